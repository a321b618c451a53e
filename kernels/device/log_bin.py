"""Log-binning on the device: pooled maps once per level, then every descriptor gathered from them in one write.

The output is 17 times the input, so its write is what takes the time; the maps are small and stay in the cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import bin_offsets

BLOCK_CELLS = 8
BLOCK_CHANNELS = 128  # with 8 cells: one 16-byte load and store of float16 by each of 128 threads per bin

_KINDS = {np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32"}
_BLOCKS = {"BLOCK_CELLS": BLOCK_CELLS, "BLOCK_CHANNELS": BLOCK_CHANNELS}
_GRID = (("grid_h", "i32"), ("grid_w", "i32"), ("channels", "i32"))


def _pool(kind: str, out: str) -> Program:
    return Program(
        name=f"pool_{kind}_{out}",
        source="log_bin:pool",
        arguments=(("maps", f"*{kind}"), ("out", f"*{out}"), ("reach_y", "i32"), ("reach_x", "i32"), *_GRID),
        constants=_BLOCKS,
        divisible=("channels",),
    )


def _log_bin(kind: str) -> Program:
    pointers = (("maps", f"*{kind}"), ("pooled", f"*{kind}"), ("out", f"*{kind}"))
    return Program(
        name=f"log_bin_{kind}",
        source="log_bin:log_bin",
        arguments=(*pointers, ("level_size", "i64"), *_GRID, ("bins", "i32")),
        constants=_BLOCKS,
        divisible=("level_size", "channels"),
    )


def _gather(kind: str) -> Program:
    pointers = (("maps", f"*{kind}"), ("pooled", "*fp32"), ("cells", "*i32"), ("count", "*i32"), ("out", "*fp32"))
    return Program(
        name=f"gather_log_bin_{kind}",
        source="log_bin:gather_log_bin",
        arguments=(*pointers, ("level_size", "i64"), ("rows", "i32"), *_GRID, ("bins", "i32")),
        constants=_BLOCKS,
        divisible=("level_size", "channels"),
    )


POOL = {(kind, out): _pool(_KINDS[kind], _KINDS[out]) for kind in _KINDS for out in _KINDS}
LOG_BIN = {kind: _log_bin(name) for kind, name in _KINDS.items()}
GATHER = {kind: _gather(name) for kind, name in _KINDS.items()}
PROGRAMS = (*POOL.values(), *LOG_BIN.values(), *GATHER.values())


def check_map(name: str, values: DeviceArray, axes: str) -> None:
    """Raise :class:`InputError` unless this is a map the kernels take; ``axes`` as in ``(grid_h, grid_w, C)``."""
    if len(values.shape) != axes.count(",") + 1 or values.dtype not in _KINDS:
        raise InputError(
            f"{name} has shape {values.shape} and type {values.dtype}: expected float16 or float32 of shape {axes}"
        )
    if values.shape[-1] % 16 or not values.shape[-1]:
        raise InputError(f"{name} has {values.shape[-1]} channels: expected a multiple of 16")


def pool_levels(device: Device, maps: DeviceArray, levels: int, dtype: DTypeLike) -> DeviceArray:
    """Pooled maps of levels 1 to ``levels - 1``: ``(levels - 1, B, grid_h, grid_w, C)`` of type ``dtype``.

    Args:
        device: where the maps are.
        maps: ``(B, grid_h, grid_w, C)`` float16 or float32.
        levels: with the maps themselves, level 0, counted.
    """
    pooled = device.empty((max(levels - 1, 0), *maps.shape), dtype)
    for level in range(1, levels):
        pool_level(device, maps, level, pooled.rows(level - 1, level).reshape(*maps.shape))
    return pooled


def pool_level(device: Device, maps: DeviceArray, level: int, out: DeviceArray) -> None:
    """Means over 3^level × 3^level cells of ``maps (B, grid_h, grid_w, C)`` into ``out`` of the same shape."""
    reach = 3**level // 2
    if level == 1:  # nine loads from the cache; two passes would write and read the maps once more
        _launch_pool(device, maps, out, reach, reach)
        return
    columns = device.empty(maps.shape, np.float32)
    _launch_pool(device, maps, columns, reach, 0)
    _launch_pool(device, columns, out, 0, reach)


def _launch_pool(device: Device, maps: DeviceArray, out: DeviceArray, reach_y: int, reach_x: int) -> None:
    batch, grid_h, grid_w, channels = maps.shape
    reach_y, reach_x = min(reach_y, grid_h - 1), min(reach_x, grid_w - 1)  # nothing lies beyond
    if maps.size:
        grid = (-(-grid_h * grid_w // BLOCK_CELLS), -(-channels // BLOCK_CHANNELS), batch)
        program = POOL[maps.dtype, out.dtype]
        device.launch(program, grid, maps, out, reach_y, reach_x, grid_h, grid_w, channels)


def log_bin(device: Device, maps: DeviceArray, hierarchy: int = 2) -> DeviceArray:
    """Binned descriptors of all cells, not normalised.

    Args:
        device: where the maps are.
        maps: ``(B, grid_h, grid_w, C)`` float16 or float32, C a multiple of 16.
        hierarchy: number of levels K; 1 + 8·K bins in the order of :func:`facetrt.kernels.log_bin.bin_offsets`. 0
            returns the descriptors unbinned: the same memory in another shape.

    Returns:
        ``(B, grid_h·grid_w, bins·C)`` of the maps' type. Means are made in float32.

    Raises:
        InputError: wrong shape or type, hierarchy out of range.
    """
    check_map("maps", maps, "(B, grid_h, grid_w, C)")
    bins = len(bin_offsets(hierarchy))
    batch, grid_h, grid_w, channels = maps.shape
    if hierarchy == 0:
        return maps.reshape(batch, grid_h * grid_w, channels)
    out = device.empty((batch, grid_h * grid_w, bins * channels), maps.dtype)
    if out.size:
        pooled = pool_levels(device, maps, hierarchy, maps.dtype) if hierarchy > 1 else maps
        grid = (_blocks(grid_h * grid_w, channels), batch)
        device.launch(LOG_BIN[maps.dtype], grid, maps, pooled, out, maps.size, grid_h, grid_w, channels, bins)
    return out


def gather_log_bin(
    device: Device, key_map: DeviceArray, cells: DeviceArray, count: DeviceArray, hierarchy: int = 2
) -> DeviceArray:
    """Binned descriptors of chosen cells, in float32 throughout.

    Args:
        device: where the map is.
        key_map: ``(grid_h, grid_w, C)`` float16 or float32, C a multiple of 16.
        cells: ``(n,)`` int32 row-major cell indices.
        count: ``(1,)`` int32; how many of ``cells`` are meant, known to the device only.
        hierarchy: number of levels, at least 1.

    Returns:
        ``(n, bins·C)`` float32; rows from ``count`` on, and of cells outside the grid, are zero.

    Raises:
        InputError: wrong shapes or types, hierarchy out of range.
    """
    check_map("key_map", key_map, "(grid_h, grid_w, C)")
    bins = len(bin_offsets(hierarchy))
    if hierarchy == 0:
        raise InputError("hierarchy 0 is no binning: expected 1 to 6")
    if len(cells.shape) != 1 or count.shape != (1,):
        raise InputError(f"cells of shape {cells.shape} and count of shape {count.shape}: expected (n,) and (1,)")
    grid_h, grid_w, channels = key_map.shape
    out = device.empty((len(cells), bins * channels), np.float32)
    if out.size:
        maps = key_map.reshape(1, grid_h, grid_w, channels)
        pooled = pool_levels(device, maps, hierarchy, np.float32) if hierarchy > 1 else out  # not read at one level
        grid = (_blocks(len(cells), channels),)
        sizes = (maps.size, len(cells), grid_h, grid_w, channels, bins)
        device.launch(GATHER[maps.dtype], grid, maps, pooled, cells, count, out, *sizes)
    return out


def _blocks(cells: int, channels: int) -> int:
    return -(-cells // BLOCK_CELLS) * -(-channels // BLOCK_CHANNELS)
