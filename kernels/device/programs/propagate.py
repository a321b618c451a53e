"""Labels from the neighbourhoods of earlier frames, a square of target cells at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_lengths(values, out, count, channels, floor, ROWS: tl.constexpr, STEP: tl.constexpr):
    """``1 / max(|row|, floor)`` of each row of ``values (count, channels)``, in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    column = tl.arange(0, STEP)
    total = tl.zeros((ROWS, STEP), tl.float32)
    for start in range(0, channels, STEP):
        channel = start + column
        mask = inside[:, None] & (channel < channels)[None, :]
        value = tl.load(values + row[:, None] * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        total += value * value
    length = tl.sqrt_rn(tl.sum(total, 1))
    tl.store(out + row, tl.div_rn(1.0, tl.maximum(length, floor)), mask=inside)


@triton.jit
def propagate(
    target,
    context,
    target_scale,
    context_scale,
    labels,
    out,
    frames,
    grid_h,
    grid_w,
    channels,
    num_labels,
    radius,
    topk,
    temperature,
    TILE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    LABELS: tl.constexpr,
):
    """``TILE × TILE`` target cells against the cells of their joint neighbourhood, ``CANDIDATES`` at a time.

    The candidates are walked through twice by the same code, so that cosines have the same bits both times: first each
    target collects its ``topk`` largest cosines, then all candidates that reach the smallest of these are weighed.
    """
    tiles_w = tl.cdiv(grid_w, TILE)
    top = tl.program_id(0) // tiles_w * TILE
    left = tl.program_id(0) % tiles_w * TILE
    lane = tl.arange(0, TILE * TILE)
    y = top + lane // TILE
    x = left + lane % TILE
    is_cell = (y < grid_h) & (x < grid_w)
    cell = tl.where(is_cell, y * grid_w + x, 0).to(tl.int64)
    own_scale = tl.load(target_scale + cell, mask=is_cell, other=0.0)
    first_row = tl.maximum(top - radius, 0)
    first_column = tl.maximum(left - radius, 0)
    rows = tl.minimum(top + TILE + radius, grid_h) - first_row
    columns = tl.minimum(left + TILE + radius, grid_w) - first_column
    total = frames * rows * columns
    chunks = tl.cdiv(total, CANDIDATES)

    slot = tl.arange(0, SLOTS)[None, :]
    unused = slot >= topk  # these hold +inf, so that they are never the smallest
    best = tl.where(unused, float("inf"), float("-inf")) + tl.zeros((TILE * TILE, SLOTS), tl.float32)
    label = tl.program_id(1) * LABELS + tl.arange(0, LABELS)
    weight_sum = tl.zeros((TILE * TILE,), tl.float32)
    label_sum = tl.zeros((TILE * TILE, LABELS), tl.float32)
    column = tl.arange(0, CANDIDATES)[None, :]
    for step in range(2 * chunks):
        number = (step % chunks) * CANDIDATES + tl.arange(0, CANDIDATES)
        is_candidate = number < total
        frame = number // (rows * columns)
        row = first_row + number % (rows * columns) // columns
        col = first_column + number % columns
        other = tl.where(is_candidate, (frame.to(tl.int64) * grid_h + row) * grid_w + col, 0)
        dots = tl.zeros((TILE * TILE, CANDIDATES), tl.float32)
        for start in range(0, channels, STEP):
            channel = start + tl.arange(0, STEP)
            exists = channel < channels
            a_mask = is_cell[:, None] & exists[None, :]
            a = tl.load(target + cell[:, None] * channels + channel[None, :], mask=a_mask, other=0.0)
            b_mask = exists[:, None] & is_candidate[None, :]
            b = tl.load(context + other[None, :] * channels + channel[:, None], mask=b_mask, other=0.0)
            dots = tl.dot(a, b, dots, input_precision="ieee")
        scale = tl.load(context_scale + other, mask=is_candidate, other=0.0)
        cosines = dots * own_scale[:, None] * scale[None, :]
        down, along = row[None, :] - y[:, None], col[None, :] - x[:, None]
        near = (tl.maximum(down, -down) <= radius) & (tl.maximum(along, -along) <= radius) & is_candidate[None, :]
        cosines = tl.where(near & is_cell[:, None], cosines, float("-inf"))
        if step < chunks:
            highest = tl.max(cosines, 1)
            lowest = tl.min(best, 1)
            while tl.max((highest > lowest).to(tl.int32), 0) > 0:
                enters = (highest > lowest)[:, None]
                place = tl.argmin(best, 1)[:, None]
                taken = tl.argmax(cosines, 1)[:, None]
                best = tl.where((slot == place) & enters, highest[:, None], best)
                cosines = tl.where((column == taken) & enters, float("-inf"), cosines)
                highest = tl.max(cosines, 1)
                lowest = tl.min(best, 1)
        else:
            # Fewer candidates than topk leave -inf among the kept: what is outside the neighbourhood stays out.
            smallest = tl.maximum(tl.min(best, 1), -3.0e38)
            largest = tl.maximum(tl.max(tl.where(unused, float("-inf"), best), 1), -3.0e38)
            kept = cosines >= smallest[:, None]
            if tl.max(tl.max(kept.to(tl.int32), 1), 0) > 0:
                # The largest cosine cancels in the quotient, and no exponent overflows.
                weights = tl.where(kept, tl.exp((cosines - largest[:, None]) / temperature), 0.0)
                weight_sum += tl.sum(weights, 1)
                mask = is_candidate[:, None] & (label < num_labels)[None, :]
                soft = tl.load(labels + other[:, None] * num_labels + label[None, :], mask=mask, other=0.0)
                label_sum = tl.dot(weights, soft, label_sum, input_precision="ieee")
    result = label_sum / tl.where(is_cell, weight_sum, 1.0)[:, None]
    mask = is_cell[:, None] & (label < num_labels)[None, :]
    tl.store(out + cell[:, None] * num_labels + label[None, :], result, mask=mask)
