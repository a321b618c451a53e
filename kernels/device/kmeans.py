"""k-means on a device: FAISS's method for many runs at once, assignment, and the clusters of diverse pairs.

Rounds are launched ahead without asking whether they are still needed: a run whose centroids stand still is marked, and
what is launched for it afterwards returns at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.device.select import gather_rows
from facetrt.kernels.errors import InputError
from facetrt.kernels.kmeans import SAMPLES_PER_CENTROID, SEED, SEED_STEP, permutation

MAX_CLUSTERS = 64
ROWS = 64  # per program that assigns
COLUMNS = 64  # centroids per program: 4 sets of up to 16, or one of up to 64
DISTANCE_COLUMNS = 16  # a learned model has about ten centroids
UPDATE_ROWS = {16: 64, 64: 32}  # at a time, by the most clusters: 64 rows and 64 clusters spill registers
UPDATE_CHANNELS = 64
PARTS = 64  # most programs that share a run's update
DRAWS = 4093  # random numbers for empty clusters; a prime, so that after all of them each meets another cluster
BLOCK = 1024
GRAM_TILE = 32  # small: few hundred pairs are usual, and should still occupy the device
TRIALS = 16  # at least 2 + log of any number of clusters
LLOYD_CLUSTERS, LLOYD_ROWS, LLOYD_COLUMNS = 16, 32, 64  # of a product; with more rows or columns registers spill
LLOYD_BLOCK = 256  # one row for each thread
LLOYD_ROUNDS, LLOYD_TOLERANCE = 300, 1e-4  # scikit-learn's defaults
BETTER = 1 - 1e-6  # restarts that end in the same clusters differ by rounding; the first of them counts
ALIGNED = 4  # float32 per aligned address

_RUNS = (("rows", "*fp32"), ("centroids", "*fp32"))

ASSIGN = {
    padded: Program(
        f"kmeans_assign_{padded}",
        "kmeans:assign",
        (
            *_RUNS,
            ("clusters", "*i32"),
            ("counts", "*i32"),
            ("changed", "*i32"),
            ("labels", "*u8"),
            ("sums", "*fp32"),
            ("sets", "i32"),
            ("count", "i32"),
            ("channels", "i32"),
            ("parts", "i32"),
            ("blocks", "i32"),
        ),
        {"SETS": COLUMNS // padded, "CLUSTERS": padded, "ROWS": ROWS, "CHANNELS": 32, "PARTS": PARTS},
        divisible=("channels",),
    )
    for padded in (16, 64)
}
UNIT_DISTANCES = Program(
    "kmeans_unit_distances",
    "kmeans:unit_distances",
    (*_RUNS, ("out", "*fp32"), ("count", "i32"), ("clusters", "i32"), ("channels", "i32")),
    {"ROWS": ROWS, "COLUMNS": DISTANCE_COLUMNS, "CHANNELS": 32},
    divisible=("channels",),
)
UPDATE = {
    padded: Program(
        f"kmeans_update_{padded}",
        "kmeans:update",
        (
            *_RUNS,
            ("labels", "*u8"),
            ("clusters", "*i32"),
            ("counts", "*i32"),
            ("draws", "*fp32"),
            ("before", "*i32"),
            ("after", "*i32"),
            ("stride", "i32"),
            ("channels", "i32"),
        ),
        {
            "CLUSTERS": padded,
            "ROWS": UPDATE_ROWS[padded],
            "CHANNELS": UPDATE_CHANNELS,
            "PARTS": PARTS,
            "DRAWS": DRAWS,
        },
        divisible=("channels",),
    )
    for padded in UPDATE_ROWS
}
CHOOSE_RUN = Program(
    "kmeans_choose_run",
    "kmeans:choose_run",
    (
        ("sums", "*fp32"),
        ("centroids", "*fp32"),
        ("chosen", "*fp32"),
        ("objectives", "*fp32"),
        ("restarts", "i32"),
        ("blocks", "i32"),
        ("size", "i32"),
        ("spacing", "i32"),
    ),
    {"BLOCK": BLOCK},
    divisible=("size",),
)
ADD_UP = Program(
    "kmeans_add_up",
    "kmeans:add_up",
    (("sums", "*fp32"), ("totals", "*fp64"), ("blocks", "i32")),
    {"BLOCK": BLOCK},
)
ELBOW = Program(
    "kmeans_elbow",
    "kmeans:elbow",
    (("objectives", "*fp64"), ("factor", "*fp64"), ("chosen", "*i32"), ("sets", "i32"), ("cells", "i64")),
)
TAKE_SET = Program(
    "kmeans_take_set_u8",
    "kmeans:take_set",
    (("values", "*u8"), ("chosen", "*i32"), ("taken", "*u8"), ("size", "i64")),
    {"BLOCK": BLOCK},
)
MEAN_ROW = Program(
    "kmeans_mean_row",
    "kmeans:mean_row",
    (("rows", "*fp32"), ("count", "*i32"), ("mean", "*fp32"), ("channels", "i32")),
    {"ROWS": 32, "BLOCK": 64},
    divisible=("channels",),
)
GRAM = Program(
    "kmeans_gram",
    "kmeans:gram",
    (
        ("rows", "*fp32"),
        ("mean", "*fp32"),
        ("count", "*i32"),
        ("out", "*fp32"),
        ("stride", "i32"),
        ("channels", "i32"),
    ),
    {"BLOCK": GRAM_TILE, "CHANNELS": 64},
    divisible=("channels",),
)
NEXT_SEED = Program(
    "kmeans_seed",
    "kmeans:seed",
    (
        ("gram", "*fp32"),
        ("count", "*i32"),
        ("draws", "*fp64"),
        ("trial_counts", "*i32"),
        ("seeds", "*i32"),
        ("closest", "*fp64"),
        ("nearer", "*fp64"),
        ("step", "i32"),
        ("wanted", "i32"),
        ("stride", "i32"),
    ),
    {"TRIALS": TRIALS, "BLOCK": 512},
    warps=8,  # the candidates' distances are double precision: with 4 warps registers spill
)
LLOYD = Program(
    "kmeans_lloyd",
    "kmeans:lloyd",
    (
        ("gram", "*fp32"),
        ("count", "*i32"),
        ("seeds", "*i32"),
        ("members", "*i32"),
        ("labels", "*i32"),
        ("nearest", "*fp64"),
        ("cross", "*fp64"),
        ("norms", "*fp64"),
        ("inertia", "*fp64"),
        ("last", "*i32"),
        ("wanted", "i32"),
        ("stride", "i32"),
        ("width", "i32"),
        ("rounds", "i32"),
        ("tolerance", "fp32"),
    ),
    {"CLUSTERS": LLOYD_CLUSTERS, "ROWS": LLOYD_ROWS, "COLUMNS": LLOYD_COLUMNS, "BLOCK": LLOYD_BLOCK},
    warps=8,
    stages=1,
)
CHOOSE_LABELS = Program(
    "kmeans_choose_labels",
    "kmeans:choose_labels",
    (
        ("labels", "*i32"),
        ("inertia", "*fp64"),
        ("last", "*i32"),
        ("count", "*i32"),
        ("clusters", "*i32"),
        ("restarts", "i32"),
        ("stride", "i32"),
    ),
    {"BETTER": BETTER, "BLOCK": BLOCK},
)
PROGRAMS = (
    *ASSIGN.values(),
    UNIT_DISTANCES,
    *UPDATE.values(),
    CHOOSE_RUN,
    ADD_UP,
    ELBOW,
    TAKE_SET,
    MEAN_ROW,
    GRAM,
    NEXT_SEED,
    LLOYD,
    CHOOSE_LABELS,
)


@dataclass(frozen=True)
class DeviceKMeans:
    """``centroids (k, C)`` float32 and ``objective (1,)`` float32, the training rows' squared distances summed."""

    centroids: DeviceArray
    objective: DeviceArray


