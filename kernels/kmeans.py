"""k-means as the method uses it: FAISS for co-segmentation, greedy k-means++ for choosing diverse point pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError, MissingDependencyError
from facetrt.kernels.parallel import map_threads, one_blas_thread
from facetrt.kernels.products import (
    BLOCK_ROWS,
    TIE,
    first_smallest,
    gram_matrix,
    squared_distances,
    squared_lengths,
)

if TYPE_CHECKING:
    from types import ModuleType

Float = NDArray[np.float32]

SEED = 1234  # FAISS's default; with it fixed, results are deterministic up to summation order
SEED_STEP = 15486557  # from one restart's seed to the next
SAMPLES_PER_CENTROID = 256  # FAISS trains on at most this many rows per centroid
ROUNDS = 16  # asked of FAISS at a time; most restarts settle within them
EXACT_TIE = 1e-12  # what float64 sums of the same numbers may differ by


@dataclass(frozen=True)
class KMeans:
    """``centroids (k, C)`` float32 and ``objective``, the sum of squared distances of the training rows."""

    centroids: Float
    objective: float


@dataclass(frozen=True)
class Assignment:
    """The nearest centroid of each row, ``labels (n,)`` int64, and its ``squared_distances (n,)`` float32."""

    labels: NDArray[np.int64]
    squared_distances: Float


def kmeans(samples: Float, num_clusters: int, *, iterations: int = 300, restarts: int = 10) -> KMeans:
    """FAISS k-means with the method's settings: random rows as start, Lloyd rounds, best of the restarts.

    Each restart is bit for bit what FAISS computes on one thread with ``niter=iterations`` and early stopping off, and
    the best one is taken. Objectives tie where they differ by less than ``TIE`` times the sum of the rows' squared
    lengths; the first restart wins. Restarts run side by side, and each ends where its rounds repeat themselves.

    Args:
        samples: ``(n, C)`` float32 rows, finite. More than 256·k rows are subsampled as by FAISS.
        num_clusters: k, at least 1 and at most n.

    Raises:
        InputError: fewer rows than clusters, wrong shape, NaN.
        MissingDependencyError: neither the ``cpu`` nor the ``gpu`` extra is installed.
    """
    return kmeans_each(samples, [num_clusters], iterations=iterations, restarts=restarts)[0]


def kmeans_each(samples: Float, counts: Sequence[int], *, iterations: int = 300, restarts: int = 10) -> list[KMeans]:
    """:func:`kmeans` for each of ``counts``, at least one; the restarts of all of them share the threads."""
    faiss = import_faiss()
    if iterations < 1 or restarts < 1:
        raise InputError(f"iterations={iterations}, restarts={restarts}: expected at least 1")
    for count in {min(counts), max(counts)}:
        rows = check_samples(samples, count)
    starts = [start for count in counts for start in _starts(rows, count, restarts)]

    def run(start: _Start) -> KMeans:
        faiss.omp_set_num_threads(1)  # of this thread only
        return _converge(start, iterations)

    found = map_threads(run, starts)
    runs = [found[i : i + restarts] for i in range(0, len(found), restarts)]
    margin = TIE * float(squared_lengths(rows).sum(dtype=np.float64))
    return [_first_best(run, margin) for run in runs]


def _first_best(runs: Sequence[KMeans], margin: float) -> KMeans:
    """FAISS takes the smallest objective; restarts often end in one clustering, numbered and rounded differently."""
    smallest = min(run.objective for run in runs)
    return next(run for run in runs if run.objective <= smallest + margin)


@dataclass(frozen=True)
class _Start:
    """Where a restart begins: training ``rows (n, C)`` and first ``centroids (k, C)``."""

    rows: Float
    centroids: Float


def _starts(rows: Float, count: int, restarts: int) -> list[_Start]:
    """The restarts of FAISS: its subsample, and centroids drawn from that by its generator."""
    limit = SAMPLES_PER_CENTROID * count
    if len(rows) > limit:
        rows = rows[_faiss_permutation(len(rows), SEED)[:limit]]
    orders = (_faiss_permutation(len(rows), SEED + 1 + restart * SEED_STEP) for restart in range(restarts))
    return [_Start(rows, rows[order[:count]]) for order in orders]


def _faiss_permutation(count: int, seed: int) -> NDArray[np.int32]:
    faiss = import_faiss()
    order = np.empty(count, np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), count, seed)
    return order


def _converge(start: _Start, iterations: int) -> KMeans:
    """The state after so many rounds.

    A round maps centroids to centroids and nothing else, so one that changes no bit ends the run. It is looked for
    where the objective stands still. That alone proves nothing: float32 sums also stay equal while centroids move.
    """
    if len(start.rows) == len(start.centroids):
        return KMeans(start.rows.copy(), 0.0)  # as FAISS does
    centroids, done = start.centroids, 0
    while done < iterations:
        centroids, objectives = _rounds(start.rows, centroids, min(ROUNDS, iterations - done))
        done += len(objectives)
        if done < iterations and len(objectives) > 1 and objectives[-1] == objectives[-2]:
            previous = centroids
            centroids, objectives = _rounds(start.rows, centroids, 1)
            done += 1
            if np.array_equal(centroids, previous):
                break
    return KMeans(centroids, objectives[-1])


def _rounds(rows: Float, centroids: Float, count: int) -> tuple[Float, list[float]]:
    """Centroids after ``count`` Lloyd rounds of FAISS and the objective of each; newer versions may stop sooner."""
    faiss = import_faiss()
    parameters = faiss.ClusteringParameters()
    parameters.niter = count
    parameters.min_points_per_centroid = 1  # only silences a warning printed by the library
    parameters.check_input_data_for_NaNs = False
    trainer = faiss.Clustering(rows.shape[1], len(centroids), parameters)
    faiss.copy_array_to_vector(centroids.ravel(), trainer.centroids)
    trainer.train(rows, faiss.IndexFlatL2(rows.shape[1]))
    stats = trainer.iteration_stats
    found = faiss.vector_to_array(trainer.centroids).reshape(centroids.shape)
    return found, [float(stats.at(i).obj) for i in range(stats.size())]


def import_faiss() -> ModuleType | Any:
    """The faiss module, or an error that names both extras that bring it."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "k-means needs faiss, which is not installed: pip install 'facetrt[cpu]' (or 'facetrt[gpu]' with CUDA)"
        ) from error
    return faiss


