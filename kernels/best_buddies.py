"""Mutual nearest neighbours ("best buddies") of two descriptor maps under cosine similarity.

Source: Amir et al., section 4.2. Binned descriptors are 17 times as long as the maps they come from; their dot product
does not need them. Bin ``b`` of level k at cell p is the pooled map ``P_k`` at ``clamp(p + offset_b)``, so

    <binned(p), binned(q)> = sum over k and b of  S_k[clamp(p + offset_b), clamp(q + offset_b)],   S_k = P_k(a) P_k(b)ᵀ

and since the offsets of a level form a 3 × 3 square, the sum separates into one over rows and one over columns. One
product of width C per level replaces one of width 17·C, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import Array, average_pool, check_hierarchy, check_map, log_bin_reference

Float = NDArray[np.float32]

NORM_FLOOR = 1e-8  # guards the cosine's denominator, as in the reference
TILE_BYTES = 64 << 20  # similarity rows are made in tiles of about this size, so that no t × t matrix is held
CHUNK = 4  # grid rows summed at a time, so that what is added up stays in the processor's cache


@dataclass(frozen=True)
class BestBuddies:
    """Nearest neighbours in both directions.

    ``nn_ab (n_a,)`` and ``nn_ba (n_b,)`` int64 cell indices, first one on ties, -1 where the other map is empty;
    ``sim_ab``, ``sim_ba`` float32 cosines (NaN where there is no neighbour); ``mutual (n_a,)`` bool.
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
    sim_ba[:] = -np.inf
    for start, similarity in similarity_tiles(a, b, hierarchy):
        rows = slice(start, start + similarity.shape[0])
        nn_ab[rows] = similarity.argmax(axis=1)
        sim_ab[rows] = np.take_along_axis(similarity, nn_ab[rows, None], axis=1)[:, 0]
        row, best = _column_maxima(similarity, a.shape[1])
        better = best > sim_ba  # strict: the first maximum wins
        sim_ba[better] = best[better]
        nn_ba[better] = start + row[better]
    return BestBuddies(nn_ab, nn_ba, sim_ab, sim_ba)


def _column_maxima(similarity: Float, block: int) -> tuple[NDArray[np.int64], Float]:
    """First row of each column's maximum, and the maximum; ``block`` divides the number of rows.

    Maxima of blocks first, then a search inside one block per column: ``argmax`` along the outer axis is 20 times
    slower than ``max``.
    """
    blocks = similarity.reshape(-1, block, similarity.shape[1])
    maxima = blocks.max(axis=1)
    chosen, columns = maxima.argmax(axis=0), np.arange(similarity.shape[1])
    inside = blocks[chosen, :, columns].argmax(axis=1)
    return chosen * block + inside, maxima[chosen, columns]


def cosine_similarity(map_a: Array, map_b: Array, hierarchy: int = 2) -> Float:
    """The whole matrix of cosines ``(n_a, n_b)`` between two maps; arguments as for :func:`best_buddies`."""
    a, b = _check_pair(map_a, map_b, hierarchy)
    out = np.zeros((a.shape[0] * a.shape[1], b.shape[0] * b.shape[1]), np.float32)
    if out.size:
        for start, similarity in similarity_tiles(a, b, hierarchy):
            out[start : start + similarity.shape[0]] = similarity
    return out


