"""One frame's descriptors, ready to be compared with points of other frames.

Positions are (column, row) in cells, fractional; cell ``(0, 0)``'s centre is (0, 0). A *shape* ``(2, 2)`` maps an
offset around a point of one map to the offset around its match in another: the local turn and zoom between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Float
from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.log_bin import average_pool, bin_offsets
from facetrt.kernels.tracking import HIERARCHY

Positions = NDArray[np.float64]  # (n, 2) as (column, row)
Shapes = NDArray[np.float64]  # (n, 2, 2)

OFFSETS = bin_offsets(HIERARCHY)
SPACING = 3  # cells between the nodes of the lattice: the pooled cells' width, and how far apart the outer bins lie
SAMPLES = 128  # interpolated at a time: with 384 channels, their neighbours take 0.8 MB


@dataclass(frozen=True)
class DescriptorMap:
    """Descriptors, their means over 3 × 3 cells, and the lengths of the binned descriptors that both make.

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
        total = sum(shifted(squares[level], dy, dx) for level, dy, dx in OFFSETS)
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

    def equals(self, other: DescriptorMap) -> bool:
        """Whether all descriptors are the same."""
        same = np.array_equal(self.norms, other.norms)  # soon seen, where they are not
        return same and np.array_equal(self.values, other.values)

    @cached_property
    def lattice(self) -> Float:
        """Every third pooled cell in each direction, ``(lattice_h, lattice_w, C)``."""
        return np.ascontiguousarray(self.levels[-1][::SPACING, ::SPACING])

    def binned(self, positions: Positions, shapes: Shapes | None = None) -> Float:
        """Unit binned descriptors at ``positions``, the bins laid out by ``shapes``, ``(n, bins, C)``."""
        out = np.empty((len(positions), len(OFFSETS), self.values.shape[2]), np.float32)
        moves = np.array([[dx, dy] for _, dy, dx in OFFSETS], np.float64)  # (bins, 2)
        around = moves if shapes is None else moves @ np.swapaxes(shapes, 1, 2)
        points = positions[:, None] + around  # (n, bins, 2)
        for level, values in enumerate(self.levels):
            bins = [i for i, offset in enumerate(OFFSETS) if offset[0] == level]
            out[:, bins] = bilinear(values, points[:, bins])
        norms = np.sqrt(np.einsum("nbc,nbc->n", out, out))
        out /= np.maximum(norms, NORM_FLOOR)[:, None, None]
        return out

    def similarity(self, binned: Float, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Float:
        """Cosine of each of ``binned (n, bins, C)`` to cells of its own, ``rows`` and ``columns (n, m)``: ``(n, m)``.

        As :func:`facetrt.engine.tasks.similarity.similarity_map`, at few cells: their bins are gathered, not the maps
        shifted.
        """
        (height, width), channels = self.grid, self.values.shape[2]
        total = np.zeros((*rows.shape, 1), np.float32)
        found = np.empty((*rows.shape, channels), np.float32)
        for number, (level, dy, dx) in enumerate(OFFSETS):
            cells = within(rows + dy, height - 1) * width + within(columns + dx, width - 1)
            self.levels[level].reshape(-1, channels).take(cells, axis=0, out=found, mode="clip")  # (n, m, C)
            total += found @ binned[:, number, :, None]
        return np.asarray(total[..., 0] / self.norms[rows, columns])


def within(values: NDArray[np.int64], last: int) -> NDArray[np.int64]:
    """Values below 0 become 0, and those above ``last`` that; ``np.clip`` takes longer over few."""
    return np.minimum(np.maximum(values, 0), last)


def shifted(values: Float, dy: int, dx: int) -> Float:
    """``out[…, y, x] = values[…, clamp(y + dy), clamp(x + dx)]``."""
    rows, columns = (within(np.arange(n) + shift, n - 1) for n, shift in zip(values.shape[-2:], (dy, dx), strict=True))
    return values.take(rows, axis=-2).take(columns, axis=-1)


def bilinear(values: Float, positions: Positions) -> Float:
    """``values (grid_h, grid_w, C)`` at ``positions (…, 2)``, clamped to the grid, ``(…, C)`` float32."""
    height, width, channels = values.shape
    x, y = np.moveaxis(positions.reshape(-1, 2), 1, 0)
    x, y = np.minimum(np.maximum(x, 0), width - 1), np.minimum(np.maximum(y, 0), height - 1)
    left, top = np.minimum(x.astype(np.int64), max(width - 2, 0)), np.minimum(y.astype(np.int64), max(height - 2, 0))
    right, down = x - left, y - top  # shares of the next cell, in 0..1
    cells = np.empty((len(x), 4), np.int64)
    cells[:, 0] = top * width + left
    cells[:, 1] = cells[:, 0] + min(width - 1, 1)
    cells[:, 2:] = cells[:, :2] + width * min(height - 1, 1)
    shares = np.empty((len(x), 1, 4), np.float32)
    shares[:, 0, 3] = right * down
    shares[:, 0, 2], shares[:, 0, 1] = down - shares[:, 0, 3], right - shares[:, 0, 3]
    shares[:, 0, 0] = 1 - right - shares[:, 0, 2]
    out, rows = np.empty((len(x), 1, channels), np.float32), values.reshape(-1, channels)
    near = np.empty((min(len(x), SAMPLES), 4, channels), np.float32)
    for start in range(0, len(x), SAMPLES):
        some = slice(start, start + SAMPLES)
        few = near[: len(cells[some])]
        rows.take(cells[some], axis=0, out=few, mode="clip")
        np.matmul(shares[some], few, out=out[some])
    return out.reshape(*positions.shape[:-1], channels)
