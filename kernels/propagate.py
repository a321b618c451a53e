"""Label propagation from earlier frames of a video, restricted to a neighbourhood of each cell.

Source: the DAVIS-2017 protocol of the DINO repository (specification §14.4, steps 3 to 6): affinities are
``exp(cosine / temperature)`` inside the neighbourhood and 0 outside; the largest few over all context frames together
are kept, divided by their sum, and weigh the context's soft labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import Array, check_map
from facetrt.kernels.parallel import map_threads, one_blas_thread
from facetrt.kernels.products import TIE
from facetrt.kernels.short_descriptors import NORM_FLOOR, Descriptors, Subspace

Float = NDArray[np.float32]
Index = NDArray[np.int64]

# Side of the square of target cells that share one product with their joint neighbourhood. Larger squares compute more
# cosines outside the neighbourhood, smaller ones copy more windows; measured at 119 × 207 cells, 8 frames, C = 384.
TILE = 12
SURVIVORS = 64  # for each target on average, beyond which all cosines are computed: about as long then
ROUNDING = np.float32(1e-6)  # of bounds


def propagate(
    features: Array,
    context_features: Sequence[Array] | Array,
    context_labels: Sequence[Array] | Array,
    *,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Float:
    """Soft labels of a frame's cells from those of its context frames.

    Memory beyond the arguments is that of one tile of cells per processor (about 10 MB each for 8 context frames at
    radius 12), whatever the grid. What ties with the smallest kept cosine, or falls short of it by less than ``TIE``,
    is kept too.

    Args:
        features: ``(grid_h, grid_w, C)`` floats of the target frame; they need not be normalised.
        context_features: one array like ``features`` per context frame, as a sequence or stacked.
        context_labels: ``(grid_h, grid_w, labels)`` floats per context frame.
        radius: rows and columns, in cells, that a context cell may lie away from the target cell.
        topk: how many context cells a target cell listens to, over all context frames together.
        temperature: divides the cosine in the exponent.

    Returns:
        ``(grid_h, grid_w, labels)`` float32.

    Raises:
        InputError: wrong shapes or types, no context frame, NaN or infinite values, an option out of range.
    """
    target, context, labels = _check(features, context_features, context_labels, radius, topk, temperature)
    subspace = Subspace.fit(context[0])
    return propagate_descriptors(
        Descriptors.of(target, subspace),
        [Descriptors.of(frame, subspace) for frame in context],
        labels,
        radius=radius,
        topk=topk,
        temperature=temperature,
    )


def propagate_descriptors(
    target: Descriptors,
    context: Sequence[Descriptors],
    labels: Float,
    *,
    radius: int,
    topk: int,
    temperature: float,
) -> Float:
    """:func:`propagate` of descriptors that were prepared before, all with the same subspace.

    Args:
        labels: ``(frames, grid_h, grid_w, labels)`` float32, finite.
    """
    grid_h, grid_w = target.unit.shape[:2]
    out = np.empty((grid_h, grid_w, labels.shape[3]), np.float32)
    pruned = target.short.shape[2] > 1

    def fill(tile: _Tile) -> None:
        few = _survivors(tile, target, context, topk) if pruned else None
        kept = _best(tile, target, context, topk) if few is None else _best_of(few, topk)
        out[tile.rows, tile.columns] = _weigh(tile, kept, labels, temperature)

    with one_blas_thread:
        map_threads(fill, _tiles(grid_h, grid_w, radius))
    return out


@dataclass(frozen=True)
class _Tile:
    """Target cells ``top..bottom × left..right`` of a grid; their joint neighbourhood may reach beyond the grid."""

    top: int
    bottom: int
    left: int
    right: int
    grid_h: int
    grid_w: int
    radius: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.right)

    @property
    def window(self) -> tuple[slice, slice]:
        """The neighbourhood's rows and columns inside the grid."""
        return (
            slice(max(self.top - self.radius, 0), min(self.bottom + self.radius, self.grid_h)),
            slice(max(self.left - self.radius, 0), min(self.right + self.radius, self.grid_w)),
        )

    @property
    def placed(self) -> tuple[slice, slice]:
        """Where :attr:`window` lies in the whole neighbourhood."""
        rows, columns = self.window
        top, left = self.top - self.radius, self.left - self.radius
        return slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)


def _tiles(grid_h: int, grid_w: int, radius: int) -> Iterator[_Tile]:
    for top in range(0, grid_h, TILE):
        for left in range(0, grid_w, TILE):
            yield _Tile(top, min(top + TILE, grid_h), left, min(left + TILE, grid_w), grid_h, grid_w, radius)


@dataclass(frozen=True)
class _Few:
    """Cosines of some pairs of a tile's cells, which are numbered row by row, and context cells."""

    targets: Index = field(repr=False)
    frame: Index = field(repr=False)
    row: Index = field(repr=False)
    column: Index = field(repr=False)
    cosines: Float = field(repr=False)

    def only(self, kept: NDArray[np.bool_] | Index) -> _Few:
        """Some of the pairs."""
        return _Few(*(values[kept] for values in vars(self).values()))


