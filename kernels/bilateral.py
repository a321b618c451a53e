"""The fast bilateral solver: a map smoothed inside regions of like colour, on a grid of places and colours.

Source: Barron & Poole, "The Fast Bilateral Solver" (ECCV 2016), with the constants of TokenCut's refinement; see the
specification, common-evaluation §3. The solver stops after 25 steps, long before it converges: where it starts, how it
is preconditioned and when it stops are part of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError, MissingDependencyError

Double = NDArray[np.float64]

CONFIDENCE = 0.999  # in every pixel of the map that is smoothed
SMOOTHNESS = 256.0  # lambda: what differences between neighbours cost beside differences from the map
ROUNDS = 10  # of bistochastisation
STEPS, TOLERANCE = 25, 1e-5  # of conjugate gradients
LEAST_DIAGONAL = 1e-5  # of the preconditioner
BASE = 255  # of the number that stands for a vertex


@dataclass(frozen=True)
class Scales:
    """How far pixels may lie apart in one cell of the grid: places in pixels, lightness and colours in levels."""

    place: float = 16.0
    lightness: float = 16.0
    colour: float = 8.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (np.isfinite(value) and value > 0):
                raise InputError(f"{name}={value}: expected more than 0")


@dataclass(frozen=True)
class BilateralGrid:
    """The cells of the grid that a picture's pixels fall into, ready for any number of maps on it.

    Attributes:
        vertices: ``(pixels,)`` int64, the cell of each pixel; cells are numbered as pixels meet them.
        blur: a SciPy sparse matrix ``(n, n)``: ten times a cell and its neighbours along the five axes.
        counts: ``(n,)`` float64, pixels per cell.
        scale, mass: ``(n,)`` float64 of the bistochastic form, n and m of the source.
        size: ``(height, width)``.
    """

    vertices: NDArray[np.int64] = field(repr=False)
    blur: Any = field(repr=False)
    counts: Double = field(repr=False)
    scale: Double = field(repr=False)
    mass: Double = field(repr=False)
    size: tuple[int, int]

    @staticmethod
    def of(pixels: NDArray[np.uint8], scales: Scales | None = None) -> BilateralGrid:
        """The grid of a picture ``(height, width, 3)`` uint8 RGB.

        Raises:
            MissingDependencyError: scipy is not installed.
        """
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise InputError(f"a picture of shape {pixels.shape}, {pixels.dtype}: expected (height, width, 3) uint8")
        return grid_of(_coordinates(pixels, scales or Scales()), (pixels.shape[0], pixels.shape[1]))

    def splat(self, values: Double) -> Double:
        """Sums over the pixels ``(pixels,)`` of each cell, ``(n,)``."""
        return np.asarray(np.bincount(self.vertices, weights=values, minlength=len(self.counts)), np.float64)

    def solve(self, target: NDArray[np.floating] | NDArray[np.bool_], confidence: float = CONFIDENCE) -> Double:
        """A map ``(height, width)`` smoothed: the soft result, in [0, 1] up to rounding where the map is.

        Raises:
            InputError: a map of another size, or with numbers that are not finite.
        """
        if target.shape != self.size or not np.isfinite(target).all():
            raise InputError(f"a map of shape {target.shape}: expected finite numbers of shape {self.size}")
        weights = confidence * self.counts
        right = self.splat(confidence * target.ravel().astype(np.float64))
        smooth = _Smoothness(self)
        diagonal = np.maximum(SMOOTHNESS * smooth.diagonal + weights, LEAST_DIAGONAL)
        start = right / weights
        found = _conjugate_gradients(lambda v: SMOOTHNESS * smooth(v) + weights * v, right, start, 1 / diagonal)
        return np.asarray(found[self.vertices].reshape(self.size))


class _Smoothness:
    """``D_m - D_n B D_n``, which is not built."""

    def __init__(self, grid: BilateralGrid) -> None:
        self._grid = grid

    def __call__(self, values: Double) -> Double:
        grid = self._grid
        return np.asarray(grid.mass * values - grid.scale * (grid.blur @ (grid.scale * values)))

    @property
    def diagonal(self) -> Double:
        grid = self._grid
        return np.asarray(grid.mass - grid.scale**2 * grid.blur.diagonal())


def grid_of(coordinates: NDArray[np.int64], size: tuple[int, int]) -> BilateralGrid:
    """The grid whose pixels have the whole ``coordinates (pixels, 5)``."""
    sparse = import_sparse()
    codes = coordinates @ BASE ** np.arange(coordinates.shape[1], dtype=np.int64)
    unique, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # cells in the order in which pixels meet them
    rank = np.empty(len(unique), np.int64)
    rank[order] = np.arange(len(unique))
    vertices, count = rank[inverse.ravel()], len(unique)
    rows, columns = [np.arange(count)], [np.arange(count)]
    weights = [np.full(count, 2.0 * coordinates.shape[1])]
    for axis in range(coordinates.shape[1]):
        for step in (-(BASE**axis), BASE**axis):
            place = np.minimum(np.searchsorted(unique, unique + step), count - 1)
            there = np.flatnonzero(unique[place] == unique + step)
            rows.append(rank[there])
            columns.append(rank[place[there]])
            weights.append(np.ones(len(there)))
    parts = np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))
    blur = sparse.csr_array(parts, shape=(count, count))
    counts = np.bincount(vertices, minlength=count).astype(np.float64)
    scale = np.ones(count)
    for _ in range(ROUNDS):
        scale = np.sqrt(scale * counts / (blur @ scale))
    return BilateralGrid(vertices, blur, counts, scale, scale * (blur @ scale), size)


def luma_chroma(pixels: NDArray[np.uint8]) -> Double:
    """JPEG's Y, U and V of RGB pixels ``(…, 3)``, ``(…, 3)`` float64.

    A product and the sum so far are rounded once, together: a pixel whose colour lies on the border of two cells falls
    where it does in the published code, on every processor.
    """
    red, green, blue = (pixels[..., channel].astype(np.float64) for channel in range(3))
    weights = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
    luma, u, v = (_fused(blue, b, _fused(green, g, red * r)) for r, g, b in weights)
    return np.stack([luma, u + 128.0, v + 128.0], axis=-1)


def _fused(levels: Double, weight: float, total: Double) -> Double:
    """``levels * weight + total``, rounded once; levels have eight bits, so that halves of the product are exact."""
    mantissa, exponent = np.frexp(weight)
    high = float(np.ldexp(np.rint(np.ldexp(mantissa, 40)), int(exponent) - 40))
    product, rest = levels * high, levels * (weight - high)
    near = product + total
    part = near - product
    missing = (product - (near - part)) + (total - part)
    return np.asarray(near + (missing + rest))


def _coordinates(pixels: NDArray[np.uint8], scales: Scales) -> NDArray[np.int64]:
    """x, y, lightness and colours of each pixel in whole cells, ``(pixels, 5)``."""
    height, width, _ = pixels.shape
    rows, columns = np.mgrid[:height, :width]
    colours = luma_chroma(pixels)
    steps = (scales.place, scales.place, scales.lightness, scales.colour, scales.colour)
    values = (columns, rows, colours[..., 0], colours[..., 1], colours[..., 2])
    return np.stack(
        [(value / step).astype(np.int64).ravel() for value, step in zip(values, steps, strict=True)], axis=1
    )


def _conjugate_gradients(apply: Any, right: Double, start: Double, inverse: Double) -> Double:
    """Conjugate gradients with a diagonal preconditioner, at most ``STEPS`` of them."""
    limit = TOLERANCE * float(np.linalg.norm(right))
    values = start.copy()
    rest = right - apply(values)
    direction, before = np.zeros_like(values), 0.0
    for _ in range(STEPS):
        if float(np.linalg.norm(rest)) < limit or not rest.any():
            break
        scaled = inverse * rest
        now = float(rest @ scaled)
        direction = scaled + (now / before) * direction if before else scaled
        image = apply(direction)
        share = now / float(direction @ image)
        values += share * direction
        rest -= share * image
        before = now
    return values


def import_sparse() -> Any:
    """SciPy's sparse matrices.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy import sparse
    except ImportError as error:
        raise MissingDependencyError(
            "the bilateral solver needs scipy, which is not installed: pip install scipy"
        ) from error
    return sparse
