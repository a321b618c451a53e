"""``facetrt eval``: tables, files, exit codes, messages."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from facetrt.engine import InputError, MissingFileError
from facetrt.engine.cli import opening
from facetrt.engine.cli.main import program
from facetrt.engine.evaluation import EVALUATIONS, open_evaluation
from facetrt.engine.evaluation.published import published_categories, published_rows
from facetrt.engine.evaluation.report import notes


@pytest.fixture
def coseg(tmp_path, save):
    for i in range(2):
        picture = np.full((32, 40, 3), 20)
        picture[8:24, 10 + i : 30] = 230
        save(tmp_path / "data" / "images" / "cow" / f"{i}.png", picture)
        save(tmp_path / "data" / "masks" / "cow" / f"{i}.png", (picture[..., 0] > 99) * 255)
    return tmp_path / "data"


def _run(*arguments, catch=True):
    return CliRunner().invoke(program(), ["eval", *map(str, arguments)], catch_exceptions=catch)


def test_a_run_prints_its_table_beside_the_papers_and_writes_results(coseg, make_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(opening.Engine, "open", lambda *_, **__: make_engine())
    options = ("--set", "refine=none", "--set", "sample-interval=3", "--load-size", "32", "--bundle", "stub")
    ended = _run("msrc", coseg, "--out", tmp_path / "out", *options, catch=False)
    assert ended.exit_code == 0
    for text in ("this run", "saliency baseline", "centred box", "Amir et al.: this system", "0.867", "cow"):
        assert text in ended.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["options"]["load_size"] == 32
    assert {choice["topic"] for choice in results["choices"]} >= {"masks compared at"}
    assert results["environment"]["numpy"] == np.__version__


def test_the_trivial_baseline_needs_no_model(coseg, tmp_path):
    ended = _run("pascal-coseg", coseg, "--out", tmp_path / "out", "--baseline", catch=False)
    assert ended.exit_code == 0
    assert "this run" not in ended.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"] is None


@pytest.mark.parametrize("arguments", [(), ("--bundle", "x", "--baseline")])
def test_exactly_one_of_bundle_and_baseline(coseg, tmp_path, arguments):
    with pytest.raises(InputError, match=r"either --bundle BUNDLE .* or --baseline"):
        _run("msrc", coseg, "--out", tmp_path / "out", *arguments, catch=False)


def test_bad_input_leaves_no_folder(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere is missing"):
        _run("msrc", tmp_path / "nowhere", "--out", tmp_path / "out", "--baseline", catch=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no evaluation 'mscoco': expected one of pf-willow") as caught:
        _run("mscoco", tmp_path, "--out", tmp_path / "out", "--baseline", catch=False)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [("radius", "expected NAME=VALUE"), ("radius=3", "no option 'radius'"), ("elbow=x", "number")],
)
def test_settings_that_cannot_be_read(coseg, tmp_path, setting, message):
    with pytest.raises(InputError, match=message):
        _run("msrc", coseg, "--out", tmp_path / "out", "--baseline", "--set", setting, catch=False)


def test_a_facet_that_was_not_exported_is_refused_before_any_work(coseg, make_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(opening.Engine, "open", lambda *_, **__: make_engine())
    with pytest.raises(InputError, match=r"query@1 was not exported: this bundle has key@9, token@9"):
        _run("msrc", coseg, "--out", tmp_path / "out", "--bundle", "stub", "--facet", "query@1", catch=False)
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_a_default_facet_asks_for_one(coseg, make_engine):
    engine = make_engine()
    engine.manifest.defaults.clear()
    with pytest.raises(InputError, match=r"names no facet for 'cosegment': choose one of key@9, token@9 with --facet"):
        open_evaluation("msrc", coseg).resolve(engine.manifest)


def test_published_rows_are_the_papers():
    first = {name: published_rows(name) for name in EVALUATIONS}
    assert first["pascal-coseg"][0].figures == {"J": 0.607, "P": 0.882}
    assert first["msrc"][1].figures == pytest.approx({"J": 0.797, "P": 0.94})
    assert first["spair71k"][0].figures["PCK"] == pytest.approx(0.5648)
    assert first["davis2017"][0].figures == pytest.approx({"J&F": 0.722, "J": 0.679, "F": 0.765})
    assert first["tapvid-davis"][0].figures == pytest.approx({"AJ": 0.33, "delta_avg": 0.486, "OA": 0.788})
    assert all(row.source for row in first["tapvid-davis"])
    assert first["celeba"][0].figures == {"error": 11.36}
    assert published_rows("celeba", 8)[0].figures == {"error": 10.74}
    assert published_rows("celeba", 5) == []
    assert first["cub"][0].figures["error"] == pytest.approx((17.14 + 14.67 + 19.59) / 3)
    assert first["pf-willow"] == []
    categories = published_categories("spair71k")
    assert len(categories) == 18
    assert np.mean([row["PCK"] for row in categories.values()]) == pytest.approx(0.565, abs=0.005)


def test_a_data_set_that_the_paper_lacks_says_so(coseg):
    assert "their papers' own figures" in notes(open_evaluation("msrc", coseg))[0]
