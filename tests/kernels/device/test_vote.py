"""Saliency voting on a device against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from facetrt.kernels import InputError
from facetrt.kernels.device import vote
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.vote import vote_reference


def cast(device: TritonDevice, labels: list, saliencies: list, clusters: int, **options: float) -> vote.DeviceVotes:
    offsets = np.cumsum([0, *(len(found) for found in labels)]).tolist()
    together = device.upload(np.concatenate(labels).astype(np.uint8)), device.upload(np.concatenate(saliencies))
    return vote.vote(device, *together, offsets, clusters, **options)


@pytest.mark.parametrize(
    ("sizes", "clusters", "percentage"),
    [
        ((1,), 6, 75),
        ((5, 7, 3), 6, 0),
        ((5, 7, 3), 6, 50),
        ((5, 7, 3), 6, 100),
        ((2100, 12), 6, 75),
        ((2,) * 131, 1, 20),
    ],
)
def test_equals_the_definition(device: TritonDevice, sizes: tuple[int, ...], clusters: int, percentage: float) -> None:
    random = np.random.default_rng(sum(sizes))
    labels = [random.integers(0, min(clusters, 4), size) for size in sizes]
    saliencies = [random.random(size, np.float32) ** 4 for size in sizes]
    found = cast(device, labels, saliencies, clusters, threshold=0.2, percentage=percentage)
    expected = vote_reference(labels, saliencies, clusters, threshold=0.2, percentage=percentage)
    np.testing.assert_allclose(device.download(found.mean_saliency), expected.mean_saliency, rtol=1e-12)
    np.testing.assert_array_equal(device.download(found.counts), expected.counts)
    np.testing.assert_array_equal(np.flatnonzero(device.download(found.salient)), expected.salient_labels)
    assert found.needed == expected.needed
    device.check_canaries(found.mean_saliency, found.counts, found.salient)


def test_the_threshold_is_strict_and_absent_clusters_do_not_vote(device: TritonDevice) -> None:
    saliencies = [np.array([0.5, 0.75], np.float32), np.array([0.75, 0.25], np.float32)]
    found = cast(device, [np.array([0, 1]), np.array([0, 0])], saliencies, 3, threshold=0.5, percentage=50)
    np.testing.assert_array_equal(device.download(found.counts), [0, 1, 0])
    np.testing.assert_array_equal(device.download(found.salient), [0, 1, 0])
    assert np.isnan(device.download(found.mean_saliency)[1, 1])


def test_the_threshold_is_not_rounded_to_float32(device: TritonDevice) -> None:
    mean = np.float32(0.3)  # above 0.3 in float64
    found = cast(device, [np.array([0])], [np.array([mean])], 1, threshold=0.3)
    np.testing.assert_array_equal(device.download(found.counts), [1])


def test_repeated_votes_and_votes_of_a_part_of_the_images_are_equal(device: TritonDevice) -> None:
    random = np.random.default_rng(0)
    labels = [random.integers(0, 3, 1500) for _ in range(3)]
    saliencies = [random.random(1500, np.float32) for _ in range(3)]
    first, again = (device.download(cast(device, labels, saliencies, 3).mean_saliency) for _ in range(2))
    alone = device.download(cast(device, labels[1:2], saliencies[1:2], 3).mean_saliency)
    assert first.tobytes() == again.tobytes() and first[1].tobytes() == alone.tobytes()


@pytest.mark.parametrize("size", [1, 1025, 70_001])
def test_salient_cells(device: TritonDevice, size: int) -> None:
    labels = np.random.default_rng(size).integers(0, 5, size).astype(np.uint8)
    salient = np.array([0, 1, 0, 0, 1], np.uint8)
    found = vote.salient_cells(device, device.upload(labels), device.upload(salient))
    np.testing.assert_array_equal(device.download(found), np.isin(labels, [1, 4]))
    device.check_canaries(found)


@pytest.mark.parametrize(
    ("offsets", "options", "message"),
    [
        ([0], {}, "offsets"),
        ([0, 2], {}, "to 3"),
        ([0, 2, 1, 3], {}, "rising"),
        ([0, 3], {"percentage": 101}, "101"),
        ([0, 3], {"num_clusters": 0}, "0 clusters"),
    ],
)
def test_bad_input(device: TritonDevice, offsets: list[int], options: dict, message: str) -> None:
    arrays = device.zeros((3,), np.uint8), device.zeros((3,), np.float32)
    with pytest.raises(InputError, match=message):
        vote.vote(device, *arrays, offsets, **{"num_clusters": 2, **options})


def test_sizes_that_differ(device: TritonDevice) -> None:
    with pytest.raises(InputError, match="differ in size"):
        vote.vote(device, device.zeros((3,), np.uint8), device.zeros((4,), np.float32), [0, 3], 2)
