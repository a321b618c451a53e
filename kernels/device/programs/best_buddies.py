"""Nearest neighbours of two maps' binned descriptors, which are never made: products read the pooled maps.

Bins are counted as in ``bin_offsets``; number 4 is the centre of level 0, alone in use where nothing is binned.
"""

import triton
import triton.language as tl

from facetrt.kernels.device.programs.log_bin import shifted

NOWHERE = tl.constexpr(2147483647)


@triton.jit
def bin_place(i):
    """Level and offset of bin ``i``."""
    above = tl.maximum(i - 9, 0)
    level = tl.where(i < 9, 0, 1 + above // 8)
    place = tl.where(i < 9, i, above % 8)
    place = tl.where((level > 0) & (place > 3), place + 1, place)  # no centre above level 0
    step = (1 + 2 * (level % 2)) * (1 + 8 * (level // 2 % 2)) * (1 + 80 * (level // 4))  # 3^level
    return level, (place // 3 - 1) * step, (place % 3 - 1) * step


@triton.jit
def squared_norms(rows, out, count, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Of rows (count, C), in float32."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_CHANNELS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        inside = (row < count)[:, None] & (start + c < channels)[None, :]
        value = tl.load(rows + row.to(tl.int64)[:, None] * channels + start + c[None, :], mask=inside, other=0.0)
        total += value.to(tl.float32) * value.to(tl.float32)
    tl.store(out + row, tl.sum(total, axis=1), mask=row < count)


@triton.jit
def binned_norms(squares, out, grid_h, grid_w, first, last, BLOCK: tl.constexpr):
    """Norms of the binned descriptors, from the squared norms (levels, cells) of the pooled maps."""
    count = grid_h * grid_w
    cells = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, last):
        level, dy, dx = bin_place(i)
        total += tl.load(squares + level * count + shifted(cells, dy, dx, grid_h, grid_w))
    tl.store(out + cells, tl.sqrt(total), mask=cells < count)


@triton.jit
def _tile(pid, tiles_a, tiles_b, GROUP: tl.constexpr):
    """Which tile of the matrix: GROUP tiles of A share each of B while that is in the cache."""
    group = pid // (GROUP * tiles_b)
    height = tl.minimum(tiles_a - group * GROUP, GROUP)
    within = pid % (GROUP * tiles_b)
    return group * GROUP + within % height, within // height


@triton.jit
def _store_best(
    dots, a, b, norms_a, norms_b, count_a, count_b, end_a, tile_a, tile_b,
    value_a, index_a, value_b, index_b, FLOOR: tl.constexpr,
):  # fmt: skip
    """Largest cosine of a tile in each row and in each column, and the lowest index that has it.

    ``a`` and ``b`` are the tile's cells; those from ``end_a`` and ``count_b`` on do not count.
    """
    norm_a = tl.load(norms_a + a, mask=a < end_a, other=0.0)
    norm_b = tl.load(norms_b + b, mask=b < count_b, other=0.0)
    cosine = dots / tl.maximum(norm_a[:, None] * norm_b[None, :], FLOOR)
    cosine = tl.where((a < end_a)[:, None] & (b < count_b)[None, :], cosine, -float("inf"))
    best_a, best_b = tl.max(cosine, axis=1), tl.max(cosine, axis=0)
    where_a = tl.min(tl.where(cosine == best_a[:, None], b[None, :], NOWHERE), axis=1)
    where_b = tl.min(tl.where(cosine == best_b[None, :], a[:, None], NOWHERE), axis=0)
    row_of_a, row_of_b = tile_b.to(tl.int64) * count_a, tile_a.to(tl.int64) * count_b
    tl.store(value_a + row_of_a + a, best_a, mask=a < end_a)
    tl.store(index_a + row_of_a + a, where_a, mask=a < end_a)
    tl.store(value_b + row_of_b + b, best_b, mask=b < count_b)
    tl.store(index_b + row_of_b + b, where_b, mask=b < count_b)


@triton.jit
def direct(
    levels_a, levels_b, norms_a, norms_b, value_a, index_a, value_b, index_b,
    height_a, width_a, height_b, width_b, channels, first, last,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
):  # fmt: skip
    """One product whose inner dimension runs over bins and channels; levels (levels, cells, C), of A and of B."""
    count_a, count_b = height_a * width_a, height_b * width_b
    tile_a, tile_b = _tile(tl.program_id(0), tl.cdiv(count_a, BLOCK_A), tl.cdiv(count_b, BLOCK_B), GROUP)
    a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    c = tl.arange(0, BLOCK_CHANNELS)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for i in range(first * blocks, last * blocks):  # one loop, so that loads are pipelined across bins
        level, dy, dx = bin_place(i // blocks)
        channel = (i % blocks) * BLOCK_CHANNELS + c
        rows_a = level.to(tl.int64) * count_a + shifted(a, dy, dx, height_a, width_a)
        rows_b = level.to(tl.int64) * count_b + shifted(b, dy, dx, height_b, width_b)
        inside = channel < channels
        part_a = tl.load(levels_a + rows_a[:, None] * channels + channel[None, :], mask=inside[None, :], other=0.0)
        part_b = tl.load(levels_b + rows_b[None, :] * channels + channel[:, None], mask=inside[:, None], other=0.0)
        dots = tl.dot(part_a, part_b, dots, input_precision="ieee")
    _store_best(
        dots, a, b, norms_a, norms_b, count_a, count_b, count_a, tile_a, tile_b,
        value_a, index_a, value_b, index_b, FLOOR,
    )  # fmt: skip


@triton.jit
def products(
    rows_a, rows_b, out, count_a, count_b, stride, channels,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """rows_a (count_a, C) · rows_b (count_b, C)ᵀ in float32, to rows that are ``stride`` apart."""
    tile_a, tile_b = _tile(tl.program_id(0), tl.cdiv(count_a, BLOCK_A), tl.cdiv(count_b, BLOCK_B), GROUP)
    a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    c = tl.arange(0, BLOCK_CHANNELS)
    from_a = rows_a + tl.minimum(a, count_a - 1).to(tl.int64)[:, None] * channels + c[None, :]
    from_b = rows_b + tl.minimum(b, count_b - 1).to(tl.int64)[None, :] * channels + c[:, None]
    dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        inside = start + c < channels
        part_a = tl.load(from_a + start, mask=inside[None, :], other=0.0)
        part_b = tl.load(from_b + start, mask=inside[:, None], other=0.0)
        dots = tl.dot(part_a, part_b, dots, input_precision="ieee")
    target = out + a.to(tl.int64)[:, None] * stride + b[None, :]
    tl.store(target, dots, mask=(a < count_a)[:, None] & (b < stride)[None, :])  # the gap as well: wider stores


@triton.jit
def shift_sum(
    products, norms_a, norms_b, value_a, index_a, value_b, index_b,
    height_a, width_a, height_b, width_b, top, held, start, end, tile, stride, level_size, first, last,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Dot products of binned descriptors as sums of shifted entries of products (levels, held cells of A, stride).

    For the cells start..end of A; ``top`` is the first cell held, ``tile`` counts tiles of A before this launch.
    """
    count_a, count_b = height_a * width_a, height_b * width_b
    a = start + tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    dots = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for i in range(first, last):
        level, dy, dx = bin_place(i)
        row = tl.minimum(tl.maximum(shifted(a, dy, dx, height_a, width_a) - top, 0), held - 1)
        column = shifted(b, dy, dx, height_b, width_b)
        dots += tl.load(products + level * level_size + row.to(tl.int64)[:, None] * stride + column[None, :])
    _store_best(
        dots, a, b, norms_a, norms_b, count_a, count_b, end, tile + tl.program_id(0), tl.program_id(1),
        value_a, index_a, value_b, index_b, FLOOR,
    )  # fmt: skip


@triton.jit
def reduce_best(values, indices, value, index, tiles, count, limit, BLOCK_TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Best of the tiles' (tiles, count) values for each of ``count`` cells; among equals the lowest index.

    Where there is none, for NaN, the index is 0: all indices are below ``limit`` whatever the maps hold.
    """
    cells = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = tl.full((BLOCK,), NOWHERE, tl.int32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        inside = (tile < tiles)[:, None] & (cells < count)[None, :]
        source = tile.to(tl.int64)[:, None] * count + cells[None, :]
        found = tl.load(values + source, mask=inside, other=-float("inf"))
        places = tl.load(indices + source, mask=inside, other=NOWHERE)
        top = tl.max(found, axis=0)
        place = tl.min(tl.where(found == top[None, :], places, NOWHERE), axis=0)
        where = tl.where(top > best, place, tl.where(top == best, tl.minimum(where, place), where))
        best = tl.maximum(best, top)
    tl.store(value + cells, best, mask=cells < count)
    tl.store(index + cells, tl.where(where < limit, where, 0), mask=cells < count)
