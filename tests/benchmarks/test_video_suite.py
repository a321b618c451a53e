"""The video suite at its quick sizes; the figures mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from facetrt.benchmarks.cpu.child import resident_mib, run_job
from facetrt.benchmarks.cpu.suite import Report
from facetrt.benchmarks.report import bar_cells, validate, write_report
from facetrt.benchmarks.results import Row, Spread, judge
from facetrt.benchmarks.video_suite import (
    BARE,
    QUICK_VIDEO,
    SLOW,
    STREAMED,
    WAITING,
    VideoBench,
    VideoSizes,
    bars,
    measure_waiting,
    run_video,
)
from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.cli.main import program
from facetrt.engine.features.features import Features
from facetrt.engine.video.stream import Stream
from facetrt.kernels.errors import InputError


@pytest.fixture(scope="module")
def bench() -> Iterator[VideoBench]:
    with VideoBench("builtin", QUICK_VIDEO, rounds=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(bench: VideoBench) -> Report:
    return run_video(bench)


@pytest.fixture(scope="module")
def rows(report: Report) -> dict[tuple[str, str], Row]:
    return {(row.section, row.name): row for row in report.rows}


def test_every_row_is_measured(report: Report) -> None:
    assert [row.name for row in report.rows if row.reason] == []


def test_a_stream_gives_the_encoders_features(rows: dict[tuple[str, str], Row]) -> None:
    assert rows["stream", STREAMED].quality == rows["latency", "p50"].quality == {"equal features": 1}
    assert set(rows["stream", BARE].ratios) == {STREAMED}


def test_tasks_are_right_as_well_as_timed(rows: dict[tuple[str, str], Row]) -> None:
    track, mask = (rows["tasks, 64 px", name] for name in ("track", "mask"))
    assert track.quality["visible"] > 0.5 and track.quality["within half a stride"] > 0.8
    assert mask.quality["J"] > 0.7
    assert all(row.details["frames/s"] > 0 and set(row.ratios) >= {BARE} for row in (track, mask))


def test_only_the_newest_frame_waits(rows: dict[tuple[str, str], Row]) -> None:
    row = rows[WAITING, SLOW]
    assert row.value == Spread(1, None, 1) and row.unit == "frames"
    assert row.quality == {"results that are of the newest frame": 1}
    assert row.details == {"frames put": 16, "dropped": 14, "left over": 0}


def test_a_queue_would_be_seen(bench: VideoBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facetrt.engine.video.stream.FRAMES_AHEAD", 2 * QUICK_VIDEO.burst)
    monkeypatch.setattr(bench.engine, "stream", lambda load_size, policy: _blocking(bench, load_size))
    (row,) = measure_waiting(bench)
    assert row.value is not None and row.value.median > 1
    assert row.quality["results that are of the newest frame"] < 1


def _blocking(bench: VideoBench, load_size: int) -> Stream[Features]:
    return type(bench.engine).stream(bench.engine, load_size=load_size, policy="block")


def test_memory_is_that_of_the_end(rows: dict[tuple[str, str], Row]) -> None:
    warm, end = (rows["memory", f"after {count} frames"] for count in (40, 240))
    assert warm.value is not None and end.value is not None and warm.unit == "MiB"
    assert warm.ratios["after 240 frames"].median == pytest.approx(end.value.median / warm.value.median)
    assert 20 < warm.value.median < 2000


def test_the_memory_job_sees_growth() -> None:
    before = resident_mib()
    ballast = np.ones(100 << 17)  # 100 MiB
    assert resident_mib() - before == pytest.approx(100, abs=20) and ballast[0] == 1
    found = run_job("stream", bundle="builtin", side=32, warm=10, frames=40)
    assert found["frames"] == 40 and found["end_mib"] > 0
    assert 0 < found["warm_mib"] <= 1.01 * found["peak_mib"]  # pages are counted in different ways


def test_bars_name_rows_that_exist(rows: dict[tuple[str, str], Row]) -> None:
    for bar in bars(QUICK_VIDEO):
        row = rows[bar.section, bar.row]
        assert bar.baseline is None or bar.baseline in row.ratios
        assert judge(bar, [row]).measured is not None


def test_the_bars_are_the_targets() -> None:
    found = {(bar.section, bar.baseline): bar for bar in bars(VideoSizes())}
    assert {name: bar.wanted for name, bar in found.items()} == {
        ("stream", "stream"): 1.05,
        ("latency", "p99"): 1.5,
        ("frames that wait", None): 1,
        ("memory", "after 10,000 frames"): 1.01,
        ("memory with all heads", "after 10,000 frames"): 1.01,
        ("tasks, 224 px", "track"): 1.1,
        ("tasks, 224 px", "mask"): 1.1,
        ("tasks, 224 px", "cosegment"): 1.1,
    }
    assert all(bar.at_most for bar in found.values())
    verdict = judge(found["frames that wait", None], [Row(WAITING, SLOW, Spread(2, None, 1), "frames")])
    assert (verdict.mark, bar_cells(verdict)[2:4]) == ("✗", ["≤ 1 frames", "2 frames"])


def test_the_report_fits_the_schema(tmp_path: Path, report: Report) -> None:
    write_report(tmp_path, report)
    data = json.loads((tmp_path / "results.json").read_text())
    validate(data)
    assert data["suite"] == "video" and data["model"] == "builtin" and data["sizes"]["many"] == 240
    assert all(bar["met"] is None for bar in data["bars"])  # quick sizes are not the bars'
    assert "after 240 frames" in (tmp_path / "table.md").read_text()


def test_the_command_runs_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    seen: list[tuple[object, object, int]] = []

    def measured(bench: VideoBench) -> Report:
        seen.append((bench.bundle, bench.sizes, bench.rounds))
        return report

    monkeypatch.setattr("facetrt.benchmarks.video_suite.run_video", measured)
    arguments = ["bench", "--suite", "video", "--quick", "--rounds", "2", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(program(), arguments, catch_exceptions=False)
    assert result.exit_code == 0 and seen == [("builtin", QUICK_VIDEO, 2)]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"results.json", "table.md", "bars.png"}
    for option in ("--weights", "--against"):
        with pytest.raises(InputError, match="leave them out"):
            CliRunner().invoke(program(), [*arguments, "--force", option, str(tmp_path)], catch_exceptions=False)


def test_a_bundle_without_what_the_suite_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "dynamic", False)
    with pytest.raises(InputError, match="any image size"):
        VideoBench("builtin")
