"""Co-segmentation of an image collection. Source: Amir et al., section 4.1.

:func:`cosegment_images` says which step follows which, on :class:`Images` that know how each is done where their
descriptors live. On the host the steps are reachable on their own: :func:`find_inliers`,
:func:`facetrt.engine.tasks.clustering.cluster_elbow`, :func:`facetrt.kernels.vote`,
:func:`facetrt.engine.tasks.refinement.grabcut`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Annotated, Generic, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.collection import records_of, select
from facetrt.engine.features.features import Features, Float, ImageRecord, SaliencyMode
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSizeChoice, Pixels
from facetrt.engine.settings import BUNDLES_CHOICE, FacetChoice, Hierarchy, Setting, check
from facetrt.engine.tasks.clustering import (
    MAX_CLUSTERS,
    Clustering,
    ClusteringMethod,
    check_reached,
    no_clusters,
    sample_rows,
    sweep_to_elbow,
)
from facetrt.engine.tasks.descriptors import Rows, descriptors_of, distances_to, unit_rows
from facetrt.engine.tasks.masks import bilateral_mask
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
from facetrt.kernels.parallel import map_threads
from facetrt.kernels.vote import Votes, vote

Gathered = TypeVar("Gathered")  # unit descriptors and saliency of the images that take part, where they live
Samples = TypeVar("Samples", bound=Sized)  # some of those descriptors, (n, C)
Sweep = TypeVar("Sweep")  # clusterings of them with k = 1, 2, …
Ballot = TypeVar("Ballot")  # votes on the last of those


VOTING = SaliencyMode.LOW_RESOLUTION  # what images vote with unless one asks for another, as in the reference
LOADING = ("load_size", "saliency")  # options that say nothing where features are given

Elbow = Annotated[float, Setting("Stop adding clusters at this error ratio.", above=0)]
VoteThreshold = Annotated[float, Setting("An image votes for clusters of a mean saliency above this, of 0 to 1.")]
VotesPercentage = Annotated[float, Setting("Share of the images that must vote for a cluster.", minimum=0, maximum=100)]
SampleInterval = Annotated[int, Setting("Cluster every n-th descriptor of each image.", minimum=1)]
Trainer = Annotated[ClusteringMethod, Setting("Who trains the clusters; faiss, on a GPU, for very many samples.")]
VoteSaliency = Annotated[
    SaliencyMode | None,
    Setting("From the descriptors' own pass, or from one at half the size and stride 8.", shown=VOTING),
]


@dataclass(frozen=True)
class CosegmentOptions:
    """Options of co-segmentation, with the reference's defaults; ``Engine.cosegment`` documents them."""

    facet: FacetChoice = BUNDLES_CHOICE
    elbow: Elbow = 0.975
    saliency_threshold: VoteThreshold = 0.065
    votes_percentage: VotesPercentage = 75
    sample_interval: SampleInterval = 100
    remove_outliers: Annotated[bool, Setting("Leave out images that are unlike the others.")] = False
    outlier_threshold: Annotated[float, Setting("Cosine to the images' mean [CLS] that --remove-outliers asks.")] = 0.7
    clustering: Trainer = ClusteringMethod.FACETRT
    refine: Annotated[Refinement, Setting("How cells become pixels.")] = Refinement.GRABCUT
    hierarchy: Hierarchy = 0
    saliency: VoteSaliency = None
    load_size: LoadSizeChoice = DEFAULT_SIZE

    def __post_init__(self) -> None:
        check(self)
        self.clustering.check_available()
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
        return enlarge_mask(self.geometry.on_picture(self.loaded_mask), self.geometry.original_size)


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


class Picture(Protocol):
    """What the mask of one image is made from, in host memory; read or downloaded where it is asked for."""

    @property
    def record(self) -> ImageRecord: ...
    @property
    def saliency(self) -> Float | None: ...
    @property
    def pixels(self) -> Pixels: ...
    def distances(self, centroids: Float) -> Float:
        """Squared distances of the cells' unit descriptors to ``centroids (k, C)``, ``(k, cells)``."""


