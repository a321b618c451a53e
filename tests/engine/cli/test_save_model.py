"""``--save-model``: the model that the command leaves gives the command's own masks; where it may lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from helpers import photo
from PIL import Image
from typer.testing import CliRunner

from facetrt.engine import Engine, InputError, OutputError, PartsModel, SegmentationModel, load_model
from facetrt.engine.cli.main import program

COMMON = ("--load-size", "48", "--sample-interval", "4", "--refine", "none")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "images" / f"photo{i}.png" for i in range(2)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        Image.fromarray(photo(90, 120, i)).save(path)
    return paths


def run(*arguments: object) -> Result:
    return CliRunner().invoke(program(), [*map(str, arguments)], catch_exceptions=False)


def test_a_model_beside_or_in_the_results(
    tiny_engine: Engine, tiny_bundle: Path, images: list[Path], tmp_path: Path
) -> None:
    out, model = tmp_path / "out", tmp_path / "models" / "disc.npz"
    command = ("cosegment", *images, "-b", tiny_bundle, *COMMON, "--saliency-threshold", "0.25")
    result = run(*command, "-o", out, "--save-model", model)
    assert f"load_model({str(model)!r})" in result.stdout
    learned = SegmentationModel.load(model)
    assert learned.options["sample_interval"] == 4 and learned.load_size == 48 and learned.images == 2
    for path in images:
        mask = np.asarray(Image.open(out / "masks" / path.name)) > 0
        np.testing.assert_array_equal(tiny_engine.apply(learned, path).mask, mask)
        assert 0 < mask.mean() < 1
    with pytest.raises(OutputError, match="exists already"):
        run(*command, "-o", tmp_path / "second", "--save-model", model)
    assert not (tmp_path / "second").exists()
    run(*command, "-o", out, "--save-model", out / "kept" / "disc.npz", "--force")
    assert load_model(out / "kept" / "disc.npz").images == 2 and (out / "results.json").is_file()


def test_a_model_of_parts(tiny_engine: Engine, tiny_bundle: Path, images: list[Path], tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "parts.npz"
    command = ("parts", *images, "-b", tiny_bundle, "-o", out, *COMMON, "--num-parts", "2", "--save-model", model)
    run(*command, "--saliency-threshold", "0")
    learned = PartsModel.load(model)
    for path in images:
        labels = np.asarray(Image.open(out / "labels" / path.name)).astype(int) - 1
        np.testing.assert_array_equal(tiny_engine.apply(learned, path).labels, labels)
    before = model.read_bytes()
    with pytest.raises(InputError, match=r"parts\.npz was not written: everything is background"):
        run(*command, "--saliency-threshold", "1", "--force")
    assert (out / "results.json").is_file() and model.read_bytes() == before


@pytest.mark.parametrize(
    ("place", "message"), [("out", "is a folder"), ("bundle/m.npz", "lies in the bundle"), ("mine.txt", "no model of")]
)
def test_places_that_are_refused_before_anything_is_computed(
    images: list[Path], tmp_path: Path, place: str, message: str
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "mine.txt").write_text("x")
    command = ("cosegment", *images, "-b", tmp_path / "bundle", "-o", tmp_path / "out", "--force", "--save-model")
    with pytest.raises(OutputError, match=message):  # an empty bundle would be the next error
        run(*command, tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "images", "mine.txt"]
