"""Where points of one frame are in another, by their binned descriptors: from coarse to fine.

All points are compared with a lattice of every third cell, in one product of pooled descriptors. Cells are compared
exactly around where a point is expected, and around those nodes of the lattice that may be better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Float
from facetrt.engine.video.descriptor_maps import OFFSETS, SPACING, DescriptorMap, Positions, shifted, within
from facetrt.kernels.products import TIE, first_largest, inner_products
from facetrt.kernels.tracking import PEAK_TEMPERATURE

Cells = NDArray[np.int64]

NODES = 3  # of the lattice, at most, around which cells are compared
REACH = 2  # rows and columns in each direction
CLIMBS = 8  # times that the best cell may lie at the rim of those compared
DOUBT = 0.15  # cosine: by so much the lattice may fall short of a peak between its nodes

SIDE = 2 * REACH + 1
AROUND = np.indices((SIDE, SIDE)).reshape(2, -1) - REACH  # rows and columns of a cell and its neighbours
NINE_ROWS, NINE_COLUMNS = np.indices((3, 3)).reshape(2, 9) - 1
NINE = SIDE * NINE_ROWS + NINE_COLUMNS  # from a cell's number to its neighbours', in a block


@dataclass(frozen=True)
class Window:
    """Cells that take part in a search: from ``low`` to ``high (n, 2)`` as (row, column), both included."""

    low: Cells
    high: Cells

    @classmethod
    def near(cls, positions: Positions, radius: float, grid: tuple[int, int]) -> Window:
        """Those within ``radius`` of ``positions (n, 2)``, or of the grid's nearest place to them."""
        last = np.array(grid) - 1
        centre = np.clip(positions[:, ::-1], 0, last)
        low, high = np.ceil(centre - radius), np.floor(centre + radius)
        return cls(np.maximum(low, 0).astype(np.int64), np.minimum(high, last).astype(np.int64))

    @classmethod
    def whole(cls, count: int, grid: tuple[int, int]) -> Window:
        """All cells, for each of ``count`` points."""
        last = np.array(grid) - 1
        return cls(np.zeros((count, 2), np.int64), np.tile(last, (count, 1)))

    @property
    def corners(self) -> Cells:
        """``low`` and ``high`` side by side, ``(n, 4)``."""
        return np.concatenate([self.low, self.high], axis=1)

    def only(self, index: Cells) -> Window:
        """The windows of some points."""
        return Window(self.low[index], self.high[index])


def find(seen: DescriptorMap, binned: Float, window: Window, expected: Positions | None = None) -> Positions:
    """The sub-cell position in ``seen`` of what is most like each of ``binned (n, bins, C)``, ``(n, 2)``.

    Args:
        binned: unit binned descriptors, or means of some.
        expected: ``(n, 2)`` where to look first, so that the rest of the window is looked at only where it may be
            better; None if they may be anywhere.
    """
    count = len(binned)
    best, where = np.full(count, -np.inf, np.float32), np.zeros((count, 2))
    if expected is not None:
        cells = np.clip(np.rint(expected[:, ::-1]).astype(np.int64), window.low, window.high)
        best, where = _climb(seen, binned, window, cells)
    point, cells = _nodes(_on_lattice(seen, binned), window, best - np.float32(DOUBT))
    scores, places = _climb(seen, binned[point], window.only(point), cells)
    for i in np.flatnonzero(scores > best[point]):
        if scores[i] > best[point[i]]:
            best[point[i]], where[point[i]] = scores[i], places[i]
    return where


