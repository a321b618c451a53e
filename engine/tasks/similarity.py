"""How similar one point of an image, or its [CLS], is to every cell of another. Source: specification §11.

The reference maps a click to a cell with the paper's grid size instead of the real one and drifts by up to a cell where
``height mod patch >= stride``; here :class:`Geometry` converts, so points are right at all sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSizeChoice
from facetrt.engine.settings import BUNDLES_CHOICE, Hierarchy, Setting, check, read_facet
from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import average_pool, bin_offsets, log_bin
from facetrt.kernels.products import TIE, inner_products


@dataclass(frozen=True)
class SimilarityMap:
    """Similarity of one cell of image A, or of A's [CLS], to every cell of image B.

    Attributes:
        values: ``(grid_h, grid_w)`` float32 cosines on B's grid.
        cells: ``(k,)`` int64, the most similar cells of B, best first. Cosines that differ by less than ``TIE`` tie,
            and the first cell comes first.
        cell_a: the cell of A that was compared, or None for [CLS].
        clicked_xy: the point of A that was asked for, in original pixels, or None for [CLS].
    """

    values: Float = field(repr=False)
    cells: NDArray[np.int64]
    cell_a: int | None
    geometry_a: Geometry
    geometry_b: Geometry
    facet: str
    hierarchy: int
    clicked_xy: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.values.shape != self.geometry_b.grid:
            raise InputError(f"values have shape {self.values.shape}: expected the grid {self.geometry_b.grid}")

    @property
    def similarity(self) -> Float:
        """Cosines of :attr:`cells`, ``(k,)`` float32, descending but for ties."""
        return np.asarray(self.values.ravel()[self.cells])

    @property
    def points_xy(self) -> NDArray[np.float64]:
        """Centres of :attr:`cells` in original pixels of image B, ``(k, 2)`` as (x, y)."""
        return self.geometry_b.points_xy(self.cells)

    @property
    def point_a_xy(self) -> NDArray[np.float64] | None:
        """Centre of :attr:`cell_a` in original pixels of image A, ``(2,)`` as (x, y); None for [CLS]."""
        return None if self.cell_a is None else self.geometry_a.points_xy(np.array([self.cell_a]))[0]


def parse_point(text: str, option: str = "--at") -> tuple[float, float]:
    """``X,Y`` in pixels."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text!r}: expected X,Y in pixels, like 120,85") from error
    return x, y


@dataclass(frozen=True)
class SimilarityOptions:
    """Options of :func:`similarity_map`, which documents them."""

    facet: Annotated[
        str, Setting("KIND@LAYER; the deepest exported keys by default, as the reference.", shown="", read=read_facet)
    ] = BUNDLES_CHOICE
    point_xy: Annotated[
        tuple[float, float] | None,
        Setting(
            "X,Y in pixels of the first image's original size.",
            flag="at",
            expected="finite pixel coordinates",
            read=parse_point,
        ),
    ] = None
    cls: Annotated[bool, Setting("Compare the first image's [CLS] instead of a point.")] = False
    hierarchy: Hierarchy = 0
    top_k: Annotated[int, Setting("Mark so many of the most similar cells.", minimum=1)] = 1
    load_size: LoadSizeChoice = DEFAULT_SIZE

    def __post_init__(self) -> None:
        check(self)


