"""Point correspondences between two images. Source: Amir et al., section 4.2.

:func:`match_pair` says which step follows which, on a :class:`Pair` of images that knows how each is done where its
descriptors live. On the host the steps are reachable on their own: :func:`facetrt.kernels.best_buddies`,
:func:`keep_salient`, :func:`pick_diverse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Features, ImageRecord
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSizeChoice
from facetrt.engine.settings import BUNDLES_CHOICE, FacetChoice, Hierarchy, Setting, check
from facetrt.kernels.best_buddies import BestBuddies, best_buddies
from facetrt.kernels.kmeans import diverse_clusters
from facetrt.kernels.log_bin import log_bin

AWAY = 3  # cells: the surroundings of a best buddy, just beyond the patch it sees
NEAR = 4  # cells that the surroundings' neighbours may be off: what a turn and a third of scale make
MAX_PAIRS = 10_000  # clusters, whose number the time of choosing pairs grows with

Cells = NDArray[np.int64]
Float = NDArray[np.float32]
Array = TypeVar("Array")  # where a pair lives
Count = TypeVar("Count")  # a number there: on a device it is known only once that has been waited for


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

    facet: FacetChoice = BUNDLES_CHOICE
    num_pairs: Annotated[int, Setting("At most this many point pairs.", minimum=1, maximum=MAX_PAIRS)] = 10
    hierarchy: Hierarchy = 2
    saliency_threshold: Annotated[float, Setting("Points are cells more salient than this, of 0 to 1.")] = 0.05
    load_size: LoadSizeChoice = DEFAULT_SIZE

    def __post_init__(self) -> None:
        check(self)


class Neighbours(Protocol):
    """Nearest neighbours in both directions, as :class:`facetrt.kernels.BestBuddies` describes them."""

    @property
    def nn_ab(self) -> Any: ...
    @property
    def sim_ab(self) -> Any: ...


Buddies = TypeVar("Buddies", bound=Neighbours)


@dataclass(frozen=True)
class Kept(Generic[Array, Count]):
    """Best buddies: ``cells_a (n,)``, ascending, and ``cells_b (n,)``, of which the first ``count`` are valid."""

    cells_a: Array
    cells_b: Array
    count: Count


class Pair(ABC, Generic[Array, Count, Buddies]):
    """Two images, wherever their descriptors live, and the steps of matching there. Only the last two methods wait.

    Attributes:
        a: the first image; ``b`` the second one.
        saliency_a: ``(cells,)`` of the first image; ``saliency_b`` of the second one.
    """

    a: ImageRecord
    b: ImageRecord

    @property
    @abstractmethod
    def saliency_a(self) -> Array: ...
    @property
    @abstractmethod
    def saliency_b(self) -> Array: ...

    @abstractmethod
    def best_buddies(self, hierarchy: int) -> Buddies:
        """Nearest neighbours by the cosine of the descriptors, log-binned in ``hierarchy`` levels."""

    @abstractmethod
    def keep_salient(self, buddies: Buddies, threshold: float) -> Kept[Array, Count]:
        """The mutual ones that are salient; see :func:`keep_salient`."""

    @abstractmethod
    def describe(self, kept: Kept[Array, Count], hierarchy: int) -> Array:
        """Both (binned) descriptors of each pair side by side, ``(n, D)``."""

    @abstractmethod
    def rank(self, kept: Kept[Array, Count]) -> Array:
        """How salient both cells are together, ``(n,)``."""

    @abstractmethod
    def pick_diverse(self, joined: Array, rank: Array, count: Count, num_pairs: int) -> tuple[Array, Array]:
        """Cluster of each pair and the best of each cluster, -1 for none; see :func:`pick_diverse`."""

    @abstractmethod
    def take(self, values: Array, cells: Array) -> Array:
        """``values[cells]``."""

    @abstractmethod
    def number(self, count: Count) -> int:
        """The count, waited for."""

    @abstractmethod
    def to_host(self, values: Array) -> NDArray[Any]:
        """The array in host memory, waited for."""


def match_pair(pair: Pair[Array, Count, Buddies], options: MatchOptions) -> Matches:
    """Up to ``num_pairs`` diverse corresponding points of two images; see ``Engine.match``."""
    a, b, facet, threshold = pair.a, pair.b, options.facet, options.saliency_threshold
    if (why := nothing_to_match(a, b)) is not None:
        return no_matches(a.geometry, b.geometry, facet, why)
    buddies = pair.best_buddies(options.hierarchy)
    kept = pair.keep_salient(buddies, threshold)
    joined = pair.describe(kept, options.hierarchy)
    clusters, selected = pair.pick_diverse(joined, pair.rank(kept), kept.count, options.num_pairs)
    similarity = pair.take(buddies.sim_ab, kept.cells_a)
    count = pair.number(kept.count)  # the only wait; the rest has been computed by now

    def integers(values: Array) -> Cells:
        return pair.to_host(values).astype(np.int64, copy=False)

    cells_a, found = integers(kept.cells_a)[:count], integers(selected)
    agreement = agreement_of(cells_a, integers(buddies.nn_ab), a.grid, b.grid)
    salient = min(int((pair.to_host(each) > threshold).sum()) for each in (pair.saliency_a, pair.saliency_b))
    return Matches(
        cells_a=cells_a,
        cells_b=integers(kept.cells_b)[:count],
        similarity=pair.to_host(similarity)[:count],
        clusters=integers(clusters)[:count],
        selected=found[found >= 0],
        geometry_a=a.geometry,
        geometry_b=b.geometry,
        facet=facet,
        agreement=agreement,
        confidence=confidence_of(agreement, salient),
    )


class HostPair(Pair[NDArray[Any], int, BestBuddies]):
    """Two images in host memory.

    Raises:
        InputError: they lack the facet; later, that they lack saliency.
    """

    def __init__(self, a: Features, b: Features, facet: str) -> None:
        self.a, self.b = self._features = a, b
        self._maps = a.map(facet), b.map(facet)

    @cached_property
    def saliency_a(self) -> Float:
        return self._features[0].saliency.ravel()

    @cached_property
    def saliency_b(self) -> Float:
        return self._features[1].saliency.ravel()

    def best_buddies(self, hierarchy: int) -> BestBuddies:
        return best_buddies(*self._maps, hierarchy)

    def keep_salient(self, buddies: BestBuddies, threshold: float) -> Kept[NDArray[Any], int]:
        cells = keep_salient(buddies, self.saliency_a, self.saliency_b, threshold)
        return Kept(cells, buddies.nn_ab[cells], len(cells))

    def describe(self, kept: Kept[NDArray[Any], int], hierarchy: int) -> Float:
        cells = zip(self._maps, (kept.cells_a, kept.cells_b), strict=True)
        return np.concatenate([log_bin(values, hierarchy, cells=chosen) for values, chosen in cells], axis=1)

    def rank(self, kept: Kept[NDArray[Any], int]) -> Float:
        return np.asarray(self.saliency_a[kept.cells_a] + self.saliency_b[kept.cells_b])

    def pick_diverse(self, joined: Float, rank: Float, count: int, num_pairs: int) -> tuple[Cells, Cells]:
        return pick_diverse(joined, rank, num_pairs)

    def take(self, values: NDArray[Any], cells: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(values[cells])

    def number(self, count: int) -> int:
        return count

    def to_host(self, values: NDArray[Any]) -> NDArray[Any]:
        return values


def nothing_to_match(a: ImageRecord, b: ImageRecord) -> str | None:
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
