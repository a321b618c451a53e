"""Pooled maps, and binned descriptors gathered from them."""

import triton
import triton.language as tl


@triton.jit
def pool(
    maps, out, reach_y, reach_x, grid_h, grid_w, channels, BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):  # fmt: skip
    """Means over the windows of (2 · reach_y + 1) × (2 · reach_x + 1) cells, valid cells only; (B, grid_h, grid_w, C).

    Differences from the centre are averaged, so that equal cells keep their value to the last bit at borders, too.
    """
    cells = tl.program_id(0) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    image = tl.program_id(2).to(tl.int64) * grid_h * grid_w * channels
    inside = (cells < grid_h * grid_w)[:, None] & (c < channels)[None, :]
    y, x = cells // grid_w, cells % grid_w
    centres = image + cells.to(tl.int64)[:, None] * channels + c[None, :]
    centre = tl.load(maps + centres, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_CELLS, BLOCK_CHANNELS), tl.float32)
    for dy in range(-reach_y, reach_y + 1):
        for dx in range(-reach_x, reach_x + 1):
            valid = (y + dy >= 0) & (y + dy < grid_h) & (x + dx >= 0) & (x + dx < grid_w)
            used = inside & valid[:, None]
            value = tl.load(maps + centres + (dy * grid_w + dx) * channels, mask=used, other=0.0).to(tl.float32)
            total += tl.where(used, value - centre, 0.0)
    rows = tl.minimum(y + reach_y, grid_h - 1) - tl.maximum(y - reach_y, 0) + 1
    columns = tl.minimum(x + reach_x, grid_w - 1) - tl.maximum(x - reach_x, 0) + 1
    count = tl.maximum(rows * columns, 1)  # behind the grid there is none
    mean = centre + total / count.to(tl.float32)[:, None]
    tl.store(out + centres, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def shifted(cells, dy, dx, grid_h, grid_w):
    """The cells (dy, dx) away, clamped to the grid."""
    y = tl.minimum(tl.maximum(cells // grid_w + dy, 0), grid_h - 1)
    x = tl.minimum(tl.maximum(cells % grid_w + dx, 0), grid_w - 1)
    return y * grid_w + x


@triton.jit
def _copy_bin(level_map, out, first, rows, cells, c, used, written, i, dy, dx, grid_h, grid_w, channels, bins):
    """Bin ``i`` of some descriptors: the level's map at the shifted cells; zero where ``used`` is false."""
    sources = first + shifted(cells, dy, dx, grid_h, grid_w).to(tl.int64) * channels
    value = tl.load(level_map + sources[:, None] + c[None, :], mask=used, other=0.0)
    targets = out + (rows * bins + i)[:, None] * channels + c[None, :]
    tl.store(targets, value.to(out.dtype.element_ty), mask=written, cache_modifier=".cs")  # maps stay in the cache


@triton.jit
def _copy_bins(
    maps, pooled, level_size, out, first, rows, cells, c, used, written, grid_h, grid_w, channels, bins
):  # fmt: skip
    """All bins of some descriptors, level 0 from ``maps`` and the others from ``pooled``, ``level_size`` apart."""
    for i in tl.static_range(9):
        _copy_bin(
            maps, out, first, rows, cells, c, used, written, i, i // 3 - 1, i % 3 - 1, grid_h, grid_w, channels, bins
        )  # fmt: skip
    step = 3
    for level in range(1, bins // 8):
        for i in tl.static_range(8):
            place = i + i // 4  # in 3 × 3, without the centre
            _copy_bin(
                pooled + (level - 1) * level_size, out, first, rows, cells, c, used, written, level * 8 + 1 + i,
                (place // 3 - 1) * step, (place % 3 - 1) * step, grid_h, grid_w, channels, bins,
            )  # fmt: skip
        step *= 3


@triton.jit
def log_bin(
    maps, pooled, out, level_size, grid_h, grid_w, channels, bins,
    BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Descriptors of all cells of maps (B, grid_h, grid_w, C); out (B, grid_h · grid_w, bins, C)."""
    count = grid_h * grid_w
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)  # side by side in time: whole rows are written at once
    cells = (tl.program_id(0) // blocks) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    c = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    image = tl.program_id(1).to(tl.int64) * count
    inside = (cells < count)[:, None] & (c < channels)[None, :]
    _copy_bins(
        maps, pooled, level_size, out, image * channels, image + cells, cells, c, inside, inside,
        grid_h, grid_w, channels, bins,
    )  # fmt: skip


@triton.jit
def gather_log_bin(
    maps, pooled, cells, count, out, level_size, rows, grid_h, grid_w, channels, bins,
    BLOCK_CELLS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Descriptors of the first ``count[0]`` of the chosen cells, zeros after them; out (rows, bins, C)."""
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    row = (tl.program_id(0) // blocks) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    c = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    chosen = tl.load(cells + row, mask=row < tl.minimum(tl.load(count), rows), other=-1)
    used = (chosen >= 0) & (chosen < grid_h * grid_w)
    cell = tl.where(used, chosen, 0)
    within = (c < channels)[None, :]
    _copy_bins(
        maps, pooled, level_size, out, tl.zeros((), tl.int64), row.to(tl.int64), cell, c, used[:, None] & within,
        (row < rows)[:, None] & within, grid_h, grid_w, channels, bins,
    )  # fmt: skip