@dataclass(frozen=True)
class DeviceAssignment:
    """The assignment to several sets of centroids: ``labels (sets, n)`` uint8 and ``objectives (sets,)`` float64.

    An objective is the sum of the squared distances of all rows to their nearest centroid.
    """

    labels: DeviceArray
    objectives: DeviceArray


def kmeans_each(
    device: Device, samples: DeviceArray, counts: Sequence[int], *, iterations: int = 300, restarts: int = 10
) -> list[DeviceKMeans]:
    """FAISS's k-means for each number of clusters in ``counts``, all restarts at once.

    The starts are those of :func:`facetrt.kernels.kmeans.kmeans_each`, and so are the fixed points up to rounding. What
    comes out for one number of clusters does not depend on the others.

    Args:
        samples: ``(n, C)`` float32, finite.

    Raises:
        InputError: fewer rows than clusters, more than 64 clusters, C not a multiple of 16.
    """
    _check_samples(samples, counts)
    if iterations < 1 or restarts < 1:
        raise InputError(f"iterations={iterations}, restarts={restarts}: expected at least 1")
    found: dict[int, DeviceKMeans] = {}
    for padded, smallest in ((16, 1), (64, 17)):
        chosen = sorted({count for count in counts if smallest <= count <= padded})
        if chosen:
            found.update(zip(chosen, _run_all(device, samples, chosen, padded, iterations, restarts), strict=True))
    return [found[count] for count in counts]


