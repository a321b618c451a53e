"""The two passes of a resize on 8-bit pixels, in Pillow's fixed-point arithmetic, and normalisation by table."""

import triton
import triton.language as tl

PRECISION_BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)


@triton.jit
def _to_pixel(total):
    """Fixed point, with half a unit added, to 0..255."""
    return tl.minimum(tl.maximum(total >> PRECISION_BITS, 0), 255)


@triton.jit
def resize_columns(
    images, starts, counts, weights, out, top, height, rows, width, out_width,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Horizontal pass: images (B, height, width, 3) to out (B, rows, out_width, 3), of the rows from ``top`` on.

    Works on (pixel, channel) pairs in memory order. A weight is loaded once for BLOCK_ROWS rows.
    """
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    image = tl.program_id(2).to(tl.int64)
    inside = elements < out_width * 3
    column = elements // 3
    count = tl.load(counts + column, mask=inside, other=0)
    first = tl.load(starts + column, mask=inside, other=0) * 3 + elements % 3
    sources = images + image * height * width * 3 + ((top + y) * (width * 3))[:, None] + first[None, :]
    written = (y < rows)[:, None] & inside[None, :]
    total = tl.full((BLOCK_ROWS, BLOCK), HALF, tl.int32)
    for tap in range(tl.max(count, axis=0)):
        used = tap < count
        weight = tl.load(weights + tap * out_width + column, mask=used, other=0)
        pixel = tl.load(sources + tap * 3, mask=written & used[None, :], other=0)
        total += pixel.to(tl.int32) * weight[None, :]
    targets = out + image * rows * out_width * 3 + (y * (out_width * 3))[:, None] + elements[None, :]
    tl.store(targets, _to_pixel(total).to(tl.uint8), mask=written)


@triton.jit
def _row_of_pixels(images, starts, counts, weights, y, image, elements, inside, rows, out_height, row_elements, top):
    """Vertical pass for some of the (pixel, channel) pairs of output row ``y``; images (B, rows, width, 3)."""
    start = tl.load(starts + y) - top
    sources = images + (image * rows + start) * row_elements + elements
    total = tl.full(elements.shape, HALF, tl.int32)
    for tap in range(tl.load(counts + y)):
        pixel = tl.load(sources + tap * row_elements, mask=inside, other=0)
        total += pixel.to(tl.int32) * tl.load(weights + tap * out_height + y)
    return _to_pixel(total)


@triton.jit
def resize_rows(images, starts, counts, weights, out, top, rows, out_height, width, BLOCK: tl.constexpr):
    """Vertical pass: images (B, rows, width, 3), whose first row is row ``top`` of the original, to 8-bit pixels."""
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    inside = elements < width * 3
    pixel = _row_of_pixels(
        images, starts, counts, weights, y, image, elements, inside, rows, out_height, width * 3, top
    )  # fmt: skip
    tl.store(out + (image * out_height + y) * (width * 3) + elements, pixel.to(tl.uint8), mask=inside)


@triton.jit
def resize_rows_normalised(
    images, starts, counts, weights, table, out, top, rows, out_height, width, BLOCK: tl.constexpr
):  # fmt: skip
    """As ``resize_rows``, and each pixel's entry of table (3, 256) goes to out (B, 3, out_height, width)."""
    elements = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    inside = elements < width * 3
    pixel = _row_of_pixels(
        images, starts, counts, weights, y, image, elements, inside, rows, out_height, width * 3, top
    )  # fmt: skip
    channel = elements % 3
    value = tl.load(table + channel * 256 + pixel, mask=inside, other=0.0)
    target = out + ((image * 3 + channel) * out_height + y) * width + elements // 3
    tl.store(target, value, mask=inside)
