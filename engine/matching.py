"""Point correspondences between two images. Source: Amir et al., section 4.2.

The steps, each reachable on its own: :func:`facetrt.kernels.best_buddies`, :func:`keep_salient`, :func:`pick_diverse`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.checks import check_finite
from facetrt.engine.features import Features
from facetrt.engine.geometry import Geometry
from facetrt.kernels.best_buddies import BestBuddies, best_buddies
from facetrt.kernels.errors import InputError
from facetrt.kernels.kmeans import diverse_clusters
from facetrt.kernels.log_bin import check_hierarchy, log_bin

Cells = NDArray[np.int64]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Matches:
    """Corresponding points of two images.

    ``cells_a``, ``cells_b (n,)`` int64, ``similarity (n,)`` float32 and ``clusters (n,)`` describe all best buddies
    kept; ``selected (K,)`` indexes the diverse pairs among them, in cluster order. With no best buddies all are empty.
    """

    cells_a: Cells
    cells_b: Cells
    similarity: Float
    clusters: Cells
    selected: Cells
    geometry_a: Geometry
    geometry_b: Geometry
    facet: str

    @property
    def points_a_xy(self) -> NDArray[np.float64]:
        """Selected points in original pixels of image A, ``(K, 2)`` as (x, y)."""
        return self.geometry_a.points_xy(self.cells_a[self.selected])

    @property
    def points_b_xy(self) -> NDArray[np.float64]:
        """Selected points in original pixels of image B, ``(K, 2)`` as (x, y)."""
        return self.geometry_b.points_xy(self.cells_b[self.selected])

    @property
    def loaded_points_a_xy(self) -> NDArray[np.float64]:
        """Selected points in the loaded image A; swapped to (y, x) they are what the reference prints."""
        return self.geometry_a.loaded_points_xy(self.cells_a[self.selected])

    @property
    def loaded_points_b_xy(self) -> NDArray[np.float64]:
        """Selected points in the loaded image B."""
        return self.geometry_b.loaded_points_xy(self.cells_b[self.selected])

    def __len__(self) -> int:
        return len(self.selected)


@dataclass(frozen=True)
class MatchOptions:
    """Options of matching, with the reference's defaults; ``Engine.match`` documents them."""

    facet: str
    num_pairs: int = 10
    hierarchy: int = 2
    saliency_threshold: float = 0.05

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise InputError(f"num_pairs={self.num_pairs}: expected at least 1")
        check_finite("saliency_threshold", self.saliency_threshold)
        check_hierarchy(self.hierarchy)


def match_features(a: Features, b: Features, options: MatchOptions) -> Matches:
    """Up to ``num_pairs`` diverse corresponding points between two encoded images; see ``Engine.match``."""
    facet, hierarchy = options.facet, options.hierarchy
    map_a, map_b = a.map(facet), b.map(facet)
    buddies = best_buddies(map_a, map_b, hierarchy)
    saliency_a, saliency_b = a.saliency.ravel(), b.saliency.ravel()
    cells_a = keep_salient(buddies, saliency_a, saliency_b, options.saliency_threshold)
    cells_b = buddies.nn_ab[cells_a]
    joined = np.concatenate(
        [log_bin(map_a, hierarchy, cells=cells_a), log_bin(map_b, hierarchy, cells=cells_b)], axis=1
    )
    clusters, selected = pick_diverse(joined, saliency_a[cells_a] + saliency_b[cells_b], options.num_pairs)
    return Matches(cells_a, cells_b, buddies.sim_ab[cells_a], clusters, selected, a.geometry, b.geometry, facet)


def keep_salient(buddies: BestBuddies, saliency_a: Float, saliency_b: Float, threshold: float) -> Cells:
    """Cells of A, ascending, that are a best buddy, salient, and the neighbour of some salient cell of B.

    The last condition is the reference's, and weaker than asking that the buddy itself be salient.
    """
    reached = np.zeros(buddies.nn_ab.size, np.bool_)
    reached[buddies.nn_ba[saliency_b > threshold]] = True
    return np.flatnonzero(buddies.mutual & (saliency_a > threshold) & reached)


def pick_diverse(joined: Float, rank: Float, num_pairs: int, *, restarts: int = 10) -> tuple[Cells, Cells]:
    """Cluster the pairs and take the best-ranked of each cluster.

    Args:
        joined: ``(n, D)`` both descriptors of each pair side by side, not normalised.
        rank: ``(n,)``; higher is better, first one on ties.
        restarts: of the k-means; 10 as in the reference. Its code run with scikit-learn 1.4 or later makes only one.

    Returns:
        ``clusters (n,)`` and ``selected (min(num_pairs, n),)``, in cluster order.
    """
    if len(joined) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    norms = np.linalg.norm(joined, axis=1, keepdims=True)
    count = min(num_pairs, len(joined))
    clusters = diverse_clusters(joined / np.maximum(norms, np.finfo(np.float32).tiny), count, restarts=restarts)
    best = [np.flatnonzero(clusters == k) for k in range(count)]
    return clusters, np.array([members[rank[members].argmax()] for members in best if members.size], np.int64)
