"""Choosing cells and rows: min-max saliency, salient best buddies, unit rows, the best of each cluster."""

import triton
import triton.language as tl


@triton.jit
def normalise_saliency(attention, saliency, cells, BLOCK: tl.constexpr):
    """One image per program: ``(x - low) / (high - low)`` of its ``cells``, zeros where they are all alike."""
    first = tl.program_id(0).to(tl.int64) * cells
    lanes = tl.arange(0, BLOCK)
    low, high = tl.full((BLOCK,), float("inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, cells, BLOCK):
        inside = start + lanes < cells
        values = tl.load(attention + first + start + lanes, mask=inside, other=0.0)
        low = tl.minimum(low, tl.where(inside, values, float("inf")))
        high = tl.maximum(high, tl.where(inside, values, float("-inf")))
    least, most = tl.min(low, axis=0), tl.max(high, axis=0)
    span = tl.where(most > least, most - least, 1.0)
    for start in range(0, cells, BLOCK):
        inside = start + lanes < cells
        values = tl.load(attention + first + start + lanes, mask=inside, other=0.0)
        scaled = tl.where(most > least, tl.div_rn(values - least, span + tl.zeros_like(values)), 0.0)
        tl.store(saliency + first + start + lanes, scaled, mask=inside)


@triton.jit
def reach(nn_ba, saliency_b, reached, count_b, threshold, BLOCK: tl.constexpr):
    """Mark the neighbours of salient cells of B; several programs may store the same 1."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < count_b
    neighbour = tl.load(nn_ba + cell, mask=inside, other=-1)
    salient = inside & (tl.load(saliency_b + cell, mask=inside, other=0.0) > threshold)
    tl.store(reached + neighbour, tl.full((BLOCK,), 1, tl.uint8), mask=salient & (neighbour >= 0))


@triton.jit
def _kept(cell, nn_ab, nn_ba, saliency_a, reached, count_a, threshold):
    """1 where a cell of A is a best buddy, salient and reached, else 0."""
    inside = cell < count_a
    buddy = tl.load(nn_ab + cell, mask=inside, other=-1)
    back = tl.load(nn_ba + buddy, mask=buddy >= 0, other=-1)
    salient = tl.load(saliency_a + cell, mask=inside, other=0.0) > threshold
    marked = tl.load(reached + cell, mask=inside, other=0) > 0
    return (inside & (buddy >= 0) & (back == cell) & salient & marked).to(tl.int32)


@triton.jit
def count_kept(nn_ab, nn_ba, saliency_a, reached, sizes, count_a, threshold, BLOCK: tl.constexpr):
    """How many cells of its block each program would keep."""
    block = tl.program_id(0)
    kept = _kept(block * BLOCK + tl.arange(0, BLOCK), nn_ab, nn_ba, saliency_a, reached, count_a, threshold)
    tl.store(sizes + block, tl.sum(kept, axis=0))


@triton.jit
def store_kept(nn_ab, nn_ba, saliency_a, reached, sizes, cells, count, count_a, threshold, BLOCK: tl.constexpr):
    """The kept cells of each block behind those of the blocks before it, and -1 behind them all."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    before, total = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, blocks, BLOCK):
        size = tl.load(sizes + start + lanes, mask=start + lanes < blocks, other=0)
        total += size
        before += tl.where(start + lanes < block, size, 0)
    cell = block * BLOCK + lanes
    kept = _kept(cell, nn_ab, nn_ba, saliency_a, reached, count_a, threshold)
    place = tl.sum(before, axis=0) + tl.cumsum(kept, axis=0) - kept
    tl.store(cells + place, cell, mask=kept > 0)
    found = tl.sum(total, axis=0)
    tl.store(cells + cell, tl.full((BLOCK,), -1, tl.int32), mask=(cell >= found) & (cell < count_a))
    if block == 0:
        tl.store(count, found)


@triton.jit
def normalise_rows(rows, units, count, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows divided by their length, ROWS of them per program; zero rows stay zero."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, channels, BLOCK):
        inside = (row < count)[:, None] & (start + lanes < channels)[None, :]
        offset = row[:, None] * channels + start + lanes[None, :]
        values = tl.load(rows + offset, mask=inside, other=0.0).to(tl.float32)
        squares += values * values
    length = tl.sqrt_rn(tl.sum(squares, axis=1))
    divisor = tl.where(length > 0, length, 1.0)[:, None] + tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, channels, BLOCK):
        inside = (row < count)[:, None] & (start + lanes < channels)[None, :]
        offset = row[:, None] * channels + start + lanes[None, :]
        values = tl.load(rows + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(units + offset, tl.div_rn(values, divisor), mask=inside)


@triton.jit
def gather_rows(rows, indices, taken, count, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``taken[i] = rows[indices[i]]``; zeros where the index is negative."""
    target = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source = tl.load(indices + target, mask=target < count, other=-1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, channels, BLOCK):
        column = (start + lanes)[None, :]
        inside = (target < count)[:, None] & (column < channels)
        values = tl.load(rows + source[:, None] * channels + column, mask=inside & (source >= 0)[:, None], other=0.0)
        tl.store(taken + target[:, None] * channels + column, values, mask=inside)


@triton.jit
def best_of_clusters(clusters, rank, count, selected, BLOCK: tl.constexpr):
    """One cluster per program: its best-ranked member among the first ``count``, the first one on ties; -1 if empty."""
    cluster = tl.program_id(0)
    total = tl.load(count)
    lanes = tl.arange(0, BLOCK)
    best, chosen = tl.full((), float("-inf"), tl.float32), tl.full((), -1, tl.int32)
    for start in range(0, total, BLOCK):
        item = start + lanes
        inside = item < total
        member = inside & (tl.load(clusters + item, mask=inside, other=-1) == cluster)
        value = tl.where(member, tl.load(rank + item, mask=inside, other=0.0), float("-inf"))
        most = tl.max(value, axis=0)
        where = tl.min(tl.where(member & (value == most), item, 0x7FFFFFFF), axis=0)
        better = most > best
        chosen = tl.where(better, where, chosen)
        best = tl.where(better, most, best)
    tl.store(selected + cluster, chosen)
