"""Landmarks regressed from the centres of unsupervised parts, on CelebA and CUB. Source: specification §14.3 (SCOPS).

Parts come from a function ``parts_of``, by default :func:`parts_of_engine`: the one place where this evaluation meets
part co-segmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.datasets.landmarks import LandmarkImage, LandmarkSet, read_celeba, read_cub
from facetrt.engine.evaluation.datasets.reading import digest
from facetrt.engine.evaluation.protocol import Choice, Evaluation, Options, Record, Row, Summary, Tick, mean_row
from facetrt.engine.features.collection import FeatureCollection
from facetrt.engine.features.features import SaliencyMode
from facetrt.engine.images.loading import DefaultSize
from facetrt.engine.settings import Setting, values_of
from facetrt.engine.tasks.cosegmentation import LOADING, VOTING
from facetrt.engine.tasks.parts import PartsOptions
from facetrt.kernels.errors import InputError
from facetrt.kernels.parallel import one_blas_thread

Array = NDArray[np.float64]
PartMap = NDArray[np.integer[Any]]
PartsOf = Callable[[Sequence[Path]], Iterable[PartMap]]  # images → one (H, W) map each, -1 background, one label space

ERROR = "error"


class BoxNorm(StrEnum):
    """What CUB's errors are divided by: the annotated box's side, as the root of its area or its longer side."""

    SQRT_AREA = "sqrt_area"
    MAX_SIDE = "max_side"


@dataclass(frozen=True)
class LandmarkOptions(PartsOptions, Options):
    """Options of landmark regression. ``limit`` counts training images, and test images, of a set."""

    side: Annotated[int, Setting("Images and landmarks are scaled to side × side pixels.", minimum=1)] = 256
    saliency: SaliencyMode = VOTING
    box_norm: Annotated[BoxNorm, Setting("What CUB's errors are divided by.")] = BoxNorm.SQRT_AREA

    def __post_init__(self) -> None:
        super().__post_init__()
        size = (self.side, self.side)
        if not isinstance(self.load_size, DefaultSize) and self.load_size != size:
            raise InputError(f"load_size={self.load_size}: landmarks are scaled to side × side pixels: use side")
        object.__setattr__(self, "load_size", size)


def parts_of_engine(engine: Engine, options: LandmarkOptions, facet: str, tick: Tick) -> PartsOf:
    """Part co-segmentation of all images of a set together, at side × side pixels; ``tick`` counts encoded images."""

    def parts_of(images: Sequence[Path]) -> Iterable[PartMap]:
        with FeatureCollection([facet]) as collection:
            for item in engine.encode_iter(images, load_size=options.load_size, saliency=options.saliency):
                collection.append(item)
                tick(1)
            parts = engine.segment_parts(collection, **values_of(options, PartsOptions, without=LOADING))
        return (part.loaded_labels for part in parts)

    return parts_of


class LandmarkRegression(Evaluation):
    """Error of landmarks predicted from part centres; an item is a set of images, segmented together."""

    task: ClassVar[str] = "cosegment"
    data_set: ClassVar[str]

    def __init__(self, root: Path, options: LandmarkOptions, parts_of: PartsOf | None = None) -> None:
        self.options: LandmarkOptions = options
        self.root = root
        self.parts_of = parts_of
        self.sets = {found.name: found for found in self.read()}

    def read(self) -> list[LandmarkSet]:
        """The sets to score."""
        raise NotImplementedError

    @property
    def keys(self) -> list[str]:
        return list(self.sets)

    def steps(self, key: str) -> int:
        return len(self.sets[key].train) + len(self.sets[key].test)

    def facts(self) -> dict[str, Any]:
        sets = self.sets.values()
        return {
            "data_set": self.data_set,
            "images": {found.name: {"train": len(found.train), "test": len(found.test)} for found in sets},
            "digest": digest(self.root, [image.path for found in sets for image in (*found.train, *found.test)]),
        }

    def choices(self) -> list[Choice]:
        return [
            Choice("a part's centre", "mean pixel coordinate of its mask (SCOPS: of its probability map)"),
            Choice("a part absent from an image", "the training images' mean centre of that part; counted"),
            Choice("landmarks", f"scaled to {self.options.side} × {self.options.side}, truncated to integers"),
            Choice("regression", "least squares without intercept on standardised values, per landmark where visible"),
            Choice("images segmented together", "training and test images of a set"),
            Choice("cluster selection by compactness (CelebA)", "not done: the paper defines neither quantity"),
        ]

    def run(self, engine: Engine | None, todo: Sequence[str], out: Path, tick: Tick) -> Iterator[tuple[str, Record]]:
        for key in todo:
            found = self.sets[key]
            record: Record = {"category": key}
            images = [image.path for image in (*found.train, *found.test)]
            if self.parts_of is not None:
                record["centres"] = self._centres(_counted(self.parts_of(images), tick), len(images))
            elif engine is not None:
                parts_of = parts_of_engine(engine, self.options, self.facet, tick)
                record["centres"] = self._centres(parts_of(images), len(images))
            else:
                tick(len(images))
            yield key, record

    def _centres(self, part_maps: Iterable[PartMap], count: int) -> list[list[list[float] | None]]:
        """x and y of each image's parts, None where a part is absent; training images first."""
        centres = []
        for part_map in part_maps:
            found = part_centres(np.asarray(part_map), self.options.num_parts, self.options.side)
            centres.append([None if np.isnan(xy).any() else [float(v) for v in xy] for xy in found])
        if len(centres) != count:
            raise InputError(f"{len(centres)} part maps of {count} images: expected one of each")
        return centres

    def summarise(self, records: Mapping[str, Record]) -> Summary:
        rows, means, counts = [], [], {}
        for key, record in records.items():
            found = self.sets[key]
            none = np.zeros((self.steps(key), 1, 2))  # constant centres: the regression predicts the mean landmarks
            means.append(Row(key, {ERROR: self._error(found, none)}))
            if "centres" in record:
                centres = np.array([[xy or (np.nan, np.nan) for xy in image] for image in record["centres"]])
                rows.append(Row(key, {ERROR: self._error(found, centres)}))
                counts[f"absent parts in {key}"] = int(np.isnan(centres[..., 0]).sum())
        return Summary(
            metrics=[ERROR],
            overall=mean_row("this run", rows, [ERROR]) if rows else None,
            baselines=[mean_row("mean training landmarks (trivial)", means, [ERROR])],
            categories=rows or means,
            counts=counts,
        )

    def _error(self, found: LandmarkSet, centres: Array) -> float | None:
        """Mean over test images of the normalised error, × 100."""
        train, test = (Landmarks.of(images, self.options.side) for images in (found.train, found.test))
        inputs = fill_absent(centres, len(found.train), self.options.side).reshape(len(centres), -1)
        split = len(found.train)
        predicted = regress(inputs[:split], train.points_xy, train.visible, inputs[split:])
        return normalised_error(predicted, test, self.scale(found.test))

    def scale(self, images: list[LandmarkImage]) -> Array:
        """What the errors of each image are divided by, ``(n,)``."""
        raise NotImplementedError


