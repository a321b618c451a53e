"""Where a piece of one descriptor map lies in another: similarity, sub-cell position and local alignment.

Positions are (column, row) in cells, fractional; cell ``(0, 0)``'s centre is (0, 0). A *shape* ``(2, 2)`` maps an
offset around a point of one map to the offset around its match in another: the local turn and zoom between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Float
from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.log_bin import average_pool, bin_offsets
from facetrt.kernels.parallel import one_blas_thread
from facetrt.kernels.products import first_largest, inner_products

Positions = NDArray[np.float64]  # (n, 2) as (column, row)
Shapes = NDArray[np.float64]  # (n, 2, 2)

HIERARCHY = 2  # levels of log-binning, as for matching
PRODUCT_BYTES = 64 << 20  # about as much of a product with all cells is made at a time
SLOPES_BYTES = 8 << 20  # and as much of the slopes of an alignment

# Soft-argmax over 3 × 3 cells at a fifth of their range: of windows 3, 5, 7 and temperatures 0.05, 0.1, 0.2 the one
# with the smallest error one frame on: medians of 0.16 to 0.27 cells, of the best cell alone 0.24 to 0.46.
PEAK_REACH = 1
PEAK_TEMPERATURE = 0.2

# Alignment: 7 × 7 samples, two cells apart. In clips turned by 3° per frame up to 21°, 97 and 96 % of the points stay
# within half a cell (load sizes 112 and 160); with 5 × 5 samples 94 and 95 %.
WINDOW = 2.0 * np.arange(-3, 4)  # cells
WINDOW_SIGMA = 4.0  # cells, of the weights
ITERATIONS = 5
LARGEST_STEP = 1.0  # cells in one iteration
LARGEST_TURN = 0.15  # change of shape in one iteration


@dataclass(frozen=True)
class DescriptorMap:
    """One frame's descriptors, ready to be compared.

    Attributes:
        levels: the map and its pooled versions, each ``(grid_h, grid_w, C)`` float32.
        norms: of the binned descriptors, ``(grid_h, grid_w)`` float32.
    """

    levels: list[Float] = field(repr=False)
    norms: Float = field(repr=False)

    @classmethod
    def of(cls, values: Float) -> DescriptorMap:
        """Make one of ``values (grid_h, grid_w, C)`` less their mean, without which cosines hardly tell cells apart."""
        levels = [average_pool(np.ascontiguousarray(values), level) for level in range(max(HIERARCHY, 1))]
        squares = [np.einsum("yxc,yxc->yx", level, level) for level in levels]
        total = sum(shifted(squares[level], dy, dx) for level, dy, dx in bin_offsets(HIERARCHY))
        return cls(levels, np.maximum(np.sqrt(total), NORM_FLOOR))

    @property
    def values(self) -> Float:
        """The map itself, ``(grid_h, grid_w, C)``."""
        return self.levels[0]

    @property
    def grid(self) -> tuple[int, int]:
        """``(grid_h, grid_w)``."""
        height, width = self.norms.shape
        return height, width

    def binned(self, positions: Positions, shapes: Shapes) -> Float:
        """Unit binned descriptors at ``positions``, the bins laid out by ``shapes``, ``(n, bins, C)``."""
        bins = [
            bilinear(self.levels[level], positions + shapes @ np.array([dx, dy], np.float64))
            for level, dy, dx in bin_offsets(HIERARCHY)
        ]
        stacked = np.stack(bins, axis=1)
        norms = np.sqrt(np.einsum("nbc,nbc->n", stacked, stacked))
        return np.asarray(stacked / np.maximum(norms, NORM_FLOOR)[:, None, None])

    def similarity(self, binned: Float) -> Float:
        """Cosine of each of ``binned (n, bins, C)`` to every cell, ``(n, grid_h, grid_w)``.

        As :func:`facetrt.engine.tasks.similarity.similarity_map`, for many queries: bins are multiplied with the pooled
        maps and the products shifted.
        """
        offsets = bin_offsets(HIERARCHY)
        out = np.zeros((len(binned), *self.grid), np.float32)
        step = max(1, PRODUCT_BYTES // (4 * len(offsets) * self.norms.size))
        for start in range(0, len(binned), step):
            chunk = slice(start, start + step)
            for level, values in enumerate(self.levels):
                chosen = [i for i, offset in enumerate(offsets) if offset[0] == level]
                rows = binned[chunk][:, chosen].reshape(-1, values.shape[2])
                products = inner_products(rows, values.reshape(-1, values.shape[2]))
                products = products.reshape(-1, len(chosen), *self.grid)
                for j, i in enumerate(chosen):
                    out[chunk] += shifted(products[:, j], *offsets[i][1:])
        out /= self.norms
        return out


def shifted(values: Float, dy: int, dx: int) -> Float:
    """``out[…, y, x] = values[…, clamp(y + dy), clamp(x + dx)]``."""
    rows, columns = (
        np.clip(np.arange(n) + shift, 0, n - 1) for n, shift in zip(values.shape[-2:], (dy, dx), strict=True)
    )
    return np.asarray(values[..., rows[:, None], columns])


def bilinear(values: Float, positions: Positions) -> Float:
    """``values (grid_h, grid_w, C)`` at ``positions (…, 2)``, clamped to the grid, ``(…, C)`` float32."""
    limits = np.array(values.shape[1::-1]) - 1
    clamped = np.clip(positions, 0, limits)
    low = np.minimum(clamped.astype(np.int64), np.maximum(limits - 1, 0))
    high = np.minimum(low + 1, limits)
    right, down = np.moveaxis((clamped - low).astype(np.float32), -1, 0)[..., None]
    above = values[low[..., 1], low[..., 0]] * (1 - right) + values[low[..., 1], high[..., 0]] * right
    below = values[high[..., 1], low[..., 0]] * (1 - right) + values[high[..., 1], high[..., 0]] * right
    return np.asarray(above * (1 - down) + below * down)


def peaks(similarity: Float) -> Positions:
    """Sub-cell position of each map's maximum, ``(n, 2)``: a soft-argmax around the best cell.

    Similarities that differ by less than ``TIE`` tie, and the first cell wins.

    Args:
        similarity: ``(n, grid_h, grid_w)``; cells of ``-inf`` do not take part.
    """
    count, height, width = similarity.shape
    rows, columns = np.divmod(first_largest(similarity.reshape(count, -1))[0], width)
    reach = np.arange(-PEAK_REACH, PEAK_REACH + 1)
    y, x = rows[:, None, None] + reach[:, None], columns[:, None, None] + reach
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    window = similarity[np.arange(count)[:, None, None], np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]
    valid = inside & np.isfinite(window)
    best = similarity[np.arange(count), rows, columns][:, None, None].astype(np.float64)
    span = best - np.where(valid, window, np.inf).min(axis=(1, 2), keepdims=True)
    scaled = (np.where(valid, window, -np.inf) - best) / np.maximum(PEAK_TEMPERATURE * span, np.finfo(np.float32).tiny)
    weights = np.exp(scaled)
    weights /= weights.sum(axis=(1, 2), keepdims=True)
    moved = np.stack([(weights * reach).sum(axis=(1, 2)), (weights * reach[:, None]).sum(axis=(1, 2))], axis=1)
    return np.asarray(np.stack([columns, rows], axis=1) + moved)


def align(a: DescriptorMap, at: Positions, b: DescriptorMap, start: Positions, shapes: Shapes) -> Alignment:
    """Move, turn and zoom a window around each point of A until it lies best on B.

    Gauss–Newton on the squared difference of the descriptors, four unknowns for each point (Baker and Matthews,
    "Lucas–Kanade 20 years on"), with Gaussian weights; what lies outside either grid does not count. Each channel's
    mean difference over the window does not count either: turning or lighting an image changes descriptors evenly, and
    that would pull the window aside (after ten shifts, 0.19 cells in the median instead of 0.07).

    Args:
        at: ``(n, 2)`` the points in A; ``start (n, 2)`` about where they are in B.
        shapes: ``(n, 2, 2)`` about how A's surroundings are turned and zoomed in B.
    """
    count = max(1, SLOPES_BYTES // (4 * 4 * len(WINDOW) ** 2 * a.values.shape[2]))  # points at a time
    chunks = [slice(first, first + count) for first in range(0, len(at), count)]
    with one_blas_thread:
        parts = [_align(a, at[chunk], b, start[chunk], shapes[chunk]) for chunk in chunks]
    return Alignment(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Alignment)))


def _align(a: DescriptorMap, at: Positions, b: DescriptorMap, start: Positions, shapes: Shapes) -> Alignment:
    """:func:`align` of some of the points."""
    offsets = np.stack(np.meshgrid(WINDOW, WINDOW), axis=-1).reshape(-1, 2)  # (k, 2)
    wanted = bilinear(a.values, at[:, None] + offsets)  # (n, k, C)
    falloff = np.exp(-np.square(offsets).sum(axis=1) / (2 * WINDOW_SIGMA**2)) * _inside(at[:, None] + offsets, a.grid)
    positions = start
    for _ in range(ITERATIONS):
        around = offsets @ np.swapaxes(shapes, 1, 2)  # (n, k, 2)
        step = _gauss_newton(wanted, b, positions[:, None] + around, around, falloff)
        positions = positions + np.clip(step[:, :2], -LARGEST_STEP, LARGEST_STEP)
        grow, turn = np.clip(step[:, 2:], -LARGEST_TURN, LARGEST_TURN).T
        shapes = np.stack([1 + grow, -turn, turn, 1 + grow], axis=1).reshape(-1, 2, 2) @ shapes
    points = positions[:, None] + offsets @ np.swapaxes(shapes, 1, 2)
    weights = falloff * _inside(points, b.grid)
    return Alignment(positions, shapes, _cosine(wanted, bilinear(b.values, points), weights))


@dataclass(frozen=True)
class Alignment:
    """Result of :func:`align`: ``positions (n, 2)``, ``shapes (n, 2, 2)``, and the windows' cosine ``(n,)``."""

    positions: Positions
    shapes: Shapes
    similarity: NDArray[np.float64]


