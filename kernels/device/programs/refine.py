"""Cells to pixels by given indices, the best label of each pixel, labels to masks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def enlarge(values, rows, columns, out, grid_h, grid_w, height, width, BLOCK: tl.constexpr):
    """``out[plane, y, x] = values[plane, rows[y], columns[x]]``, one plane per second grid index."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(1).to(tl.int64)
    inside = pixel < height * width
    row = tl.load(rows + pixel // width, mask=inside, other=0)
    column = tl.load(columns + pixel % width, mask=inside, other=0)
    found = tl.load(values + plane * grid_h * grid_w + row * grid_w + column, mask=inside)
    tl.store(out + plane * height * width + pixel, found, mask=inside)


@triton.jit
def best_label(scores, out, sign, num_labels, num_pixels, BLOCK: tl.constexpr):
    """The label with the largest ``sign · score``; the first one on ties."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    largest = sign * tl.load(scores + pixel, mask=inside, other=0.0)
    best = tl.zeros((BLOCK,), tl.int32)
    for label in range(1, num_labels):
        score = sign * tl.load(scores + tl.cast(label, tl.int64) * num_pixels + pixel, mask=inside, other=0.0)
        best = tl.where(score > largest, label, best)
        largest = tl.maximum(score, largest)
    tl.store(out + pixel, best, mask=inside)
