"""Readers of data sets of objects: images with boxes, with a grey annotation each, or with COCO's annotations.

* Boxes: PASCAL VOC (``Annotations/NAME.xml``, ``ImageSets/Main/trainval.txt``, ``JPEGImages/NAME.jpg``), and COCO20k
  (``annotations/instances_train2014.json``, ``coco_20k_filenames.txt``, and the images that it lists).
* Grey annotations: ECSSD, DUTS-TE and DUT-OMRON as they are distributed, or any two folders of :data:`PAIRS`.
* Sets of images with masks (:mod:`facetrt.engine.evaluation.datasets.masks`) serve for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from facetrt.engine.evaluation.datasets.masks import read_image_sets
from facetrt.engine.evaluation.datasets.reading import image_size, list_images, member, read_rows, require
from facetrt.engine.files import read_bytes, read_object
from facetrt.kernels.errors import InputError, MissingFileError, reading

VOC_YEARS = ("VOC2007", "VOC2012")
COCO_LIST = ("coco_20k_filenames.txt", "annotations/coco_20k_filenames.txt")
MAX_XML_BYTES, MAX_JSON_BYTES = 1 << 20, 1 << 30
PAIRS = (  # folders of images and of annotations, as distributed
    ("images", "ground_truth_mask"),  # ECSSD
    ("DUTS-TE-Image", "DUTS-TE-Mask"),
    ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
    ("Imgs", "GT"),
    ("Image", "Mask"),
    ("image", "mask"),
    ("images", "masks"),
    ("images", "gt"),
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Boxed:
    """An image and its annotated boxes ``xmin, ymin, xmax, ymax``, ends excluded."""

    name: str
    category: str
    image: Path
    boxes: list[Box]


@dataclass(frozen=True)
class Annotated:
    """An image and its grey annotation."""

    name: str
    category: str
    image: Path
    mask: Path


def read_voc(root: Path, split: str, *, difficult: bool) -> list[Boxed] | None:
    """The images of a split with their boxes; None if this is not PASCAL VOC.

    One is subtracted from the smaller coordinates alone, as the methods do. Without ``difficult``, objects that are
    marked as such or as truncated are left out, and images that then have none.

    Raises:
        MissingFileError, InputError: a file of the data set is missing or damaged, or two years lie in one folder.
    """
    places = [root, *(root / inner / year for inner in ("", "VOCdevkit") for year in VOC_YEARS)]
    found = [place for place in places if (place / "Annotations").is_dir() and (place / "ImageSets").is_dir()]
    if not found:
        return None
    if len(found) > 1:
        raise InputError(f"{root} holds {' and '.join(place.name for place in found)}: give the folder of one of them")
    folder = found[0]
    listed = require(folder / "ImageSets" / "Main" / f"{split}.txt", "PASCAL VOC", f"the names of {split}")
    images = []
    for (name,) in read_rows(listed, 1):
        annotation = require(member(folder / "Annotations", f"{name}.xml", listed), "PASCAL VOC", f"boxes of {name}")
        image = require(member(folder / "JPEGImages", f"{name}.jpg", listed), "PASCAL VOC", f"the image {name}")
        boxes = list(_voc_boxes(annotation, difficult=difficult))
        if boxes:
            images.append(Boxed(name, folder.name, image, boxes))
    return images


def _voc_boxes(path: Path, *, difficult: bool) -> Iterator[Box]:
    data = read_bytes(path, "an annotation of PASCAL VOC", MAX_XML_BYTES)
    if b"<!" in data.replace(b"<!--", b""):
        raise InputError(f"{path} declares a document type or entities, which no annotation of PASCAL VOC does")
    with reading(path, "an annotation of PASCAL VOC"):
        tree = ElementTree.fromstring(data)
        for item in tree.iter("object"):
            hard = any(item.findtext(mark, "0").strip() == "1" for mark in ("difficult", "truncated"))
            if hard and not difficult:
                continue
            corners = [float(item.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if not all(map(math.isfinite, corners)):
                raise InputError(f"{path} has an object without a box of four numbers")
            left, top, right, bottom = (float(int(value)) for value in corners)
            yield left - 1, top - 1, right, bottom


def read_coco20k(root: Path) -> list[Boxed] | None:
    """The images of LOST's list with COCO's boxes; None if this is not COCO20k."""
    listed = next((root / name for name in COCO_LIST if (root / name).is_file()), None)
    if listed is None:
        return None
    path = require(root / "annotations" / "instances_train2014.json", "COCO20k", "COCO's annotations of 2014")
    boxes: dict[int, list[Box]] = {}
    data = read_coco(path)
    for item in data["annotations"]:
        if not item.get("iscrowd"):
            left, top, width, height = item["bbox"]
            corners = (float(round(value)) for value in (left, top, left + width, top + height))
            boxes.setdefault(item["image_id"], []).append(tuple(corners))  # type: ignore[arg-type]
    by_name = {item["file_name"]: item["id"] for item in data["images"]}
    images = []
    for (name,) in read_rows(listed, 1):
        file = name.rpartition("/")[2]
        if file not in by_name:
            raise InputError(f"{listed} names {name[:100]}, of which {path.name} has no annotation")
        found = boxes.get(by_name[file])
        if found:
            place = member(root, name if "/" in name else f"train2014/{name}", listed)
            images.append(Boxed(file, "COCO20k", require(place, "COCO20k", f"the image {file}"), found))
    return images


def read_coco(path: Path) -> dict[str, Any]:
    """COCO's annotations; images, annotations and categories are checked for what is used.

    Raises:
        InputError: the file holds something else.
    """
    data = read_object(path, "annotations of COCO", MAX_JSON_BYTES)
    fields = {"images": ("id", "file_name", "height", "width"), "annotations": ("id", "image_id", "bbox")}
    for kind, names in fields.items():
        items = data.get(kind)
        if not isinstance(items, list) or not all(isinstance(item, dict) and set(names) <= set(item) for item in items):
            raise InputError(f"{path} is no file of COCO's annotations: expected {kind} with {', '.join(names)}")
    for item in data["annotations"]:
        box = item["bbox"]
        sound = isinstance(box, list) and len(box) == 4 and all(isinstance(side, (int, float)) for side in box)
        if not sound or not all(map(math.isfinite, box)):
            raise InputError(f"{path}: annotation {item['id']!r:.40} has no box of four numbers")
    return data


def read_annotated(root: Path, limit: int | None = None) -> list[Annotated]:
    """Images and grey annotations in one of the known layouts.

    Raises:
        MissingFileError: the folder has none of them; the message says what was expected and what is there.
    """
    require(root, "the data set", "images and annotations")
    for images, masks in PAIRS:
        if (root / images).is_dir() and (root / masks).is_dir() and list_images(root / images):
            return _pairs(root.name, root / images, root / masks)[:limit]
    try:
        sets = read_image_sets(root, "the data set", limit)
    except MissingFileError as error:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        expected = ", ".join(f"{images} with {masks}" for images, masks in PAIRS)
        raise MissingFileError(f"{root} holds {there}: expected {expected}, or images/SET with masks/SET") from error
    return [
        Annotated(f"{found.name}/{image.name}", found.name, image, mask)
        for found in sets
        for image, mask in zip(found.images, found.masks, strict=True)
    ]


def _pairs(category: str, images: Path, masks: Path) -> list[Annotated]:
    by_stem = {path.stem: path for path in list_images(masks)}
    found = []
    for image in list_images(images):
        mask = by_stem.get(image.stem)
        if mask is None:
            raise MissingFileError(f"{masks / image.stem}.png is missing: it is the annotation of {image}")
        if image_size(mask) != image_size(image):
            raise InputError(f"{mask} and {image} have different sizes: image and annotation must have one size")
        found.append(Annotated(image.name, category, image, mask))
    return found