def similarity_map(
    a: Features,
    b: Features,
    *,
    facet: str,
    point_xy: tuple[float, float] | None = SimilarityOptions.point_xy,
    cls: bool = SimilarityOptions.cls,
    hierarchy: int = SimilarityOptions.hierarchy,
    top_k: int = SimilarityOptions.top_k,
) -> SimilarityMap:
    """Cosine similarity of a point of image A, or of its [CLS], to all cells of image B.

    Args:
        facet: which descriptors are compared.
        point_xy: (x, y) in original pixels of A; the cell whose centre is nearest is compared.
        cls: compare A's [CLS] instead of a point.
        hierarchy: levels of log-binning; 0 for none, which is all that [CLS] allows.
        top_k: how many of the best cells are listed, at most all.

    Raises:
        InputError: both or neither of ``point_xy`` and ``cls``, a point outside the image, [CLS] with binning, a facet
            that was not exported or differs in width.
    """
    SimilarityOptions(facet, None if point_xy is None else (point_xy[0], point_xy[1]), cls, hierarchy, top_k)
    if (point_xy is None) != cls:
        raise InputError("expected either a point of the first image or its [CLS], and not both")
    if cls and hierarchy:
        raise InputError(f"[CLS] has no neighbours to bin: use hierarchy 0 with it, not {hierarchy}")
    cell = None if point_xy is None else cell_at(a, point_xy)
    query = a.cls(facet)[None] if cell is None else log_bin(a.map(facet), hierarchy, cells=np.array([cell]))
    values = _cosines(query, b, facet, hierarchy)
    cells = _best(values.ravel())[:top_k]
    return SimilarityMap(values, cells, cell, a.geometry, b.geometry, facet, hierarchy, point_xy)


def cell_at(features: Features, point_xy: tuple[float, float]) -> int:
    """The cell whose centre is nearest to (x, y) in original pixels."""
    x, y = point_xy
    if not (math.isfinite(x) and math.isfinite(y)):
        raise InputError(f"point ({x:g}, {y:g}) of {features.name}: expected finite pixel coordinates")
    try:
        return int(features.geometry.cells_at(np.array([[x, y]], np.float64))[0])
    except InputError as error:
        raise InputError(f"{features.name}: {error}") from error


def _best(values: Float) -> NDArray[np.int64]:
    """Indices of ``values (n,)``, largest value first; what is closer than rounding stays in the order of the cells."""
    order = np.argsort(-values, kind="stable")
    lower = np.diff(values[order], prepend=np.inf) <= -TIE
    return order[np.lexsort((order, np.cumsum(lower)))]


def _cosines(query: Float, b: Features, facet: str, hierarchy: int) -> Float:
    """Cosine of ``query (1, bins·C)`` to each binned descriptor of B, ``(grid_h, grid_w)`` float32.

    A bin of a cell is the pooled map a few cells further on, clamped to the grid: pooled maps are multiplied with the
    query's bins and the products shifted, so B's binned descriptors, 17 times as long, are never made.
    """
    offsets, values = bin_offsets(hierarchy), b.map(facet)
    bins = query.reshape(len(offsets), -1)
    if bins.shape[1] != values.shape[2]:
        raise InputError(
            f"{facet} of {b.name} has {values.shape[2]} channels and the query {bins.shape[1]}: use one bundle for both"
        )
    if not (np.isfinite(bins).all() and np.isfinite(values).all()):
        raise InputError(f"{facet} holds NaN or infinite values: expected finite descriptors")
    dots, squares = np.zeros(b.grid), np.zeros(b.grid)
    for level in range(max(hierarchy, 1)):
        chosen = [i for i, offset in enumerate(offsets) if offset[0] == level]
        pooled = average_pool(values, level)
        products = inner_products(pooled.reshape(-1, pooled.shape[2]), bins[chosen])
        norms = np.einsum("yxc,yxc->yx", pooled, pooled, dtype=np.float64)
        for product, i in zip(products.T.reshape(-1, *b.grid), chosen, strict=True):
            dots += _shifted(product, *offsets[i][1:])
            squares += _shifted(norms, *offsets[i][1:])
    scale = np.sqrt(squares) * np.linalg.norm(bins.astype(np.float64))
    return np.asarray(dots / np.maximum(scale, NORM_FLOOR), np.float32)


def _shifted(values: NDArray[np.floating], dy: int, dx: int) -> NDArray[np.floating]:
    """``out[y, x] = values[clamp(y + dy), clamp(x + dx)]``."""
    rows, columns = (np.clip(np.arange(n) + shift, 0, n - 1) for n, shift in zip(values.shape, (dy, dx), strict=True))
    return np.asarray(values[rows[:, None], columns])
