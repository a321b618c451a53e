"""The positional table for any grid, by the reference formula (DINO's bicubic interpolation).

It is computed on the host, never inside a graph: it depends on the weights and the grid alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.parallel import one_blas_thread

SCALE_GUARD = 0.1  # what DINO adds to a grid's side before it interpolates by scale
CUBIC = -0.75  # the coefficient A of the bicubic kernel


def positional_table(
    trained: NDArray[np.float32], grid: tuple[int, int], image_size: tuple[int, int], *, by_size: bool = False
) -> NDArray[np.float32]:
    """The trained patch table resampled to a grid.

    Args:
        trained: ``(G, G, C)`` float32, the checkpoint's table without its [CLS] row.
        grid: ``(grid_h, grid_w)``.
        image_size: ``(height, width)`` of the network's input in pixels. A square input with G² cells uses the stored
            table untouched, as in the reference.
        by_size: interpolate to the grid's size instead of by DINO's scale, as SelfMask's networks do; they use the
            stored table untouched wherever it has as many cells.

    Returns:
        ``(grid_h, grid_w, C)`` float32.
    """
    side = trained.shape[0]
    if grid[0] * grid[1] == side * side and (by_size or image_size[0] == image_size[1]):
        return trained if grid == (side, side) else trained.reshape(*grid, -1)
    more = 0.0 if by_size else SCALE_GUARD
    rows, columns = _weights(side, grid[0], more), _weights(side, grid[1], more)
    with one_blas_thread:  # the same bits on any number of threads
        table = np.einsum("yi,ijc,xj->yxc", rows, trained.astype(np.float64), columns, optimize=True)
    return np.ascontiguousarray(table, np.float32)


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


def _weights(side: int, size: int, more: float) -> NDArray[np.float64]:
    """``(size, side)`` interpolation matrix of one axis.

    The reference passes the scale (size + 0.1)/side, and that scale, not size/side, maps the coordinates: ``more`` is
    the 0.1.
    """
    source = (np.arange(size) + 0.5) * side / (size + more) - 0.5
    base = np.floor(source).astype(int)
    matrix = np.zeros((size, side))
    for tap in range(-1, 3):
        column = np.clip(base + tap, 0, side - 1)
        np.add.at(matrix, (np.arange(size), column), _cubic(source - base - tap))
    return matrix


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    u = np.abs(distance)
    near = (CUBIC + 2) * u**3 - (CUBIC + 3) * u**2 + 1
    far = CUBIC * (u**3 - 5 * u**2 + 8 * u - 4)
    return np.where(u <= 1, near, np.where(u < 2, far, 0.0))
