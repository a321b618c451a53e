"""Part co-segmentation. Source: Amir et al., section 4.1; specification §10.

Stage 1 finds the foreground as co-segmentation does. Stage 2 clusters its cells into parts. With three stages, stage 2
finds the number of clusters by an elbow, parts that some image lacks are dropped, and what is left is clustered again.
After stages 2 and 3 a dense CRF turns distances to centroids into pixel labels. Augmented views take part in all
clusterings, but they neither vote nor leave.

Where the reference crashes, this does not: without background clusters there is no background label; without
foreground, or without a part that all images share, everything is background; an empty last part keeps its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, overload

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.collection import LazySequence, join, reasons_empty, select
from facetrt.engine.features.features import Features, Float, ImageRecord
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSizeChoice
from facetrt.engine.images.resampling import pillow_nearest, torch_nearest
from facetrt.engine.settings import BUNDLES_CHOICE, FacetChoice, Hierarchy, Setting, check
from facetrt.engine.tasks.clustering import Clustering, ClusteringMethod, cluster_elbow, no_clusters
from facetrt.engine.tasks.cosegmentation import (
    HostPicture,
    Picture,
    SampleInterval,
    Trainer,
    VoteSaliency,
    VotesPercentage,
    VoteThreshold,
    contrast,
)
from facetrt.engine.tasks.descriptors import Rows, assign_rows, blocks, descriptors_of, only, unit_rows
from facetrt.engine.tasks.refinement import Progress, Refinement, Refiner, check_available, lowest_labels, refine_labels
from facetrt.kernels.errors import InputError
from facetrt.kernels.parallel import map_threads
from facetrt.kernels.products import TIE, first_smallest, squared_distances
from facetrt.kernels.vote import Votes, vote

Labels = NDArray[np.signedinteger]

BACKGROUND = -1
MAX_CROPS = 100  # of an image; each is encoded, and so is its mirror


@dataclass(frozen=True)
class PartsOptions:
    """Options of part co-segmentation, with the reference's defaults; ``Engine.segment_parts`` documents them."""

    facet: FacetChoice = BUNDLES_CHOICE
    num_parts: Annotated[int, Setting("Number of part labels.", minimum=1, maximum=64)] = 4
    elbow: Annotated[float, Setting("Of the foreground stage.", above=0)] = 0.975
    elbow_second_stage: Annotated[float, Setting("With --three-stages.", above=0)] = 0.94
    saliency_threshold: VoteThreshold = 0.065
    votes_percentage: VotesPercentage = 75
    sample_interval: SampleInterval = 100
    num_crop_augmentations: Annotated[
        int, Setting("Random crops of each image and its mirror.", minimum=0, maximum=MAX_CROPS)
    ] = 0
    flip_augmentation: Annotated[bool, Setting("Mirrors join as well.")] = False
    three_stages: Annotated[bool, Setting("Drop parts that some image lacks.")] = False
    clustering: Trainer = ClusteringMethod.FACETRT
    refine: Annotated[Refinement, Setting("crf, pydensecrf or none.")] = Refinement.CRF
    hierarchy: Hierarchy = 0
    seed: Annotated[int, Setting("Of the random crops.", minimum=0)] = 0
    saliency: VoteSaliency = None
    load_size: LoadSizeChoice = DEFAULT_SIZE

    def __post_init__(self) -> None:
        check(self)
        if self.refine.two_labels:
            raise InputError(f"refine {self.refine!s} separates two labels only: parts need crf, pydensecrf or none")
        self.clustering.check_available()
        check_available(self.refine)


@dataclass(frozen=True)
class PartMap:
    """One image's parts. Part numbers mean the same in all images of a set; -1 is background.

    Attributes:
        loaded_labels: ``(height, width)`` int16 at the loaded size: what the reference returns, with -1 for its NaN.
        cells: ``(grid_h, grid_w)`` integers, the part of each cell before refinement.
        confidence: how salient the parts' cells are beside the others, as in :class:`Mask`.
        why_empty: why nothing can be found in the image (it is featureless or too small), or None.
    """

    loaded_labels: Labels
    cells: Labels
    refinement: Refinement
    geometry: Geometry
    name: str
    confidence: float | None
    why_empty: str | None

    @property
    def labels(self) -> Labels:
        """``(height, width)`` int16 at the original size: :attr:`loaded_labels` enlarged by nearest neighbour."""
        shifted = (self.geometry.on_picture(self.loaded_labels) + 1).astype(np.uint8)
        return pillow_nearest(shifted, self.geometry.original_size).astype(np.int16) - 1


