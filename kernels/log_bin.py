"""Log-binning: every cell's descriptor joined with its neighbourhood at growing distances.

Source: Amir et al., "Deep ViT Features as Dense Visual Descriptors", section 3.2; the bin order is that of the
published implementation. Bins of level 0 are the 3 × 3 neighbourhood; level k adds the eight 3^k × 3^k means centred
3^k cells away.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError

Array = NDArray[np.generic]


def bin_offsets(hierarchy: int) -> list[tuple[int, int, int]]:
    """``(level, dy, dx)`` of each bin, in concatenation order: level outermost, then dy, then dx."""
    check_hierarchy(hierarchy)
    offsets = []
    for level in range(hierarchy):
        step = 3**level
        window = [(level, dy, dx) for dy in (-step, 0, step) for dx in (-step, 0, step)]
        offsets += [offset for offset in window if level == 0 or offset[1:] != (0, 0)]
    return offsets or [(0, 0, 0)]


def check_hierarchy(hierarchy: int) -> None:
    """Raise :class:`InputError` unless ``hierarchy`` is an integer in 0..6 (0 means no binning)."""
    if not 0 <= hierarchy <= 6:
        raise InputError(f"hierarchy {hierarchy} is out of range: expected 0 (no binning) to 6; the method uses 2")


def check_map(name: str, key_map: Array) -> NDArray[np.float32]:
    """``(grid_h, grid_w, C)`` floats as contiguous float32, or :class:`InputError`."""
    if key_map.ndim != 3 or not np.issubdtype(key_map.dtype, np.floating):
        raise InputError(
            f"{name} has shape {key_map.shape} and type {key_map.dtype}: expected floats of shape "
            "(grid_h, grid_w, C), for example features.map('key@9')"
        )
    return np.ascontiguousarray(key_map, dtype=np.float32)


def average_pool(key_map: NDArray[np.float32], level: int) -> NDArray[np.float32]:
    """Mean over the 3^level × 3^level window around each cell, valid cells only; same shape ``(grid_h, grid_w, C)``."""
    if level == 0:
        return key_map
    return _mean_along(_mean_along(key_map, 0, 3**level), 1, 3**level)


def _mean_along(values: NDArray[np.float32], axis: int, window: int) -> NDArray[np.float32]:
    """Mean over ``window`` neighbours along ``axis``; what lies outside does not count."""
    size, reach = values.shape[axis], window // 2
    total = values.copy()
    counts = np.ones(size, np.float32)
    for shift in range(1, min(reach, size - 1) + 1):
        before, after = _slices(values.ndim, axis, slice(None, -shift)), _slices(values.ndim, axis, slice(shift, None))
        total[after] += values[before]
        total[before] += values[after]
        counts[shift:] += 1
        counts[:-shift] += 1
    total /= counts.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return total


def _slices(ndim: int, axis: int, chosen: slice) -> tuple[slice, ...]:
    return tuple(chosen if i == axis else slice(None) for i in range(ndim))


def log_bin(key_map: Array, hierarchy: int = 2, *, cells: NDArray[np.integer] | None = None) -> NDArray[np.float32]:
    """Binned descriptors, as gathers from one pooled map per level.

    Args:
        key_map: ``(grid_h, grid_w, C)`` floats of any precision.
        hierarchy: number of levels K; 1 + 8·K bins. 0 returns the descriptors unbinned.
        cells: ``(n,)`` row-major cell indices to compute; all cells if None.

    Returns:
        ``(n, bins·C)`` float32, not normalised; channel = bin·C + channel of ``key_map``.

    Raises:
        InputError: wrong shape or type, hierarchy out of range, a cell outside the grid.
    """
    values = check_map("key_map", key_map)
    grid_h, grid_w, channels = values.shape
    rows, columns = np.divmod(_check_cells(cells, grid_h * grid_w), max(grid_w, 1))
    offsets = bin_offsets(hierarchy)
    binned = np.empty((rows.size, len(offsets), channels), np.float32)
    if binned.size == 0:
        return binned.reshape(rows.size, len(offsets) * channels)
    pooled = [average_pool(values, level) for level in range(max(hierarchy, 1))]
    for i, (level, dy, dx) in enumerate(offsets):
        y, x = np.clip(rows + dy, 0, grid_h - 1), np.clip(columns + dx, 0, grid_w - 1)
        binned[:, i] = pooled[level][y, x]
    return binned.reshape(rows.size, -1)


def _check_cells(cells: NDArray[np.integer] | None, count: int) -> NDArray[np.integer]:
    if cells is None:
        return np.arange(count)
    if cells.ndim != 1 or (cells.size and (cells.min() < 0 or cells.max() >= count)):
        raise InputError(f"cells of shape {cells.shape} do not all lie in 0..{count - 1}: expected (n,) cell indices")
    return cells


def log_bin_reference(key_map: Array, hierarchy: int = 2) -> NDArray[np.float32]:
    """The definition, one cell and one bin at a time. Slow; the oracle for :func:`log_bin`."""
    values = np.asarray(key_map, np.float64)
    grid_h, grid_w, channels = values.shape
    offsets = bin_offsets(hierarchy)
    binned = np.empty((grid_h * grid_w, len(offsets), channels))
    for cell in range(grid_h * grid_w):
        for i, (level, dy, dx) in enumerate(offsets):
            y = min(max(cell // grid_w + dy, 0), grid_h - 1)
            x = min(max(cell % grid_w + dx, 0), grid_w - 1)
            reach = 3**level // 2
            window = values[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
            binned[cell, i] = window.mean(axis=(0, 1))
    return binned.reshape(grid_h * grid_w, -1).astype(np.float32)
