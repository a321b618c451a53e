"""Mutual nearest neighbours ("best buddies") of two descriptor maps under cosine similarity.

Source: Amir et al., section 4.2. Binned descriptors are 17 times as long as the maps they come from; their dot product
does not need them. Bin ``b`` of level k at cell p is the pooled map ``P_k`` at ``clamp(p + offset_b)``, so

    <binned(p), binned(q)> = sum over k and b of  S_k[clamp(p + offset_b), clamp(q + offset_b)],   S_k = P_k(a) P_k(b)ᵀ

and since the offsets of a level form a 3 × 3 square, the sum separates into one over columns and one over rows. ``S_1``
is ``S_0`` averaged over 3 × 3 cells of either map, so that one product of width C replaces one of width 17·C, exactly;
each further level costs a product of its own.

All of this streams over the grid rows of map A. A *slab* is what one of them contributes, ``(grid_w, grid_h_b,
grid_w_b)`` float32, and only the slabs within reach of the bins are held: memory grows with a grid row, not with the
matrix.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import Array, average_pool, check_hierarchy, check_map, log_bin_reference
from facetrt.kernels.products import TIE, first_largest, inner_products

Float = NDArray[np.float32]

NORM_FLOOR = 1e-8  # guards the cosine's denominator, as in the reference
TILE_BYTES = 64 << 20  # about as much of a product is made at a time


@dataclass(frozen=True)
class BestBuddies:
    """Nearest neighbours in both directions.

    ``nn_ab (n_a,)`` and ``nn_ba (n_b,)`` int64 cell indices, -1 where the other map is empty; ``sim_ab``, ``sim_ba``
    float32 cosines (NaN where there is no neighbour); ``mutual (n_a,)`` bool. Cosines that differ by less than ``TIE``
    tie, and the first cell wins: equal descriptors have cosines that rounding tells apart.
    """

    nn_ab: NDArray[np.int64]
    nn_ba: NDArray[np.int64]
    sim_ab: Float
    sim_ba: Float

    @property
    def mutual(self) -> NDArray[np.bool_]:
        """True where a cell of A is the nearest neighbour of its own nearest neighbour."""
        if self.nn_ba.size == 0:
            return np.zeros(self.nn_ab.size, np.bool_)
        return np.asarray(self.nn_ba[self.nn_ab] == np.arange(self.nn_ab.size))


def best_buddies(map_a: Array, map_b: Array, hierarchy: int = 2) -> BestBuddies:
    """Nearest neighbours between two maps by the cosine of their (binned) descriptors.

    Args:
        map_a: ``(grid_h, grid_w, C)`` floats; ``map_b`` likewise, its grid may differ.
        hierarchy: levels of log-binning; 0 compares the descriptors as they are.

    Raises:
        InputError: wrong shapes or types, different C, NaN or infinite values.
    """
    a, b = _check_pair(map_a, map_b, hierarchy)
    count_a, count_b = a.shape[0] * a.shape[1], b.shape[0] * b.shape[1]
    nn_ab, sim_ab = _no_neighbours(count_a)
    nn_ba, sim_ba = _no_neighbours(count_b)
    if count_a == 0 or count_b == 0:
        return BestBuddies(nn_ab, nn_ba, sim_ab, sim_ba)
    sim_ba[:], margin = -np.inf, np.float32(TIE)
    for start, similarity in similarity_tiles(a, b, hierarchy):
        rows = slice(start, start + len(similarity))
        nn_ab[rows], sim_ab[rows] = first_largest(similarity)
        better = np.flatnonzero(similarity.max(axis=0) > sim_ba + margin)  # one further on must be better than a tie
        nearest, sim_ba[better] = first_largest(similarity.T[better])  # a copy: argmax down columns is slow
        nn_ba[better] = start + nearest
    return BestBuddies(nn_ab, nn_ba, sim_ab, sim_ba)


def cosine_similarity(map_a: Array, map_b: Array, hierarchy: int = 2) -> Float:
    """The whole matrix of cosines ``(n_a, n_b)`` between two maps; arguments as for :func:`best_buddies`."""
    a, b = _check_pair(map_a, map_b, hierarchy)
    out = np.zeros((a.shape[0] * a.shape[1], b.shape[0] * b.shape[1]), np.float32)
    if out.size:
        for start, similarity in similarity_tiles(a, b, hierarchy):
            out[start : start + len(similarity)] = similarity
    return out


def similarity_tiles(a: Float, b: Float, hierarchy: int) -> Iterator[tuple[int, Float]]:
    """The cosine matrix by grid rows of A, as ``(first row, (grid_w, n_b))``."""
    levels_a = [average_pool(a, level) for level in range(max(hierarchy, 1))]
    levels_b = [average_pool(b, level) for level in range(max(hierarchy, 1))]
    norm_a, norm_b = _binned_norms(levels_a, hierarchy), _binned_norms(levels_b, hierarchy)
    grid_w = a.shape[1]
    for y, slab in enumerate(_dot_products(levels_a, levels_b, hierarchy)):
        start = y * grid_w
        rows = slab.reshape(grid_w, -1)
        _divide_by_norms(rows, norm_a[start : start + grid_w], norm_b)
        yield start, rows


def _dot_products(levels_a: list[Float], levels_b: list[Float], hierarchy: int) -> Iterator[Float]:
    """Slabs of the binned descriptors' dot products."""
    products = [_products(a, b) for a, b in zip(levels_a, levels_b, strict=True)]
    if hierarchy == 0:
        yield from products[0]
        return
    if hierarchy > 1:  # by sums, in half the time of a second product
        products[0], again = _twice(products[0])
        products[1] = _pooled(again, len(levels_a[0]))
    shares = [_level_share(slabs, level, len(levels_a[0])) for level, slabs in enumerate(products)]
    for total, *others in zip(*shares, strict=True):
        for share in others:
            total += share
        yield total


