"""Masks followed on a device against those on the host; kernels in the interpreter, features from the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers import photo
from numpy.typing import NDArray

from facetrt.engine import Engine, InputError
from facetrt.engine.device.propagation import DeviceMemory
from facetrt.engine.device.transfer import to_device
from facetrt.engine.features.features import Features
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.video.propagation import MaskPropagator
from facetrt.kernels.device import Device

FACET = "key@1"
OPTIONS = {"queue": 2, "radius": 2, "topk": 3}


@pytest.fixture
def clip(tiny_engine: Engine) -> list[Features]:
    """A photograph that moves by two pixels from frame to frame; more frames than the queue holds."""
    wide = photo(24, 40)
    return tiny_engine.encode([np.ascontiguousarray(wide[:, 2 * i : 2 * i + 28]) for i in range(5)], load_size=None)


@pytest.fixture
def mask() -> NDArray[np.int64]:
    labels = np.zeros((24, 28), np.int64)
    labels[6:16, 8:18], labels[18:23, 2:8] = 3, 7
    return labels


def on_device(features: Features, device: Device, facet: str = FACET) -> DeviceFeatures:
    return to_device(device, features, [facet])


def propagator(device: Device) -> MaskPropagator:
    @contextmanager
    def stream() -> Iterator[Device]:
        yield device

    return MaskPropagator(FACET, **OPTIONS, on_device=partial(DeviceMemory, stream))


def test_labels_are_the_hosts(clip: list[Features], mask: NDArray[np.int64], device: Device) -> None:
    host, ours = MaskPropagator(FACET, **OPTIONS), propagator(device)
    host.start(clip[0], mask)
    ours.start(on_device(clip[0], device), mask)
    assert ours.objects == host.objects == [3, 7]
    for features in clip[1:]:
        expected, found = host.step(features), ours.step(on_device(features, device))
        assert (expected == found).mean() > 0.99 and set(np.unique(found)) == set(np.unique(expected))
    ours.start(on_device(clip[1], device), mask)  # anew
    host.start(clip[1], mask)
    assert (ours.step(on_device(clip[2], device)) == host.step(clip[2])).mean() > 0.99


def test_only_soft_labels_come_down(
    clip: list[Features], mask: NDArray[np.int64], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, frames = propagator(device), [on_device(features, device) for features in clip[:3]]
    ours.start(frames[0], mask)
    down, real = [], device.download
    monkeypatch.setattr(device, "download", lambda array: down.append(array.shape) or real(array))
    for frame in frames[1:]:
        ours.step(frame)
    assert down == [(*clip[0].grid, 3)] * 2


def test_frames_that_do_not_fit(clip: list[Features], mask: NDArray[np.int64], device: Device) -> None:
    ours, frame = propagator(device), on_device(clip[0], device)
    with pytest.raises(InputError, match=r"take the propagator from Engine\.propagator"):
        MaskPropagator(FACET).start(frame, mask)
    ours.start(frame, mask)
    with pytest.raises(InputError, match="lie on the host and on a device"):
        ours.step(clip[1])
    with pytest.raises(InputError, match="on the device, and key@1 was asked for: encode it with facets="):
        ours.step(on_device(clip[1], device, "key@2"))
    broken = replace(clip[1], tokens={FACET: np.full_like(clip[1].tokens[FACET], np.nan)})
    before = ours.step(on_device(clip[1], device))
    ours.start(frame, mask)
    with pytest.raises(InputError, match="NaN or infinite"):
        ours.step(on_device(broken, device))
    np.testing.assert_array_equal(ours.step(on_device(clip[1], device)), before)  # nothing of it is left