@dataclass(frozen=True)
class Parts(Sequence[PartMap]):
    """One :class:`PartMap` per input image, in order, and how they came about.

    ``centroids (num_parts, C)`` of the last stage; ``background_centroids`` that the parts were weighed against;
    ``common_parts`` the stage-2 clusters that all images have, or None with two stages. Images in which nothing can be
    found are all background and take part in nothing.
    """

    maps: list[PartMap]
    foreground: Clustering
    votes: Votes
    centroids: Float = field(repr=False)
    background_centroids: Float = field(repr=False)
    second_stage: Clustering | None
    common_parts: Labels | None

    @property
    def num_parts(self) -> int:
        """Number of part labels; 0 if nothing was foreground."""
        return len(self.centroids)

    @overload
    def __getitem__(self, index: int) -> PartMap: ...
    @overload
    def __getitem__(self, index: slice) -> list[PartMap]: ...
    def __getitem__(self, index: int | slice) -> PartMap | list[PartMap]:
        return self.maps[index]

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[PartMap]:
        return iter(self.maps)


def segment_parts_features(
    features: Sequence[Features],
    options: PartsOptions,
    augmented: Sequence[Features] = (),
    progress: Progress | None = None,
    refiner: Refiner = refine_labels,
) -> Parts:
    """Parts that the images share; see ``Engine.segment_parts``.

    Args:
        augmented: features of augmented views, which take part in clustering only.
        progress: called with (maps refined, maps to refine); with three stages that runs twice.
        refiner: runs the CRF.

    Raises:
        InputError: no image, or fewer descriptors than clusters.
    """
    if not features:
        raise InputError("no image was given: part co-segmentation needs at least 1")
    empty, empty_views = reasons_empty(features), reasons_empty(augmented)
    if any(empty):
        shown = [number for number, why in enumerate(empty) if why is None]
        found = (
            segment_parts_features(select(features, shown), options, augmented, progress, refiner)
            if shown
            else _nothing_found()
        )
        in_order = iter(found.maps)
        every = [
            next(in_order) if why is None else _background(features[i], _saliency(features[i]))
            for i, why in enumerate(empty)
        ]
        return replace(found, maps=every)
    augmented = select(augmented, [number for number, why in enumerate(empty_views) if why is None])
    everything = join(features, augmented)
    rows = descriptors_of(everything, options.facet, options.hierarchy)
    trainer, interval = options.clustering, options.sample_interval
    foreground = cluster_elbow(rows, elbow=options.elbow, sample_interval=interval, method=trainer)
    votes = _vote(features, foreground, options)
    masks = [np.isin(labels, votes.salient_labels) for labels in foreground.labels]
    background = np.delete(foreground.centroids, votes.salient_labels, axis=0)
    if not any(mask.any() for mask in masks):
        return Parts(_all_background(features), foreground, votes, background[:0], background, None, None)
    second = _second_stage(rows, masks, options)
    centroids, common = second.centroids, None
    if options.three_stages:
        refined = _refine(everything, centroids, background, options, progress, refiner)
        common = _common_parts(refined[: len(features)], len(centroids))
        masks = [np.isin(_smoothed_cells(item), common) for item in refined]
        background = np.concatenate([background, np.delete(centroids, common, axis=0)])
        if not common.size:
            return Parts(_all_background(features), foreground, votes, centroids[:0], background, second, common)
        (centroids,) = trainer.train(_samples(rows, masks, options), [options.num_parts])
    maps = _refine(features, centroids, background, options, progress, refiner)
    return Parts(maps, foreground, votes, centroids, background, second, common)


def _nothing_found() -> Parts:
    """The parts of no image."""
    none, votes = np.empty((0, 0), np.float32), Votes(np.empty((0, 0)), np.empty(0, np.int64), 0)
    return Parts([], no_clusters(), votes, none, none, None, None)


def _vote(features: Sequence[Features], foreground: Clustering, options: PartsOptions) -> Votes:
    """Originals alone vote; they come first in the clustering."""
    return vote(
        foreground.labels[: len(features)],
        [item.saliency.ravel() for item in features],
        len(foreground.centroids),
        threshold=options.saliency_threshold,
        percentage=options.votes_percentage,
    )


def _second_stage(rows: Sequence[Rows], masks: Sequence[NDArray[np.bool_]], options: PartsOptions) -> Clustering:
    chosen = LazySequence(len(masks), lambda i: only(rows[i], masks[i]))
    if options.three_stages:
        trainer, interval = options.clustering, options.sample_interval
        return cluster_elbow(chosen, elbow=options.elbow_second_stage, sample_interval=interval, method=trainer)
    (centroids,) = options.clustering.train(_samples(rows, masks, options), [options.num_parts])
    found = [assign_rows(image_rows, [centroids])[0] for image_rows in chosen]
    error = sum(float(f.squared_distances.sum(dtype=np.float64)) for f in found) / sum(len(f.labels) for f in found)
    return Clustering([options.num_parts], [error], centroids, [f.labels for f in found])


