"""Co-segmentation of an image collection. Source: Amir et al., section 4.1.

The steps, each reachable on its own: :func:`find_inliers`, :func:`cluster_elbow`, :func:`facetrt.kernels.vote`,
:func:`facetrt.engine.tasks.refinement.grabcut`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.collection import LazySequence, map_features, reasons_empty, select
from facetrt.engine.features.features import Features
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.checks import check_finite, check_voting
from facetrt.engine.tasks.descriptors import Rows, assign_rows, distances_to, normalise, unit_rows
from facetrt.engine.tasks.refinement import (
    Progress,
    Refinement,
    Refiner,
    check_available,
    enlarge_mask,
    grabcut,
    refine_labels,
)
from facetrt.kernels.errors import InputError
from facetrt.kernels.kmeans import kmeans_each
from facetrt.kernels.log_bin import check_hierarchy
from facetrt.kernels.parallel import map_threads
from facetrt.kernels.vote import Votes, vote

Float = NDArray[np.float32]

MAX_CLUSTERS = 14
AHEAD = 4  # how many k share one reading of descriptors in memory; lazy ones are read once for all k


@dataclass(frozen=True)
class CosegmentOptions:
    """Options of co-segmentation, with the reference's defaults; ``Engine.cosegment`` documents them."""

    facet: str
    elbow: float = 0.975
    saliency_threshold: float = 0.065
    votes_percentage: float = 75
    sample_interval: int = 100
    remove_outliers: bool = False
    outlier_threshold: float = 0.7
    refine: Refinement = Refinement.GRABCUT
    hierarchy: int = 0

    def __post_init__(self) -> None:
        check_voting(
            elbow=self.elbow,
            saliency_threshold=self.saliency_threshold,
            votes_percentage=self.votes_percentage,
            sample_interval=self.sample_interval,
        )
        check_hierarchy(self.hierarchy)
        check_finite("outlier_threshold", self.outlier_threshold)
        check_available(self.refine)


@dataclass(frozen=True)
class Mask:
    """One image's co-segmentation.

    Attributes:
        cells: ``(grid_h, grid_w)`` bool, the cells whose cluster is salient.
        labels: ``(grid_h, grid_w)`` int64 cluster of each cell; -1 everywhere in an outlier image.
        loaded_mask: ``(height, width)`` bool at the loaded size: what the reference returns.
        refinement: what made ``loaded_mask`` of ``cells``. ``none`` also where GrabCut had nothing to learn from.
        inlier: False where outlier removal left the image out, or there is nothing to find in it; its mask is empty.
        confidence: how salient the mask's cells are beside the others, ``(in - out) / (in + out)`` of the mean
            saliency inside and outside, at least 0; 0 for a mask of no cell or of all, None without saliency.
        why_empty: why nothing can be found in the image (it is featureless or too small), or None.
    """

    cells: NDArray[np.bool_]
    labels: NDArray[np.int64]
    loaded_mask: NDArray[np.bool_]
    salient_labels: NDArray[np.int64]
    refinement: Refinement
    inlier: bool
    geometry: Geometry
    name: str
    confidence: float | None
    why_empty: str | None

    @property
    def mask(self) -> NDArray[np.bool_]:
        """``(height, width)`` bool at the original size: :attr:`loaded_mask` enlarged by nearest neighbour."""
        return enlarge_mask(self.loaded_mask, self.geometry.original_size)


@dataclass(frozen=True)
class Clustering:
    """An elbow sweep: every ``k`` tried, the mean squared distance ``objectives`` of each, and the last clustering.

    ``labels`` holds one ``(cells,)`` int64 array per image, ``centroids (k, C)`` float32.
    """

    tried_k: list[int]
    objectives: list[float]
    centroids: Float = field(repr=False)
    labels: list[NDArray[np.int64]] = field(repr=False)