class Images(ABC, Generic[Gathered, Samples, Sweep, Ballot]):
    """A set of images, wherever their descriptors live, and the steps of co-segmentation there.

    Attributes:
        records: what each image is.
        refiner: runs the CRF; may be called from several threads, as :meth:`picture` may.
    """

    records: Sequence[ImageRecord]
    refiner: Refiner

    @abstractmethod
    def cls_rows(self, numbers: Sequence[int]) -> Float:
        """[CLS] descriptors of some images in host memory, ``(n, C)``."""

    @abstractmethod
    def gather(self, numbers: Sequence[int]) -> Gathered:
        """What is clustered of the images that take part."""

    @abstractmethod
    def sample(self, gathered: Gathered, interval: int) -> Samples:
        """Every ``interval``-th descriptor of each image."""

    @abstractmethod
    def sweep(
        self, gathered: Gathered, samples: Samples, elbow: float, max_clusters: int, method: ClusteringMethod
    ) -> Sweep:
        """Clusters of the samples, to which all descriptors are assigned, until one more no longer helps.

        The last k is the first one :func:`~facetrt.engine.tasks.clustering.past_elbow`, or else the largest there is.
        """

    @abstractmethod
    def vote(self, gathered: Gathered, sweep: Sweep, threshold: float, percentage: float) -> Ballot:
        """The images' votes on the clusters of the last k; see :func:`facetrt.kernels.vote`."""

    @abstractmethod
    def clustering(self, sweep: Sweep) -> Clustering:
        """The sweep in host memory. On a device this waits, and the votes have been counted by then."""

    @abstractmethod
    def votes(self, ballot: Ballot, num_clusters: int) -> Votes:
        """The votes in host memory, of so many clusters."""

    @abstractmethod
    def picture(self, number: int) -> Picture:
        """One image, for its mask."""


def cosegment_images(
    images: Images[Gathered, Samples, Sweep, Ballot], options: CosegmentOptions, progress: Progress | None = None
) -> Masks:
    """Masks of the objects that the images share; see ``Engine.cosegment``.

    Args:
        progress: called with (masks refined, masks to refine).

    Raises:
        InputError: fewer than two images, or too few descriptors for the clusters.
    """
    similarity, numbers = choose_images([item.why_empty for item in images.records], images.cls_rows, options)
    if not numbers:
        return nothing_shared(images, options)
    clustering, votes = _cluster(images, numbers, options)
    labels = dict(zip(numbers, clustering.labels, strict=True))

    def mask(number: int) -> Mask:
        picture, own = images.picture(number), labels.get(number)
        return make_mask(picture, own, clustering.centroids, votes, options.refine, images.refiner)

    masks = map_threads(mask, range(len(images.records)), progress, threads=options.refine.threads)
    return Masks(masks, clustering, votes, similarity)


def _cluster(
    images: Images[Gathered, Samples, Sweep, Ballot], numbers: Sequence[int], options: CosegmentOptions
) -> tuple[Clustering, Votes]:
    """Clusters of the images that take part, and the votes on them."""
    gathered = images.gather(numbers)
    samples = images.sample(gathered, options.sample_interval)
    sweep = images.sweep(gathered, samples, options.elbow, MAX_CLUSTERS, options.clustering)
    ballot = images.vote(gathered, sweep, options.saliency_threshold, options.votes_percentage)
    clustering = images.clustering(sweep)
    check_reached(clustering, options.elbow, len(samples), options.sample_interval, MAX_CLUSTERS)
    return clustering, images.votes(ballot, len(clustering.centroids))


@dataclass(frozen=True)
class HostPicture:
    """An image's features, held while its mask is made."""

    features: Features
    facet: str
    hierarchy: int

    @property
    def record(self) -> ImageRecord:
        """The features are one."""
        return self.features

    @property
    def saliency(self) -> Float | None:
        """None in a bundle without."""
        return None if self.features.attention is None else self.features.saliency

    @property
    def pixels(self) -> Pixels:
        """The loaded image."""
        return self.features.pixels

    def distances(self, centroids: Float) -> Float:
        """See :class:`Picture`."""
        return distances_to(unit_rows(self.features, self.facet, self.hierarchy), centroids)[0]


@dataclass(frozen=True)
class _Chosen:
    """Features of the images that take part, and their unit descriptors."""

    features: Sequence[Features]
    rows: Sequence[Rows]


