"""Co-segmentation scored by Jaccard index and precision. Source: specification §14.2.

Besides the method, two baselines are scored on the same images: saliency alone above a threshold (a row of the paper's
table), and a centred box that knows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.drawing.results import on_chessboard
from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.comparison import resize_labels, write_comparison
from facetrt.engine.evaluation.datasets.masks import ImageSet, read_image_sets
from facetrt.engine.evaluation.datasets.reading import digest, image_size, read_mask
from facetrt.engine.evaluation.protocol import (
    Choice,
    Evaluation,
    Options,
    Record,
    Row,
    Summary,
    Tick,
    by_category,
    mean_row,
)
from facetrt.engine.evaluation.scores import jaccard, mean_of, pixel_precision
from facetrt.engine.features.collection import FeatureCollection
from facetrt.engine.features.features import Features, SaliencyMode
from facetrt.engine.files import write_png
from facetrt.engine.images.finding import unique_stems
from facetrt.engine.images.loading import LoadSize, loaded_size
from facetrt.engine.settings import Setting, values_of
from facetrt.engine.tasks.cosegmentation import LOADING, VOTING, CosegmentOptions, Masks
from facetrt.engine.tasks.presets import PAPER_COSEGMENT
from facetrt.engine.tasks.refinement import enlarge_mask
from facetrt.kernels.errors import InputError, OutputError

METRICS = ["J", "P"]
METHODS = {"masks": "this run", "saliency": "saliency baseline", "box": "centred box of 70 % × 70 % (trivial)"}

BOX_MARGIN = 0.15  # of each side that the trivial box leaves free


@dataclass(frozen=True)
class CosegmentationOptions(CosegmentOptions, Options):
    """Options of co-segmentation; defaults are the paper's. ``limit`` counts images per set.

    ``longest_side``: attention takes memory with the square of the cells (a panorama of 1052 × 320 pixels needs 21 GB);
    there is no such limit in the paper.
    """

    load_size: LoadSize = PAPER_COSEGMENT["load_size"]
    longest_side: Annotated[
        int | None, Setting("Images that would load longer than this are loaded smaller; none for no limit.", minimum=1)
    ] = 800
    saliency: SaliencyMode = VOTING
    limit: Annotated[
        int | None,
        Setting("At most this many images of a set.", minimum=2, expected="at least 2 images of a set, or none"),
    ] = None
    baseline_threshold: Annotated[float, Setting("Cells more salient than this are the saliency baseline.")] = 0.04


@dataclass(frozen=True)
class InternetOptions(CosegmentationOptions):
    """Internet300 holds images without the object: outliers are removed, as in the paper."""

    remove_outliers: bool = True


class Cosegmentation(Evaluation):
    """J and P of one data set; an item is a set of images, which are segmented together."""

    task: ClassVar[str] = "cosegment"
    category_word: ClassVar[str] = "sets"
    data_set: ClassVar[str]

    def __init__(self, root: Path, options: CosegmentationOptions) -> None:
        self.options: CosegmentationOptions = options
        self.root = root
        self.sets = {found.name: found for found in read_image_sets(root, self.data_set, options.limit)}

    @property
    def keys(self) -> list[str]:
        return list(self.sets)

    def steps(self, key: str) -> int:
        return len(self.sets[key].images)

    def facts(self) -> dict[str, Any]:
        sets = self.sets.values()
        files = [path for found in sets for path in (*found.images, *found.masks)]
        images = {found.name: len(found.images) for found in sets}
        return {
            "data_set": self.data_set,
            "sets": len(images),
            "images": images,
            "digest": digest(self.root, files),
        }

    def choices(self) -> list[Choice]:
        return [
            Choice("masks compared at", "the annotation's size, predictions enlarged by nearest neighbour"),
            Choice("J where the annotation is empty", "left out of J, kept in P"),
            Choice(
                "annotated foreground", "more than half of the file's largest value; void (255 in a palette) is not"
            ),
            Choice("saliency baseline", f"cells above {self.options.baseline_threshold}, enlarged, not refined"),
            Choice("image order in a set", "by file name"),
            Choice(
                "images longer than longest_side", f"loaded at {self.options.longest_side} pixels", "longest_side=none"
            ),
        ]

    def run(self, engine: Engine | None, todo: Sequence[str], out: Path, tick: Tick) -> Iterator[tuple[str, Record]]:
        for key in todo:
            found = self.sets[key]
            annotated = [read_mask(path) for path in found.masks]
            record: Record = {"category": key, "images": [path.name for path in found.images]}
            record["box"] = _scores([centred_box(mask.shape) for mask in annotated], annotated)
            if engine is None:
                tick(len(annotated))
            else:
                record |= self._segment(engine, found, annotated, out / key, tick)
            yield key, record

    def _segment(
        self, engine: Engine, found: ImageSet, annotated: list[NDArray[np.bool_]], out: Path, tick: Tick
    ) -> Record:
        options = self.options
        with FeatureCollection([self.facet]) as features:
            for size, images in groupby(found.images, lambda path: load_size_of(path, options)):
                for item in engine.encode_iter(list(images), load_size=size, saliency=options.saliency):
                    features.append(item)
                    tick(1)
            masks = self._cosegment(engine, features, found.name)
            _draw(out, features, masks, annotated)
            salient = [enlarge_mask(f.saliency > options.baseline_threshold, f.original_size) for f in features]
        return {
            "masks": _scores([mask.mask for mask in masks], annotated),
            "saliency": _scores(salient, annotated),
            "clusters": len(masks.clustering.centroids),
            "shrunk": [path.name for path in found.images if load_size_of(path, options) != options.load_size],
            "salient_clusters": len(masks.votes.salient_labels),
            "inliers": sum(mask.inlier for mask in masks),
        }

    def _cosegment(self, engine: Engine, features: FeatureCollection, name: str) -> Masks:
        try:
            return engine.cosegment(features, **values_of(self.options, CosegmentOptions, without=LOADING))
        except InputError as error:
            raise InputError(f"set {name}: {error}") from error

    def summarise(self, records: Mapping[str, Record]) -> Summary:
        groups = by_category(records)
        rows = {
            method: [_row(name, group[0][method]) for name, group in groups.items() if method in group[0]]
            for method in METHODS
        }
        means = {method: mean_row(METHODS[method], found, METRICS) for method, found in rows.items() if found}
        return Summary(
            metrics=METRICS,
            overall=means.pop("masks", None),
            baselines=list(means.values()),
            categories=rows["masks"] or rows["box"],
            counts=_counts(records),
        )


class PascalCoseg(Cosegmentation):
    """The PASCAL-VOC co-segmentation set of Faktor & Irani: 20 sets."""

    name = "pascal-coseg"
    data_set = "the PASCAL-VOC co-segmentation set"


class Msrc(Cosegmentation):
    """MSRC7: 7 sets of 10 images."""

    name = "msrc"
    data_set = "MSRC"


class Internet300(Cosegmentation):
    """Internet300: airplane, car and horse, 100 images each, some without the object."""

    name = "internet300"
    data_set = "Internet300"


class PascalCo(Cosegmentation):
    """PASCAL-CO: 40 sets of 6 images of related classes."""

    name = "pascal-co"
    data_set = "PASCAL-CO"


def load_size_of(path: Path, options: CosegmentationOptions) -> LoadSize:
    """The options' load size, or the ``(height, width)`` that keeps an image's longer side within ``longest_side``."""
    height, width = loaded_size(image_size(path), options.load_size, str(path))
    limit = options.longest_side
    if limit is None or max(height, width) <= limit:
        return options.load_size
    return max(1, height * limit // max(height, width)), max(1, width * limit // max(height, width))


def centred_box(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The middle 70 % × 70 % of an image; its edges are truncated to whole pixels."""
    box = np.zeros(shape, np.bool_)
    rows, columns = (slice(int(BOX_MARGIN * side), int((1 - BOX_MARGIN) * side)) for side in shape)
    box[rows, columns] = True
    return box