@dataclass(frozen=True)
class Masks(Sequence[Mask]):
    """One :class:`Mask` per input image, in order, and how the set was clustered and voted on.

    Images in which nothing can be found neither take part in the clustering nor vote; where fewer than two are left,
    nothing is shared, and there are no clusters. ``inlier_similarity (N,)`` is NaN for them.
    """

    masks: list[Mask]
    clustering: Clustering
    votes: Votes
    inlier_similarity: NDArray[np.float64] | None

    @overload
    def __getitem__(self, index: int) -> Mask: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mask]: ...
    def __getitem__(self, index: int | slice) -> Mask | list[Mask]:
        return self.masks[index]

    def __len__(self) -> int:
        return len(self.masks)

    def __iter__(self) -> Iterator[Mask]:
        return iter(self.masks)


def cosegment_features(
    features: Sequence[Features], options: CosegmentOptions, progress: Progress | None = None
) -> Masks:
    """Masks of the objects that the images share; see ``Engine.cosegment``.

    Args:
        progress: called with (masks refined, masks to refine).

    Raises:
        InputError: fewer than two images, or too few descriptors for the clusters.
    """
    empty = reasons_empty(features)
    similarity, numbers = choose_images(
        empty, lambda shown: np.stack([features[i].cls(options.facet) for i in shown]), options
    )
    if not numbers:
        return nothing_shared(features, options)
    chosen = select(features, numbers)
    rows = descriptors_of(chosen, options.facet, options.hierarchy)
    clustering = cluster_elbow(rows, elbow=options.elbow, sample_interval=options.sample_interval)
    votes = vote(
        clustering.labels,
        [f.saliency.ravel() for f in chosen],
        len(clustering.centroids),
        threshold=options.saliency_threshold,
        percentage=options.votes_percentage,
    )
    labels = dict(zip(numbers, clustering.labels, strict=True))

    def mask(number: int) -> Mask:
        return make_mask(features[number], labels.get(number), clustering.centroids, votes, options)

    masks = map_threads(mask, range(len(features)), progress, threads=options.refine.threads)
    return Masks(masks, clustering, votes, similarity)


def descriptors_of(features: Sequence[Features], facet: str, hierarchy: int) -> Sequence[Rows]:
    """Unit descriptors of each image; binned ones, which would fill memory, are made again at each use."""
    if hierarchy:
        return LazySequence(len(features), lambda i: unit_rows(features[i], facet, hierarchy))
    return map_features(features, lambda item: normalise(item[facet]))


def choose_images(
    empty: Sequence[str | None], cls_rows: Callable[[Sequence[int]], Float], options: CosegmentOptions
) -> tuple[NDArray[np.float64] | None, list[int]]:
    """Similarity of each image to the mean, if outliers are removed, and the numbers of the images that take part.

    Args:
        empty: of each image, why nothing can be found in it, or None.
        cls_rows: gives the [CLS] descriptors of some images, ``(n, C)``; called only if outliers are removed.

    Returns:
        The numbers are none where fewer than two images have something in them.

    Raises:
        InputError: fewer than two images, or fewer than two inliers.
    """
    if len(empty) < 2:
        raise InputError(f"{len(empty)} image was given: co-segmentation needs at least 2 that share an object")
    shown = [number for number, why in enumerate(empty) if why is None]
    if len(shown) < 2 or not options.remove_outliers:
        return None, shown if len(shown) > 1 else []
    similarity = np.full(len(empty), np.nan)
    similarity[shown] = similarity_to_mean(cls_rows(shown))
    inliers = find_inliers(similarity[shown], options.outlier_threshold)
    return similarity, [number for number, inlier in zip(shown, inliers, strict=True) if inlier]


def nothing_shared(features: Sequence[Features], options: CosegmentOptions) -> Masks:
    """The result where fewer than two images have something in them: empty masks, no clusters."""
    none = np.empty((0, 0), np.float32)
    votes = Votes(np.empty((0, 0)), np.empty(0, np.int64), 0)
    return Masks([make_mask(item, None, none, votes, options) for item in features], no_clusters(), votes, None)


def no_clusters() -> Clustering:
    """Of no image."""
    return Clustering([], [], np.empty((0, 0), np.float32), [])