class CelebA(LandmarkRegression):
    """Five landmarks of in-the-wild faces; errors in units of the distance between the eyes."""

    name = "celeba"
    data_set = "CelebA (MAFL lists, faces of at least 30 % of the image)"

    def read(self) -> list[LandmarkSet]:
        return read_celeba(self.root, self.options.limit)

    def scale(self, images: list[LandmarkImage]) -> Array:
        points = Landmarks.of(images, self.options.side).points_xy
        return np.asarray(np.linalg.norm(points[:, 0] - points[:, 1], axis=1))


class Cub(LandmarkRegression):
    """Fifteen landmarks of birds, of which the visible count; errors in units of the annotated box."""

    name = "cub"
    data_set = "CUB-200-2011, categories 001 to 003"

    def read(self) -> list[LandmarkSet]:
        return read_cub(self.root, self.options.limit)

    def scale(self, images: list[LandmarkImage]) -> Array:
        sides = np.array([image.box_wh for image in images]) * self.options.side
        scaled = sides / np.array([image.size[::-1] for image in images])
        return np.asarray(
            scaled.max(axis=1) if self.options.box_norm is BoxNorm.MAX_SIDE else np.sqrt(scaled.prod(axis=1))
        )

    def choices(self) -> list[Choice]:
        norm = Choice(
            "errors divided by", f"the scaled box's {self.options.box_norm}", "box_norm=sqrt_area or max_side"
        )
        return [*super().choices(), norm, Choice("landmarks that count", "those annotated as visible")]