def _on_lattice(seen: DescriptorMap, binned: Float) -> Float:
    """About the cosines to every third cell, ``(n, lattice_h, lattice_w)``.

    The inner bins, which are the cells around the middle, are compared with these cells' mean.
    """
    inner, outer = ([i for i, offset in enumerate(OFFSETS) if offset[0] == level] for level in (0, 1))
    queries = np.concatenate([binned[:, inner].sum(axis=1, keepdims=True), binned[:, outer]], axis=1)
    lattice = seen.lattice
    products = inner_products(queries.reshape(-1, lattice.shape[2]), lattice.reshape(-1, lattice.shape[2]))
    products = products.reshape(*queries.shape[:2], *lattice.shape[:2])
    total = products[:, 0]
    for number, i in enumerate(outer, start=1):
        _, dy, dx = OFFSETS[i]
        total += shifted(products[:, number], dy // SPACING, dx // SPACING)
    return np.asarray(total / seen.norms[::SPACING, ::SPACING])


def _nodes(scores: Float, window: Window, least: Float) -> tuple[Cells, Cells]:
    """Up to ``NODES`` best nodes of each point with ``least (n,)``: which point ``(m,)``, which cell ``(m, 2)``."""
    count, height, width = scores.shape
    flat, places = scores.reshape(count, -1), SPACING * np.indices((height, width)).reshape(2, -1)
    inside = flat >= least[:, None]
    for axis in (0, 1):  # nodes that may stand for cells of the window
        inside &= places[axis] >= window.low[:, axis, None] - SPACING // 2
        inside &= places[axis] <= window.high[:, axis, None] + SPACING // 2
    point, node = np.nonzero(inside)
    order = np.lexsort((-flat[point, node], point))
    point, node = point[order], node[order]
    kept = np.arange(len(point)) - np.searchsorted(point, point) < NODES
    point, cells = point[kept], places.T[node[kept]]
    return point, np.clip(cells, window.low[point], window.high[point])


def _climb(seen: DescriptorMap, binned: Float, window: Window, cells: Cells) -> tuple[Float, Positions]:
    """The highest cosine around ``cells (n, 2)`` and its sub-cell position, going on while it lies at the rim."""
    best, where, cells = np.full(len(cells), -np.inf, np.float32), cells[:, ::-1].astype(np.float64), cells.copy()
    todo = np.arange(len(cells))
    for _ in range(CLIMBS):
        if not todo.size:
            break
        block = _block(seen, binned[todo], window.only(todo), cells[todo])
        number, _ = first_largest(block)
        move = np.stack(np.divmod(number, SIDE), axis=1) - REACH
        cells[todo] += move
        inner = (np.abs(move) < REACH).all(axis=1)
        found, point = todo[inner], np.flatnonzero(inner)[:, None]
        nine = block[point, number[point] + NINE]  # (n, 9)
        best[found], where[found] = nine[:, 4], cells[found, ::-1] + _peak(nine)
        todo = todo[~inner]
    return best, where


def _block(seen: DescriptorMap, binned: Float, window: Window, cells: Cells) -> Float:
    """Cosines to ``REACH`` rows and columns around ``cells (n, 2)``, ``(n, SIDE²)``; ``-inf`` outside the window."""
    rows, columns = (cells[:, axis, None] + AROUND[axis] for axis in (0, 1))
    inside = (rows >= window.low[:, :1]) & (rows <= window.high[:, :1])
    inside &= (columns >= window.low[:, 1:]) & (columns <= window.high[:, 1:])
    height, width = seen.grid
    found = seen.similarity(binned, within(rows, height - 1), within(columns, width - 1))
    return np.where(inside, found, np.float32(-np.inf))


def _peak(nine: Float) -> Positions:
    """A soft-argmax over 3 × 3 cosines ``(n, 9)``, as an offset (column, row) from the middle, ``(n, 2)``."""
    best = nine.max(axis=1)
    span = best - np.where(np.isfinite(nine), nine, np.inf).min(axis=1)
    scaled = nine - best[:, None].astype(np.float64)
    weights = np.exp(scaled / np.maximum(PEAK_TEMPERATURE * span, TIE)[:, None])  # rounding does not choose
    weights /= weights.sum(axis=1, keepdims=True)
    return np.asarray(weights @ np.stack([NINE_COLUMNS, NINE_ROWS], axis=1))