def find_inliers(similarity: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Which images take part, ``(N,)``: those of at least ``threshold``.

    Raises:
        InputError: fewer than two images are left.
    """
    inliers = similarity >= threshold
    if inliers.sum() < 2:
        raise InputError(
            f"outlier removal at {threshold} leaves {inliers.sum()} of {len(inliers)} images (similarities "
            f"{similarity.min():.2f} to {similarity.max():.2f}): lower outlier_threshold"
        )
    return inliers


def similarity_to_mean(rows: Float) -> NDArray[np.float64]:
    """Cosine of each image's [CLS] descriptor, a row of ``(N, C)``, to the mean over the images, ``(N,)``."""
    vectors = rows.astype(np.float64)
    mean = vectors.mean(axis=0)
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(mean)
    dots = np.einsum("nc,c->n", vectors, mean)  # no BLAS: the same on any number of threads
    return np.asarray(dots / np.maximum(norms, 1e-8))


def cluster_elbow(
    descriptors: Sequence[Rows],
    *,
    elbow: float = 0.975,
    sample_interval: int = 100,
    max_clusters: int = MAX_CLUSTERS,
) -> Clustering:
    """Cluster with k = 1, 2, … until one more cluster no longer helps.

    Stops at the first k whose error exceeds ``elbow`` times the previous one; that k itself is used.

    Args:
        descriptors: per image ``(cells, C)`` float32, rows of unit length, or :class:`BinnedRows`.
        sample_interval: every how many-th descriptor of each image the clusters are trained on.

    Raises:
        InputError: fewer sampled descriptors than clusters before the elbow was reached.
    """
    samples = np.concatenate([rows[::sample_interval].copy() for rows in descriptors])  # a view would keep all rows
    fits: list[_Fit] = []
    for fit in _sweep(descriptors, samples, max_clusters):
        fits.append(fit)
        if len(fits) > 1 and fit.objective > elbow * fits[-2].objective:
            break
    else:
        if len(fits) < max_clusters:
            raise InputError(too_few_descriptors(len(samples), sample_interval))
    labels = [found.astype(np.int64) for found in fit.labels]
    return Clustering([len(f.centroids) for f in fits], [f.objective for f in fits], fit.centroids, labels)


@dataclass(frozen=True)
class _Fit:
    """One k of the sweep: the mean squared distance of all descriptors, and the cluster of each by image."""

    centroids: Float
    objective: float
    labels: list[NDArray[np.unsignedinteger]]


def _sweep(descriptors: Sequence[Rows], samples: Float, max_clusters: int) -> Iterator[_Fit]:
    """k = 1, 2, … up to ``max_clusters`` or the number of samples.

    Several k share one reading of all descriptors. What was done beyond the last k that the caller takes is in vain:
    clustering 20 images once more costs about as much as reading their descriptors from memory, less than from disk.
    """
    ahead = max_clusters if isinstance(descriptors, LazySequence) else AHEAD
    most = min(max_clusters, len(samples))
    for first in range(1, most + 1, ahead):
        yield from _fits(descriptors, samples, range(first, min(first + ahead, most + 1)))


def _fits(descriptors: Sequence[Rows], samples: Float, counts: Sequence[int]) -> list[_Fit]:
    """Clusterings of the samples, one for each of ``counts``, assigned to all descriptors in one reading."""
    centroids = [found.centroids for found in kmeans_each(samples, counts)]
    labels: list[list[NDArray[np.unsignedinteger]]] = [[] for _ in counts]
    sums, cells = np.zeros(len(counts)), 0
    for rows in descriptors:
        cells += len(rows)
        for i, found in enumerate(assign_rows(rows, centroids)):
            sums[i] += found.squared_distances.sum(dtype=np.float64)
            labels[i].append(found.labels.astype(np.min_scalar_type(counts[i])))  # most of them are dropped
    return [_Fit(*fit) for fit in zip(centroids, (sums / cells).tolist(), labels, strict=True)]


def too_few_descriptors(samples: int, interval: int) -> str:
    """The message where a sweep runs out of sampled descriptors before it reaches the elbow."""
    smaller = f" or a sampling interval below {interval}" if interval > 1 else ""
    return (
        f"the images give {samples} sampled descriptors, too few for {samples + 1} clusters: use more images, a larger "
        f"load size{smaller}"
    )


def make_mask(
    features: Features,
    labels: NDArray[np.int64] | None,
    centroids: Float,
    votes: Votes,
    options: CosegmentOptions,
    refiner: Refiner = refine_labels,
    saliency: Float | None = None,
) -> Mask:
    """The mask of one image from its cells' clusters ``(cells,)``; None makes the empty mask of an outlier."""
    salient = votes.salient_labels

    def nearest() -> Float:
        rows = unit_rows(features, options.facet, options.hierarchy)
        return nearest_of_groups(distances_to(rows, centroids)[0], salient)

    all_or_none = len(salient) in (0, len(centroids))
    return mask_of_labels(
        features, labels, salient, options.refine, None if all_or_none else nearest, refiner, saliency
    )


def nearest_of_groups(distances: Float, salient: NDArray[np.int64]) -> Float:
    """Distances to the nearest salient and other centroid, ``(2, cells)``, of ``distances (k, cells)`` to all."""
    return np.stack([group.min(axis=0) for group in (distances[salient], np.delete(distances, salient, axis=0))])


def mask_of_labels(
    features: Features,
    labels: NDArray[np.int64] | None,
    salient: NDArray[np.int64],
    refine: Refinement,
    nearest: Callable[[], Float] | None,
    refiner: Refiner = refine_labels,
    saliency: Float | None = None,
) -> Mask:
    """The mask that an image's clusters make.

    Args:
        labels: cluster of each cell, ``(cells,)``; None makes the empty mask of an outlier.
        salient: the clusters that are foreground.
        nearest: gives squared distances to the nearest salient and other centroid, ``(2, cells)``, which a CRF weighs
            against each other; None if there are not both.
        refiner: runs the CRF.
        saliency: of the cells, where ``features`` do not hold it.
    """
    if features.why_empty is not None:
        labels = None
    grid = features.grid
    grid_labels = np.full(grid, -1) if labels is None else labels.reshape(grid)
    cells = np.isin(grid_labels, salient)
    if saliency is None and features.attention is not None:
        saliency = features.saliency
    loaded, refinement = enlarge_mask(cells, features.image_size), Refinement.NONE
    refined = None if labels is None else _refine(features, loaded, refine, nearest, refiner)
    if refined is not None:
        loaded, refinement = refined, refine
    return Mask(
        cells=cells,
        labels=grid_labels,
        loaded_mask=loaded,
        salient_labels=salient,
        refinement=refinement,
        inlier=labels is not None,
        geometry=features.geometry,
        name=features.name,
        confidence=None if saliency is None else contrast(saliency, cells),
        why_empty=features.why_empty,
    )


def contrast(saliency: Float, cells: NDArray[np.bool_]) -> float:
    """``(in - out) / (in + out)`` of the mean saliency inside and outside of some cells, at least 0; see :class:`Mask`.

    Args:
        saliency: of all cells, in the shape of ``cells`` or flat.
    """
    chosen = cells.ravel()
    if not chosen.any() or chosen.all():
        return 0.0
    values = saliency.ravel().astype(np.float64)
    inside, outside = values[chosen].mean(), values[~chosen].mean()
    return float(max(inside - outside, 0) / max(inside + outside, np.finfo(np.float64).tiny))


def _refine(
    features: Features,
    mask: NDArray[np.bool_],
    refine: Refinement,
    nearest: Callable[[], Float] | None,
    refiner: Refiner,
) -> NDArray[np.bool_] | None:
    """The mask refined as asked, or None where there is nothing to refine by."""
    if refine is Refinement.NONE:
        return None
    if refine is Refinement.GRABCUT:
        return grabcut(features.pixels, mask)
    if nearest is None:
        return None
    distances = nearest()
    energy = (distances - distances.max(axis=0)).reshape(2, *features.grid)
    return np.asarray(refiner(features.pixels, energy, refine) == 0)