class HostImages(Images[_Chosen, Float, Clustering, Votes]):
    """Features in host memory or, one at a time, on disk."""

    refiner = staticmethod(refine_labels)

    def __init__(self, features: Sequence[Features], facet: str, hierarchy: int) -> None:
        self.records = records_of(features)
        self._features, self._facet, self._hierarchy = features, facet, hierarchy

    def cls_rows(self, numbers: Sequence[int]) -> Float:
        return np.stack([self._features[i].cls(self._facet) for i in numbers])

    def gather(self, numbers: Sequence[int]) -> _Chosen:
        chosen = select(self._features, numbers)
        return _Chosen(chosen, descriptors_of(chosen, self._facet, self._hierarchy))

    def sample(self, gathered: _Chosen, interval: int) -> Float:
        return sample_rows(gathered.rows, interval)

    def sweep(
        self, gathered: _Chosen, samples: Float, elbow: float, max_clusters: int, method: ClusteringMethod
    ) -> Clustering:
        return sweep_to_elbow(gathered.rows, samples, elbow, max_clusters, method)

    def vote(self, gathered: _Chosen, sweep: Clustering, threshold: float, percentage: float) -> Votes:
        saliency = [item.saliency.ravel() for item in gathered.features]
        return vote(sweep.labels, saliency, len(sweep.centroids), threshold=threshold, percentage=percentage)

    def clustering(self, sweep: Clustering) -> Clustering:
        return sweep

    def votes(self, ballot: Votes, num_clusters: int) -> Votes:
        return ballot

    def picture(self, number: int) -> HostPicture:
        return HostPicture(self._features[number], self._facet, self._hierarchy)


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


def nothing_shared(images: Images[Gathered, Samples, Sweep, Ballot], options: CosegmentOptions) -> Masks:
    """The result where fewer than two images have something in them: empty masks, no clusters."""
    none, votes = no_clusters(), Votes(np.empty((0, 0)), np.empty(0, np.int64), 0)
    pictures = map(images.picture, range(len(images.records)))
    return Masks([make_mask(each, None, none.centroids, votes, options.refine) for each in pictures], none, votes, None)


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


def make_mask(
    picture: Picture,
    labels: NDArray[np.int64] | None,
    centroids: Float,
    votes: Votes,
    refine: Refinement,
    refiner: Refiner = refine_labels,
) -> Mask:
    """The mask of one image from its cells' clusters ``(cells,)``; None makes the empty mask of an outlier."""
    salient = votes.salient_labels

    def nearest() -> Float:
        return nearest_of_groups(picture.distances(centroids), salient)

    all_or_none = len(salient) in (0, len(centroids))
    return mask_of_labels(picture, labels, salient, refine, None if all_or_none else nearest, refiner)


def nearest_of_groups(distances: Float, salient: NDArray[np.int64]) -> Float:
    """Distances to the nearest salient and other centroid, ``(2, cells)``, of ``distances (k, cells)`` to all."""
    return np.stack([group.min(axis=0) for group in (distances[salient], np.delete(distances, salient, axis=0))])


def mask_of_labels(
    picture: Picture,
    labels: NDArray[np.int64] | None,
    salient: NDArray[np.int64],
    refine: Refinement,
    nearest: Callable[[], Float] | None,
    refiner: Refiner = refine_labels,
) -> Mask:
    """The mask that an image's clusters make.

    Args:
        labels: cluster of each cell, ``(cells,)``; None makes the empty mask of an outlier.
        salient: the clusters that are foreground.
        nearest: gives squared distances to the nearest salient and other centroid, ``(2, cells)``, which a CRF weighs
            against each other; None if there are not both.
        refiner: runs the CRF.
    """
    image = picture.record
    if image.why_empty is not None:
        labels = None
    grid = image.grid
    grid_labels = np.full(grid, -1) if labels is None else labels.reshape(grid)
    cells = np.isin(grid_labels, salient)
    saliency = picture.saliency
    loaded, refinement = enlarge_mask(cells, image.image_size), Refinement.NONE
    refined = None if labels is None else _refine(picture, loaded, refine, nearest, refiner)
    if refined is not None:
        loaded, refinement = refined, refine
    return Mask(
        cells=cells,
        labels=grid_labels,
        loaded_mask=loaded,
        salient_labels=salient,
        refinement=refinement,
        inlier=labels is not None,
        geometry=image.geometry,
        name=image.name,
        confidence=None if saliency is None else contrast(saliency, cells),
        why_empty=image.why_empty,
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
    picture: Picture,
    mask: NDArray[np.bool_],
    refine: Refinement,
    nearest: Callable[[], Float] | None,
    refiner: Refiner,
) -> NDArray[np.bool_] | None:
    """The mask refined as asked, or None where there is nothing to refine by."""
    if refine is Refinement.NONE:
        return None
    if refine is Refinement.GRABCUT:
        return grabcut(picture.pixels, mask)
    if refine is Refinement.BILATERAL:
        return bilateral_mask(picture.pixels, mask)[0]
    if nearest is None:
        return None
    distances = nearest()
    energy = (distances - distances.max(axis=0)).reshape(2, *picture.record.grid)
    return np.asarray(refiner(picture.pixels, energy, refine) == 0)
