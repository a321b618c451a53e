"""The commands in this process, as the program runs them."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo
from PIL import Image

from facetrt.engine import Engine
from facetrt.engine.cli import inspection
from facetrt.engine.cli.app import run
from facetrt.engine.cli.main import program

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def facetrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program; (exit code, standard output, standard error), white space collapsed."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["facetrt", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            run(program())
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), " ".join(err.split())

    return call


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate([(90, 120), (104, 92)]):
        Image.fromarray(photo(*size, i)).save(folder / f"photo{i}.png")
    return folder


def results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def test_pca_jointly(facetrt: Call, tiny_bundle: Path, images: Path, tmp_path: Path, tiny_engine: Engine) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = facetrt("pca", images, "-b", tiny_bundle, "-o", out, "--load-size", 48)
    assert code == 0, stderr
    assert "4 components of key@2 explain" in stdout and "2 images" in stdout
    with np.load(out / "pca.npz") as arrays:
        components, mean = arrays["components"], arrays["mean"]
    features = tiny_engine.encode(sorted(images.iterdir()), load_size=48)
    for i, item in enumerate(features):
        with np.load(out / "maps" / f"photo{i}.npz") as arrays:
            expected = (item.map("key@2") - mean) @ components.T
            np.testing.assert_allclose(arrays["projected"], expected, atol=1e-4)
        assert Image.open(out / "rgb" / f"photo{i}.png").size == item.image_size[::-1]
        assert len(list((out / "components").glob(f"photo{i}_*.png"))) == 4
    record = results(out)
    assert record["descriptors_fitted"] == sum(len(item["key@2"]) for item in features)
    assert len(record["explained_variance_ratio"]) == 4 and record["images"][1]["original_size"] == [104, 92]
    assert Image.open(out / "overview.png").width > 600


def test_pca_of_a_set_that_spills(
    facetrt: Call, tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (images, images, images, "-b", tiny_bundle, "--load-size", 48, "--facet", "token@2", "-o")
    assert facetrt("pca", *options, tmp_path / "held")[0] == 0
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(inspection, "MEMORY_LIMIT", 100_000)  # two of the six images
    monkeypatch.setattr(inspection, "OVERVIEW_IMAGES", 1)
    assert facetrt("pca", *options, tmp_path / "spilled")[0] == 0
    names = [p.name for p in sorted((tmp_path / "held" / "maps").iterdir())]
    assert len(names) == 6 and not list((tmp_path / "temporary").iterdir())
    for name in names:
        with (
            np.load(tmp_path / "held" / "maps" / name) as held,
            np.load(tmp_path / "spilled" / "maps" / name) as spilled,
        ):
            np.testing.assert_allclose(held["projected"], spilled["projected"], atol=1e-5)


def test_pca_per_image(facetrt: Call, tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = (images, "-b", tiny_bundle, "--load-size", 48, "--components", 2, "-o", out)
    code, stdout, _ = facetrt("pca", *common, "--per-image")
    assert code == 0 and "2 components of key@2, 2 images" in stdout
    with np.load(out / "maps" / "photo1.npz") as arrays:
        np.testing.assert_allclose(arrays["projected"].mean(axis=(0, 1)), 0, atol=1e-4)
        assert arrays["components"].shape == (2, 48)
    assert not (out / "pca.npz").exists()
    assert not (out / "rgb").exists()  # a colour picture takes three components
    assert [item["descriptors_fitted"] for item in results(out)["images"]] == [11 * 15, 12 * 11]


def test_similarity(facetrt: Call, tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out, first = tmp_path / "out", images / "photo0.png"
    common = ("similarity", first, first, "-b", tiny_bundle, "-o", out, "--load-size", 48)
    code, stdout, stderr = facetrt(*common, "--at", "60,45.5", "--top-k", 3, "--hierarchy", 1)
    assert code == 0, stderr
    assert "most similar (key@2, cosine 1.000)" in stdout and "photo0.png" in stdout
    record = results(out)
    assert (
        record["points_b_xy"][0] == record["point_a_xy"]
        and np.abs(np.subtract(record["point_a_xy"], (60, 45.5))).max() < 4
    )
    assert len(record["points_b_xy"]) == 3 and record["clicked_xy"] == [60, 45.5]
    (left, top), (right, bottom) = record["cell_a_box_xy"]
    assert left < 60 < right and top < 45.5 < bottom and right - left == pytest.approx(8 * 120 / 64)
    with np.load(out / "similarity.npz") as arrays:
        assert arrays["values"].shape == (11, 15) and arrays["cells"][0] == record["cell_a"]
    assert Image.open(out / "similarity.png").height > 400
    assert facetrt(*common, "--cls", "--force")[0] == 0
    assert results(out)["cell_a"] is results(out)["cell_a_box_xy"] is results(out)["clicked_xy"] is None


def test_facets(facetrt: Call, tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("facets", images, "-b", tiny_bundle, "-o", out, "--load-size", 48)
    code, stdout, stderr = facetrt(*common, "--at", "60,45", "--at", "20,20")
    assert code == 0, stderr
    assert "4 facets, 2 points" in stdout
    record = results(out)
    assert list(record["facets"]) == ["key@1", "query@1", "key@2", "token@2"]
    assert len(record["points_a_xy"]) == 2 and len(record["facets"]["token@2"]["best_b_xy"]) == 2
    with np.load(out / "facets.npz") as arrays:
        assert arrays["key@2.similarity"].shape == (2, 12, 11) and arrays["key@1.pca_a"].shape == (11, 15, 4)
    assert Image.open(out / "facets.png").height > 5 * 150
    code, stdout, _ = facetrt(*common, "--force", "--facets", "token@2, key@1,key@1", "--points", 2)
    assert code == 0 and "2 facets, 2 points" in stdout and list(results(out)["facets"]) == ["key@1", "token@2"]


def test_bad_input_is_one_line_and_leaves_nothing(
    facetrt: Call, tiny_bundle: Path, images: Path, tmp_path: Path
) -> None:
    first, second, out, empty = images / "photo0.png", images / "photo1.png", tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    small = tmp_path / "small.png"
    Image.fromarray(photo(8, 16)).save(small)
    common = ("-b", tiny_bundle, "-o", out, "--load-size", 48)
    two = (first, second, *common)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("similarity", *two, "--at", "121,5"), "point (121, 5) lies outside the image of 120×90 (width × height)"),
        (("similarity", *two, "--at", "-3,5"), "point (-3, 5) lies outside"),
        (("similarity", *two, "--at", "nan,5"), "expected finite pixel coordinates"),
        (("similarity", *two, "--at", "12"), "--at '12': expected X,Y in pixels, like 120,85"),
        (("similarity", *two, "--at", "a,b"), "expected X,Y in pixels"),
        (("similarity", *two), "either --at X,Y or --cls"),
        (("similarity", *two, "--at", "1,1", "--cls"), "either --at X,Y or --cls"),
        (("similarity", *two, "--cls", "--hierarchy", 2), "[CLS] has no neighbours to bin"),
        (("similarity", *two, "--cls", "--facet", "key@9"), "key@9 was not exported: this bundle has key@1, query@1"),
        (("similarity", first, *common, "--cls"), "1 images were given: similarity needs exactly 2"),
        (("facets", images, first, *common), "3 images were given: facets needs exactly 2"),
        (("facets", *two, "--at", "1,1", "--points", 2), "give one of them"),
        (("facets", *two, "--facets", "key@1,value@9"), "value@9 was not exported"),
        (("facets", *two, "--facets", "key@1,"), "expected names out of key@1,query@1"),
        (("pca", empty, *common), "holds no image"),
        (("pca", first, *common, "--facet", "key@9"), "key@9 was not exported"),
        (("pca", first, *common, "--components", 60), "--components 60: key@2 has 48 channels"),
        (("pca", small, "-b", tiny_bundle, "-o", out, "--load-size", "none"), "too few for 4 components"),
        (("pca", first, tmp_path / "none.png", *common), "none.png does not exist"),
    ]
    for arguments, message in cases:
        code, _, err = facetrt(*arguments)
        assert code == 2 and message in err and err.startswith("error:"), (arguments, code, err)
    assert not out.exists() and not list(tmp_path.glob(".*.tmp"))
    out.mkdir()
    (out / "mine.txt").write_text("x")
    for command, *more in (("pca",), ("similarity", "--cls"), ("facets", "--at", "1,1")):
        code, _, err = facetrt(command, *two, *more)
        assert code == 2 and "exists already" in err