@dataclass(frozen=True)
class Landmarks:
    """Landmarks of several images scaled to a square: ``points_xy (n, landmarks, 2)``, ``visible (n, landmarks)``."""

    points_xy: Array
    visible: NDArray[np.bool_]

    @staticmethod
    def of(images: Sequence[LandmarkImage], side: int) -> Landmarks:
        scaled = [np.trunc(image.points_xy * side / image.size[::-1]) for image in images]
        return Landmarks(np.stack(scaled), np.stack([image.visible for image in images]))


def part_centres(part_map: PartMap, num_parts: int, side: int) -> Array:
    """Mean pixel coordinate of each part of an ``(H, W)`` map, ``(num_parts, 2)`` as (x, y); NaN where it is absent.

    Coordinates are pixel indices of the image scaled to ``side`` × ``side``.
    """
    height, width = part_map.shape
    labels = part_map.ravel().astype(np.int64)
    present = (labels >= 0) & (labels < num_parts)
    rows, columns = np.divmod(np.flatnonzero(present), width)
    counts = np.bincount(labels[present], minlength=num_parts)
    centres = np.full((num_parts, 2), np.nan)
    for axis, (values, length) in enumerate(((columns, width), (rows, height))):
        sums = np.bincount(labels[present], weights=(values + 0.5) * side / length - 0.5, minlength=num_parts)
        np.divide(sums, counts, out=centres[:, axis], where=counts > 0)
    return centres


def fill_absent(centres: Array, num_train: int, side: int) -> Array:
    """``(images, parts, 2)`` with NaN replaced by the part's mean over the first ``num_train`` images.

    A part that no training image shows gets the image's centre everywhere, so that it says nothing.
    """
    filled = centres.copy()
    for part in range(centres.shape[1]):
        seen = centres[:num_train, part][~np.isnan(centres[:num_train, part, 0])]
        if len(seen):
            filled[np.isnan(centres[:, part, 0]), part] = seen.mean(axis=0)
        else:
            filled[:, part] = (side - 1) / 2
    return filled


def regress(inputs: Array, targets: Array, visible: NDArray[np.bool_], test_inputs: Array) -> Array:
    """Landmarks ``(m, landmarks, 2)`` predicted for ``test_inputs (m, d)``; NaN for those never visible in training.

    Least squares without intercept from ``inputs (n, d)`` to ``targets (n, landmarks, 2)``, both standardised; a
    landmark is fitted, and its targets are standardised, on the images where it is visible.
    """
    mean, scale = _standard(inputs)
    known, asked = (inputs - mean) / scale, (test_inputs - mean) / scale
    predicted = np.full((len(test_inputs), *targets.shape[1:]), np.nan)
    with one_blas_thread:
        for landmark in range(targets.shape[1]):
            shown = visible[:, landmark]
            if shown.any():
                centre, spread = _standard(targets[shown, landmark])
                weights = np.linalg.lstsq(known[shown], (targets[shown, landmark] - centre) / spread, rcond=None)[0]
                predicted[:, landmark] = asked @ weights * spread + centre
    return predicted


def _standard(values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation per column; a constant column's is 1."""
    deviation = values.std(axis=0)
    return values.mean(axis=0), np.where(deviation > 0, deviation, 1)


def normalised_error(predicted: Array, test: Landmarks, scale: Array) -> float | None:
    """Mean over images of their mean distance over visible landmarks divided by ``scale (n,)``, × 100."""
    counted = test.visible & ~np.isnan(predicted[..., 0])
    distance = np.where(counted, np.linalg.norm(predicted - test.points_xy, axis=2), 0.0)
    scored = counted.any(axis=1) & (scale > 0)
    if not scored.any():
        return None
    per_image = distance[scored].sum(axis=1) / counted[scored].sum(axis=1) / scale[scored]
    return float(per_image.mean() * 100)


def _counted(part_maps: Iterable[PartMap], tick: Tick) -> Iterator[PartMap]:
    for part_map in part_maps:
        tick(1)
        yield part_map
