"""Points followed on a device against those on the host; kernels in the interpreter, features from the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import Engine, InputError
from facetrt.engine.device.tracking import DeviceComparer
from facetrt.engine.device.transfer import to_device
from facetrt.engine.features.features import Features
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.video.tracking import Tracker, Tracks, grid_points
from facetrt.kernels.device import Device

FACET = "key@1"
POINTS = np.array([[14.0, 18.0], [25.0, 22.5], [30.2, 33.0]])


@pytest.fixture(scope="module")
def clip(tiny_engine: Engine) -> list[Features]:
    """A photograph that moves by two pixels from frame to frame; half of the third frame is another."""
    wide = photo(44, 64)
    frames = [np.ascontiguousarray(wide[:, 2 * i : 2 * i + 44]) for i in range(4)]
    frames[2][:, 24:] = photo(44, 20, seed=9)
    return tiny_engine.encode(frames, load_size=None)


def on_device(features: Features, device: Device, facet: str = FACET) -> DeviceFeatures:
    return to_device(device, features, [facet])


def tracker(device: Device, **options: Any) -> Tracker:
    @contextmanager
    def stream() -> Iterator[Device]:
        yield device

    return Tracker(FACET, on_device=partial(DeviceComparer, stream), **options)


def assert_alike(found: Tracks, expected: Tracks) -> None:
    np.testing.assert_array_equal(found.visible, expected.visible)
    np.testing.assert_allclose(found.points_xy, expected.points_xy, atol=0.05)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-3)


def test_points_are_the_hosts(clip: list[Features], tiny_engine: Engine, device: Device) -> None:
    """Followed, lost, found again, and in a frame of another size."""
    host, ours = Tracker(FACET, search_radius=2), tracker(device, search_radius=2)
    assert_alike(ours.start(on_device(clip[0], device), POINTS), host.start(clip[0], POINTS))
    large = tiny_engine.encode([photo(44, 64)], load_size=None)
    visible = []
    for frame in [*clip[1:], *large]:
        expected = host.step(frame)
        assert_alike(ours.step(on_device(frame, device)), expected)
        visible.append(expected.visible.tolist())
    assert visible[:3] == [[True, True, True], [True, True, False], [True, False, True]]


def test_arrays_go_up_once_and_come_down_once(
    clip: list[Features], device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, frames = tracker(device, search_radius=2), [on_device(features, device) for features in clip[:2]]
    ours.start(frames[0], POINTS)
    down, up, real_down, real_up = [], [], device.download, device.upload
    monkeypatch.setattr(device, "download", lambda array: down.append(array.size) or real_down(array))
    monkeypatch.setattr(device, "upload", lambda array: up.append(array.shape) or real_up(array))
    first = ours.step(frames[1])
    assert down == [2 + 9 * len(POINTS)]  # flags, positions, shapes, similarity, the way back
    assert len(up) == 2  # with the keyframe's points, once
    again = ours.step(frames[1])
    assert len(down) == 2 and len(up) == 3
    for name in ("points_xy", "visible", "confidence"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))


def test_a_device_chooses_the_hosts_points(clip: list[Features], device: Device) -> None:
    found = tracker(device).following(3)(on_device(clip[0], device))
    np.testing.assert_array_equal(found.points_xy, grid_points(clip[0], 3, FACET))


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_frames_that_do_not_fit(clip: list[Features], device: Device) -> None:
    ours, frame = tracker(device, search_radius=2), on_device(clip[0], device)
    with pytest.raises(InputError, match=r"take the tracker from Engine\.tracker"):
        Tracker(FACET).start(frame, POINTS)
    ours.start(frame, POINTS[:1])
    with pytest.raises(InputError, match="lie on the host and on a device"):
        ours.step(clip[1])
    with pytest.raises(InputError, match="on the device, and key@1 was asked for: encode it with facets="):
        ours.step(on_device(clip[1], device, "key@2"))
    before = ours.step(on_device(clip[1], device))
    broken = on_device(replace(clip[2], tokens={FACET: np.full_like(clip[2].tokens[FACET], np.nan)}), device)
    with pytest.raises(InputError, match="NaN or infinite"):
        ours.step(broken)
    np.testing.assert_array_equal(ours.step(on_device(clip[1], device)).points_xy, before.points_xy)
    with pytest.raises(InputError, match="NaN or infinite"):
        ours.start(broken, POINTS)
