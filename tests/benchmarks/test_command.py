from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from facetrt.benchmarks import missing
from facetrt.benchmarks.cpu.workbench import Workbench, prepare
from facetrt.benchmarks.report import validate
from facetrt.engine.cli.main import program
from facetrt.kernels.errors import InputError, MissingDependencyError, MissingFileError, OutputError

runner = CliRunner()


def test_bench_end_to_end(tmp_path: Path, tiny_bundle: Path, tiny_weights: Path) -> None:
    out = tmp_path / "bench"
    options = ["--quick", "--rounds", "1", "--bundle", str(tiny_bundle), "--weights", str(tiny_weights)]
    result = runner.invoke(program(), ["bench", *options, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0 and "pair match" in result.stdout
    assert {path.name for path in out.iterdir()} == {"results.json", "table.md", "bars.png", "scaling.png"}
    data = json.loads((out / "results.json").read_text())
    validate(data)
    assert data["model"] == "tiny" and data["notes"] == []
    rows = {(row["section"], row["name"]): row for row in data["rows"]}
    assert all(row["value"] or row["reason"] for row in rows.values())
    assert rows["match", "facetrt fp32"]["quality"] == {"equal best buddies": 1, "equal points": 1}
    assert rows["cosegment", "facetrt fp32"]["quality"] == {"mask IoU": 1, "equal clusters": 1}
    assert rows["kernels", "elbow sweep"]["quality"] == {"equal labels": 1}
    assert rows["discover: tokencut", "facetrt fp32"]["quality"] == {"equal cells": 1}
    assert rows["discover: maskcut, three cuts", "facetrt"]["quality"] == {"equal cells": 1}
    assert rows["discover: second eigenvector", "smallest_eigenvectors"]["quality"]["cosine"] > 1 - 1e-9
    assert rows["memory", "match, fp32"]["value"]["median"] > 20
    assert all(bar["met"] is None and bar["reason"] for bar in data["bars"])  # quick sizes are not the bars'
    with pytest.raises(OutputError, match="exists already"):
        runner.invoke(program(), ["bench", *options, "--out", str(out)], catch_exceptions=False)


def test_the_original_code_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"extractor\.py, correspondences\.py not found"):
        runner.invoke(
            program(), ["bench", "--out", str(tmp_path / "b"), "--against", str(tmp_path)], catch_exceptions=False
        )


def test_a_missing_library_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"needs matplotlib.*facetrt\[bench\]"):
        runner.invoke(program(), ["bench", "--out", str(tmp_path / "b")], catch_exceptions=False)
    with pytest.raises(MissingDependencyError, match=r"facetrt\[crf\]"):
        missing.import_library("no_such_library", extra="crf")


def test_weights_must_be_the_bundles(tmp_path: Path, tiny_bundle: Path, tiny_weights: Path) -> None:
    with pytest.raises(InputError, match="without --weights"):
        prepare(tiny_bundle, None, tmp_path)
    other = tmp_path / "other.npz"
    with np.load(tiny_weights) as arrays:
        np.savez(other, **{name: values * 2 if name == "cls_token" else values for name, values in arrays.items()})
    with pytest.raises(InputError, match="SHA-256 differs"):
        prepare(tiny_bundle, other, tmp_path)
    bundle, spec, state = prepare(tiny_bundle, tiny_weights, tmp_path)
    assert bundle == tiny_bundle and spec.name == "tiny" and "cls_token" in state


def test_a_bundle_without_what_the_tasks_need(tmp_path: Path, tiny_weights: Path, workbench: Workbench) -> None:
    from helpers import export_tiny

    fixed = export_tiny(tiny_weights, tmp_path / "fixed", size=(32, 32))
    with pytest.raises(InputError, match="any image size"):
        Workbench(fixed, workbench.spec, workbench.state, tmp_path)
