"""Graphs of alike cells as bits, and products with them.

Bit ``j`` of word ``(w, i)`` is the edge of cells ``i`` and ``32·w + j``; vectors are as long as the bits, zeros behind.
"""

import triton
import triton.language as tl


@triton.jit
def unit_rows(rows, units, count, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``rows (count, C)`` divided by their lengths, which are computed in float64; rows of zeros stay."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    places = row.to(tl.int64)[:, None] * channels + lanes[None, :]
    squares = tl.zeros((ROWS, BLOCK), tl.float64)
    for start in range(0, channels, BLOCK):
        inside = (row < count)[:, None] & (start + lanes < channels)[None, :]
        values = tl.load(rows + places + start, mask=inside, other=0.0).to(tl.float64)
        squares += values * values
    length = tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), 1e-12)
    for start in range(0, channels, BLOCK):
        inside = (row < count)[:, None] & (start + lanes < channels)[None, :]
        values = tl.load(rows + places + start, mask=inside, other=0.0).to(tl.float64)
        tl.store(units + places + start, (values / length[:, None]).to(tl.float32), mask=inside)


@triton.jit
def strong_edges(
    units, limit, bits, count, words, channels, TIE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One word of ``ROWS`` cells of one image per program.

    Cosines that are near the limit are computed again in float64, channel by channel.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bit, lanes = tl.arange(0, 32), tl.arange(0, BLOCK)
    column = word * 32 + bit
    own = units + image * count * channels
    row_at, column_at = row.to(tl.int64)[:, None] * channels, column.to(tl.int64)[:, None] * channels
    cosines = tl.zeros((ROWS, 32), tl.float32)
    for start in range(0, channels, BLOCK):
        inside = (start + lanes < channels)[None, :]
        a = tl.load(own + row_at + start + lanes[None, :], mask=(row < count)[:, None] & inside, other=0.0)
        b = tl.load(own + column_at + start + lanes[None, :], mask=(column < count)[:, None] & inside, other=0.0)
        cosines = tl.dot(a, tl.trans(b), cosines, input_precision="ieee")
    exact_limit = tl.load(limit)
    single = exact_limit.to(tl.float32)
    strong = cosines > single
    near = tl.abs(cosines - single) <= TIE
    if tl.sum(tl.sum(near.to(tl.int32), axis=1), axis=0) > 0:
        exact = tl.zeros((ROWS, 32), tl.float64)
        for channel in range(channels):
            a = tl.load(own + row.to(tl.int64) * channels + channel, mask=row < count, other=0.0)
            b = tl.load(own + column.to(tl.int64) * channels + channel, mask=column < count, other=0.0)
            exact += a.to(tl.float64)[:, None] * b.to(tl.float64)[None, :]
        strong = tl.where(near, exact > exact_limit, strong)
    strong = strong & (column < count)[None, :]
    packed = tl.sum(strong.to(tl.int32) << bit[None, :], axis=1)
    tl.store(bits + (image * words + word) * count + row, packed, mask=row < count)


@triton.jit
def keep_edges(bits, kept, cells, left, count, words, BLOCK: tl.constexpr):
    """The bits without edges of cells that are not kept: 0 in bits ``kept (B, words)`` and in ``cells (B, count)``."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = row < count
    place = (image * words + word) * count + row
    stays = tl.load(cells + image * count + row, mask=inside, other=0) != 0
    found = tl.load(bits + place, mask=inside, other=0) & tl.load(kept + image * words + word)
    tl.store(left + place, tl.where(stays, found, 0), mask=inside)


@triton.jit
def graph_product(bits, vectors, scale, weak, out, count, words, ROWS: tl.constexpr):
    """``scale · W (scale · vector)`` of each image's vector; W is 1 at strong edges and ``weak`` elsewhere."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(1).to(tl.int64)
    bit = tl.arange(0, 32)
    inside = row < count
    first = image * words * 32
    sums, total = tl.zeros((ROWS, 32), tl.float64), tl.zeros((32,), tl.float64)
    for word in range(words):
        place = first + word * 32 + bit
        scaled = tl.load(vectors + place) * tl.load(scale + place)
        edges = tl.load(bits + (image * words + word) * count + row, mask=inside, other=0)
        sums += tl.where(((edges[:, None] >> bit[None, :]) & 1) != 0, scaled[None, :], 0.0)
        total += scaled
    light = tl.load(weak)
    product = (1 - light) * tl.sum(sums, axis=1) + light * tl.sum(total, axis=0)
    width = words * 32
    own = tl.load(scale + first + row, mask=row < width, other=0.0)
    tl.store(out + first + row, tl.where(inside, product * own, 0.0), mask=row < width)


@triton.jit
def inner_products(basis, vectors, out, images, width, step, stride, BLOCK: tl.constexpr):
    """One vector of the basis ``(k, B, width)`` and one image per program: its inner product with the image's vector.

    Stored at ``out (B, stride, stride)[image, step, number]``.
    """
    number, image = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    own, other = (number.to(tl.int64) * images + image) * width, image.to(tl.int64) * width
    for start in range(0, width, BLOCK):
        inside = start + lanes < width
        a = tl.load(basis + own + start + lanes, mask=inside, other=0.0)
        sums += a * tl.load(vectors + other + start + lanes, mask=inside, other=0.0)
    tl.store(out + (image.to(tl.int64) * stride + step) * stride + number, tl.sum(sums, axis=0))


@triton.jit
def subtract(basis, vectors, coefficients, images, width, count, step, stride, BLOCK: tl.constexpr):
    """Each image's vector less ``coefficients[image, step, number]`` times the first ``count`` vectors of its basis."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    inside = place < width
    value = tl.load(vectors + image * width + place, mask=inside, other=0.0)
    for number in range(count):
        share = tl.load(coefficients + (image * stride + step) * stride + number)
        value -= share * tl.load(basis + (number * images + image) * width + place, mask=inside, other=0.0)
    tl.store(vectors + image * width + place, value, mask=inside)


@triton.jit
def normalise(vectors, out, lengths, width, step, stride, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """One image per program: its vector divided by its length, zeros where that is below ``LEAST`` and counts as 0."""
    image = tl.program_id(0)
    first = image.to(tl.int64) * width
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, width, BLOCK):
        values = tl.load(vectors + first + start + lanes, mask=start + lanes < width, other=0.0)
        squares += values * values
    length = tl.sqrt(tl.sum(squares, axis=0))
    long = length >= LEAST
    tl.store(lengths + image.to(tl.int64) * stride + step, tl.where(long, length, 0.0))
    for start in range(0, width, BLOCK):
        inside = start + lanes < width
        values = tl.load(vectors + first + start + lanes, mask=inside, other=0.0)
        tl.store(out + first + start + lanes, tl.where(long, values / tl.where(long, length, 1.0), 0.0), mask=inside)


@triton.jit
def combine(basis, shares, out, images, width, count, stride, BLOCK: tl.constexpr):
    """``out (kept, B, width)``: sums of each image's first ``count`` vectors by ``shares (B, stride, kept)``."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted, kept = tl.program_id(1), tl.num_programs(1)
    image = tl.program_id(2).to(tl.int64)
    inside = place < width
    value = tl.zeros((BLOCK,), tl.float64)
    for number in range(count):
        share = tl.load(shares + (image * stride + number) * kept + wanted)
        value += share * tl.load(basis + (number * images + image) * width + place, mask=inside, other=0.0)
    tl.store(out + (wanted * images + image) * width + place, value, mask=inside)
