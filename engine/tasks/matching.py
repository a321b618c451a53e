"""Point correspondences between two images. Source: Amir et al., section 4.2.

The steps, each reachable on its own: :func:`facetrt.kernels.best_buddies`, :func:`keep_salient`, :func:`pick_diverse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Features
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.checks import check_finite
from facetrt.kernels.best_buddies import BestBuddies, best_buddies
from facetrt.kernels.errors import InputError
from facetrt.kernels.kmeans import diverse_clusters
from facetrt.kernels.log_bin import check_hierarchy, log_bin

AWAY = 3  # cells: the surroundings of a best buddy, just beyond the patch it sees
NEAR = 4  # cells that the surroundings' neighbours may be off: what a turn and a third of scale make
MAX_PAIRS = 10_000  # clusters, whose number the time of choosing pairs grows with

Cells = NDArray[np.int64]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Matches:
    """Corresponding points of two images.

    ``cells_a``, ``cells_b (n,)`` int64, ``similarity (n,)`` float32 and ``clusters (n,)`` describe all best buddies
    kept; ``selected (K,)`` indexes the diverse pairs among them, in cluster order. With no best buddies all are empty.

    Attributes:
        agreement: ``(n,)`` float32, of the eight cells 3 cells away from A's one (those in the grid), the share whose
            nearest neighbour in B lies within 4 cells of B's one. 1 where the surroundings match as well.
        confidence: the best buddies kept, each counted by its :attr:`agreement`, divided by the salient cells of the
            image that has fewer. In [0, 1]: 0.7 and more for two views of a thing, below 0.3 for pictures of noise or
            of unlike things.
        why_empty: why there is nothing to match (which image is featureless or too small), or None.
    """

    cells_a: Cells
    cells_b: Cells
    similarity: Float
    clusters: Cells
    selected: Cells
    geometry_a: Geometry
    geometry_b: Geometry
    facet: str
    agreement: Float
    confidence: float
    why_empty: str | None = None

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
        if not 1 <= self.num_pairs <= MAX_PAIRS:
            raise InputError(f"num_pairs={self.num_pairs}: expected 1 to {MAX_PAIRS:,}")
        check_finite("saliency_threshold", self.saliency_threshold)
        check_hierarchy(self.hierarchy)


def match_features(a: Features, b: Features, options: MatchOptions) -> Matches:
    """Up to ``num_pairs`` diverse corresponding points between two encoded images; see ``Engine.match``."""
    facet, hierarchy = options.facet, options.hierarchy
    map_a, map_b = a.map(facet), b.map(facet)
    if (why := nothing_to_match(a, b)) is not None:
        return no_matches(a.geometry, b.geometry, facet, why)
    buddies = best_buddies(map_a, map_b, hierarchy)
    saliency_a, saliency_b = a.saliency.ravel(), b.saliency.ravel()
    cells_a = keep_salient(buddies, saliency_a, saliency_b, options.saliency_threshold)
    cells_b = buddies.nn_ab[cells_a]
    joined = np.concatenate(
        [log_bin(map_a, hierarchy, cells=cells_a), log_bin(map_b, hierarchy, cells=cells_b)], axis=1
    )
    clusters, selected = pick_diverse(joined, saliency_a[cells_a] + saliency_b[cells_b], options.num_pairs)
    agreement = agreement_of(cells_a, buddies.nn_ab, a.grid, b.grid)
    salient = min(int((values > options.saliency_threshold).sum()) for values in (saliency_a, saliency_b))
    return Matches(
        cells_a,
        cells_b,
        buddies.sim_ab[cells_a],
        clusters,
        selected,
        a.geometry,
        b.geometry,
        facet,
        agreement,
        confidence_of(agreement, salient),
    )


def nothing_to_match(a: Features, b: Features) -> str | None:
    """Why two images cannot be matched, or None."""
    reasons = [f"{item.name} {item.why_empty}" for item in (a, b) if item.why_empty is not None]
    return " and ".join(reasons) or None


def no_matches(geometry_a: Geometry, geometry_b: Geometry, facet: str, why: str) -> Matches:
    """The result where there is nothing to match."""
    cells, none = np.empty(0, np.int64), np.empty(0, np.float32)
    return Matches(cells, cells, none, cells, cells, geometry_a, geometry_b, facet, none, 0.0, why)


def agreement_of(cells_a: Cells, nn_ab: Cells, grid_a: tuple[int, int], grid_b: tuple[int, int]) -> Float:
    """``Matches.agreement`` of best buddies, ``(n,)``, from the nearest neighbours ``nn_ab (cells of A,)``."""
    nearest = np.stack(np.divmod(nn_ab, grid_b[1]), axis=-1).reshape(*grid_a, 2)  # row and column in B
    rows, columns = np.divmod(cells_a, grid_a[1])
    own = nearest[rows, columns]
    near, inside = np.zeros(len(cells_a)), np.zeros(len(cells_a))
    for dy, dx in product((-AWAY, 0, AWAY), repeat=2):
        y, x = rows + dy, columns + dx
        there = (y >= 0) & (y < grid_a[0]) & (x >= 0) & (x < grid_a[1]) & ((dy, dx) != (0, 0))
        found = nearest[np.clip(y, 0, grid_a[0] - 1), np.clip(x, 0, grid_a[1] - 1)]
        near += there & (np.abs(found - own).max(axis=-1) <= NEAR)
        inside += there
    return np.asarray(near / np.maximum(inside, 1), np.float32)


def confidence_of(agreement: Float, salient: int) -> float:
    """``Matches.confidence`` where the image that has fewer has ``salient`` cells."""
    return min(float(agreement.sum(dtype=np.float64)) / max(salient, 1), 1.0)


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
