from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facetrt.benchmarks.cpu.scaling import NUMBERS, SIZES, STRIDES
from facetrt.benchmarks.cpu.suite import Report
from facetrt.benchmarks.plots import draw
from facetrt.benchmarks.report import TABLE, bar_cells, document, markdown, row_cells, validate, write_report
from facetrt.benchmarks.results import Bar, Row, Spread, judge
from facetrt.kernels.errors import InputError

FACTS: dict[str, Any] = {
    "machine": {
        "cpu": "a processor", "cores": 2, "flags": ["avx2"], "memory_gib": 16.0, "system": "x", "load_average": None,
    },
    "versions": {"python": "3.11", "facetrt": "0.1.0", "numpy": "2.0"},
    "commit": None, "suite": "cpu", "date": "2025-01-02T03:04:05+00:00", "seconds": 12.5, "model": "dino_vits8",
    "stride": 4, "sizes": {"side": 224, "sides": (112, 224)}, "rounds": 5,
}  # fmt: skip


def report() -> Report:
    rows = [
        Row("match", "ours", Spread(0.5, 0.01, 5), ratios={"theirs": Spread(300, 2.5, 2)}, quality={"equal": 0.99}),
        Row("match", "theirs", Spread(150, None, 1), extrapolated="rows: 24 of 3025 timed"),
        Row("match", "half", None, reason="this processor has no bf16 instructions"),
        Row("memory", "match | fp32", Spread(934.4, None, 1), "MiB"),
        *(
            Row(SIZES, f"ours, {side} px", Spread(side / 100, 0.1, 3), details={"side": side, "cells": side})
            for side in (112, 224)
        ),
        Row(SIZES, "half, 112 px", None, reason="none"),
        Row(STRIDES, "ours, stride 4", Spread(2, 0.1, 3), details={"cells": 3025}),
        Row(NUMBERS, "20 images", Spread(0.1, 0.1, 3), details={"images": 20}),
    ]
    bars = [
        Bar("pair match vs theirs", "match", "ours", "theirs", 200),
        Bar("pair match vs theirs, hard", "match", "ours", "theirs", 500),
        Bar("pair match in bf16", "match", "half", "theirs", 350),
        Bar("bounded", "match", "ours", "theirs", 1.1, at_most=True),
    ]
    return Report(rows, [judge(bar, rows) for bar in bars], FACTS, ["The weights are untrained."])


def plain() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(document(report())))
    return data


def test_results_are_written_and_fit_the_schema(tmp_path: Path) -> None:
    write_report(tmp_path, report())
    data = json.loads((tmp_path / "results.json").read_text())
    validate(data)
    assert data == plain()
    assert [bar["met"] for bar in data["bars"]] == [True, False, None, False]
    assert data["rows"][2]["reason"] == "this processor has no bf16 instructions"
    assert (tmp_path / TABLE).read_text() == markdown(report())


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (["rows", 0, "value", "median"], "fast", "rows/0/value"),
        (["rows", 0, "value"], None, "rows/0"),  # not run, and no reason
        (["rows", 1, "reason"], "none", "rows/1"),  # run, and a reason why not
        (["rows", 0, "unit"], "hours", "rows/0/unit"),
        (["rows", 0, "ratios", "theirs", "rounds"], 0, "rows/0/ratios/theirs"),
        (["bars", 2, "reason"], None, "bars/2"),
        (["bars", 0, "measured"], None, "bars/0"),  # met, and nothing measured
        (["machine", "cores"], 0, "machine/cores"),
        (["rows"], [], "rows"),
        (["surprise"], 1, "the document"),
    ],
)
def test_the_schema_refuses(path: list[Any], value: Any, place: str) -> None:
    data = copy.deepcopy(plain())
    holder: Any = data
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(InputError, match=f"do not fit their schema: {place}"):
        validate(data)


def test_the_schema_refuses_what_is_missing() -> None:
    data = plain()
    del data["machine"]
    with pytest.raises(InputError, match="'machine' is a required property"):
        validate(data)


def test_bar_lines() -> None:
    met, missed, absent, bounded = (bar_cells(verdict) for verdict in report().verdicts)
    assert met == ["✓", "pair match vs theirs", "≥ 200 ×", "300 × (extrapolated)", "± 2.5 ×"]
    assert missed[0] == "✗" and bounded[:3] == ["✗", "bounded", "≤ 1.1 ×"]
    assert absent[0] == "–" and absent[3] == "not run" and "no bf16 instructions" in absent[4]


def test_row_lines() -> None:
    ours, theirs, half, memory, *_ = (row_cells(row) for row in report().rows)
    assert ours[:4] == ["ours", "500 ms", "± 10 ms", "5"] and ours[4] == "theirs: 300" and ours[5] == "equal 0.99"
    assert theirs[1] == "150 s *" and theirs[2] == "one round"
    assert half[1] == "not run: this processor has no bf16 instructions"
    assert memory[1] == "934 MiB"


def test_markdown_names_everything() -> None:
    text = markdown(report())
    for expected in (
        "2 cores of a processor; 2025-01-02", "The weights are untrained.", "## Match", "## Scaling: image size",
        "theirs: extrapolated (rows: 24 of 3025 timed)", "match \\| fp32", "numpy 2.0",
    ):  # fmt: skip
        assert expected in text


def test_plots(tmp_path: Path) -> None:
    draw(tmp_path, report())
    for name in ("bars.png", "scaling.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.shape[1] > 600 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
