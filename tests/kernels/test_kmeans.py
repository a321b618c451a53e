from __future__ import annotations

import sys
from collections.abc import Iterator

import faiss
import numpy as np
import pytest

from facetrt.kernels import InputError, assign, diverse_clusters, kmeans
from facetrt.kernels.kmeans import assign_each, kmeans_each, kmeans_reference
from facetrt.kernels.products import TIE


def rows(count: int, channels: int = 8, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (40, 3), (30, 14), (25, 25), (600, 2), (17, 16)])
def test_equals_the_definition(count: int, clusters: int) -> None:
    samples = rows(count)
    got, expected = kmeans(samples, clusters), kmeans_reference(samples, clusters, iterations=60)
    np.testing.assert_allclose(got.objective, expected.objective, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.centroids, expected.centroids, atol=1e-5)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """FAISS on one thread: on several, its distances may differ in the last bit."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def faiss_kmeans(samples: np.ndarray, clusters: int, restarts: int) -> tuple[np.ndarray, float]:
    """FAISS itself, all 300 rounds of all restarts."""
    trainer = faiss.Kmeans(samples.shape[1], clusters, niter=300, nredo=restarts, min_points_per_centroid=1)
    if hasattr(trainer.cp, "early_stop_threshold"):
        trainer.cp.early_stop_threshold = -1
    objective = float(trainer.train(samples))
    return trainer.centroids, objective


def same_as_faiss(samples: np.ndarray, clusters: int) -> None:
    """FAISS's first restart whose objective ties with the best of ten."""
    limit = faiss_kmeans(samples, clusters, 10)[1] + TIE * float(np.square(samples, dtype=np.float64).sum())
    tried = (faiss_kmeans(samples, clusters, restarts) for restarts in range(1, 11))
    centroids, objective = next(found for found in tried if found[1] <= limit)
    got = kmeans(samples, clusters)
    np.testing.assert_array_equal(got.centroids, centroids)
    assert got.objective == objective