def _check_samples(samples: DeviceArray, counts: Iterable[int]) -> None:
    _check_width(samples, "samples")
    for count in counts:
        if not 1 <= count <= len(samples):
            raise InputError(
                f"{count} clusters were asked of {len(samples)} descriptors: expected 1 to {len(samples)}; "
                "use larger images, a smaller sampling interval or fewer clusters"
            )
        if count > MAX_CLUSTERS:
            raise InputError(f"{count} clusters were asked of a device: expected at most {MAX_CLUSTERS}")


def _check_width(rows: DeviceArray, name: str) -> None:
    if len(rows.shape) != 2 or rows.dtype != np.float32 or rows.shape[1] % 16 or not rows.shape[1]:
        raise InputError(
            f"{name} have shape {rows.shape} and type {rows.dtype}: expected (n, C) float32, C a multiple of 16"
        )
    if rows.shape[1] > UPDATE_CHANNELS * PARTS:
        raise InputError(f"{name} have {rows.shape[1]} channels: expected at most {UPDATE_CHANNELS * PARTS}")


def _run_all(
    device: Device, samples: DeviceArray, counts: list[int], padded: int, iterations: int, restarts: int
) -> list[DeviceKMeans]:
    """Runs of up to ``padded`` clusters: rounds of all of them side by side, then the best restart of each count."""
    channels, runs = samples.shape[1], len(counts) * restarts
    plan = plan_starts(len(samples), counts, restarts, padded)
    rows = samples if plan.order is None else gather_rows(device, samples, device.upload(plan.order))
    centroids = gather_rows(device, rows, device.upload(plan.starts))
    numbers = np.array(counts, np.int32)
    clusters, sizes = (device.upload(np.repeat(values, restarts)) for values in (numbers, plan.sizes))
    parts, blocks = -(-channels // UPDATE_CHANNELS), -(-len(rows) // ROWS)
    labels, sums = device.empty((runs, len(rows)), "uint8"), device.zeros((runs, blocks), "float32")
    moving = np.repeat(plan.sizes > numbers, restarts)  # FAISS leaves as many rows as clusters as they are
    before = device.upload(np.repeat(moving.astype(np.int32)[:, None], parts, axis=1))
    after, draws = device.empty(before.shape, "int32"), device.upload(_uniform_draws())
    grid = (-(-runs * padded // COLUMNS) * blocks,)
    for _ in range(iterations):
        shape = (runs, len(rows), channels, parts, blocks)
        device.launch(ASSIGN[padded], grid, rows, centroids, clusters, sizes, before, labels, sums, *shape)
        arrays = (rows, centroids, labels, clusters, sizes, draws, before, after)
        device.launch(UPDATE[padded], (parts, runs), *arrays, len(rows), channels)
        before, after = after, before
    chosen = device.empty((len(counts) * padded, channels), "float32")
    objectives = device.empty((len(counts) * ALIGNED,), "float32")
    size = padded * channels
    device.launch(CHOOSE_RUN, (len(counts),), sums, centroids, chosen, objectives, restarts, blocks, size, ALIGNED)
    return [
        DeviceKMeans(chosen.rows(i * padded, i * padded + count), objectives.rows(i * ALIGNED, i * ALIGNED + 1))
        for i, count in enumerate(counts)
    ]


@dataclass(frozen=True)
class Starts:
    """Where runs begin.

    ``order`` int32 of the samples that are trained on, None for all as they are; ``starts (counts · restarts ·
    padded,)`` int32, the places in that order of the first centroids, -1 where there is none; ``sizes (counts,)``
    int32, how many rows in that order each count is trained on.
    """

    order: NDArray[np.int32] | None
    starts: NDArray[np.int32]
    sizes: NDArray[np.int32]


def plan_starts(num_samples: int, counts: Sequence[int], restarts: int, padded: int) -> Starts:
    """FAISS's subsamples and starts, from numbers of rows alone.

    A subsample is the beginning of one permutation, the same for every number of clusters. So where the smallest would
    be subsampled, all rows are put into that order, and each run takes as many of them as it needs.
    """
    limits = np.minimum(num_samples, SAMPLES_PER_CENTROID * np.array(counts))
    order = None
    position = np.arange(num_samples)
    if num_samples > SAMPLES_PER_CENTROID:
        order = permutation(num_samples, SEED, min(num_samples, SAMPLES_PER_CENTROID * padded))
        position[order] = np.arange(len(order))
    starts = np.full((len(counts), restarts, padded), -1, np.int32)
    for i, (count, limit) in enumerate(zip(counts, limits.tolist(), strict=True)):
        for restart in range(restarts):
            first = permutation(limit, SEED + 1 + restart * SEED_STEP, count) if limit > count else np.arange(count)
            starts[i, restart, :count] = position[first] if limit == num_samples else first
    return Starts(order, starts.ravel(), limits.astype(np.int32))


def _uniform_draws() -> NDArray[np.float32]:
    """FAISS's random numbers in [0, 1] for empty clusters; it begins with the same ones in every round."""
    drawn = np.random.RandomState(SEED).randint(0, 2**32, size=DRAWS, dtype=np.uint32)
    return drawn.astype(np.float32) / np.float32(0xFFFFFFFF)


def assign_each(device: Device, rows: DeviceArray, centroid_sets: Sequence[DeviceArray]) -> DeviceAssignment:
    """Nearest centroid of each row in each set by squared Euclidean distance, the first one on ties.

    Args:
        rows: ``(n, C)`` float32; ``centroid_sets`` at least one ``(k, C)`` float32 with k from 1 to 64.

    Raises:
        InputError: shapes that do not fit, or C not a multiple of 16.
    """
    _check_width(rows, "rows")
    for centroids in centroid_sets:
        if centroids.shape[1:] != rows.shape[1:] or not 1 <= len(centroids) <= MAX_CLUSTERS:
            raise InputError(
                f"rows {rows.shape} and centroids {centroids.shape} do not fit: expected (n, C) and (k, C), "
                f"k from 1 to {MAX_CLUSTERS}"
            )
    sets, (count, channels) = len(centroid_sets), rows.shape
    labels, blocks = device.empty((sets, count), "uint8"), -(-count // ROWS)
    totals = device.zeros((sets,), "float64")
    if not count:
        return DeviceAssignment(labels, totals)
    clusters = np.array([len(centroids) for centroids in centroid_sets], np.int32)
    padded = 16 if clusters.max() <= 16 else 64
    together = _pack(device, centroid_sets, padded)
    counts, active = np.full(sets, count, np.int32), np.ones(sets, np.int32)
    arrays = [device.upload(values) for values in (clusters, counts, active)]
    sums = device.empty((sets, blocks), "float32")
    grid = (-(-sets * padded // COLUMNS) * blocks,)
    device.launch(ASSIGN[padded], grid, rows, together, *arrays, labels, sums, sets, count, channels, 1, blocks)
    device.launch(ADD_UP, (sets,), sums, totals, blocks)
    return DeviceAssignment(labels, totals)


def unit_distances(device: Device, rows: DeviceArray, centroids: DeviceArray) -> DeviceArray:
    """Squared distances of ``rows``, each divided by its length, to ``centroids``, at least 0: ``(k, n)`` float32.

    Rows without length stay zero; those with NaN or infinite numbers have distances that are NaN.

    Args:
        rows: ``(n, C)`` float32, C a multiple of 16; ``centroids (k, C)`` likewise.

    Raises:
        InputError: shapes or types that do not fit.
    """
    shapes = (rows.shape, centroids.shape)
    fits = all(len(shape) == 2 and shape[1] % 16 == 0 and shape[1] for shape in shapes)
    if not fits or shapes[0][1] != shapes[1][1] or {rows.dtype, centroids.dtype} != {np.dtype(np.float32)}:
        raise InputError(
            f"rows {rows.dtype} {rows.shape} and centroids {centroids.dtype} {centroids.shape} do not fit: expected "
            "(n, C) and (k, C) float32, C a multiple of 16"
        )
    out = device.empty((len(centroids), len(rows)), np.float32)
    if out.size:
        grid = (-(-len(rows) // ROWS), -(-len(centroids) // DISTANCE_COLUMNS))
        device.launch(UNIT_DISTANCES, grid, rows, centroids, out, len(rows), len(centroids), rows.shape[1])
    return out


def _pack(device: Device, centroid_sets: Sequence[DeviceArray], padded: int) -> DeviceArray:
    """All sets in one array, ``(sets · padded, C)``."""
    together = device.zeros((len(centroid_sets) * padded, centroid_sets[0].shape[1]), "float32")
    for i, centroids in enumerate(centroid_sets):
        device.copy(centroids, together.rows(i * padded, i * padded + len(centroids)))
    return together


def elbow(device: Device, objectives: DeviceArray, cells: int, factor: float) -> DeviceArray:
    """Which set of a sweep over k to take, ``(1,)`` int32: the first that hardly improves on the one before it.

    Args:
        objectives: ``(sets,)`` float64, sums over ``cells`` rows.
        factor: a set is taken if its mean objective exceeds this share of the previous one; else it is the last.
    """
    chosen = device.empty((1,), "int32")
    share = device.upload(np.array([factor], np.float64))  # as an array: scalars are float32
    device.launch(ELBOW, (1,), objectives, share, chosen, len(objectives), cells)
    return chosen


def select_labels(device: Device, labels: DeviceArray, chosen: DeviceArray) -> DeviceArray:
    """``labels[chosen]``, ``(n,)``, of ``labels (sets, n)`` uint8 and ``chosen (1,)`` int32."""
    taken = device.empty(labels.shape[1:], labels.dtype)
    if taken.size:
        device.launch(TAKE_SET, (-(-taken.size // BLOCK),), labels, chosen, taken, taken.size)
    return taken


def diverse_clusters(
    device: Device, rows: DeviceArray, count: DeviceArray, num_clusters: int, *, restarts: int = 10
) -> DeviceArray:
    """Cluster number of each row as :func:`facetrt.kernels.diverse_clusters` gives it, ``(n,)`` int32.

    Only the first ``count`` rows take part, in ``min(num_clusters, count)`` clusters; the others get -1. Memory is that
    of the ``(n, n)`` float32 Gram matrix.

    Args:
        rows: ``(n, D)`` float32; ``count (1,)`` int32.

    Raises:
        InputError: ``num_clusters`` or ``restarts`` below 1, or D not a multiple of 16.
    """
    if num_clusters < 1 or restarts < 1:
        raise InputError(f"num_clusters={num_clusters}, restarts={restarts}: expected at least 1")
    if len(rows.shape) != 2 or rows.dtype != np.float32 or rows.shape[1] % 16 or not rows.shape[1]:
        raise InputError(f"rows have shape {rows.shape} and type {rows.dtype}: expected (n, 16·m) float32")
    size = len(rows)
    clusters = device.empty((size,), "int32")
    if not size:
        return clusters
    gram = _gram(device, rows, count)
    seeds = _seeds(device, gram, count, num_clusters, restarts)
    members, labels = (device.empty((restarts, 2, size), "int32") for _ in range(2))
    nearest, cross = (device.empty((restarts * many, size), "float64") for many in (1, num_clusters))
    norms = device.empty((restarts, 2, num_clusters), "float64")
    inertia, last = device.empty((restarts,), "float64"), device.empty((restarts,), "int32")
    scratch = (members, labels, nearest, cross, norms, inertia, last)
    options = (num_clusters, size, rows.shape[1], LLOYD_ROUNDS, LLOYD_TOLERANCE)
    device.launch(LLOYD, (restarts,), gram, count, seeds, *scratch, *options)
    grid = (-(-size // BLOCK),)
    device.launch(CHOOSE_LABELS, grid, labels, inertia, last, count, clusters, restarts, size)
    return clusters


def _gram(device: Device, rows: DeviceArray, count: DeviceArray) -> DeviceArray:
    """Dot products of the rows less their mean, ``(n, n)``."""
    size, width = rows.shape
    mean, gram = device.empty((width,), "float32"), device.empty((size, size), "float32")
    device.launch(MEAN_ROW, (-(-width // 64),), rows, count, mean, width)
    tiles = -(-size // GRAM_TILE)
    device.launch(GRAM, (tiles, tiles), rows, mean, count, gram, size, width)
    return gram


def _seeds(device: Device, gram: DeviceArray, count: DeviceArray, num_clusters: int, restarts: int) -> DeviceArray:
    """First rows of each cluster, ``(restarts, num_clusters)`` int32, by the random numbers of scikit-learn.

    Each restart takes one number for its first seed and as many as it has candidates for each further one. How many
    clusters there are depends on ``count``, so the device finds its place in the stream.
    """
    trials = np.array([0, *(2 + int(np.log(k)) for k in range(1, num_clusters + 1))], np.int32)
    drawn = np.random.RandomState(0).random_sample(restarts * (1 + (num_clusters - 1) * int(trials[-1])))
    stream, trial_counts = device.upload(drawn), device.upload(trials)
    seeds = device.empty((restarts, num_clusters), "int32")
    closest, nearer = (device.empty((restarts, len(gram)), "float64") for _ in range(2))
    for step in range(num_clusters):
        arrays = (gram, count, stream, trial_counts, seeds, closest, nearer)
        device.launch(NEXT_SEED, (restarts,), *arrays, step, num_clusters, len(gram))
        closest, nearer = nearer, closest
    return seeds
