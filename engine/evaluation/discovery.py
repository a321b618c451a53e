"""What evaluations of discovery have in common, and CorLoc: one box per image. Source: common-evaluation §1."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.drawing.discovery import objects_overlay
from facetrt.engine.drawing.results import capped
from facetrt.engine.encoding.encoder import EncodeOptions
from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.cosegmentation import centred_box
from facetrt.engine.evaluation.datasets import objects as reader
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
)
from facetrt.engine.files import write_png
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSize, load_image
from facetrt.engine.settings import Setting, options_of, split_settings
from facetrt.engine.tasks.discovery.catalogue import METHODS, make_method
from facetrt.engine.tasks.discovery.discovering import Discovery
from facetrt.engine.tasks.discovery.fusing import parse_terms
from facetrt.engine.tasks.discovery.method import Method
from facetrt.engine.tasks.discovery.objects import Objects
from facetrt.engine.tasks.refinement import Refinement
from facetrt.kernels.components import extent
from facetrt.kernels.errors import MissingFileError, OutputError

PUBLISHED = "published"
EPSILON = 1e-7  # added to heights and unions, as published
CORRECT = 0.5  # IoU from which a box counts
PICTURES = 50  # of a run that are drawn
BOX = "centred box of 70 % × 70 % (trivial)"

Box = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class DiscoveryOptions(Options):
    """Options of every evaluation of discovery. ``limit`` counts images, of each set where there are sets."""

    method: Annotated[str, Setting(f"One of {', '.join(METHODS)}.")] = "tokencut"
    settings: Annotated[str, Setting("Options of the method: NAME=VALUE, with commas between them.")] = ""
    load_size: Annotated[str, Setting("published, or a shorter side, HEIGHTxWIDTH, none.")] = PUBLISHED
    refine: Annotated[Refinement, Setting("How masks are refined.")] = Refinement.NONE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen_method()
        self.chosen_size()

    def chosen_method(self) -> Method:
        """The method with its options."""
        parts = [part for part in self.settings.split(",") if part.strip()]
        return make_method(self.method, split_settings(parts))

    def chosen_size(self) -> LoadSize:
        """The load size; that of the method if it is as published."""
        if self.load_size == PUBLISHED:
            return DEFAULT_SIZE
        size: LoadSize = options_of(EncodeOptions)["load_size"].read(self.load_size)
        return size


class DiscoveryEvaluation(Evaluation):
    """Objects found in images, one by one; an item is an image."""

    task: ClassVar[str] = "discover"
    category_word: ClassVar[str] = "sets"
    options: DiscoveryOptions

    def resolve(self, manifest: Manifest) -> None:
        """See :class:`Evaluation`; facets may be fused."""
        facet = self.options.facet or self.options.chosen_method().facet(manifest)
        self.options = replace(self.options, facet=facet)
        Discovery(self.options.chosen_method(), parse_terms(facet), manifest, self.options.refine)

    @property
    @abstractmethod
    def images(self) -> Mapping[str, Path]:
        """The image of each item."""

    @property
    def keys(self) -> list[str]:
        """See :class:`Evaluation`."""
        return list(self.images)

    def steps(self, key: str) -> int:
        """See :class:`Evaluation`."""
        return 1

    def choices(self) -> list[Choice]:
        """See :class:`Evaluation`."""
        return [
            Choice("method's options", self.options.settings or "as published", "settings=NAME=VALUE,…"),
            Choice("ties", "the first cell or component, where a published solver decides otherwise by accident"),
        ]

    def run(self, engine: Engine | None, todo: Sequence[str], out: Path, tick: Tick) -> Iterator[tuple[str, Record]]:
        """See :class:`Evaluation`."""
        if engine is None:
            for key in todo:
                tick(1)
                yield key, self.score(key, None)
            return
        found = engine.discover_iter(
            [self.images[key] for key in todo],
            self.options.chosen_method(),
            facet=self.facet,
            load_size=self.options.chosen_size(),
            refine=self.options.refine,
        )
        for number, (key, objects) in enumerate(zip(todo, found, strict=True)):
            if number < PICTURES:
                _draw(out, key, objects)
            tick(1)
            yield key, self.score(key, objects)

    @abstractmethod
    def score(self, key: str, found: Objects | None) -> Record:
        """Figures of one image; of the trivial baseline alone without objects."""


@dataclass(frozen=True)
class CorLocOptions(DiscoveryOptions):
    """Options of CorLoc."""

    split: Annotated[str, Setting("Of PASCAL VOC.")] = "trainval"
    difficult: Annotated[bool, Setting("Count difficult and truncated objects, as published.")] = True


class CorLoc(DiscoveryEvaluation):
    """Share of the images whose box overlaps with an annotated one by at least one half."""

    name = "corloc"

    def __init__(self, root: Path, options: CorLocOptions) -> None:
        self.options: CorLocOptions = options
        self.root = root
        self._items = {f"{item.category}/{item.name}": item for item in read_boxed(root, options)}

    @property
    def images(self) -> Mapping[str, Path]:
        """See :class:`DiscoveryEvaluation`."""
        return {key: item.image for key, item in self._items.items()}

    def facts(self) -> dict[str, Any]:
        """See :class:`Evaluation`."""
        items = self._items.values()
        boxes = sum(len(item.boxes) for item in items)
        kept = digest(self.root, [item.image for item in items])
        return {"data_set": self.name, "images": len(items), "boxes": boxes, "digest": kept}

    def choices(self) -> list[Choice]:
        """See :class:`Evaluation`."""
        return [
            *super().choices(),
            Choice(
                "difficult and truncated objects", "count" if self.options.difficult else "are left out", "difficult"
            ),
            Choice("box of an image with several objects", "that of the first"),
            Choice("an image without an object found", "wrong"),
        ]

    def score(self, key: str, found: Objects | None) -> Record:
        """See :class:`DiscoveryEvaluation`."""
        item = self._items[key]
        centre = extent(centred_box(image_size(item.image)))
        record: Record = {"category": item.category, "baseline": hit(centre or (0, 0, 0, 0), item.boxes)}
        if found is None:
            return record
        boxes = found.boxes.tolist()
        return record | {"box": boxes[0] if boxes else None, "correct": bool(boxes) and hit(boxes[0], item.boxes)}

    def summarise(self, records: Mapping[str, Record]) -> Summary:
        """See :class:`Evaluation`."""
        metrics = ["CorLoc"]
        values = list(records.values())
        own = [float(record["correct"]) for record in values if "correct" in record]
        rows = [
            Row(name, {"CorLoc": _share([record.get("correct", record["baseline"]) for record in group])})
            for name, group in by_category(records).items()
        ]
        baseline = Row(BOX, {"CorLoc": _share([record["baseline"] for record in values])})
        overall = Row("this run", {"CorLoc": _share(own)}) if own else None
        nothing = sum(record.get("box", ()) is None for record in values)
        return Summary(metrics, overall, [baseline], rows, {"images": len(values), "without_an_object": nothing})


def read_boxed(root: Path, options: CorLocOptions) -> list[reader.Boxed]:
    """Images with boxes in whichever layout the folder has; masks give the boxes around them."""
    if not root.is_dir():
        raise MissingFileError(f"{root} is no folder: expected PASCAL VOC, COCO20k, or images/SET with masks/SET")
    found = reader.read_voc(root, options.split, difficult=options.difficult)
    found = reader.read_coco20k(root) if found is None else found
    if found is not None:
        return found[: options.limit]
    try:
        annotated = reader.read_annotated(root, options.limit)
    except MissingFileError as error:
        raise MissingFileError(
            f"{error}; or PASCAL VOC (Annotations, ImageSets, JPEGImages), or COCO20k (coco_20k_filenames.txt)"
        ) from error
    boxed = []
    for item in annotated:
        box = extent(read_mask(item.mask))
        if box is not None:
            corners = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
            boxed.append(reader.Boxed(item.name, item.category, item.image, [corners]))
    return boxed


def hit(box: Box, annotated: Sequence[Box]) -> bool:
    """Whether a box overlaps with any of those by at least one half."""
    return any(overlap(box, other) >= CORRECT for other in annotated)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, with the published additions to heights and union."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    shared = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1] + EPSILON) for box in (one, other)]
    return float(shared / (sum(areas) - shared + EPSILON))


def _share(hits: Sequence[Any]) -> float | None:
    return 100 * sum(map(float, hits)) / len(hits) if hits else None


def _draw(out: Path, key: str, objects: Objects) -> None:
    """The first objects on their photograph."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        picture = objects_overlay(capped(load_image(objects.name).pixels), objects)
        write_png(out / f"{Path(key.replace('/', '-')).stem}.png", picture)
    except OSError as error:
        raise OutputError(f"pictures cannot be written to {out}: {error.strerror or error}") from error