def check_samples(samples: Float, num_clusters: int) -> Float:
    """``(n, C)`` finite rows, at least ``num_clusters`` of them, as contiguous float32."""
    if samples.ndim != 2 or samples.shape[1] == 0:
        raise InputError(f"samples have shape {samples.shape}: expected (n, C) descriptors")
    if not 1 <= num_clusters <= len(samples):
        raise InputError(
            f"{num_clusters} clusters were asked of {len(samples)} descriptors: expected 1 to {len(samples)}; "
            "use larger images, a smaller sampling interval or fewer clusters"
        )
    rows = np.ascontiguousarray(samples, np.float32)
    if not np.isfinite(rows).all():
        raise InputError("samples hold NaN or infinite values: expected finite descriptors")
    return rows


def assign(samples: Float, centroids: Float) -> Assignment:
    """Nearest centroid by squared Euclidean distance; ``samples (n, C)``, ``centroids (k, C)``.

    Distances tie where they differ by less than ``TIE`` times the squared lengths; the first centroid wins. Works
    through blocks of rows, so that memory stays at ``rows × k`` floats.
    """
    return assign_each(samples, [centroids])[0]


def assign_each(samples: Float, centroid_sets: Sequence[Float]) -> list[Assignment]:
    """:func:`assign` for each set of centroids, reading the samples once; bit for bit as one after the other."""
    for centroids in centroid_sets:
        _check_centroids(samples, centroids)
    found = [Assignment(np.empty(len(samples), np.int64), np.empty(len(samples), np.float32)) for _ in centroid_sets]
    for start in range(0, len(samples), BLOCK_ROWS):
        rows = np.asarray(samples[start : start + BLOCK_ROWS], np.float32)
        block = slice(start, start + len(rows))
        squares = squared_lengths(rows)
        for centroids, result in zip(centroid_sets, found, strict=True):  # a product each: no set may touch another
            distances = squared_distances(rows, centroids, squares)
            result.labels[block] = nearest(distances, centroids, squares)
            result.squared_distances[block] = distances.min(axis=0)
    return found