def _gauss_newton(
    wanted: Float, b: DescriptorMap, points: Positions, around: Positions, falloff: NDArray[np.float64]
) -> NDArray[np.float64]:
    """One step ``(n, 4)``: move in x and y, growth, turn."""
    weights = (falloff * _inside(points, b.grid)).astype(np.float32)[..., None]  # (n, k, 1)
    slopes = _slopes(b, points, around)
    slopes -= _weighted_mean(slopes, weights[..., None])
    residual = wanted - bilinear(b.values, points)
    residual -= _weighted_mean(residual, weights)
    count, unknowns = len(slopes), slopes.shape[-1]
    weighted = np.swapaxes((slopes * weights[..., None]).reshape(count, -1, unknowns), 1, 2)
    normal = (weighted @ slopes.reshape(count, -1, unknowns)).astype(np.float64)
    target = (weighted @ residual.reshape(count, -1, 1)).astype(np.float64)
    damping = 1e-3 * np.trace(normal, axis1=1, axis2=2) / unknowns + np.finfo(np.float32).tiny
    normal += damping[:, None, None] * np.eye(unknowns)  # flat surroundings: no step rather than a wild one
    return np.asarray(np.linalg.solve(normal, target)[..., 0])


def _slopes(b: DescriptorMap, points: Positions, around: Positions) -> Float:
    """How B's descriptors at ``points (n, k, 2)`` change with a move in x and y, growth and turn, ``(n, k, C, 4)``."""
    right, down = np.array([0.5, 0.0]), np.array([0.0, 0.5])
    along_x = bilinear(b.values, points + right) - bilinear(b.values, points - right)
    along_y = bilinear(b.values, points + down) - bilinear(b.values, points - down)
    x, y = np.moveaxis(around.astype(np.float32), -1, 0)[..., None]
    return np.stack([along_x, along_y, along_x * x + along_y * y, along_y * x - along_x * y], axis=-1)


def _weighted_mean(values: Float, weights: Float) -> Float:
    """Over the window, axis 1, which is kept."""
    total = np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return np.asarray((values * weights).sum(axis=1, keepdims=True) / total)


def _inside(positions: Positions, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which of ``positions (…, 2)`` lie between the outermost cells' centres."""
    limits = np.array(grid[::-1]) - 1
    return np.asarray(((positions >= 0) & (positions <= limits)).all(axis=-1))


def _cosine(a: Float, b: Float, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of ``a, b (n, k, C)`` under ``weights (n, k)``."""
    dots, squares_a, squares_b = (
        (np.einsum("nkc,nkc->nk", left, right) * weights).sum(axis=1) for left, right in ((a, b), (a, a), (b, b))
    )
    return np.asarray(dots / np.maximum(np.sqrt(squares_a * squares_b), NORM_FLOOR))
