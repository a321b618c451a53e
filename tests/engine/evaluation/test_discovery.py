"""Evaluations of discovery on small data sets in the published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facetrt.engine import Engine
from facetrt.engine.evaluation import evaluate, open_evaluation
from facetrt.engine.evaluation.datasets.objects import read_coco20k, read_voc
from facetrt.engine.evaluation.discovery import CorLocOptions, overlap, read_boxed
from facetrt.engine.evaluation.published import published_rows
from facetrt.engine.tasks.discovery.rle import encode_rle
from facetrt.kernels.errors import FacetrtError, InputError, MissingFileError

SIZE = (64, 96)  # height, width
INSIDE = (slice(16, 48), slice(24, 72))
BOX = (24, 16, 72, 48)  # xmin, ymin, xmax, ymax, ends excluded


def picture(seed: int) -> Image.Image:
    """A bright textured rectangle on dark ground."""
    random = np.random.default_rng(seed)
    pixels = random.integers(20, 50, (*SIZE, 3), np.uint8)
    pixels[INSIDE] = random.integers(150, 250, (32, 48, 3), np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    values = np.zeros(SIZE, np.uint8)
    values[INSIDE] = 255
    return Image.fromarray(values)


def make_voc(root: Path, objects: str = "") -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    left, top, right, bottom = BOX
    plain = f"<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"
    hard = plain.replace(str(left + 1), "3")
    text = objects or f"<object>{plain}</object><object><difficult>1</difficult>{hard}</object>"
    for name in ("000001", "000002"):
        picture(int(name)).save(root / f"JPEGImages/{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
    (root / "ImageSets/Main/trainval.txt").write_text("000001\n000002\n")
    return root


def make_coco20k(root: Path) -> Path:
    for folder in ("annotations", "train2014"):
        (root / folder).mkdir(parents=True)
    names = [f"COCO_train2014_{number}.jpg" for number in (1, 2)]
    for number, name in enumerate(names):
        picture(number).save(root / "train2014" / name)
    annotations = [
        {"id": 1, "image_id": 0, "bbox": [23.6, 16.4, 48.2, 31.9], "iscrowd": 0},
        {"id": 2, "image_id": 0, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 3, "image_id": 1, "bbox": [24, 16, 48, 32]},
    ]
    images = [{"id": i, "file_name": n, "height": SIZE[0], "width": SIZE[1]} for i, n in enumerate(names)]
    data = {"images": images, "annotations": annotations}
    (root / "annotations/instances_train2014.json").write_text(json.dumps(data))
    (root / "coco_20k_filenames.txt").write_text("".join(f"train2014/{name}\n" for name in names))
    return root


def make_pairs(images: str, masks: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        for folder in (images, masks):
            (root / folder).mkdir(parents=True)
        for number in range(2):
            picture(number).save(root / images / f"{number:04d}.jpg")
            mask().save(root / masks / f"{number:04d}.png")
        return root

    return make


def make_coco(root: Path) -> Path:
    for folder in ("annotations", "val2017"):
        (root / folder).mkdir(parents=True)
    images, annotations = [], []
    for number in (1, 2):
        name = f"{number:012d}.jpg"
        picture(number).save(root / "val2017" / name)
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        shown = {"bbox": [24, 16, 48, 32], "segmentation": encode_rle(np.asarray(mask()) > 0)}
        annotations.append({"id": number, "image_id": number, "category_id": 17 + number, "area": 1536, **shown})
    data = {"images": images, "annotations": annotations, "categories": []}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(data))
    return root


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.open("builtin") as opened:
        yield opened


ECSSD, DUTS, OMRON = (
    make_pairs("images", "ground_truth_mask"),
    make_pairs("DUTS-TE-Image", "DUTS-TE-Mask"),
    make_pairs("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
)


@pytest.mark.parametrize(
    ("name", "make", "metric", "least"),
    [
        ("corloc", make_voc, "CorLoc", 100),
        ("corloc", make_coco20k, "CorLoc", 100),
        ("corloc", ECSSD, "CorLoc", 100),
        ("saliency", ECSSD, "IoU", 0.6),
        ("saliency", DUTS, "IoU", 0.6),
        ("saliency", OMRON, "IoU", 0.6),
        ("class-agnostic", make_coco, "mask AP50", 50),
        ("class-agnostic", ECSSD, "mask AP50", 50),
    ],
)
def test_each_layout_is_read_and_scored(
    engine: Engine, tmp_path: Path, name: str, make: Callable[[Path], Path], metric: str, least: float
) -> None:
    """The pictures show one clear object, which any method finds."""
    evaluation = open_evaluation(name, make(tmp_path / "data"), {"method": "tokencut"})
    outcome = evaluate(evaluation, engine, tmp_path / "out")
    assert outcome.items == 2 and outcome.summary.overall is not None
    found = outcome.summary.overall.figures[metric]
    assert found is not None and found >= least
    assert list((tmp_path / "out").rglob("*.png"))
    assert evaluate(evaluation, engine, tmp_path / "out").resumed == 2


def test_without_a_bundle_the_centred_box_is_scored(tmp_path: Path) -> None:
    outcome = evaluate(open_evaluation("corloc", make_voc(tmp_path / "data")), None, tmp_path / "out")
    assert outcome.summary.overall is None and outcome.summary.baselines[0].figures["CorLoc"] is not None


def test_boxes_follow_the_published_rules(tmp_path: Path) -> None:
    voc, coco = make_voc(tmp_path / "voc"), make_coco20k(tmp_path / "coco")
    every, plain = (read_voc(voc, "trainval", difficult=difficult) for difficult in (True, False))
    assert every is not None and every[0].boxes == [BOX, (2, *BOX[1:])]
    assert plain is not None and plain[0].boxes == [BOX]
    found = read_coco20k(coco)
    assert found is not None and [item.boxes for item in found] == [[(24, 16, 72, 48)], [BOX]]
    assert read_voc(coco, "trainval", difficult=True) is None and read_coco20k(voc) is None
    assert overlap(BOX, BOX) == pytest.approx(1) and overlap(BOX, (80, 50, 90, 60)) == 0


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><object/>', "document type or entities"),
        ("<object><bndbox><xmin>1</xmin></bndbox></object>", "without a box of four numbers"),
        ("<object><bndbox><xmin>nan</xmin></bndbox></object>", "without a box of four numbers"),
        ("<object>", "annotation of PASCAL VOC"),
    ],
)
def test_damaged_and_hostile_annotations_are_refused(tmp_path: Path, objects: str, message: str) -> None:
    with pytest.raises(FacetrtError, match=message):
        read_voc(make_voc(tmp_path / "data", objects), "trainval", difficult=True)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_no_name_leads_out_of_the_data_set(tmp_path: Path, name: str) -> None:
    voc, coco = make_voc(tmp_path / "voc"), make_coco(tmp_path / "coco")
    (voc / "ImageSets/Main/trainval.txt").write_text(f"{name}\n")
    with pytest.raises(InputError, match="expected one inside"):
        read_voc(voc, "trainval", difficult=True)
    path = coco / "annotations/instances_val2017.json"
    data: dict[str, Any] = json.loads(path.read_text())
    data["images"][0]["file_name"] = name
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="expected one inside"):
        open_evaluation("class-agnostic", coco)


def test_another_layout_says_what_was_expected_and_found(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(MissingFileError, match=r"holds pictures: expected images with ground_truth_mask.*PASCAL VOC"):
        read_boxed(tmp_path, CorLocOptions())
    for name in ("saliency", "class-agnostic"):
        with pytest.raises(MissingFileError, match="holds pictures: expected"):
            open_evaluation(name, tmp_path)
    two = tmp_path / "two"
    for year in ("VOC2007", "VOC2012"):
        make_voc(two / year)
    with pytest.raises(InputError, match="holds VOC2007 and VOC2012"):
        read_voc(two, "trainval", difficult=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "there is no method 'magic'"),
        ({"settings": "tau=7"}, "tau=7"),
        ({"settings": "tau"}, "NAME=VALUE"),
        ({"load_size": "wide"}, "load_size"),
    ],
)
def test_wrong_options_are_named_before_anything_is_read(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_evaluation("corloc", tmp_path, options)


def test_published_figures_stand_beside() -> None:
    rows = {row.name: row.figures for row in published_rows("corloc")}
    assert rows["LOST, ViT-S/16: VOC2007"] == {"CorLoc": 61.9}
    rows = {row.name: row.figures for row in published_rows("saliency")}
    assert rows["TokenCut: ECSSD"] == pytest.approx({"maxF": 0.803, "IoU": 0.712, "acc": 0.918})
    assert published_rows("class-agnostic")[0].figures == {"box AP50": 21.9, "box AR100": 32.7}
