"""k-means on a device against FAISS and against what the engine computes on a CPU.

The interpreter is slow, so there are few rows, rounds and restarts.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from facetrt.kernels import InputError, assign
from facetrt.kernels import diverse_clusters as diverse_clusters_on_cpu
from facetrt.kernels.device import kmeans
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.kmeans import SEED, _faiss_permutation, permutation
from facetrt.kernels.kmeans import kmeans_each as kmeans_each_on_cpu


def rows(count: int, channels: int = 16, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def run(device: TritonDevice, samples: np.ndarray, counts: list[int], **options: int) -> list[tuple[np.ndarray, float]]:
    found = kmeans.kmeans_each(device, device.upload(samples), counts, **options)
    return [(device.download(one.centroids), float(device.download(one.objective)[0])) for one in found]


def same_as_faiss(device: TritonDevice, samples: np.ndarray, counts: list[int], **options: int) -> None:
    expected = kmeans_each_on_cpu(samples, counts, **options)
    for (centroids, objective), on_cpu in zip(run(device, samples, counts, **options), expected, strict=True):
        np.testing.assert_allclose(centroids, on_cpu.centroids, atol=1e-6)
        np.testing.assert_allclose(objective, on_cpu.objective, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "channels", "counts", "iterations"),
    [
        (1, 16, [1], 1),
        (61, 16, [1, 2, 4], 12),
        (53, 80, [3], 3),
        (70, 32, [17, 2, 17], 2),  # more than 16 clusters have programs of their own
        (12, 16, [12, 3], 3),  # as many rows as clusters
        (300, 16, [1, 2], 2),  # more than 256 rows per cluster: subsampled for the first count
    ],
)
def test_equals_faiss(device: TritonDevice, count: int, channels: int, counts: list[int], iterations: int) -> None:
    same_as_faiss(device, rows(count, channels), counts, iterations=iterations, restarts=2)


@pytest.mark.parametrize("clusters", [5, 9])
def test_empty_clusters_are_split_off_large_ones_as_by_faiss(device: TritonDevice, clusters: int) -> None:
    samples = np.repeat(rows(4), 10, axis=0)[np.random.default_rng(1).permutation(40)]
    same_as_faiss(device, samples, [clusters], iterations=1, restarts=1)
    centroids, objective = run(device, samples, [clusters], iterations=4, restarts=1)[0]
    assert len(np.unique(centroids, axis=0)) == clusters and objective < 1e-3


def test_one_count_does_not_depend_on_the_others(device: TritonDevice) -> None:
    samples = rows(290)
    together, alone = (run(device, samples, counts, iterations=2, restarts=1) for counts in ([3, 1, 2], [2]))
    assert together[2][0].tobytes() == alone[0][0].tobytes() and together[2][1] == alone[0][1]


def test_runs_end_where_their_centroids_stand_still(device: TritonDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, marks = device.launch, []

    def record(program: Any, grid: tuple[int, ...], *arguments: Any) -> None:
        if program in kmeans.UPDATE.values():
            marks.append(device.download(arguments[6])[:, 0])
        launch(program, grid, *arguments)

    monkeypatch.setattr(device, "launch", record)
    samples = np.concatenate([rows(5) + 9, rows(7) - 9])
    run(device, samples, [1, 2, 12], iterations=6, restarts=1)
    np.testing.assert_array_equal(marks[0], [1, 1, 0])  # the last has as many clusters as rows
    np.testing.assert_array_equal(marks[2][0], 0)
    np.testing.assert_array_equal(marks[-1], 0)


def test_rounds_behind_the_end_change_nothing(device: TritonDevice) -> None:
    samples = rows(40)
    few, many, again = (run(device, samples, [2], iterations=count, restarts=2)[0] for count in (9, 14, 14))
    expected = kmeans_each_on_cpu(samples, [2], restarts=2)[0]
    np.testing.assert_allclose(few[0], expected.centroids, atol=1e-6)
    assert few[0].tobytes() == many[0].tobytes() == again[0].tobytes() and few[1] == many[1] == again[1]


@pytest.mark.parametrize("count", [1, 50, 300])
def test_permutations_begin_as_those_of_faiss(count: int) -> None:
    np.testing.assert_array_equal(permutation(count, SEED, count), _faiss_permutation(count, SEED))
    np.testing.assert_array_equal(permutation(count, SEED, 1), _faiss_permutation(count, SEED)[:1])


@pytest.mark.parametrize(
    ("samples", "counts", "options", "message"),
    [
        (rows(3), [1, 4], {}, "4 clusters were asked of 3 descriptors"),
        (rows(3), [0], {}, "0 clusters"),
        (rows(70), [65], {}, "at most 64"),
        (rows(3, 15), [1], {}, "multiple of 16"),
        (rows(3, 4112), [1], {}, "4112 channels"),
        (rows(3), [1], {"iterations": 0}, "expected at least 1"),
        (rows(3), [1], {"restarts": 0}, "expected at least 1"),
    ],
)
def test_bad_input(device: TritonDevice, samples: np.ndarray, counts: list[int], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kmeans.kmeans_each(device, device.upload(samples), counts, **options)


@pytest.mark.parametrize(
    ("count", "channels", "sizes"),
    [(1, 16, [1]), (67, 48, [4, 1, 7, 16, 2]), (131, 16, [3, 40]), (64, 384, [14])],
)
def test_assignment_to_several_sets(device: TritonDevice, count: int, channels: int, sizes: list[int]) -> None:
    samples, sets = rows(count, channels), [rows(size, channels, seed=size) for size in sizes]
    found = kmeans.assign_each(device, device.upload(samples), [device.upload(one) for one in sets])
    expected = [assign(samples, one) for one in sets]
    np.testing.assert_array_equal(device.download(found.labels), [one.labels for one in expected])
    sums = [one.squared_distances.sum(dtype=np.float64) for one in expected]
    np.testing.assert_allclose(device.download(found.objectives), sums, rtol=1e-6)
    device.check_canaries(found.labels, found.objectives)


def test_the_first_of_equal_centroids_is_assigned(device: TritonDevice) -> None:
    sets = [np.repeat(rows(2), 3, axis=0), np.zeros((5, 16), np.float32)]
    found = kmeans.assign_each(device, device.upload(rows(21, seed=1)), [device.upload(one) for one in sets])
    labels = device.download(found.labels)
    assert set(labels[0]) == {0, 3} and set(labels[1]) == {0}


def test_an_assignment_does_not_depend_on_the_other_sets(device: TritonDevice) -> None:
    samples, sets = device.upload(rows(70)), [device.upload(rows(size, seed=size)) for size in (3, 5, 2)]
    together, alone = kmeans.assign_each(device, samples, sets), kmeans.assign_each(device, samples, sets[1:2])
    assert device.download(together.labels)[1].tobytes() == device.download(alone.labels)[0].tobytes()
    assert device.download(together.objectives)[1] == device.download(alone.objectives)[0]


def test_assignment_of_no_rows(device: TritonDevice) -> None:
    found = kmeans.assign_each(device, device.zeros((0, 16), np.float32), [device.upload(rows(2))])
    assert found.labels.shape == (1, 0) and device.download(found.objectives) == [0]


@pytest.mark.parametrize("centroids", [np.zeros((2, 32), np.float32), np.zeros((65, 16), np.float32)])
def test_assignment_checks_shapes(device: TritonDevice, centroids: np.ndarray) -> None:
    with pytest.raises(InputError, match="do not fit"):
        kmeans.assign_each(device, device.upload(rows(3)), [device.upload(centroids)])


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ([5.0], 0),
        ([100.0, 90, 80, 79.9, 40], 3),
        ([100.0, 90, 80, 70], 3),
        ([100.0, 97.5, 95.1], 2),  # exactly the factor is not above it
        ([0.0, 0, 0], 2),
        ([10.0, 11, 12], 1),
    ],
)
def test_the_elbow_is_the_first_set_that_hardly_improves(
    device: TritonDevice, objectives: list[float], expected: int
) -> None:
    found = kmeans.elbow(device, device.upload(np.array(objectives)), 1, 0.975)
    np.testing.assert_array_equal(device.download(found), [expected])


@pytest.mark.parametrize("number", [0, 2])
def test_the_chosen_set(device: TritonDevice, number: int) -> None:
    chosen = device.upload(np.array([number], np.int32))
    labels = np.random.default_rng(0).integers(0, 9, (3, 1501)).astype(np.uint8)
    found = kmeans.select_labels(device, device.upload(labels), chosen)
    np.testing.assert_array_equal(device.download(found), labels[number])
    device.check_canaries(found)


def diverse(device: TritonDevice, samples: np.ndarray, count: int, clusters: int, restarts: int = 3) -> np.ndarray:
    """Behind the first ``count`` rows there is rubbish."""
    spoilt = np.concatenate([samples[:count], np.full_like(samples[count:], np.nan)])
    arrays = device.upload(spoilt), device.upload(np.array([count], np.int32))
    found = kmeans.diverse_clusters(device, *arrays, clusters, restarts=restarts)
    device.check_canaries(found)
    return device.download(found)


@pytest.mark.parametrize(
    ("size", "count", "channels", "clusters"),
    [
        (1, 1, 16, 1),
        (30, 30, 64, 4),
        (60, 47, 32, 10),
        (140, 133, 48, 5),
        (37, 36, 16, 19),  # more than 16 clusters
        (12, 12, 32, 12),
        (20, 5, 32, 8),  # fewer rows than clusters
        (20, 1, 32, 8),
    ],
)
def test_diverse_clusters_equal_the_cpus(
    device: TritonDevice, size: int, count: int, channels: int, clusters: int
) -> None:
    samples = rows(size, channels, seed=size)
    expected = diverse_clusters_on_cpu(samples[:count], min(clusters, count), restarts=3)
    found = diverse(device, samples, count, clusters)
    np.testing.assert_array_equal(found[:count], expected)
    assert (found[count:] == -1).all()


def test_diverse_clusters_without_rows(device: TritonDevice) -> None:
    assert (diverse(device, rows(5), 0, 3) == -1).all()
    assert diverse(device, rows(1)[:0], 0, 3).shape == (0,)


@pytest.mark.parametrize("seeds", [[3, 3, 30, 3], [5] * 17 + [1, 2, 2]])
def test_empty_diverse_clusters_take_the_farthest_rows(
    device: TritonDevice, monkeypatch: pytest.MonkeyPatch, seeds: list[int]
) -> None:
    """A seed that comes twice leaves the second one's cluster empty."""
    on_cpu = sys.modules[diverse_clusters_on_cpu.__module__]  # the package's attribute of this name is a function
    monkeypatch.setattr(on_cpu, "_greedy_seeds", lambda *_: seeds)
    monkeypatch.setattr(kmeans, "_seeds", lambda *_: device.upload(np.array(seeds, np.int32)))
    samples = rows(40, 16, seed=2)
    expected = diverse_clusters_on_cpu(samples, len(seeds), restarts=1)
    np.testing.assert_array_equal(diverse(device, samples, 40, len(seeds), restarts=1), expected)
    assert set(expected) == set(range(len(seeds)))


