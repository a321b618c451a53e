"""Where cells are, as the network is told: positional tables that are added, angles that queries and keys turn by.

Both depend on the weights and the grid alone, so they are computed on the host in float64, never inside a graph: what
runtimes make of a cubic resizing differs. Source: specification, common DINO backbone §4, backbones in detail §2 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.images.geometry import grid_size
from facetrt.kernels.parallel import one_blas_thread

Float64 = NDArray[np.float64]

SCALE_GUARD = 0.1  # what DINO and DINOv2 add to a grid's side before they interpolate by scale
CUBIC = -0.75  # the coefficient A of the bicubic kernel
CUBIC_ANTIALIAS = -0.5  # the same where the kernel widens to smooth what is made smaller


class TableRule(StrEnum):
    """How a trained table is brought to another grid, as the code does that each family was published with.

    Attributes:
        SCALE: DINO's, by the scale (cells + 0.1) / side, whatever the stride.
        SIZE: SelfMask's, by the grid's size, whatever the stride.
        SCALE_CENTRES: DINOv2's without registers, like ``scale``, at the true centres of overlapping patches.
        SIZE_CENTRES: MAE's and MSN's, like ``size``, at true centres.
        ANTIALIAS: DINOv2's with registers, and timm's: by size with antialiasing, at true centres.
    """

    SCALE = "scale"
    SIZE = "size"
    SCALE_CENTRES = "scale-centres"
    SIZE_CENTRES = "size-centres"
    ANTIALIAS = "antialias"

    @property
    def true_centres(self) -> bool:
        """Whether cells that coincide across strides get the same codes; DINO's own code spreads them evenly."""
        return self in (TableRule.SCALE_CENTRES, TableRule.SIZE_CENTRES, TableRule.ANTIALIAS)


@dataclass(frozen=True)
class Cells:
    """The cells of an image: ``image_size (height, width)`` of the network's input, patches of ``patch`` pixels every
    ``stride`` pixels.
    """

    image_size: tuple[int, int]
    patch: int
    stride: int

    @property
    def grid(self) -> tuple[int, int]:
        """``(grid_h, grid_w)``."""
        return grid_size(self.image_size, self.patch, self.stride)

    def centres(self, axis: int) -> Float64:
        """Where cells lie along one axis, as shares in (0, 1) of the extent that they cover."""
        return (np.arange(self.grid[axis]) * self.stride + self.patch / 2) / self._extent(axis)

    def patches(self, axis: int) -> float:
        """How many patches lie side by side in the extent that the cells of one axis cover."""
        return self._extent(axis) / self.patch

    def carriers(self, prefix: int) -> NDArray[np.int64]:
        """Which tokens the network has at the stride of its patch, in order: ``prefix`` tokens that stand before those
        of cells, and the cells whose row and column are whole patches from the first.
        """
        rows, columns = (np.flatnonzero(np.arange(cells) * self.stride % self.patch == 0) for cells in self.grid)
        cells = (rows[:, None] * self.grid[1] + columns).ravel()
        return np.concatenate([np.arange(prefix), prefix + cells]).astype(np.int64)

    def _extent(self, axis: int) -> int:
        return (self.grid[axis] - 1) * self.stride + self.patch


def positional_table(
    trained: NDArray[np.float32], cells: Cells, rule: TableRule = TableRule.SCALE
) -> NDArray[np.float32]:
    """The trained patch table resampled to a grid; untouched where the code it was published with does not touch it.

    Args:
        trained: ``(G, G, C)`` float32, the checkpoint's table without the rows of [CLS] and registers.

    Returns:
        ``(grid_h, grid_w, C)`` float32.
    """
    side, grid, (height, width) = trained.shape[0], cells.grid, cells.image_size
    square = rule in (TableRule.SIZE, TableRule.SIZE_CENTRES) or height == width
    if grid[0] * grid[1] == side * side and square and not (rule.true_centres and cells.stride != cells.patch):
        return trained if grid == (side, side) else trained.reshape(*grid, -1)
    rows, columns = (_weights(side, cells, axis, rule) for axis in (0, 1))
    with one_blas_thread:  # the same bits on any number of threads
        table = np.einsum("yi,ijc,xj->yxc", rows, trained.astype(np.float64), columns, optimize=True)
    return np.ascontiguousarray(table, np.float32)


@dataclass(frozen=True)
class Rotation:
    """How queries and keys turn with their cell (RoPE).

    With ``u`` a cell's true centre along an axis, as a share of ``n`` patches side by side, its angles are
    ``2π · c / period`` with ``c = scale · u + per_patch / n + offset``: half of a head's channels turn with the row,
    half with the column, the row first unless ``x_first``.
    """

    scale: float
    per_patch: float
    offset: float
    x_first: bool


