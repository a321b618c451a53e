"""The GPU suite on a CPU: kernels in Triton's interpreter, ONNX Runtime's CPU encoder. The figures mean nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from facetrt.benchmarks import timing
from facetrt.benchmarks.baselines import strong_glue_gpu
from facetrt.benchmarks.baselines.common import load_pixels
from facetrt.benchmarks.cpu.suite import Report
from facetrt.benchmarks.cpu.task_times import GLUE, RESEARCH, mean_iou
from facetrt.benchmarks.gpu import facts as gpu_facts
from facetrt.benchmarks.gpu import kernels as gpu_kernels
from facetrt.benchmarks.gpu import video as gpu_video
from facetrt.benchmarks.gpu import workbench as gpu_workbench
from facetrt.benchmarks.gpu.encoder import COMPILED, EAGER, engine_name
from facetrt.benchmarks.gpu.suite import bars, run_gpu
from facetrt.benchmarks.gpu.task_times import decode
from facetrt.benchmarks.gpu.workbench import QUICK_GPU, CountingDevice, GpuSizes, GpuWorkbench, Target
from facetrt.benchmarks.plots import draw
from facetrt.benchmarks.report import bar_cells, markdown, validate, write_report
from facetrt.benchmarks.results import Row, Spread, judge
from facetrt.benchmarks.timing import Clock, Latencies, queued
from facetrt.benchmarks.video_suite import BARE
from facetrt.engine.cli.main import program
from facetrt.engine.doctor.diagnosis import Driver, Gpu
from facetrt.export.weights import read_state_dict
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.errors import BackendError, FacetrtError, InputError

HERE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = {"name": "NVIDIA H200", "arch": "sm_90", "memory_gib": 139.8, "driver": "580.65.06", "cuda": "13.0"}
ON_CPU = Target(HERE, (("onnxruntime", "cpu"), ("tensorrt", "cuda")), compiled=False, half=False)
OURS = engine_name("onnxruntime")


@pytest.fixture(scope="module")
def bench(work: Path, tiny_bundle: Path, tiny_weights: Path) -> Iterator[GpuWorkbench]:
    state, folder = read_state_dict(tiny_weights), work / "gpu-workbench"
    with (
        threadpool_limits(1),  # small loops of FAISS and scikit-learn, whose threads only wait for each other
        GpuWorkbench(tiny_bundle, TINY, state, folder, sizes=QUICK_GPU, rounds=1, target=ON_CPU) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def report(bench: GpuWorkbench) -> Report:
    return run_gpu(bench, GPU, notes=["untrained"])


@pytest.fixture(scope="module")
def rows(report: Report) -> dict[tuple[str, str], Row]:
    return {(row.section, row.name): row for row in report.rows}


def test_every_row_is_measured_or_says_why(report: Report) -> None:
    assert all(row.value or row.reason for row in report.rows)
    if HERE == "cpu":
        absent = {f"{row.section}: {row.name}" for row in report.rows if row.reason}
        other = {name for name in absent if engine_name("tensorrt") not in name}
        assert len(other) == 1 and "all kernels" in other.pop() and absent > other


def test_the_encoders_agree(rows: dict[tuple[str, str], Row]) -> None:
    for section in ("encoder, batch 1", "encoder, batch 2"):
        for name in (OURS, EAGER, COMPILED):
            row = rows[section, name]
            assert row.quality["mean_cosine"] > 0.99999 and row.details["images/s"] > 0
        assert set(rows[section, OURS].ratios) == {EAGER, COMPILED}
    assert ("encoder, batch 1", f"{OURS}, p99") in rows
    assert rows["encoder, batch 2", "matrix product"].details["TFLOP/s"] >= 0


def test_the_kernels_agree_with_those_of_the_cpu(rows: dict[tuple[str, str], Row]) -> None:
    expected = {
        "resize": {"largest difference": 0},
        "best_buddies, 49 × 49": {"equal neighbours": 1},
        "best_buddies, 36 × 36": {"equal neighbours": 1},
        "vote": {"equal counts": 1},
        "dense_crf": {"equal labels": 1},
        "track": {"within 0.05 cells of the CPU's": 1},
        "second eigenvectors": {"cosine": 1},
    }
    for name, quality in expected.items():
        row = rows[gpu_kernels.section(name), name]
        assert row.details["on"] == "TritonDevice"
        assert row.quality == pytest.approx(quality, abs=0.05), name
    for method in ("direct", "identity"):
        name = "best_buddies, 49 × 49"
        assert rows[gpu_kernels.section(name), f"{name}, {method}"].quality["equal neighbours"] >= 0.95
    binned = rows[gpu_kernels.section("log_bin"), "log_bin"]
    assert binned.quality["largest difference"] < 1e-3
    assert set(binned.ratios) == {gpu_kernels.glue_name("log_bin"), gpu_kernels.copy_name("log_bin")}
    assert gpu_kernels.section("k-means sweep") in {section for section, _ in rows}


def test_the_memory_of_best_buddies_is_counted(rows: dict[tuple[str, str], Row]) -> None:
    row = rows[gpu_kernels.MEMORY, "best_buddies, 36 × 36"]
    assert row.value is not None and row.unit == "MiB"
    assert row.value.median * 2**20 >= 2 * 36 * 48 * 2  # the maps themselves


def test_the_tasks_agree(rows: dict[tuple[str, str], Row]) -> None:
    for section in ("match from decoded frames", "match from files"):
        assert rows[section, OURS].quality == {"equal best buddies": 1, "equal points": 1}
        assert rows[section, RESEARCH].quality == {"equal best buddies": 1, "equal points": 1}
        assert (section, f"{OURS}, p99") in rows
    assert rows["cosegment", OURS].quality == {"mask IoU": 1, "equal clusters": 1}
    assert rows["cosegment", OURS].details["images/s"] > 0


def test_heads_of_a_video_agree(rows: dict[tuple[str, str], Row]) -> None:
    section = gpu_video.section("onnxruntime")
    row = rows[section, gpu_video.BOTH]
    assert row.quality == {"equal points": 1, "equal labels": 1} and row.details["head, ms"] > 0
    assert set(row.ratios) == {BARE, gpu_video.ON_HOST}


def test_the_report_fits_the_schema(tmp_path: Path, report: Report) -> None:
    write_report(tmp_path, report)
    data = json.loads((tmp_path / "results.json").read_text())
    validate(data)
    assert data["suite"] == "gpu" and data["machine"]["gpu"] == GPU and data["sizes"]["batch"] == 2
    assert all(bar["met"] is None for bar in data["bars"])  # quick sizes are not the bars'
    assert "NVIDIA H200" in (tmp_path / "table.md").read_text()
    draw(tmp_path, report)
    assert (tmp_path / "bars.png").is_file() and not (tmp_path / "scaling.png").exists()


def test_bars_name_rows_that_exist(rows: dict[tuple[str, str], Row]) -> None:
    known = {(section, name.replace("onnxruntime", "tensorrt")) for section, name in rows}
    for bar in bars(QUICK_GPU):
        assert (bar.section, bar.row) in known, bar.what
        assert bar.baseline is None or (bar.section, bar.baseline) in known, bar.what


def test_the_bars_are_the_targets() -> None:
    found = {bar.what: bar for bar in bars(GpuSizes())}
    assert len(found) == 11
    assert found["encoder, one image"].wanted == 1.5e-3
    assert found["best_buddies, 3025 × 3025"].wanted == 0.35e-3
    assert found["best_buddies, 12321 × 12321, memory"].unit == "MiB"
    assert 100 / found["cosegment, 100 decoded images (150 images/s)"].wanted == 150


@pytest.mark.parametrize(("seconds", "mark"), [(1.4e-3, "✓"), (1.6e-3, "✗")])
def test_a_bar_on_the_value_itself(seconds: float, mark: str) -> None:
    bar = next(bar for bar in bars(GpuSizes()) if bar.what == "encoder, one image")
    verdict = judge(bar, [Row(bar.section, bar.row, Spread(seconds, 1e-5, 5))])
    assert verdict.mark == mark
    assert bar_cells(verdict)[2:] == ["≤ 1.5 ms", f"{seconds * 1e3:.3g} ms", "± 0.01 ms"]
    assert judge(bar, []).reason == f"{bar.row} was not measured"


def test_no_gpu_is_found_out_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts, "ask", lambda probe: {"error": "no NVIDIA driver: libcuda.so.1 is not there"})
    monkeypatch.setattr(gpu_workbench, "prepare_gpu", lambda *arguments: pytest.fail("work was done"))
    with pytest.raises(FacetrtError, match="needs an NVIDIA GPU: no NVIDIA driver") as error:
        CliRunner().invoke(program(), ["bench", "--suite", "gpu", "--out", str(tmp_path / "b")], catch_exceptions=False)
    assert error.value.exit_code == 2 and not (tmp_path / "b").exists()


def test_the_original_code_is_the_cpu_suites(tmp_path: Path) -> None:
    options = ["--suite", "gpu", "--out", str(tmp_path / "b"), "--against", str(tmp_path)]
    with pytest.raises(InputError, match="timed by the CPU suite"):
        CliRunner().invoke(program(), ["bench", *options], catch_exceptions=False)


def test_the_gpu_is_described() -> None:
    driver = Driver("580.65.06", (13, 0), (Gpu("NVIDIA H200", (9, 0), 150_110_011_392),))
    assert gpu_facts.describe(driver) == GPU


def test_the_command_runs_the_suite(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bench: GpuWorkbench,
    tiny_bundle: Path,
    tiny_weights: Path,
    report: Report,
) -> None:
    monkeypatch.setattr(gpu_facts, "find_gpu", lambda: GPU)
    seen: list[Any] = []

    def measured(workbench: GpuWorkbench, gpu: dict[str, Any], *, notes: list[str]) -> Report:
        seen.append((workbench.sizes, gpu, notes))
        return report

    monkeypatch.setattr("facetrt.benchmarks.gpu.suite.run_gpu", measured)
    options = ["--suite", "gpu", "--quick", "--bundle", str(tiny_bundle), "--weights", str(tiny_weights)]
    result = CliRunner().invoke(program(), ["bench", *options, "--out", str(tmp_path / "b")], catch_exceptions=False)
    assert result.exit_code == 0 and seen == [(QUICK_GPU, GPU, [])]
    assert (tmp_path / "b" / "results.json").is_file()


def test_glue_on_the_gpu_pads_its_last_batch(bench: GpuWorkbench) -> None:
    sources, facet = [decode(path) for path in bench.paths], bench.cosegment_facet
    expected = bench.gpu_engine("onnxruntime", "cpu").cosegment(sources, load_size=bench.size, refine="none")
    found = strong_glue_gpu.cosegment(bench.glue_gpu(), sources, bench.size, facet, bench.stride, 3)
    assert len(sources) % 3 and len(found.masks) == len(sources)
    assert mean_iou(found.masks, [mask.loaded_mask for mask in expected]) == 1


def test_frames_and_files_load_alike(bench: GpuWorkbench) -> None:
    path = bench.paths[0]
    np.testing.assert_array_equal(load_pixels(decode(path), (40, 56)), load_pixels(path, (40, 56)))


def test_peak_memory_counts_what_lives_at_a_time() -> None:
    device = CountingDevice(TritonDevice(HERE))
    kept = device.zeros((100,), np.float32)
    for _ in range(3):
        device.upload(np.zeros(50, np.float32))  # gone at once
    view = kept.reshape(10, 10).rows(0, 2)
    assert device.peak == 600
    del kept
    device.empty((25,), np.float32)
    assert device.peak == 600 and view.nbytes == 80  # a view keeps the memory
    device.empty((75,), np.float32)
    assert device.peak == 700


class FakeTime:
    """Time that only passes where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(timing, "time", fake)
    return fake