def _samples(rows: Sequence[Rows], masks: Sequence[NDArray[np.bool_]], options: PartsOptions) -> Float:
    """Every n-th foreground descriptor of each image, counted within that image's foreground."""
    chosen = [r[np.flatnonzero(mask)[:: options.sample_interval]] for r, mask in zip(rows, masks, strict=True)]
    samples = np.concatenate(chosen)
    if len(samples) < options.num_parts:
        raise InputError(
            f"the foreground gives {len(samples)} sampled descriptors, too few for {options.num_parts} parts: use a "
            f"sampling interval below {options.sample_interval}, fewer parts, more images or a larger load size"
        )
    return samples


def part_energy(item: Features, rows: Rows, centroids: Float, background: Float) -> Float:
    """Squared distances of every cell to each part, and last to the nearest background centroid if there is one.

    The cell's maximum is subtracted, so all are at most 0. Returns ``(labels, grid_h, grid_w)`` float32.
    """
    groups = (centroids, background) if len(background) else (centroids,)
    every = [np.concatenate([squared_distances(block, group) for group in groups]) for block in blocks(rows)]
    return energy_of(np.concatenate(every, axis=1), len(centroids), item.grid)


def energy_of(distances: Float, num_parts: int, grid: tuple[int, int]) -> Float:
    """See :func:`part_energy`, of squared ``distances (k, cells)`` to all parts and then to all of the background."""
    parts, background = distances[:num_parts], distances[num_parts:]
    energy = np.concatenate([parts, background.min(axis=0, keepdims=True)] if len(background) else [parts])
    energy -= energy.max(axis=0)
    return energy.reshape(-1, *grid)


def _refine(
    items: Sequence[Features],
    centroids: Float,
    background: Float,
    options: PartsOptions,
    progress: Progress | None,
    refiner: Refiner,
) -> list[PartMap]:
    """Parts of each image, several images at a time."""

    def refine(number: int) -> PartMap:
        item = items[number]
        energy = part_energy(item, unit_rows(item, options.facet, options.hierarchy), centroids, background)
        picture = HostPicture(item, options.facet, options.hierarchy)
        return map_of_energy(picture, energy, len(centroids), options.refine, refiner)

    return map_threads(refine, range(len(items)), progress, threads=options.refine.threads)


def map_of_energy(
    picture: Picture, energy: Float, num_parts: int, refine: Refinement, refiner: Refiner = refine_labels
) -> PartMap:
    """The parts of smallest ``energy (labels, grid_h, grid_w)``; a label beyond ``num_parts`` is background."""
    image = picture.record
    if image.why_empty is not None:
        return _background(image, picture.saliency)
    labels = _pixel_labels(picture, energy, refine, refiner)
    cells = first_smallest(energy, 2 * TIE)  # unit rows, and means of such
    for found in (labels, cells):
        found[found == num_parts] = BACKGROUND
    return _part_map(image, picture.saliency, labels.astype(np.int16), cells, refine)


def _pixel_labels(picture: Picture, energy: Float, refine: Refinement, refiner: Refiner) -> Labels:
    """Pixels, which may lie on a device, are asked for only where something is refined by them."""
    if refine is Refinement.NONE:
        return lowest_labels(energy, picture.record.image_size)
    return refiner(picture.pixels, energy, refine)


def _saliency(item: Features) -> Float | None:
    return None if item.attention is None else item.saliency


def _part_map(image: ImageRecord, saliency: Float | None, labels: Labels, cells: Labels, refine: Refinement) -> PartMap:
    confidence = None if saliency is None else contrast(saliency, cells >= 0)
    return PartMap(labels, cells, refine, image.geometry, image.name, confidence, image.why_empty)


def _common_parts(refined: Sequence[PartMap], count: int) -> Labels:
    """Parts that appear among the cells of every image."""
    present = [np.bincount(_smoothed_cells(item) + 1, minlength=count + 1)[1:] > 0 for item in refined]
    return np.flatnonzero(np.all(present, axis=0))


def _smoothed_cells(refined: PartMap) -> Labels:
    """Pixel labels reduced to the grid by nearest neighbour, ``(cells,)``."""
    return np.asarray(torch_nearest(refined.loaded_labels, refined.geometry.grid).ravel())


def _all_background(features: Sequence[Features]) -> list[PartMap]:
    return [_background(item, _saliency(item)) for item in features]


def _background(image: ImageRecord, saliency: Float | None) -> PartMap:
    labels = np.full(image.image_size, BACKGROUND, np.int16)
    return _part_map(image, saliency, labels, np.full(image.grid, BACKGROUND), Refinement.NONE)