def rotation_table(periods: NDArray[np.float32], cells: Cells, rotation: Rotation) -> NDArray[np.float32]:
    """Sine and cosine of each cell's angles, ``(2, grid_h, grid_w, d / 2)`` float32 for heads of d channels.

    Args:
        periods: ``(d / 4,)`` float32, the same for both axes.
    """
    angles = [2 * np.pi * _coordinates(cells, axis, rotation)[:, None] / periods.astype(np.float64) for axis in (0, 1)]
    grid_h, grid_w = cells.grid
    down = np.broadcast_to(angles[0][:, None], (grid_h, grid_w, len(periods)))
    across = np.broadcast_to(angles[1][None], (grid_h, grid_w, len(periods)))
    both = np.concatenate([across, down] if rotation.x_first else [down, across], axis=2)
    return np.stack([np.sin(both), np.cos(both)]).astype(np.float32)


def _coordinates(cells: Cells, axis: int, rotation: Rotation) -> Float64:
    return rotation.scale * cells.centres(axis) + (rotation.per_patch / cells.patches(axis) + rotation.offset)


def padding_correction(
    padding: NDArray[np.float32], grid: tuple[int, int], picture: tuple[int, int], stride: int
) -> NDArray[np.float32]:
    """What is to be added to the embeddings of cells, ``(grid_h, grid_w, C)``, so that their padding is exactly zero.

    Bytes cannot hold the colour that normalisation turns into zero: images are padded with the nearest one. The patch
    convolution is linear, so that what this adds to a cell depends only on which of its pixels are padding.

    Args:
        padding: ``(patch, patch, C)``, what a pixel of the exact colour would add beside one of the nearest bytes.
        picture: ``(height, width)`` of the part of the image that is not padding.
        stride: between cells.
    """
    patch = len(padding)
    sums = np.zeros((patch + 1, patch + 1, padding.shape[2]))
    sums[1:, 1:] = padding.astype(np.float64).cumsum(axis=0).cumsum(axis=1)
    rows, columns = (
        np.clip(side - np.arange(count) * stride, 0, patch) for count, side in zip(grid, picture, strict=True)
    )
    return np.asarray(sums[patch, patch] - sums[rows[:, None], columns], np.float32)


def _weights(side: int, cells: Cells, axis: int, rule: TableRule) -> Float64:
    """``(cells, side)`` interpolation matrix of one axis."""
    count = cells.grid[axis]
    if rule is TableRule.ANTIALIAS:
        return _smoothing(side, cells.centres(axis) * side, max(side / cells.patches(axis), 1.0))
    # by scale the codes pass (size + 0.1) / side, and that scale, not size / side, maps the coordinates
    more = SCALE_GUARD if rule in (TableRule.SCALE, TableRule.SCALE_CENTRES) else 0.0
    patches = cells.patches(axis) if rule.true_centres else count  # side by side
    centres = cells.centres(axis) * patches if rule.true_centres else np.arange(0.5, count)
    source: Float64 = centres * side / (patches + more) - 0.5
    base = np.floor(source).astype(int)
    matrix = np.zeros((count, side))
    for tap in range(-1, 3):
        column = np.clip(base + tap, 0, side - 1)
        np.add.at(matrix, (np.arange(count), column), _cubic(source - base - tap, CUBIC))
    return matrix


def _smoothing(side: int, centres: Float64, stretch: float) -> Float64:
    """Weights of torch's antialiased bicubic: a kernel that is stretched, cut off at the borders and summed to one."""
    matrix = np.zeros((len(centres), side))
    low = np.maximum(np.floor(centres - 2 * stretch + 0.5), 0).astype(int)
    high = np.minimum(np.floor(centres + 2 * stretch + 0.5), side).astype(int)
    for row, (first, last, centre) in enumerate(zip(low, high, centres, strict=True)):
        taps = np.arange(first, last)
        weights = _cubic((taps + 0.5 - centre) / stretch, CUBIC_ANTIALIAS)
        matrix[row, taps] = weights / weights.sum()
    return matrix


def _cubic(distance: Float64, a: float) -> Float64:
    u = np.abs(distance)
    near = (a + 2) * u**3 - (a + 3) * u**2 + 1
    far = a * (u**3 - 5 * u**2 + 8 * u - 4)
    return np.where(u <= 1, near, np.where(u < 2, far, 0.0))