def _products(level_a: Float, level_b: Float) -> Iterator[Float]:
    """Slabs of one level's products ``S_k``, made in blocks of about ``TILE_BYTES``."""
    grid_h, grid_w, channels = level_a.shape
    height = max(1, TILE_BYTES // (4 * grid_w * level_b.shape[0] * level_b.shape[1]))
    flat_b = level_b.reshape(-1, channels)
    for top in range(0, grid_h, height):
        block = level_a[top : top + height]
        products = inner_products(block.reshape(-1, channels), flat_b)
        yield from products.reshape(*block.shape[:2], *level_b.shape[:2])


def _twice(slabs: Iterator[Float]) -> tuple[Iterator[Float], Iterator[Float]]:
    """Two readers of one stream. As ``itertools.tee``, which however keeps up to 57 items after they are read."""
    queues: tuple[deque[Float], deque[Float]] = (deque(), deque())

    def read(own: deque[Float]) -> Iterator[Float]:
        while True:
            if not own:
                slab = next(slabs, None)
                if slab is None:
                    return
                for queue in queues:
                    queue.append(slab)
            yield own.popleft()

    return read(queues[0]), read(queues[1])


def _pooled(slabs: Iterator[Float], grid_h: int) -> Iterator[Float]:
    """Slabs of ``S_1`` from those of ``S_0``: means over 3 × 3 cells of A and of B, valid cells only."""
    slab = next(slabs)
    before = nothing = np.zeros_like(slab)
    for y, after in enumerate(chain(slabs, [nothing])):
        total = before + slab
        total += after
        total *= 3 / (min(y + 2, grid_h) - max(y - 1, 0))
        for axis in range(3):
            total = _window_sum(total, axis)
        total *= np.float32(1 / 81)
        yield total
        before, slab = slab, after


def _window_sum(values: Float, axis: int) -> Float:
    """Thrice the mean of each entry and its neighbours along ``axis``; what lies outside does not count."""
    size = values.shape[axis]
    if size == 1:
        return values * np.float32(3)
    first, last = _at(axis, 0), _at(axis, size - 1)
    total = _pair_sum(values, values, axis, 1)
    total[first], total[last] = values[_at(axis, 1)], values[_at(axis, size - 2)]
    total += values
    total[first] *= 1.5
    total[last] *= 1.5
    return total


def _level_share(slabs: Iterator[Float], level: int, grid_h: int) -> Iterator[Float]:
    """Slabs of what one level's bins add to the dot products, from the level's products."""
    step = 3**level
    columns: dict[int, Float] = {}  # sums over columns, of the rows still needed
    centres: dict[int, Float] = {}
    done = 0
    for y, slab in enumerate(slabs):
        columns[y], centres[y] = _sum_over_columns(slab, level)
        while done < grid_h and y >= min(done + step, grid_h - 1):
            total = _pair_sum(columns[max(done - step, 0)], columns[min(done + step, grid_h - 1)], 1, step)
            total += centres.pop(done)
            columns.pop(done - step, None)
            yield total
            done += 1


def _sum_over_columns(slab: Float, level: int) -> tuple[Float, Float]:
    """Sums over ``dx`` of ``slab[clamp(x_a + dx), :, clamp(x_b + dx)]``: of all three, and of those in the middle row.

    Level 0 counts its centre, the others do not; they may overwrite ``slab``.
    """
    step, grid_w = 3**level, len(slab)
    padded = slab.take(np.arange(-step, grid_w + step), axis=0, mode="clip")
    beside = _pair_sum(padded[:grid_w], padded[2 * step :], 2, step)
    if level == 0:
        beside += slab
        return beside, beside
    slab += beside
    return slab, beside


def _pair_sum(low: Float, high: Float, axis: int, step: int) -> Float:
    """``low[clamp(i - step)] + high[clamp(i + step)]`` for each ``i`` along ``axis``; contiguous arrays of one shape.

    One addition of flat arrays, wrong at both ends of the axis, and then the ends: NumPy adds one long run five times
    as fast as runs of a grid's width.
    """
    size, shift = low.shape[axis], step * math.prod(low.shape[axis + 1 :])
    total = np.empty(low.shape, np.float32)
    if size > 2 * step:
        np.add(low.reshape(-1)[: -2 * shift], high.reshape(-1)[2 * shift :], out=total.reshape(-1)[shift:-shift])
    for i in chain(range(min(step, size)), range(max(step, size - step), size)):
        np.add(low[_at(axis, max(i - step, 0))], high[_at(axis, min(i + step, size - 1))], out=total[_at(axis, i)])
    return total


def _at(axis: int, index: int) -> tuple[slice | int, ...]:
    return (*[slice(None)] * axis, index)


def _divide_by_norms(rows: Float, norm_a: Float, norm_b: Float) -> None:
    """``rows /= max(norm_a ⊗ norm_b, NORM_FLOOR)``; without zero norms that is two scalings and no (n_a, n_b) array."""
    if norm_a.min() * norm_b.min() > NORM_FLOOR:
        rows *= 1 / norm_a[:, None]
        rows *= 1 / norm_b
    else:
        rows /= np.maximum(norm_a[:, None] * norm_b, NORM_FLOOR)


def _binned_norms(levels: list[Float], hierarchy: int) -> Float:
    """Norms of the binned descriptors, ``(cells,)``: the same shift sum, of squared norms."""
    total = np.zeros(levels[0].shape[:2])
    for level, values in enumerate(levels):
        squared = np.square(values).sum(axis=2).astype(np.float64)  # summed in pairs: float32 is exact enough
        step = 3**level
        padded = np.pad(squared, step, mode="edge")
        shifts = (0, step, 2 * step) if hierarchy else (step,)
        grid_h, grid_w = squared.shape
        total += sum(padded[dy : dy + grid_h, dx : dx + grid_w] for dy in shifts for dx in shifts)
        total -= squared if level else 0.0
    return np.sqrt(total).ravel().astype(np.float32)


def _no_neighbours(count: int) -> tuple[NDArray[np.int64], Float]:
    return np.full(count, -1, np.int64), np.full(count, np.nan, np.float32)


def _check_pair(map_a: Array, map_b: Array, hierarchy: int) -> tuple[Float, Float]:
    check_hierarchy(hierarchy)
    a, b = check_map("map_a", map_a), check_map("map_b", map_b)
    if a.shape[2] != b.shape[2]:
        raise InputError(
            f"map_a has {a.shape[2]} channels and map_b {b.shape[2]}: expected the same facet of one model"
        )
    for name, values in (("map_a", a), ("map_b", b)):
        if not np.isfinite(values).all():
            raise InputError(f"{name} holds NaN or infinite values: expected finite descriptors")
    return a, b


def best_buddies_reference(map_a: Array, map_b: Array, hierarchy: int = 2) -> BestBuddies:
    """Binned descriptors in full, every cosine in float64, one row at a time. Slow; the oracle."""
    a, b = log_bin_reference(map_a, hierarchy), log_bin_reference(map_b, hierarchy)
    similarity = np.empty((len(a), len(b)))
    for i, row in enumerate(a.astype(np.float64)):
        for j, column in enumerate(b.astype(np.float64)):
            norms = np.linalg.norm(row) * np.linalg.norm(column)
            similarity[i, j] = row @ column / max(norms, NORM_FLOOR)
    if similarity.size == 0:
        return BestBuddies(*_no_neighbours(len(a))[:1], *_no_neighbours(len(b))[:1], *_empty_sims(len(a), len(b)))
    sim_ab, sim_ba = similarity.max(1), similarity.max(0)
    nn_ab = (similarity >= sim_ab[:, None] - TIE).argmax(1)
    nn_ba = (similarity >= sim_ba - TIE).argmax(0)
    return BestBuddies(nn_ab, nn_ba, sim_ab.astype(np.float32), sim_ba.astype(np.float32))


def _empty_sims(count_a: int, count_b: int) -> tuple[Float, Float]:
    return _no_neighbours(count_a)[1], _no_neighbours(count_b)[1]
