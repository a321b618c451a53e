"""``facetrt discover`` and ``facetrt found-head``, called in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo
from PIL import Image
from typer.testing import CliRunner, Result

from facetrt.engine import Engine, FacetrtError, Geometry
from facetrt.engine.cli.discovery import DiscoverOptions, read_fit
from facetrt.engine.cli.main import program
from facetrt.engine.drawing.discovery import BRIGHT, DARK, ZERO, map_picture, objects_overlay
from facetrt.engine.tasks.discovery.catalogue import METHODS

SIZES = {"a": (64, 90), "b": (80, 72)}  # (height, width)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(photo(*size, seed)).save(folder / f"{name}.png")
    Image.fromarray(np.full((64, 64, 3), 80, np.uint8)).save(folder / "flat.png")
    return folder


def discover(*arguments: object, command: str = "discover") -> Result:
    return CliRunner().invoke(program(), [command, *map(str, arguments), "--bundle", "builtin"])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_what_is_found_is_written_twice_and_drawn(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = discover(images, "--out", out, "--load-size", 64, "--save-intermediate")
    assert result.exit_code == 0, result.output
    assert "2 objects in 3 images by tokencut" in result.output
    assert "flat.png is featureless" in " ".join(result.output.split())
    record, coco = read(out / "results.json"), read(out / "objects.json")
    assert [Path(image["image"]).stem for image in record["images"]] == ["a", "b", "flat"]
    assert record["command"] == "discover" and record["options"]["method"] == "tokencut"
    assert "featureless" in record["images"][2]["why_empty"] and record["images"][2]["masks"] == []
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        image, mask = coco["images"][number], np.asarray(Image.open(out / "masks" / f"{name}-1.png")) > 0
        assert (image["file_name"], image["height"], image["width"]) == (f"{name}.png", height, width)
        annotation = coco["annotations"][number]
        assert annotation["image_id"] == image["id"] and annotation["area"] == mask.sum() > 0
        assert annotation["segmentation"]["size"] == [height, width] == list(mask.shape)
        left, top, right, bottom = record["images"][number]["boxes"][0]
        np.testing.assert_allclose(annotation["bbox"], [left, top, right - left, bottom - top], atol=2e-3)
        assert Image.open(out / "overlays" / f"{name}.png").size == (width, height)
        arrays = np.load(out / "data" / f"{name}.npz")
        assert {"cells", "boxes", "eigenvector", "degree", "bipartition"} <= set(arrays)
        assert (out / "maps" / f"{name}-eigenvector.png").is_file()
    assert Image.open(out / "overview.png").size[0] > 200


def test_a_large_photograph_without_anything_in_it(tmp_path: Path) -> None:
    Image.new("RGB", (1900, 700), (90, 90, 90)).save(tmp_path / "flat.png")
    Image.fromarray(photo(64, 80)).save(tmp_path / "b.png")
    result = discover(tmp_path / "flat.png", tmp_path / "b.png", "--out", tmp_path / "out", "--load-size", 64)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "overview.png").is_file()


def test_the_coco_file_is_read_by_its_tools(images: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    out = tmp_path / "out"
    assert discover(images, "--out", out, "--method", "found", "--set", "extent=each", "--load-size", 64).exit_code == 0
    file = coco.COCO(str(out / "objects.json"))
    for annotation in file.loadAnns(file.getAnnIds()):
        mask = file.annToMask(annotation)
        name = file.loadImgs([annotation["image_id"]])[0]["file_name"]
        assert mask.shape == SIZES[Path(name).stem] and mask.sum() == annotation["area"]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tokencut"])
def test_every_method_is_a_command(images: Path, tmp_path: Path, name: str) -> None:
    size = "64x96" if name == "maskcut" else "64"
    result = discover(
        images / "a.png", "--out", tmp_path / "out", "--method", name, "--load-size", size, "--save-intermediate"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert read(tmp_path / "out" / "results.json")["images"][0]["method"] == name
    assert list((tmp_path / "out" / "maps").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "tokencat"), "no method 'tokencat': expected one of tokencut"),
        (("--set", "tua=1"), "no option 'tua' here: expected one of form=box"),
        (("--set", "tau"), "expected NAME=VALUE"),
        (("--facet", "key@9"), "key@9 was not exported"),
        (("--fuse", "key@3,key@3"), "expected facets joined by"),
        (("--facet", "key@3", "--fuse", "key@3,query@3"), "exclude each other"),
        (("--fit", "stretch"), "fit 'stretch': expected one of none"),
        (("--method", "found", "--set", "head=nothing.json"), "nothing.json"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    images: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = discover(images, "--out", tmp_path / "out", *arguments)
    assert isinstance(result.exception, FacetrtError) and message in str(result.exception)
    assert "\n" not in str(result.exception) and not list(tmp_path.iterdir())


def test_a_broken_image_stops_or_is_left_out(images: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    given = (images / "a.png", tmp_path / "broken.png", "--out", tmp_path / "out", "--load-size", 64)
    refused = discover(*given)
    assert isinstance(refused.exception, FacetrtError) and "--skip-broken" in str(refused.exception)
    assert discover(*given, "--skip-broken").exit_code == 0
    record = read(tmp_path / "out" / "results.json")
    assert len(record["images"]) == 1 and record["skipped"][0]["image"].endswith("broken.png")


def test_fit_none_is_a_choice_and_not_its_absence(images: Path, tmp_path: Path) -> None:
    assert read_fit("none") == "none" and DiscoverOptions().fit is None
    given = (images / "a.png", "--load-size", "none", "--out")
    loaded = []
    for name, fit in (("plain", ["--fit", "none"]), ("published", [])):
        assert discover(*given, tmp_path / name, *fit).exit_code == 0
        loaded.append(read(tmp_path / name / "results.json")["images"][0]["loaded_size"])
    assert loaded == [[64, 90], [64, 96]]


def test_a_head_is_trained_and_used(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    photographs = (images / "a.png", images / "b.png")
    trained = discover(*photographs, "--out", out, "--load-size", 64, "--steps", 4, command="found-head")
    assert trained.exit_code == 0, (trained.output, trained.exception)
    assert "a head of 145 numbers for value@3-mean" in " ".join(trained.output.split())
    given = (photographs[0], "--method", "found", "--set", f"head={out / 'found-head.json'}", "--load-size", 64)
    assert discover(*given, "--out", tmp_path / "out").exit_code == 0
    image = read(tmp_path / "out" / "results.json")["images"][0]
    assert image["facet"] == "value@3-mean" and (image["why_empty"] or image["facts"]["form"] == "head")


def test_a_head_weighs_one_facet(images: Path, tmp_path: Path) -> None:
    refused = discover(images / "a.png", "--out", tmp_path / "out", "--facet", "key@3,query@3", command="found-head")
    assert isinstance(refused.exception, FacetrtError) and "a head weighs one facet" in str(refused.exception)


def test_maps_lie_on_the_image_without_the_border() -> None:
    geometry = Geometry((100, 60), (56, 32), 8, 8, resized=(50, 30))
    bits = np.zeros((7, 4), np.bool_)
    bits[:, 0] = True
    picture = map_picture(bits, geometry, 100)
    assert picture.shape == (100, 60, 3)
    assert tuple(picture[50, 4]) == BRIGHT and tuple(picture[50, 40]) == DARK
    signed = np.linspace(-1, 1, 28).reshape(7, 4)
    signed[3, 1] = 0
    shown = map_picture(signed, geometry, 100)
    assert shown[5, 5, 2] > shown[5, 5, 0] and shown[95, 50, 0] > shown[95, 50, 2]
    assert np.abs(shown[56, 24].astype(int) - ZERO).max() <= 40
    assert len(np.unique(map_picture(np.arange(28).reshape(7, 4) % 3, geometry).reshape(-1, 3), axis=0)) >= 3


def test_an_overlay_colours_objects_and_darkens_the_rest() -> None:
    picture = np.full((80, 96, 3), 128, np.uint8)
    picture[30:50, 40:60] = (250, 250, 20)
    with Engine.open("builtin", threads=1) as engine:
        found = engine.discover([picture], load_size=None)[0]
    mask = found.masks[0]
    assert 0 < mask.sum() < mask.size
    drawn = objects_overlay(picture, found)
    far = ~mask
    left, top, right, bottom = found.boxes[0].astype(int)
    far[max(top - 4, 0) : bottom + 4, max(left - 4, 0) : right + 4] = False
    assert far.any() and (drawn[far] < picture[far]).all()
    assert objects_overlay(picture[::2, ::2], found).shape == (40, 48, 3)
