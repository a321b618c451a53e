"""Clusters of unit descriptors: k = 1, 2, … until one more no longer helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.collection import LazySequence
from facetrt.engine.features.features import Float
from facetrt.engine.tasks.descriptors import Rows, assign_rows
from facetrt.kernels.errors import InputError
from facetrt.kernels.faiss_gpu import import_faiss_with_gpu, kmeans_gpu
from facetrt.kernels.kmeans import kmeans_each

MAX_CLUSTERS = 14
AHEAD = 4  # how many k share one reading of descriptors in memory; lazy ones are read once for all k


class ClusteringMethod(StrEnum):
    """Who trains the clusters: facetrt's own k-means where the descriptors live, or FAISS on a GPU.

    Both have the same starts and rounds; FAISS is for very many samples. Centroids agree up to rounding.
    """

    FACETRT = "facetrt"
    FAISS = "faiss"

    def check_available(self) -> None:
        """Raise an error, which says what to install, if FAISS is asked for and cannot use a GPU."""
        if self is ClusteringMethod.FAISS:
            import_faiss_with_gpu()

    def train(self, samples: Float, counts: Sequence[int], gpu: int = 0) -> list[Float]:
        """Centroids ``(k, C)`` for each k of ``counts``, of ``samples (n, C)`` on the host; FAISS works on ``gpu``."""
        if self is ClusteringMethod.FAISS:
            return [kmeans_gpu(samples, count, gpu=gpu).centroids for count in counts]
        return [found.centroids for found in kmeans_each(samples, counts)]


@dataclass(frozen=True)
class Clustering:
    """An elbow sweep: every ``k`` tried, the mean squared distance ``objectives`` of each, and the last clustering.

    ``labels`` holds one ``(cells,)`` int64 array per image, ``centroids (k, C)`` float32.
    """

    tried_k: list[int]
    objectives: list[float]
    centroids: Float = field(repr=False)
    labels: list[NDArray[np.int64]] = field(repr=False)


def no_clusters() -> Clustering:
    """The clustering of no image."""
    return Clustering([], [], np.empty((0, 0), np.float32), [])


def cluster_elbow(
    descriptors: Sequence[Rows],
    *,
    elbow: float = 0.975,
    sample_interval: int = 100,
    max_clusters: int = MAX_CLUSTERS,
    method: ClusteringMethod = ClusteringMethod.FACETRT,
) -> Clustering:
    """Cluster with k = 1, 2, … until one more cluster no longer helps.

    Stops at the first k whose error exceeds ``elbow`` times the previous one; that k itself is used.

    Args:
        descriptors: per image ``(cells, C)`` float32, rows of unit length, or :class:`BinnedRows`.
        sample_interval: every how many-th descriptor of each image the clusters are trained on.

    Raises:
        InputError: fewer sampled descriptors than clusters before the elbow was reached.
    """
    samples = sample_rows(descriptors, sample_interval)
    clustering = sweep_to_elbow(descriptors, samples, elbow, max_clusters, method)
    check_reached(clustering, elbow, len(samples), sample_interval, max_clusters)
    return clustering


def sample_rows(descriptors: Sequence[Rows], interval: int) -> Float:
    """Every ``interval``-th descriptor of each image, ``(n, C)``."""
    return np.concatenate([rows[::interval].copy() for rows in descriptors])  # a view would keep all rows


def sweep_to_elbow(
    descriptors: Sequence[Rows],
    samples: Float,
    elbow: float,
    max_clusters: int,
    method: ClusteringMethod = ClusteringMethod.FACETRT,
) -> Clustering:
    """The sweep of :func:`cluster_elbow`, whether it reaches the elbow or not."""
    tried: list[int] = []
    objectives: list[float] = []
    last = _Fit(samples[:0], 0.0, [])  # of no samples
    for last in _sweep(descriptors, samples, max_clusters, partial(method.train, samples)):
        tried.append(len(last.centroids))
        objectives.append(last.objective)
        if past_elbow(objectives, elbow):
            break
    return Clustering(tried, objectives, last.centroids, [found.astype(np.int64) for found in last.labels])


def past_elbow(objectives: Sequence[float], elbow: float) -> bool:
    """Whether the last k hardly improved on the one before it."""
    return len(objectives) > 1 and objectives[-1] > elbow * objectives[-2]


def check_reached(clustering: Clustering, elbow: float, samples: int, interval: int, max_clusters: int) -> None:
    """Raise :class:`InputError` if a sweep ran out of its ``samples`` before the elbow."""
    if samples < max_clusters and not past_elbow(clustering.objectives, elbow):
        smaller = f" or a sampling interval below {interval}" if interval > 1 else ""
        raise InputError(
            f"the images give {samples} sampled descriptors, too few for {samples + 1} clusters: use more images, a "
            f"larger load size{smaller}"
        )


@dataclass(frozen=True)
class _Fit:
    """One k of the sweep: the mean squared distance of all descriptors, and the cluster of each by image."""

    centroids: Float
    objective: float
    labels: list[NDArray[np.unsignedinteger]]


Train = Callable[[Sequence[int]], list[Float]]


def _sweep(descriptors: Sequence[Rows], samples: Float, max_clusters: int, train: Train) -> Iterator[_Fit]:
    """k = 1, 2, … up to ``max_clusters`` or the number of samples.

    Several k share one reading of all descriptors. What was done beyond the last k that the caller takes is in vain:
    clustering 20 images once more costs about as much as reading their descriptors from memory, less than from disk.
    """
    ahead = max_clusters if isinstance(descriptors, LazySequence) else AHEAD
    most = min(max_clusters, len(samples))
    for first in range(1, most + 1, ahead):
        yield from _fits(descriptors, train, range(first, min(first + ahead, most + 1)))


def _fits(descriptors: Sequence[Rows], train: Train, counts: Sequence[int]) -> list[_Fit]:
    """Clusterings of the samples, one for each of ``counts``, assigned to all descriptors in one reading."""
    centroids = train(counts)
    labels: list[list[NDArray[np.unsignedinteger]]] = [[] for _ in counts]
    sums, cells = np.zeros(len(counts)), 0
    for rows in descriptors:
        cells += len(rows)
        for i, found in enumerate(assign_rows(rows, centroids)):
            sums[i] += found.squared_distances.sum(dtype=np.float64)
            labels[i].append(found.labels.astype(np.min_scalar_type(counts[i])))  # most of them are dropped
    return [_Fit(*fit) for fit in zip(centroids, (sums / cells).tolist(), labels, strict=True)]