def _survivors(tile: _Tile, target: Descriptors, context: Sequence[Descriptors], topk: int) -> _Few | None:
    """Pairs that may have one of the largest cosines, with their cosines; None if these are not few."""
    rows, columns = tile.window
    near = [frame.short[rows, columns].reshape(-1, frame.short.shape[2]) for frame in context]
    short = target.short[tile.rows, tile.columns].reshape(-1, target.short.shape[2])
    bounds = np.empty((len(context), len(short), len(near[0])), np.float32)
    for number, cells in enumerate(near):
        np.matmul(short, cells.T, out=bounds[number])
    rests = max(float(cells[:, -1].max()) for cells in near)
    likely = _bound(_own_neighbourhoods(tile, [bounds.max(axis=0)]), topk, 2 * tile.radius + 1)  # of the bounds
    least = likely - 2 * rests * short[:, -1] - np.float32(TIE) - ROUNDING  # a cosine is at most so much below its own
    places = np.flatnonzero(bounds >= least[:, None])
    if len(places) > 4 * SURVIVORS * len(short):  # some of these lie outside their own neighbourhood
        return None
    few = _few(tile, places, len(near[0]))
    return None if len(few.targets) > SURVIVORS * len(short) else _with_cosines(tile, few, target, context)


def _few(tile: _Tile, places: Index, cells: int) -> _Few:
    """Pairs by their ``places`` in ``(frames, targets, cells)``, without those outside a target's neighbourhood."""
    rows, columns = tile.window
    height, width = tile.bottom - tile.top, tile.right - tile.left
    frame, place = np.divmod(places, height * width * cells)
    targets, cell = np.divmod(place, cells)
    row, column = np.divmod(cell, columns.stop - columns.start)
    row, column = row + rows.start, column + columns.start
    own = abs(row - tile.top - targets // width) <= tile.radius
    own &= abs(column - tile.left - targets % width) <= tile.radius
    return _Few(targets, frame, row, column, np.zeros(len(places), np.float32)).only(own)


def _with_cosines(tile: _Tile, few: _Few, target: Descriptors, context: Sequence[Descriptors]) -> _Few:
    width = tile.right - tile.left
    row, column = tile.top + few.targets // width, tile.left + few.targets % width
    for number, other in enumerate(context):
        its = np.flatnonzero(few.frame == number)
        own, others = target.unit[row[its], column[its]], other.unit[few.row[its], few.column[its]]
        few.cosines[its] = np.einsum("nc,nc->n", own, others)
    return few


def _best_of(few: _Few, topk: int) -> _Few:
    """Each target's ``topk`` largest cosines, and what ties with the smallest of these; target by target."""
    order = np.lexsort((-few.cosines, few.targets))
    targets, cosines = few.targets[order], few.cosines[order]
    first = np.searchsorted(targets, targets)
    last = np.minimum(first + topk, np.searchsorted(targets, targets, side="right")) - 1
    return few.only(order[cosines >= cosines[last] - np.float32(TIE)])


def _best(tile: _Tile, target: Descriptors, context: Sequence[Descriptors], topk: int) -> _Few:
    """The same from all pairs."""
    (rows, columns), channels = tile.window, target.unit.shape[2]
    cells = target.unit[tile.rows, tile.columns].reshape(-1, channels)
    products = [cells @ frame.unit[rows, columns].reshape(-1, channels).T for frame in context]
    cosines = _own_neighbourhoods(tile, products)
    least = _bound(cosines, topk, 2 * tile.radius + 1)
    kept = np.flatnonzero((cosines >= (least - np.float32(TIE))[:, None]).ravel())
    targets, candidates = np.divmod(kept, cosines.shape[1])
    return _best_of(_Few(targets, *_locate(tile, targets, candidates), cosines.ravel()[kept]), topk)


def _bound(cosines: Float, count: int, side: int) -> Float:
    """At most the ``count``-th largest of each row, from the largest of each ``side`` neighbours where these do.

    Where fewer lie in the grid, it is below all of them; ``-inf`` stays out.
    """
    if cosines.shape[1] < count:
        return np.full(len(cosines), -2, np.float32)
    groups = cosines.reshape(len(cosines), -1, side).max(axis=2) if cosines.shape[1] >= count * side else cosines
    smallest = np.partition(groups, -count, axis=1)[:, -count]
    return np.asarray(np.maximum(smallest, np.float32(-2)))


def _own_neighbourhoods(tile: _Tile, frames: Sequence[Float]) -> Float:
    """Each target's own part of ``(targets, window cells)`` per frame: ``(targets, frames·side²)``; -inf outside."""
    height, width, reach = tile.bottom - tile.top, tile.right - tile.left, 2 * tile.radius
    joint = np.full((height, width, len(frames), height + reach, width + reach), -np.inf, np.float32)
    rows, columns = tile.window
    for i, values in enumerate(frames):
        shape = (height, width, rows.stop - rows.start, columns.stop - columns.start)
        joint[:, :, i, tile.placed[0], tile.placed[1]] = values.reshape(shape)
    return _diagonal(joint, reach + 1).reshape(height * width, -1)


def _diagonal(joint: Float, side: int) -> Float:
    """``own[i, j, t, u, v] = joint[i, j, t, i + u, j + v]`` as a view: one step down moves target and window alike."""
    height, width, frames = joint.shape[:3]
    step_i, step_j, step_t, step_u, step_v = joint.strides
    return np.lib.stride_tricks.as_strided(
        joint,
        shape=(height, width, frames, side, side),
        strides=(step_i + step_u, step_j + step_v, step_t, step_u, step_v),
        writeable=False,
    )


def _weigh(tile: _Tile, kept: _Few, labels: Float, temperature: float) -> Float:
    """Labels of a tile, ``(rows, columns, labels)``, from :func:`_best_of`'s pairs; each target has some."""
    count = (tile.bottom - tile.top) * (tile.right - tile.left)
    first = np.searchsorted(kept.targets, np.arange(count))
    values = kept.cosines - np.maximum.reduceat(kept.cosines, first)[kept.targets]  # cancels, and nothing overflows
    weights = np.exp(values / np.float32(temperature))
    weights /= np.add.reduceat(weights, first)[kept.targets]
    summed = np.add.reduceat(weights[:, None] * labels[kept.frame, kept.row, kept.column], first, axis=0)
    return np.asarray(summed, np.float32).reshape(tile.bottom - tile.top, tile.right - tile.left, -1)


def _locate(
    tile: _Tile, targets: NDArray[np.int64], candidates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Frame, row and column of numbered candidates of numbered targets."""
    side = 2 * tile.radius + 1
    frame, offset = np.divmod(candidates, side * side)
    dy, dx = np.divmod(offset, side)
    row, column = np.divmod(targets, tile.right - tile.left)
    return frame, tile.top + row + dy - tile.radius, tile.left + column + dx - tile.radius


def _check(
    features: Array,
    context_features: Sequence[Array] | Array,
    context_labels: Sequence[Array] | Array,
    radius: int,
    topk: int,
    temperature: float,
) -> tuple[Float, list[Float], Float]:
    if radius < 0 or topk < 1 or not temperature > 0:
        raise InputError(
            f"radius={radius}, topk={topk}, temperature={temperature}: expected a radius of at least 0 cells, a topk "
            "of at least 1 and a positive temperature"
        )
    target = check_map("features", features)
    context = [check_map(f"context_features[{i}]", frame) for i, frame in enumerate(context_features)]
    labels = [check_map(f"context_labels[{i}]", frame) for i, frame in enumerate(context_labels)]
    if not context or len(context) != len(labels):
        raise InputError(
            f"{len(context)} context frames and {len(labels)} label maps: expected one of each, at least one"
        )
    _check_shapes(target, context, labels)
    for name, values in [("features", target), *_named("context_features", context), *_named("context_labels", labels)]:
        if not np.isfinite(values).all():
            raise InputError(f"{name} holds NaN or infinite values: expected finite numbers")
    return target, context, np.stack(labels)


def _check_shapes(target: Float, context: list[Float], labels: list[Float]) -> None:
    for name, frame in _named("context_features", context):
        if frame.shape != target.shape:
            raise InputError(f"{name} has shape {frame.shape} and features {target.shape}: expected the same")
    for name, frame in _named("context_labels", labels):
        expected = (*target.shape[:2], labels[0].shape[2])
        if frame.shape != expected:
            raise InputError(f"{name} has shape {frame.shape}: expected {expected}, one row of labels per cell")


def _named(name: str, frames: list[Float]) -> list[tuple[str, Float]]:
    return [(f"{name}[{i}]", frame) for i, frame in enumerate(frames)]


def propagate_reference(
    features: Array,
    context_features: Sequence[Array] | Array,
    context_labels: Sequence[Array] | Array,
    *,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Float:
    """The definition, one target cell at a time, in float64. Slow; the oracle for :func:`propagate`."""
    target, context, labels = np.asarray(features), np.stack(list(context_features)), np.stack(list(context_labels))
    grid_h, grid_w = target.shape[:2]
    out = np.zeros((grid_h, grid_w, labels.shape[3]))
    rows, columns = np.indices((grid_h, grid_w))
    for y in range(grid_h):
        for x in range(grid_w):
            cosine = _cosine(target[y, x].astype(np.float64), context.astype(np.float64))  # (frames, grid_h, grid_w)
            near = (abs(rows - y) <= radius) & (abs(columns - x) <= radius)
            candidates = np.where(near, cosine, -np.inf)
            smallest = np.sort(candidates, axis=None)[::-1][: min(topk, candidates.size)][-1]
            affinity = np.where(candidates >= smallest - TIE, np.exp(candidates / temperature), 0.0)
            out[y, x] = np.tensordot(affinity / affinity.sum(), labels.astype(np.float64), axes=3)
    return out.astype(np.float32)


def _cosine(vector: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.maximum(np.linalg.norm(others, axis=-1), NORM_FLOOR)
    return np.asarray(others @ vector / lengths / max(np.linalg.norm(vector), NORM_FLOOR))
