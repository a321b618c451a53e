from __future__ import annotations

import numpy as np
import pytest

from facetrt.kernels import InputError, assign, diverse_clusters, kmeans
from facetrt.kernels.kmeans import kmeans_reference


def rows(count: int, channels: int = 8, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (40, 3), (30, 14), (25, 25), (600, 2), (17, 16)])
def test_equals_the_definition(count: int, clusters: int) -> None:
    samples = rows(count)
    got, expected = kmeans(samples, clusters), kmeans_reference(samples, clusters, iterations=60)
    np.testing.assert_allclose(got.objective, expected.objective, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.centroids, expected.centroids, atol=1e-5)


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


def test_assign_checks_widths() -> None:
    with pytest.raises(InputError, match="do not fit"):
        assign(np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float32))