@pytest.mark.parametrize(
    ("count", "channels", "clusters"),
    [
        (1, 8, 1),
        (40, 7, 3),
        (30, 8, 14),
        (25, 8, 25),
        (17, 1, 16),
        (300, 3, 1),  # more than 256 rows per cluster: subsampled
        (600, 8, 2),
        (1500, 33, 5),
        (620, 384, 9),
        (371, 401, 4),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_equals_faiss_bit_for_bit(count: int, channels: int, clusters: int) -> None:
    same_as_faiss(rows(count, channels), clusters)


@pytest.mark.parametrize("clusters", [2, 4, 5, 9])
@pytest.mark.usefixtures("one_thread")
def test_equals_faiss_where_duplicates_empty_clusters(clusters: int) -> None:
    same_as_faiss(np.repeat(rows(4), 10, axis=0)[np.random.default_rng(1).permutation(40)], clusters)


@pytest.mark.parametrize("clusters", [3, 4, 5])
@pytest.mark.usefixtures("one_thread")
def test_an_objective_that_stands_still_does_not_end_the_rounds(clusters: int) -> None:
    random = np.random.default_rng(0)
    far = np.array([[1e4, 1e3], [1e4, -1e3]])  # so large that moves of the others vanish in the float32 sum
    samples = np.concatenate([far[1:], 0.1 * random.standard_normal((60, 2)), far[:1]]).astype(np.float32)
    same_as_faiss(samples, clusters)


@pytest.mark.usefixtures("one_thread")
def test_versions_of_faiss_that_run_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = faiss.ClusteringParameters

    def without_early_stop() -> faiss.ClusteringParameters:
        made = parameters()
        made.early_stop_threshold = -1
        return made

    expected = kmeans(rows(200), 6)
    monkeypatch.setattr(faiss, "ClusteringParameters", without_early_stop)
    np.testing.assert_array_equal(kmeans(rows(200), 6).centroids, expected.centroids)


def test_rounds_end_once_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[kmeans.__module__]  # the package's attribute of this name is the function
    run, counts = module._rounds, []

    def count_rounds(*arguments: object) -> tuple[np.ndarray, list[float]]:
        centroids, objectives = run(*arguments)
        counts.append(len(objectives))
        return centroids, objectives

    monkeypatch.setattr(module, "_rounds", count_rounds)
    kmeans(rows(100), 3)
    assert 20 <= sum(counts) < 1000


def test_several_numbers_of_clusters_at_once() -> None:
    samples = rows(90)
    for found, clusters in zip(kmeans_each(samples, [5, 1, 90]), [5, 1, 90], strict=True):
        np.testing.assert_array_equal(found.centroids, kmeans(samples, clusters).centroids)


def test_duplicates_leave_no_empty_cluster_behind() -> None:
    samples = np.repeat(rows(3), 10, axis=0)
    got = kmeans(samples, 5)
    assert np.isfinite(got.centroids).all()
    np.testing.assert_allclose(got.objective, 0, atol=1e-4)


def test_repeated_runs_are_equal() -> None:
    samples = rows(200)
    np.testing.assert_array_equal(kmeans(samples, 5).centroids, kmeans(samples, 5).centroids)


@pytest.mark.parametrize("count", [0, 1, 1000, 70_000])
def test_assign(count: int) -> None:
    samples, centroids = rows(max(count, 1), 3)[:count], rows(4, 3, seed=1)
    got = assign(samples, centroids)
    distances = ((samples[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    np.testing.assert_array_equal(got.labels, distances.argmin(axis=1))
    np.testing.assert_allclose(got.squared_distances, distances.min(axis=1), atol=1e-5)


@pytest.mark.parametrize("channels", [3, 64, 384])
def test_the_other_sets_change_no_bit_of_an_assignment(channels: int) -> None:
    samples, sets = rows(150, channels), [rows(k, channels, seed=k) for k in (4, 1, 7, 14)]
    for got, centroids in zip(assign_each(samples, sets), sets, strict=True):
        expected = assign(samples, centroids)
        assert got.labels.tobytes() == expected.labels.tobytes()
        assert got.squared_distances.tobytes() == expected.squared_distances.tobytes()


@pytest.mark.parametrize("channels", [64, 768, 1000])
def test_the_first_of_equal_centroids_is_the_nearest(channels: int) -> None:
    """Equal rows have products that differ in the last bits, by where they stand in the product."""
    samples, centroids = 30 * rows(150, channels), np.repeat(30 * rows(1, channels, seed=1), 14, axis=0)
    assert not assign(samples, centroids).labels.any()


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (10, 10), (37, 5), (300, 10)])
def test_diverse_clusters_separate_blobs_and_number_them_stably(count: int, clusters: int) -> None:
    samples = rows(count, 100, seed=3)
    got = diverse_clusters(samples, clusters)
    assert got.shape == (count,) and set(got) == set(range(clusters))
    np.testing.assert_array_equal(got, diverse_clusters(samples, clusters))


def test_diverse_clusters_equal_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is the oracle here")
    for count, clusters in [(30, 4), (120, 10), (12, 12)]:
        samples = rows(count, 64, seed=count)
        oracle = cluster.KMeans(clusters, n_init=10, random_state=0, algorithm="elkan").fit(samples)
        np.testing.assert_array_equal(diverse_clusters(samples, clusters), oracle.labels_)


def test_diverse_clusters_keep_equal_rows_together() -> None:
    samples = rows(6, 1000)[np.random.default_rng(0).integers(6, size=90)]
    got, numbers = diverse_clusters(samples, 6), np.unique(samples, axis=0, return_inverse=True)[1]
    assert [len(set(got[numbers == number])) for number in range(6)] == [1] * 6 and len(set(got)) == 6


def test_diverse_clusters_with_duplicate_rows() -> None:
    got = diverse_clusters(np.repeat(rows(2), 5, axis=0), 4)
    assert got.shape == (10,) and got.max() < 4


@pytest.mark.parametrize(
    ("samples", "clusters", "message"),
    [
        (rows(3), 4, "4 clusters were asked of 3 descriptors"),
        (rows(3), 0, "0 clusters"),
        (np.zeros(3, np.float32), 1, r"shape \(3,\)"),
        (np.full((3, 2), np.nan, np.float32), 1, "NaN"),
    ],
)
def test_bad_input(samples: np.ndarray, clusters: int, message: str) -> None:
    for function in (kmeans, diverse_clusters):
        with pytest.raises(InputError, match=message):
            function(samples, clusters)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"restarts": 0}])
def test_counts_that_do_nothing(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected at least 1"):
        kmeans(rows(5), 2, **options)


def test_assign_checks_widths() -> None:
    with pytest.raises(InputError, match="do not fit"):
        assign(np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float32))
