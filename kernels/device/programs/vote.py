"""Saliency voting."""

import triton
import triton.language as tl


@triton.jit
def mean_saliency(labels, saliency, offsets, means, BLOCK: tl.constexpr):
    """One image and cluster per program: the mean saliency of the cluster's cells in the image, NaN without any."""
    image, cluster = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    lanes = tl.arange(0, BLOCK)
    sums, cells = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    for start in range(first, end, BLOCK):
        inside = start + lanes < end
        member = inside & (tl.load(labels + start + lanes, mask=inside, other=255).to(tl.int32) == cluster)
        sums += tl.load(saliency + start + lanes, mask=member, other=0.0).to(tl.float64)
        cells += member.to(tl.int32)
    count = tl.sum(cells, axis=0)
    mean = tl.sum(sums, axis=0) / tl.maximum(count, 1).to(tl.float64)
    tl.store(means + image * tl.num_programs(1) + cluster, tl.where(count > 0, mean, float("nan")))


@triton.jit
def count_votes(means, threshold, counts, salient, images, needed, BLOCK: tl.constexpr):
    """One cluster per program: how many images' mean is above the threshold; NaN is not."""
    cluster, clusters = tl.program_id(0), tl.num_programs(0)
    least = tl.load(threshold)
    lanes = tl.arange(0, BLOCK)
    votes = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, images, BLOCK):
        image = start + lanes
        mean = tl.load(means + image * clusters + cluster, mask=image < images, other=float("nan"))
        votes += (mean > least).to(tl.int32)
    total = tl.sum(votes, axis=0)
    tl.store(counts + cluster, total)
    tl.store(salient + cluster, (total >= needed).to(tl.uint8))


@triton.jit
def salient_cells(labels, salient, cells, size, BLOCK: tl.constexpr):
    """``cells[i] = salient[labels[i]]``."""
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + cell, mask=cell < size, other=0).to(tl.int32)
    tl.store(cells + cell, tl.load(salient + label, mask=cell < size, other=0), mask=cell < size)
