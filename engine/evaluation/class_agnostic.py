"""Masks of several objects per image against annotated ones of any class: COCO's AP and AR, by pycocotools."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from facetrt.engine.evaluation.cosegmentation import centred_box
from facetrt.engine.evaluation.datasets import objects as reader
from facetrt.engine.evaluation.datasets.reading import digest, image_size, member, read_mask, require
from facetrt.engine.evaluation.discovery import BOX, DiscoveryEvaluation, DiscoveryOptions
from facetrt.engine.evaluation.protocol import Choice, Record, Row, Summary
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.objects import Bools, Objects
from facetrt.engine.tasks.discovery.rle import encode_rle
from facetrt.kernels.components import extent
from facetrt.kernels.errors import InputError, MissingDependencyError, MissingFileError

METRICS = ["box AP50", "box AP", "box AR100", "mask AP50", "mask AP", "mask AR100"]
PLACES = {"AP": 0, "AP50": 1, "AR100": 8}  # in what pycocotools summarises


@dataclass(frozen=True)
class ClassAgnosticOptions(DiscoveryOptions):
    """Options of the scores of objects of any class."""

    method: Annotated[str, Setting("Of discovery.")] = "maskcut"
    annotations: Annotated[str, Setting("COCO's file, in the folder annotations.")] = "instances_val2017.json"


class ClassAgnostic(DiscoveryEvaluation):
    """AP and AR with all classes taken for one."""

    name = "class-agnostic"

    def __init__(self, root: Path, options: ClassAgnosticOptions) -> None:
        import_coco()
        self.options: ClassAgnosticOptions = options
        self.root = root
        if not root.is_dir():
            raise MissingFileError(f"{root} is no folder: expected COCO's, or images/SET with masks/SET")
        path = root / "annotations" / options.annotations
        data, self._paths = _read_coco(root, path) if path.is_file() else _read_masks(root, options.limit)
        kept = data["images"][: options.limit] if path.is_file() else data["images"]
        numbers = {item["id"] for item in kept}
        self._images = {str(item["id"]): item for item in kept}
        annotations = [item for item in data["annotations"] if item["image_id"] in numbers]
        self._truth = {"images": kept, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}

    @property
    def images(self) -> Mapping[str, Path]:
        """See :class:`DiscoveryEvaluation`."""
        return {key: self._paths[item["id"]] for key, item in self._images.items()}

    def facts(self) -> dict[str, Any]:
        """See :class:`Evaluation`."""
        count = len(self._truth["annotations"])
        kept = digest(self.root, list(self.images.values()))
        return {"data_set": self.name, "images": len(self._images), "objects": count, "digest": kept}

    def choices(self) -> list[Choice]:
        """See :class:`Evaluation`."""
        return [
            *super().choices(),
            Choice("score of an object", "the method's, or 1, 1/2, 1/3, … in the order in which they are found"),
            Choice("classes", "one for all; crowds as pycocotools treats them"),
        ]

    def score(self, key: str, found: Objects | None) -> Record:
        """See :class:`DiscoveryEvaluation`."""
        item = self._images[key]
        baseline = centred_box((item["height"], item["width"]))
        record: Record = {"category": "images", "baseline": [_detection(item["id"], baseline, 1.0)]}
        if found is None:
            return record
        scores = 1 / np.arange(1, 1 + len(found)) if found.scores is None else found.scores
        detections = [_detection(item["id"], mask, float(s)) for mask, s in zip(found.masks, scores, strict=True)]
        return record | {"detections": [each for each in detections if each is not None]}

    def summarise(self, records: Mapping[str, Record]) -> Summary:
        """See :class:`Evaluation`."""
        values = list(records.values())
        overall = None
        if values and "detections" in values[0]:
            overall = Row("this run", self._figures([each for record in values for each in record["detections"]]))
        baseline = Row(BOX, self._figures([each for record in values for each in record["baseline"]]))
        row = Row("images", (overall or baseline).figures)
        return Summary(METRICS, overall, [baseline], [row], {"images": len(values)})

    def _figures(self, detections: list[dict[str, Any]]) -> dict[str, float | None]:
        """COCO's figures × 100."""
        coco, evaluator = import_coco()
        if not detections:
            return dict.fromkeys(METRICS, 0.0)
        with redirect_stdout(io.StringIO()):  # it tells of its progress
            truth = coco()
            truth.dataset = self._truth
            truth.createIndex()
            found = truth.loadRes(detections)
            figures: dict[str, float | None] = {}
            for kind, shown in (("bbox", "box"), ("segm", "mask")):
                run = evaluator(truth, found, kind)
                run.params.useCats = 0
                run.evaluate()
                run.accumulate()
                run.summarize()
                figures |= {f"{shown} {name}": 100 * float(run.stats[place]) for name, place in PLACES.items()}
        return {name: figures[name] for name in METRICS}


def _detection(image: int, mask: Bools, score: float) -> Any:
    box = extent(mask)
    if box is None:
        return None
    left, top, right, bottom = box
    rle = encode_rle(mask)
    shown = {"bbox": [left, top, right - left, bottom - top], "segmentation": rle, "score": score}
    return {"image_id": image, "category_id": 1, **shown}


def _read_coco(root: Path, path: Path) -> tuple[dict[str, Any], dict[int, Path]]:
    """COCO's annotations, all of one class, and its images: beside them in the folder that the file is named for."""
    data = reader.read_coco(path)
    folder = path.stem.rpartition("_")[2]
    places = {}
    for item in data["images"]:
        file = next((root / part / item["file_name"] for part in (folder, "images") if (root / part).is_dir()), None)
        member(root, str(item["file_name"]), path)
        if file is None:
            raise MissingFileError(f"{root / folder} is missing: COCO has the images of {path.name} there")
        places[item["id"]] = require(file, "COCO", f"the image {item['file_name']}")
    for item in data["annotations"]:
        item["category_id"] = 1
        item.setdefault("iscrowd", 0)
        item.setdefault("area", item["bbox"][2] * item["bbox"][3])
        if "segmentation" not in item:
            raise InputError(f"{path}: annotation {item['id']!r:.40} has no segmentation")
    return data, places


def _read_masks(root: Path, limit: int | None) -> tuple[dict[str, Any], dict[int, Path]]:
    """Images with one mask each, which is one object."""
    images, annotations, places = [], [], {}
    for number, item in enumerate(reader.read_annotated(root, limit), start=1):
        height, width = image_size(item.image)
        images.append({"id": number, "file_name": item.name, "height": height, "width": width})
        places[number] = item.image
        mask = read_mask(item.mask)
        box = extent(mask)
        if box is not None:
            shown = {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "segmentation": encode_rle(mask)}
            area = int(mask.sum())
            annotations.append(
                {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "area": area, **shown}
            )
    return {"images": images, "annotations": annotations}, places


def import_coco() -> tuple[Any, Any]:
    """pycocotools' classes of annotations and of their evaluation.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingDependencyError(
            "the class-agnostic evaluation needs pycocotools: pip install 'facetrt[eval]'"
        ) from error
    return COCO, COCOeval