@pytest.mark.parametrize(("seconds", "calls"), [(0.1, 1 + 10), (0.015, 1), (0.0, 1)])
def test_queued_calls_are_charged_each(fake_time: FakeTime, seconds: float, calls: int) -> None:
    done: list[float] = []
    clock = Clock()
    fake_time.sleep(5)  # before the call: not charged
    queued(clock, lambda: done.append(fake_time.sleep(0.01) or fake_time.now), lambda: None, seconds=seconds)
    assert len(done) == calls and clock.seconds == pytest.approx(0.01)


def test_the_wait_is_charged(fake_time: FakeTime) -> None:
    clock, pending = Clock(), [0]

    def synchronize() -> None:
        fake_time.sleep(0.01 * pending[0])
        pending[0] = 0

    queued(clock, lambda: pending.__setitem__(0, pending[0] + 1), synchronize, seconds=0.1)
    assert clock.seconds == pytest.approx(0.01)


def test_latencies_keep_their_percentile(fake_time: FakeTime) -> None:
    delays = iter([9.0] * 3 + [0.001] * 99 + [0.5])
    latencies = Latencies(lambda: fake_time.sleep(next(delays)), lambda: None, 100)
    latencies.prepare()
    clock = Clock()
    latencies.run(clock)
    (row,) = latencies.row("s", "ours")
    assert clock.seconds == pytest.approx(0.001) and row.name == "ours, p99"
    assert row.value is not None and 0.001 < row.value.median < 0.5
    assert Latencies(lambda: None, lambda: None, 1).row("s", "ours") == []


def test_a_failure_of_torch_costs_one_row(bench: GpuWorkbench) -> None:
    def fail() -> None:
        raise RuntimeError("no C compiler\nand a long story")

    with pytest.raises(BackendError, match=r"torch failed: RuntimeError: no C compiler$"):
        bench.guarded(fail)()
    with pytest.raises(InputError, match="as it is"):
        bench.guarded(lambda: (_ for _ in ()).throw(InputError("as it is")))()


def test_markdown_tells_the_gpu(report: Report) -> None:
    text = markdown(report)
    assert "sm_90, 139.8 GiB, driver 580.65.06, CUDA up to 13.0" in text and GLUE in text