def test_separate_blobs_and_repeated_runs(device: TritonDevice) -> None:
    random = np.random.default_rng(0)
    owner = random.integers(0, 4, 50)
    samples = (8 * rows(4, 32, seed=9)[owner] + 0.1 * random.standard_normal((50, 32))).astype(np.float32)
    found, again = (diverse(device, samples, 50, 4) for _ in range(2))
    np.testing.assert_array_equal(found, again)
    assert len(set(zip(owner, found, strict=True))) == len(set(found)) == 4


@pytest.mark.parametrize("options", [{"num_clusters": 0}, {"restarts": 0}])
def test_diverse_counts_that_do_nothing(device: TritonDevice, options: dict) -> None:
    arrays = device.upload(rows(5)), device.upload(np.array([5], np.int32))
    with pytest.raises(InputError, match="expected at least 1"):
        kmeans.diverse_clusters(device, *arrays, **{"num_clusters": 2, **options})


def test_diverse_rows_that_do_not_fit(device: TritonDevice) -> None:
    with pytest.raises(InputError, match="shape"):
        kmeans.diverse_clusters(device, device.upload(rows(5, 15)), device.upload(np.array([5], np.int32)), 2)


@pytest.mark.parametrize(("count", "clusters", "channels"), [(1, 1, 16), (67, 17, 48), (130, 3, 80)])
def test_distances_of_unit_rows(device: TritonDevice, count: int, clusters: int, channels: int) -> None:
    random = np.random.default_rng(0)
    given = random.standard_normal((count, channels)).astype(np.float32) * random.lognormal(0, 3, (count, 1)).astype(
        np.float32
    )
    given[count // 2] = 0  # stays zero
    centroids = rows(clusters, channels, seed=1) * np.float32(0.9)
    found = device.download(kmeans.unit_distances(device, device.upload(given), device.upload(centroids)))
    exact = given.astype(np.float64)
    exact /= np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-30)
    expected = ((exact[None] - centroids[:, None].astype(np.float64)) ** 2).sum(axis=2)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_distances_to_itself_are_not_negative(device: TritonDevice) -> None:
    held = device.upload(rows(40))
    found = device.download(kmeans.unit_distances(device, held, held))
    assert found.min() >= 0 and np.diag(found).max() < 1e-6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_distances_of_what_is_not_finite_are_not(device: TritonDevice, value: float) -> None:
    given = rows(5)
    given[3, 7] = value
    found = device.download(kmeans.unit_distances(device, device.upload(given), device.upload(rows(2, seed=1))))
    assert np.isnan(found[:, 3]).all() and np.isfinite(np.delete(found, 3, axis=1)).all()


@pytest.mark.parametrize("width", [16, 20])
def test_distances_need_rows_of_one_width(device: TritonDevice, width: int) -> None:
    wide = np.zeros((4, width), np.float32)
    with pytest.raises(InputError, match="do not fit"):
        kmeans.unit_distances(device, device.upload(wide), device.upload(np.zeros((2, 32), np.float32)))