def nearest(distances: Float, centroids: Float, squares: Float) -> NDArray[np.int64]:
    """Which of the squared ``distances (k, n)`` is the smallest of each row, as for :func:`assign`, ``(n,)``.

    Args:
        squares: ``(n,)`` squared lengths of the rows.
    """
    return first_smallest(distances, TIE * (squares + squared_lengths(centroids).max()))


def _check_centroids(samples: Float, centroids: Float) -> None:
    if samples.ndim != 2 or centroids.ndim != 2 or samples.shape[1] != centroids.shape[1] or not len(centroids):
        raise InputError(
            f"samples {samples.shape} and centroids {centroids.shape} do not fit: expected (n, C) and (k, C), k ≥ 1"
        )


def diverse_clusters(
    rows: Float, num_clusters: int, *, restarts: int = 10, tolerance: float = 1e-4
) -> NDArray[np.int64]:
    """Cluster number of each row, as scikit-learn's k-means numbers them (greedy k-means++, ``random_state=0``).

    The method clusters few, very long rows (two binned descriptors). Everything k-means needs of them is their Gram
    matrix, so the iterations run on ``(n, n)`` numbers instead of ``(n, 2·17·C)``: distances to a mean of rows are sums
    of its entries. The random stream, seeding, stopping rule and choice among restarts are scikit-learn's.

    Args:
        rows: ``(n, C)`` float32, n ≥ num_clusters ≥ 1.

    Returns:
        ``(n,)`` int64 in 0..num_clusters-1.

    Raises:
        InputError: fewer rows than clusters.
    """
    samples = check_samples(rows, num_clusters)
    centred = samples - samples.mean(axis=0)
    tolerance = tolerance * float(samples.var(axis=0).mean())
    gram = _gram(centred)
    squared = np.maximum(gram.diagonal()[:, None] + gram.diagonal() - 2 * gram, 0)
    random = np.random.RandomState(0)
    best_labels, best_inertia = np.zeros(len(rows), np.int64), np.inf
    with one_blas_thread:
        for _ in range(restarts):
            seeds = _greedy_seeds(squared, num_clusters, random)
            labels, inertia = _lloyd(gram, seeds, tolerance)
            if inertia < best_inertia * (1 - EXACT_TIE):
                best_labels, best_inertia = labels, inertia
    return best_labels


def _gram(rows: Float) -> NDArray[np.float64]:
    """Dot products of all rows, ``(n, n)``. Rows closer than rounding count as the first of them, and tie exactly."""
    gram = gram_matrix(rows).astype(np.float64)
    lengths = gram.diagonal()
    equal = lengths[:, None] + lengths - 2 * gram <= TIE * (lengths[:, None] + lengths)
    first = equal.argmax(axis=1)  # of each row itself at the latest
    return gram[np.ix_(first, first)]


def _greedy_seeds(squared: NDArray[np.float64], count: int, random: np.random.RandomState) -> list[int]:
    """Greedy k-means++: each new seed is the best of ``2 + log(count)`` candidates drawn by squared distance."""
    trials = 2 + int(np.log(count))
    seeds = [int(random.choice(len(squared), p=np.full(len(squared), 1 / len(squared))))]
    closest = squared[seeds[0]]
    for _ in range(1, count):
        draws = random.uniform(size=trials) * closest.sum()
        candidates = np.minimum(np.searchsorted(np.cumsum(closest), draws), len(squared) - 1)
        distances = np.minimum(closest, squared[candidates])
        best = int(distances.sum(axis=1).argmin())
        closest = distances[best]
        seeds.append(int(candidates[best]))
    return seeds