def similarity_tiles(a: Float, b: Float, hierarchy: int) -> Iterator[tuple[int, Float]]:
    """Consecutive row blocks of the cosine matrix as ``(first row, (rows, n_b))``; a block is valid until the next."""
    levels_a = [average_pool(a, level) for level in range(max(hierarchy, 1))]
    levels_b = [average_pool(b, level) for level in range(max(hierarchy, 1))]
    norm_a, norm_b = _binned_norms(levels_a, hierarchy), _binned_norms(levels_b, hierarchy)
    flat_b = [np.ascontiguousarray(level.reshape(-1, level.shape[2]).T) for level in levels_b]
    steps = [3**level for level in range(hierarchy)] or [0]
    grid_h, grid_w, _ = a.shape
    height = max(1, min(grid_h, TILE_BYTES // (4 * grid_w * norm_b.size)))
    totals = np.empty((height, grid_w, *b.shape[:2]), np.float32)
    products = np.empty((min(grid_h, height + 2 * steps[-1]) * grid_w, norm_b.size), np.float32)
    for top in range(0, grid_h, height):
        total = totals[: min(height, grid_h - top)]
        total.fill(0)
        for level, step in enumerate(steps):
            _add_level(total, levels_a[level], flat_b[level], products, top, step)
        rows = total.reshape(-1, norm_b.size)
        _divide_by_norms(rows, norm_a[top * grid_w :][: len(rows)], norm_b)
        yield top * grid_w, rows


def _add_level(total: Float, level_a: Float, flat_b: Float, products: Float, top: int, step: int) -> None:
    """Add one level's bins to ``total (rows, grid_w, grid_h_b, grid_w_b)``, whose first grid row is ``top``.

    ``products`` is scratch space for the level's product. Level 0 (step 1) counts its centre, the others do not.
    """
    grid_h, grid_w, channels = level_a.shape
    bottom = top + total.shape[0]
    first, last = max(top - step, 0), min(bottom + step, grid_h)  # rows of A that the tile's bins reach
    product = products[: (last - first) * grid_w]
    np.matmul(level_a[first:last].reshape(-1, channels), flat_b, out=product)
    similarity = product.reshape(last - first, *total.shape[1:])
    if step == 0:
        total += similarity
        return
    summed = np.empty((CHUNK, *total.shape[1:]), np.float32)
    for start in range(first, last, CHUNK):
        stop = min(start + CHUNK, last)
        columns = _sum_over_columns(similarity[start - first : stop - first], summed[: stop - start], step)
        for dy in (-step, 0, step):
            _add_rows(total, columns, start, top, grid_h, dy)
    if step > 1:
        total -= similarity[top - first : bottom - first]


def _add_rows(total: Float, columns: Float, start: int, top: int, grid_h: int, dy: int) -> None:
    """``total[y_a - top, :, y_b] += columns[clamp(y_a + dy) - start, :, clamp(y_b + dy)]`` for the rows at hand."""
    for out_a, in_a in _clamped(grid_h, dy, top, top + total.shape[0]):
        low, high = max(in_a.start, start), min(in_a.stop, start + len(columns))
        if low >= high:
            continue
        if high - low < in_a.stop - in_a.start:  # only a part of the shifted rows is at hand
            shift = out_a.start - in_a.start
            out_a = slice(low + shift, high + shift)
        for out_b, in_b in _clamped(total.shape[2], dy):
            total[out_a, :, out_b] += columns[low - start : high - start, :, in_b]


def _sum_over_columns(similarity: Float, total: Float, step: int) -> Float:
    """Sum over dx in (-step, 0, step) of ``similarity[y_a, clamp(x_a + dx), y_b, clamp(x_b + dx)]``, in ``total``."""
    np.copyto(total, similarity)
    for dx in (-step, step):
        for out_a, in_a in _clamped(similarity.shape[1], dx):
            for out_b, in_b in _clamped(similarity.shape[3], dx):
                total[:, out_a, :, out_b] += similarity[:, in_a, :, in_b]
    return total


def _divide_by_norms(rows: Float, norm_a: Float, norm_b: Float) -> None:
    """``rows /= max(norm_a ⊗ norm_b, NORM_FLOOR)``; without zero norms that is two scalings and no (n_a, n_b) array."""
    if norm_a.min() * norm_b.min() > NORM_FLOOR:
        rows *= 1 / norm_a[:, None]
        rows *= 1 / norm_b
    else:
        rows /= np.maximum(norm_a[:, None] * norm_b, NORM_FLOOR)


def _clamped(size: int, shift: int, start: int = 0, stop: int | None = None) -> list[tuple[slice, slice]]:
    """Pieces (destination, source) of ``out[i - start] += in[clamp(i + shift, 0, size - 1)]`` for i in start..stop."""
    stop = size if stop is None else stop
    low, high = (min(max(bound, start), stop) for bound in (-shift, size - shift))
    pieces = [
        (slice(0, low - start), slice(0, 1)),
        (slice(low - start, high - start), slice(low + shift, high + shift)),
        (slice(high - start, stop - start), slice(size - 1, size)),
    ]
    return [(out, source) for out, source in pieces if out.stop > out.start]


def _binned_norms(levels: list[Float], hierarchy: int) -> Float:
    """Norms of the binned descriptors, ``(cells,)``: the same shift sum, of squared norms."""
    total = np.zeros(levels[0].shape[:2])
    for level, values in enumerate(levels):
        squared = np.einsum("yxc,yxc->yx", values, values, dtype=np.float64)
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
    nn_ab, nn_ba = similarity.argmax(1), similarity.argmax(0)
    return BestBuddies(nn_ab, nn_ba, similarity.max(1).astype(np.float32), similarity.max(0).astype(np.float32))


def _empty_sims(count_a: int, count_b: int) -> tuple[Float, Float]:
    return _no_neighbours(count_a)[1], _no_neighbours(count_b)[1]
