"""Mean-field inference on permutohedral lattices: splat, blur, slice, softmax.

Values are planes, ``(labels, pixels)`` and ``(labels, vertices)``, one plane per second grid index: the planes of an
image stay in the second-level cache, where a gather of single floats costs little.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def splat(
    values,
    scale,
    starts,
    pixels,
    weights,
    vertices_out,
    num_vertices,
    num_pixels,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Each vertex sums ``weight · scale · value`` over its pixels, in the order of its list: no atomics."""
    vertex = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    label = tl.program_id(1).to(tl.int64)
    inside = vertex < num_vertices
    first = tl.load(starts + vertex, mask=inside, other=0)
    end = tl.load(starts + vertex + 1, mask=inside, other=0)
    plane = values + label * num_pixels
    column = tl.arange(0, STEP)
    total = tl.zeros((ROWS, STEP), tl.float32)
    for start in range(0, tl.max(end - first, 0), STEP):
        entry = first[:, None] + start + column[None, :]
        mask = entry < end[:, None]
        pixel = tl.load(pixels + entry, mask=mask, other=0)
        weight = tl.load(weights + entry, mask=mask, other=0.0)
        total += weight * tl.load(scale + pixel, mask=mask, other=0.0) * tl.load(plane + pixel, mask=mask, other=0.0)
    tl.store(vertices_out + label * num_vertices + vertex, tl.sum(total, 1), mask=inside)


@triton.jit
def blur(vertices, neighbours, blurred, num_vertices, axis, BLOCK: tl.constexpr):
    """``(1/2, 1, 1/2)`` along one axis; absent neighbours, numbered ``num_vertices``, count as zero."""
    vertex = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.program_id(1).to(tl.int64)
    inside = vertex < num_vertices
    plane = vertices + label * num_vertices
    pair = neighbours + tl.cast(axis, tl.int64) * 2 * num_vertices
    ahead = tl.load(pair + vertex, mask=inside, other=num_vertices)
    behind = tl.load(pair + num_vertices + vertex, mask=inside, other=num_vertices)
    own = tl.load(plane + vertex, mask=inside, other=0.0)
    before = tl.load(plane + behind, mask=behind < num_vertices, other=0.0)
    after = tl.load(plane + ahead, mask=ahead < num_vertices, other=0.0)
    tl.store(blurred + label * num_vertices + vertex, own + 0.5 * (after + before), mask=inside)


@triton.jit
def slice_vertices(
    vertices, corners, weights, scale, base, out, strength, num_vertices, num_pixels, num_corners, BLOCK: tl.constexpr
):
    """``out = base - strength · scale · Σ weight · vertex`` over the corners of each pixel; ``out`` may be ``base``."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.program_id(1).to(tl.int64)
    inside = pixel < num_pixels
    plane = vertices + label * num_vertices
    total = tl.zeros((BLOCK,), tl.float32)
    for corner in range(num_corners):
        entry = pixel + tl.cast(corner, tl.int64) * num_pixels
        vertex = tl.load(corners + entry, mask=inside, other=0)
        total += tl.load(weights + entry, mask=inside, other=0.0) * tl.load(plane + vertex, mask=inside, other=0.0)
    factor = strength * tl.load(scale + pixel, mask=inside, other=0.0)
    place = label * num_pixels + pixel
    tl.store(out + place, tl.load(base + place, mask=inside, other=0.0) - factor * total, mask=inside)


@triton.jit
def reciprocal_root(values, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(values + place, mask=inside, other=1.0)
    tl.store(out + place, tl.div_rn(1.0, tl.sqrt_rn(value)), mask=inside)


@triton.jit
def softmax(energy, marginals, num_labels, num_pixels, BLOCK: tl.constexpr):
    """``exp(-energy)`` over its sum over the labels of each pixel."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    least = tl.load(energy + pixel, mask=inside, other=0.0)
    for label in range(1, num_labels):
        place = pixel + tl.cast(label, tl.int64) * num_pixels
        least = tl.minimum(least, tl.load(energy + place, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    for label in range(num_labels):
        place = pixel + tl.cast(label, tl.int64) * num_pixels
        total += tl.exp(least - tl.load(energy + place, mask=inside, other=0.0))
    for label in range(num_labels):
        place = pixel + tl.cast(label, tl.int64) * num_pixels
        value = tl.exp(least - tl.load(energy + place, mask=inside, other=0.0))
        tl.store(marginals + place, tl.div_rn(value, total), mask=inside)