def _lloyd(gram: NDArray[np.float64], seeds: list[int], tolerance: float) -> tuple[NDArray[np.int64], float]:
    """Lloyd rounds from the given rows; returns labels and the sum of squared distances."""
    weights = np.zeros((len(seeds), len(gram)))  # each centroid as a mean of rows
    weights[np.arange(len(seeds)), seeds] = 1
    labels = np.full(len(gram), -1, np.int64)
    for _ in range(300):
        distances = _distances_to_means(gram, weights)
        previous, labels = labels, first_smallest(distances, EXACT_TIE * gram.diagonal().max())
        if np.array_equal(labels, previous):
            break
        moved = _means(labels, distances, len(seeds)) - weights
        weights += moved
        if np.einsum("ki,ij,kj->", moved, gram, moved, optimize=True) <= tolerance:
            break
    distances = _distances_to_means(gram, weights)
    return first_smallest(distances, EXACT_TIE * gram.diagonal().max()), float(distances.min(axis=0).sum())


def _distances_to_means(gram: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(k, n)`` squared distances from the rows to the means that ``weights (k, n)`` describe."""
    cross = weights @ gram
    own = np.einsum("kn,kn->k", cross, weights)
    return np.asarray(np.maximum(gram.diagonal() - 2 * cross + own[:, None], 0))


def _means(labels: NDArray[np.int64], distances: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Weights of the clusters' means; an empty cluster takes the row that lies farthest from its centroid."""
    members = np.zeros((count, len(labels)))
    members[labels, np.arange(len(labels))] = 1
    empty = np.flatnonzero(members.sum(axis=1) == 0)
    if empty.size:
        farthest = np.argsort(-distances.min(axis=0), kind="stable")[: empty.size]
        members[:, farthest] = 0
        members[empty, farthest] = 1
    return np.asarray(members / np.maximum(members.sum(axis=1, keepdims=True), 1))


def permutation(count: int, seed: int, length: int) -> NDArray[np.int32]:
    """The beginning of FAISS's random permutation: swap i with ``i + next_u32 mod (count - i)``."""
    order = list(range(count))
    draws = np.random.RandomState(seed).randint(0, 2**32, size=length, dtype=np.uint32)
    for i, draw in enumerate(draws.tolist()):
        j = i + draw % (count - i)
        order[i], order[j] = order[j], order[i]
    return np.array(order[:length], np.int32)


def kmeans_reference(samples: Float, num_clusters: int, *, iterations: int = 300, restarts: int = 10) -> KMeans:
    """FAISS's k-means written out in NumPy: same random streams, same rounds. Slow; the oracle for :func:`kmeans`."""
    rows = check_samples(samples, num_clusters).astype(np.float64)
    limit = SAMPLES_PER_CENTROID * num_clusters
    if len(rows) > limit:
        rows = rows[permutation(len(rows), SEED, limit)]
    best = KMeans(np.empty((0, 0), np.float32), np.inf)
    if len(rows) == num_clusters:
        return KMeans(rows.astype(np.float32), 0.0)
    for restart in range(restarts):
        centroids = rows[permutation(len(rows), SEED + 1 + restart * SEED_STEP, num_clusters)]
        objective = np.inf
        for _ in range(iterations):
            distances = ((rows[:, None] - centroids) ** 2).sum(axis=2)
            objective = float(distances.min(axis=1).sum())
            centroids = _update(rows, distances.argmin(axis=1), num_clusters)
        if objective < best.objective:
            best = KMeans(centroids.astype(np.float32), objective)
    return best


def _update(rows: NDArray[np.float64], labels: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Means of the clusters; an empty one becomes a perturbed copy of a large one."""
    sizes = np.bincount(labels, minlength=count)
    centroids = np.stack(
        [rows[labels == k].mean(axis=0) if sizes[k] else np.zeros(rows.shape[1]) for k in range(count)]
    )
    random = np.random.RandomState(SEED)
    sign = np.where(np.arange(rows.shape[1]) % 2 == 0, 1, -1) / 1024
    for empty in np.flatnonzero(sizes == 0):
        donor = 0
        while _next_float(random) >= (sizes[donor] - 1) / (len(rows) - count):
            donor = (donor + 1) % count
        centroids[empty] = centroids[donor] * (1 + sign)
        centroids[donor] = centroids[donor] * (1 - sign)
        sizes[empty] = sizes[donor] // 2
        sizes[donor] -= sizes[empty]
    return centroids


def _next_float(random: np.random.RandomState) -> float:
    return float(random.randint(0, 2**32, dtype=np.uint32)) / 0xFFFFFFFF