def _scores(predicted: list[NDArray[np.bool_]], annotated: list[NDArray[np.bool_]]) -> dict[str, list[float | None]]:
    """J and P of each image, in order."""
    pairs = list(zip(predicted, annotated, strict=True))
    return {"J": [jaccard(*pair) for pair in pairs], "P": [pixel_precision(*pair) for pair in pairs]}


def _row(name: str, scores: Mapping[str, list[float | None]]) -> Row:
    """Means over a set's images; undefined ones are left out."""
    return Row(name, {m: mean_of([value for value in scores[m] if value is not None]) for m in METRICS})


def _counts(records: Mapping[str, Record]) -> dict[str, int]:
    values = [value for record in records.values() for value in record["box"]["J"]]
    return {
        "images": len(values),
        "images_with_empty_annotation": sum(value is None for value in values),
        "images_loaded_smaller": sum(len(record.get("shrunk", [])) for record in records.values()),
    }


def _draw(out: Path, features: Sequence[Features], masks: Masks, annotated: Sequence[NDArray[np.bool_]]) -> None:
    """Each mask at its original size, and beside the photograph and the annotation in the folder of comparisons."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        stems = unique_stems([Path(f.name) for f in features])
        for stem, item, mask, truth in zip(stems, features, masks, annotated, strict=True):
            write_png(out / f"{stem}.png", mask.mask)
            shown = resize_labels(truth, item.image_size), mask.loaded_mask
            true, found = (on_chessboard(item.pixels, np.asarray(values, np.bool_)) for values in shown)
            write_comparison(out, stem, item.pixels, true, found)
    except OSError as error:
        raise OutputError(f"masks cannot be written to {out}: {error.strerror or error}") from error
