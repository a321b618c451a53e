"""Clusters of a few coordinates."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans

from facetrt.kernels.errors import InputError
from facetrt.kernels.partition import partition


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (7, 7), (97, 5), (300, 5)])
def test_clusters_are_as_tight_as_those_of_scikit_learn(count: int, clusters: int) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(5, 3))[random.integers(0, 5, count)] + 0.2 * random.normal(size=(count, 3))
    labels, spread = partition(rows, clusters)
    expected = KMeans(clusters, n_init=10, random_state=0).fit(rows).inertia_
    assert spread <= expected * (1 + 1e-6) + 1e-12
    means = np.stack([rows[labels == label].mean(axis=0) for label in range(clusters)])
    assert np.square(rows - means[labels]).sum() == pytest.approx(spread, abs=1e-9)


def test_equal_rows_make_clusters_all_the_same() -> None:
    labels, spread = partition(np.ones((5, 2)), 3)
    assert spread == 0 and labels.shape == (5,)


@pytest.mark.parametrize("clusters", [0, 4])
def test_more_clusters_than_rows_are_refused(clusters: int) -> None:
    with pytest.raises(InputError, match="of 3 rows"):
        partition(np.ones((3, 2)), clusters)
