"""Label propagation on a device against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.kernels.device.propagate import LABELS, SLOTS, TILE, propagate
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.errors import InputError
from facetrt.kernels.propagate import propagate as propagate_host
from facetrt.kernels.propagate import propagate_reference

Float = NDArray[np.float32]


def case(
    grid: tuple[int, int] = (4, 5), frames: int = 3, channels: int = 16, labels: int = 3, seed: int = 0
) -> tuple[Float, Float, Float]:
    random = np.random.default_rng(seed)
    features = random.standard_normal((frames + 1, *grid, channels)).astype(np.float32)
    return features[-1], features[:-1], random.random((frames, *grid, labels)).astype(np.float32)


def on_device(device: TritonDevice, target: Any, context: Any, labels: Any, **options: Any) -> Float:
    found = propagate(device, *(device.upload(values) for values in (target, context, labels)), **options)
    device.check_canaries(found)
    return device.download(found)


@pytest.mark.parametrize(
    ("grid", "frames", "channels", "radius", "topk"),
    [
        ((1, 1), 1, 16, 0, 5),
        ((1, 7), 2, 16, 2, 5),
        ((4, 5), 3, 16, 0, 5),
        ((4, 5), 3, 16, 2, 1),
        ((4, 5), 1, 16, 40, SLOTS),
        ((TILE, TILE), 2, 32, 3, 5),
        ((TILE + 3, TILE - 1), 2, 48, 2, 4),
        ((5, 2 * TILE + 1), 1, 80, 12, 7),
    ],
)
def test_equals_the_definition(
    device: TritonDevice, grid: tuple[int, int], frames: int, channels: int, radius: int, topk: int
) -> None:
    target, context, labels = case(grid, frames, channels)
    found = on_device(device, target, context, labels, radius=radius, topk=topk)
    expected = propagate_reference(target, context, labels, radius=radius, topk=topk)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        found, propagate_host(target, context, labels, radius=radius, topk=topk), rtol=1e-5, atol=1e-6
    )


def test_half_precision_is_summed_in_single(device: TritonDevice) -> None:
    target, context, labels = case(channels=48)
    target, context = (target * 4).astype(np.float16), (context * 4).astype(np.float16)
    found = on_device(device, target, context, labels, radius=2)
    np.testing.assert_allclose(found, propagate_reference(target, context, labels, radius=2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [1, LABELS, LABELS + 3])
def test_any_number_of_labels(device: TritonDevice, labels: int) -> None:
    target, context, soft = case(labels=labels)
    found = on_device(device, target, context, soft, radius=2, temperature=0.3)
    expected = propagate_reference(target, context, soft, radius=2, temperature=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_all_ties_are_kept(device: TritonDevice) -> None:
    """A still video: all 60 cosines are equal, and all count, whatever topk is."""
    frame = np.ones((4, 5, 16), np.float32)
    labels = case()[2]
    found = on_device(device, frame, np.stack([frame] * 3), labels, radius=9, topk=1)
    np.testing.assert_allclose(found, np.broadcast_to(labels.mean((0, 1, 2)), found.shape), rtol=1e-6)


def test_copies_of_a_frame_tie_at_the_smallest_kept_cosine(device: TritonDevice) -> None:
    target, context, labels = case()
    copies = np.stack([context[0]] * 4)
    soft = np.concatenate([labels, labels[:1] * 0.5])
    found = on_device(device, target, copies, soft, radius=2, topk=2)  # keeps the four copies of the best cell
    np.testing.assert_allclose(found, on_device(device, target, copies, soft, radius=2, topk=4), rtol=0, atol=0)
    mean = on_device(device, target, context[:1], soft.mean(0, keepdims=True), radius=2, topk=1)
    np.testing.assert_allclose(found, mean, rtol=1e-6)


def test_descriptors_of_length_zero_are_orthogonal_to_all(device: TritonDevice) -> None:
    target, context, labels = case()
    target[1, 2] = 0
    found = on_device(device, target, context, labels, radius=1)
    near = labels[:, 0:3, 1:4].mean((0, 1, 2))
    np.testing.assert_allclose(found[1, 2], near, rtol=1e-5)


def test_a_match_beyond_the_radius_is_not_seen(device: TritonDevice) -> None:
    frame = np.zeros((1, 9, 16), np.float32)
    frame[..., 0] = 1
    frame[0, 8] = np.eye(16)[1]
    target = np.broadcast_to(np.eye(16, dtype=np.float32)[1], (1, 9, 16))
    labels = np.zeros((1, 1, 9, 1), np.float32)
    labels[0, 0, 8] = 1
    reached = on_device(device, target, frame[None], labels, radius=2, topk=1)[0, :, 0]
    np.testing.assert_array_equal(reached > 0.5, [False] * 6 + [True] * 3)


def test_low_temperatures_and_opposite_descriptors_do_not_overflow(device: TritonDevice) -> None:
    target, context, labels = case(frames=1)
    found = on_device(device, target, -np.abs(context) * np.sign(target), labels, radius=0, temperature=1e-3)
    np.testing.assert_allclose(found, labels[0], rtol=1e-6)


def test_repeated_runs_give_the_same_bytes(device: TritonDevice) -> None:
    arrays = case((9, 11), 2)
    first, second = (on_device(device, *arrays, radius=3) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_bad_input_is_named(device: TritonDevice) -> None:
    target, context, labels = (device.upload(values) for values in case())
    for options in ({"radius": -1}, {"topk": 0}, {"topk": SLOTS + 1}, {"temperature": 0.0}):
        with pytest.raises(InputError, match=f"topk of 1 to {SLOTS} and a positive temperature"):
            propagate(device, target, context, labels, **options)
    with pytest.raises(InputError, match=r"\(4, 5, 8\): expected .* C a multiple of 16"):
        propagate(device, device.upload(np.zeros((4, 5, 8), np.float32)), context, labels)
    with pytest.raises(InputError, match=r"context features are float16 .* float32 like the features"):
        propagate(device, target, device.upload(case()[1].astype(np.float16)), labels)
    with pytest.raises(InputError, match=r"context labels .*expected \(3, 4, 5, 'labels'\) float32"):
        propagate(device, target, context, device.upload(np.zeros((2, 4, 5, 3), np.float32)))
