"""Small conversions between the encoder's outputs and the operations."""

import triton
import triton.language as tl


@triton.jit
def place(source, target, offset, source_width, height, width, size, BLOCK: tl.constexpr):
    """``target[offset:]`` gets the upper-left ``(height, width, 3)`` bytes of an image ``source_width`` wide."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    row = index // (width * 3)
    column = index % (width * 3)
    values = tl.load(source + row.to(tl.int64) * source_width * 3 + column, mask=inside)
    tl.store(target + offset + index, values, mask=inside)


@triton.jit
def to_half(source, target, size, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """float32 to float16; what half precision cannot hold becomes its largest number."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    values = tl.load(source + index, mask=inside)
    values = tl.minimum(tl.maximum(values, -LIMIT), LIMIT)
    tl.store(target + index, values.to(tl.float16), mask=inside)


@triton.jit
def take(source, indices, target, size, BLOCK: tl.constexpr):
    """``target[i] = source[indices[i]]``; negative indices give zero."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    chosen = tl.load(indices + index, mask=inside, other=-1)
    values = tl.load(source + chosen, mask=inside & (chosen >= 0), other=0.0)
    tl.store(target + index, values, mask=inside)


@triton.jit
def join_rows(a, b, target, count, width_a, width_b, BLOCK: tl.constexpr):
    """Row ``i < count`` of both inputs side by side, divided by the length of the whole; later rows are zero."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    out = target + row * (width_a + width_b)
    if row >= tl.load(count):
        for start in range(0, width_a + width_b, BLOCK):
            tl.store(out + start + channels, tl.zeros((BLOCK,), tl.float32), mask=start + channels < width_a + width_b)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width_a, BLOCK):
            values = tl.load(a + row * width_a + start + channels, mask=start + channels < width_a, other=0.0)
            squares += values * values
        for start in range(0, width_b, BLOCK):
            values = tl.load(b + row * width_b + start + channels, mask=start + channels < width_b, other=0.0)
            squares += values * values
        length = tl.sqrt_rn(tl.sum(squares))
        scale = tl.where(length > 0, 1.0, 0.0) / tl.where(length > 0, length, 1.0)
        for start in range(0, width_a, BLOCK):
            inside = start + channels < width_a
            values = tl.load(a + row * width_a + start + channels, mask=inside, other=0.0)
            tl.store(out + start + channels, values * scale, mask=inside)
        for start in range(0, width_b, BLOCK):
            inside = start + channels < width_b
            values = tl.load(b + row * width_b + start + channels, mask=inside, other=0.0)
            tl.store(out + width_a + start + channels, values * scale, mask=inside)


@triton.jit
def add_taken(a, cells_a, b, cells_b, target, size, BLOCK: tl.constexpr):
    """``target[i] = a[cells_a[i]] + b[cells_b[i]]``; zero where ``cells_a`` is negative."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    first = tl.load(cells_a + index, mask=inside, other=-1)
    second = tl.load(cells_b + index, mask=inside, other=-1)
    valid = inside & (first >= 0) & (second >= 0)
    values = tl.load(a + first, mask=valid, other=0.0) + tl.load(b + second, mask=valid, other=0.0)
    tl.store(target + index, values, mask=inside)


@triton.jit
def take_integers(source, indices, target, size, BLOCK: tl.constexpr):
    """``target[i] = source[indices[i]]`` for int32; negative indices give -1."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    chosen = tl.load(indices + index, mask=inside, other=-1)
    values = tl.load(source + chosen, mask=inside & (chosen >= 0), other=-1)
    tl.store(target + index, values, mask=inside)
