"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import photo, require_openvino
from PIL import Image

PROGRAM = [sys.executable, "-c", "from facetrt.engine.cli.main import main; main()"]


def facetrt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "160", "NO_COLOR": "1"}
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )


def refused(result: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    """One clear line on standard error, the right exit code, no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(photo(90, 120, i)).save(folder / f"photo{i}.png")
    return folder


def test_info(tiny_bundle: Path) -> None:
    result = facetrt("info", tiny_bundle)
    assert result.returncode == 0
    for part in ("tiny", "key@1, query@1, key@2, token@2", "encoder.onnx", "relative frobenius", "checkpoint"):
        assert part in result.stdout


def test_info_measures_what_runs_here(tiny_bundle: Path) -> None:
    require_openvino()
    result = facetrt("info", tiny_bundle, "--measure", "--backend", "openvino")
    assert result.returncode == 0, result.stderr
    assert "openvino fp32 against onnxruntime" in result.stdout and "fp32 keeps its contract" in result.stdout
    refused(facetrt("info", tiny_bundle, "--measure"), "nothing to compare", "--backend openvino")
    refused(facetrt("info", tiny_bundle, "--precision", "fp32"), "add --measure")


def test_an_image_of_too_many_cells(tiny_bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(photo(64, 64)).save(tmp_path / "a.png")
    pair, options = [tmp_path / "a.png"] * 2, ["--bundle", tiny_bundle, "--out", tmp_path / "out", "--max-cells", "100"]
    result = facetrt("match", *pair, *options, "--load-size", "none")
    refused(result, "225 cells", "use load size 47 (--load-size 47)", "--max-cells 225")


def test_a_large_image_is_refused_in_one_line_of_ours(tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("1", (12_000, 12_000)).save(tmp_path / "a.png")
    pair = [tmp_path / "a.png"] * 2
    result = facetrt("match", *pair, "--bundle", tiny_bundle, "--out", tmp_path / "out")
    refused(result, "144,000,000 pixels", "at most 100,000,000")
    assert "note:" not in result.stderr and "DOS" not in result.stderr


def test_match(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--load-size", "48", "--saliency-threshold", "0", "--num-pairs", "5", "--save-intermediate")
    result = facetrt("match", images / "photo0.png", images / "photo0.png", "-b", tiny_bundle, "-o", out, *options)
    assert result.returncode == 0, result.stderr
    record = json.loads((out / "results.json").read_text())
    assert record["points_a_xy"] == record["points_b_xy"] and len(record["points_a_xy"]) == 5
    assert record["facet"] == "key@1" and record["options"]["num_pairs"] == 5
    assert Image.open(out / "matches.png").size == (120 + 8 + 120, 90)  # the originals', not the loaded size
    assert {p.name for p in out.iterdir()} >= {"matches.npz", "saliency_a.png", "saliency_b.png", "best_buddies.png"}


def test_cosegment(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--load-size", "48", "--sample-interval", "5", "--save-intermediate")
    result = facetrt("cosegment", images, "--bundle", tiny_bundle, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    record = json.loads((out / "results.json").read_text())
    for item in record["images"]:
        mask = Image.open(out / item["mask"])
        assert mask.size == (120, 90) and set(np.unique(np.asarray(mask))) <= {0, 255}
    assert record["tried_k"][0] == 1 and record["options"]["saliency"] == "low_resolution"
    for name in (
        "overlays/photo0.png",
        "saliency/photo1.png",
        "clusters/photo1.png",
        "overview.png",
        "data/photo0.npz",
    ):
        assert (out / name).is_file()


def test_parts(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--load-size", "48", "--sample-interval", "4", "--saliency-threshold", "0", "--num-parts", "2")
    result = facetrt("parts", images, "--bundle", tiny_bundle, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    assert "2 parts in 2 images, refined by crf" in result.stdout
    record = json.loads((out / "results.json").read_text())
    for item in record["images"]:
        labels = np.asarray(Image.open(out / item["labels"]))
        assert labels.shape == (90, 120) and labels.max() <= 2 and item["refinement"] == "crf"
        assert abs(sum(item["shares"]) - 1) < 1e-3
    assert (out / "overview.png").is_file() and (out / "overlays" / "photo1.png").is_file()
    refused(facetrt("parts", images, "-b", tiny_bundle, "-o", out, "--force", "--refine", "grabcut"), "two labels only")
    many = ("--load-size", "48", "--saliency-threshold", "0", "--num-parts", "64")
    refused(facetrt("parts", images, "-b", tiny_bundle, "-o", tmp_path / "b", *many), "too few for 64 parts")
    assert (out / "results.json").is_file() and not (tmp_path / "b").exists()


def test_existing_output(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    for command in ("extract", "match", "cosegment"):
        refused(facetrt(command, images, "-b", tiny_bundle, "-o", out), "exists already", "--force")
        refused(facetrt(command, images, "-b", tiny_bundle, "-o", out, "--force"), "was not written by facetrt")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_bad_input_is_one_line_and_leaves_nothing(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out, broken, empty = tmp_path / "out", tmp_path / "broken.png", tmp_path / "empty"
    broken.write_bytes((images / "photo0.png").read_bytes()[:500])
    empty.mkdir()
    first = images / "photo0.png"
    small = tmp_path / "small.png"
    Image.fromarray(photo(5, 5)).save(small)
    common = ("-b", tiny_bundle, "-o", out)
    refused(facetrt("match", first, *common), "1 images were given: match needs exactly 2")
    refused(facetrt("cosegment", first, *common), "needs at least 2")
    refused(facetrt("cosegment", empty, *common), "holds no image")
    refused(facetrt("match", first, broken, *common), "broken.png", "damaged")
    refused(facetrt("extract", broken, "-b", tiny_bundle, "-o", tmp_path / "kept"), "broken.png", "damaged")
    refused(facetrt("match", first, tmp_path / "none.png", *common), "none.png", "does not exist")
    refused(facetrt("match", first, small, *common, "--load-size", "none"), "smaller than one patch")
    refused(facetrt("match", first, first, *common, "--load-size", "big"), "big")
    refused(facetrt("match", first, first, *common, "--facet", "value@1"), "value@1 was not exported")
    refused(facetrt("match", first, first, "-b", empty, "-o", out), "is not a bundle")
    refused(facetrt("match", first, first, *common, "--backend", "tensorrt"), "tensorrt")
    refused(facetrt("nonsense"), "nonsense")
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_names_that_look_like_markup(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run[bold]"
    result = facetrt("extract", images, "-b", tiny_bundle, "-o", out, "--load-size", "48")
    assert result.returncode == 0 and "run[bold]" in result.stdout and out.is_dir()
    refused(facetrt("export", "[/]", "-o", tmp_path / "x"), "model '[/]' is unknown")


def test_facets_are_checked_before_encoding(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    common = ("-b", tiny_bundle, "-o", tmp_path / "out", "--load-size", "48")
    refused(facetrt("extract", images, *common, "--facets", ""), "expected names out of key@1")
    refused(facetrt("extract", images, *common, "--facets", "key@1,value@7"), "value@7 was not exported")
    refused(facetrt("match", images, *common, "--facet", ""), "was not exported")
    assert facetrt("extract", images, *common, "--facets", "key@1, key@2").returncode == 0


def test_force_never_deletes_what_is_read(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    refused(facetrt("match", images, "-b", bundle, "-o", bundle, "--force"), "was not written by facetrt as results")
    out = tmp_path / "out"
    assert facetrt("extract", images, "-b", bundle, "-o", out, "--load-size", "48").returncode == 0
    shutil.copy(images / "photo0.png", out / "mine.png")
    refused(facetrt("extract", out, "-b", bundle, "-o", out, "--force"), "which --force would delete")
    assert (out / "mine.png").is_file() and (bundle / "encoder.onnx").is_file()


def test_output_that_cannot_be_written(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(facetrt("extract", images, "-b", tiny_bundle, "-o", tmp_path / "file" / "out"), "cannot write to")


def test_nothing_corresponding_is_an_answer(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = facetrt("match", images, "-b", tiny_bundle, "-o", out, "--load-size", "48", "--saliency-threshold", "1")
    assert result.returncode == 0 and "nothing corresponds" in result.stdout
    assert json.loads((out / "results.json").read_text())["points_a_xy"] == []


def test_demo_runs_without_arguments(tmp_path: Path) -> None:
    result = facetrt("demo", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "model: builtin" in result.stdout and "not DINO" in result.stdout
    pictures = [p.relative_to(tmp_path).as_posix() for p in (tmp_path / "facetrt-demo").rglob("*.png")]
    assert any("matches.png" in p for p in pictures) and any("overlays/" in p for p in pictures)
    refused(facetrt("demo", cwd=tmp_path), "exists already")
