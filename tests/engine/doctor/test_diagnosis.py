from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from facetrt.engine.backends.run_options import BackendName
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import ENCODER, FileEntry, ParityReport, PlanRecord
from facetrt.engine.doctor import diagnosis as doctor
from facetrt.engine.doctor.diagnosis import (
    Diagnosis,
    Driver,
    Finding,
    Gpu,
    State,
    ask,
    clashes,
    diagnose,
    probes,
    read_driver,
)

H200 = {
    "cuda": [13, 0], "driver": "580.65.06",
    "gpus": [{"name": "NVIDIA H200", "capability": [9, 0], "memory": 150_000_000_000}],
}  # fmt: skip
NO_DRIVER = {"error": "no NVIDIA driver: libcuda.so.1 is not there"}
CPU_PACKAGES = {"onnxruntime": "1.31.1", "openvino": "2026.4.1"}
GPU_PACKAGES = {"onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0", "pycuda": "2026.1", "cuda-bindings": "13.5.0"}
ANSWERS: dict[str, Mapping[str, Any]] = {
    "gpu": NO_DRIVER,
    "onnxruntime": {"providers": ["CPUExecutionProvider"]},
    "onnxruntime_cuda": {"providers": ["CUDAExecutionProvider"]},
    "openvino": {"capabilities": ["BF16", "FP32"]},
    "tensorrt": {"version": "11.4.0"},
    "tensorrt_rtx": {"version": "1.7.1"},
    "pycuda": {"count": 1},
}

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this machine look like another: packages, answers of probes, flags of the processor."""

    def pretend(packages: Mapping[str, str], *, flags: tuple[str, ...] = (), **answers: Any) -> None:
        known = ANSWERS | answers
        monkeypatch.setattr(doctor, "installed_versions", lambda names: dict(packages))
        monkeypatch.setattr(doctor, "processor_flags", lambda: set(flags))
        monkeypatch.setattr(doctor, "ask", lambda probe, *arguments: known[probe])

    return pretend


def states(findings: tuple[Finding, ...]) -> dict[str, State]:
    return {finding.name: finding.state for finding in findings}


def find(diagnosis: Diagnosis, name: str) -> Finding:
    return next(f for f in (*diagnosis.backends, diagnosis.kernels) if f.name == name)


def test_every_backend_is_looked_at(machine: Machine) -> None:
    machine(CPU_PACKAGES)
    assert {finding.name.split()[0] for finding in diagnose().backends} == set(BackendName) - {BackendName.AUTO}


def test_a_machine_without_a_gpu(machine: Machine) -> None:
    machine(CPU_PACKAGES, flags=("avx2", "avx512_bf16"))
    found = diagnose()
    assert states(found.backends) == {
        "onnxruntime cpu": State.WORKS, "openvino fp32": State.WORKS, "openvino bf16": State.WORKS,
        "onnxruntime cuda": State.NOT_HERE, "tensorrt": State.NOT_HERE, "tensorrt-rtx": State.NOT_HERE,
    }  # fmt: skip
    assert found.runs and found.kernels.state is State.NOT_HERE and found.flags == ("avx2", "avx512_bf16")
    assert all(finding.remedy is None for finding in found.backends)


def test_bf16_needs_the_processor_and_openvino(machine: Machine) -> None:
    machine(CPU_PACKAGES, flags=("avx2",))
    assert find(diagnose(), "openvino bf16").state is State.NOT_HERE
    machine(CPU_PACKAGES, flags=("avx512_bf16",), openvino={"capabilities": ["FP32"]})
    assert find(diagnose(), "openvino bf16").state is State.NOT_HERE
    machine({"onnxruntime": "1"}, flags=("avx512_bf16",))
    missing = find(diagnose(), "openvino bf16")
    assert missing.state is State.MISSING and missing.remedy == "pip install 'facetrt[openvino]'"


def test_nothing_installed(machine: Machine) -> None:
    machine({})
    found = diagnose()
    assert not found.runs
    assert find(found, "onnxruntime cpu").remedy == "pip install 'facetrt[cpu]'"


def test_a_machine_with_everything(machine: Machine) -> None:
    machine(GPU_PACKAGES, gpu=H200)
    found = diagnose()
    assert found.driver == Driver("580.65.06", (13, 0), (Gpu("NVIDIA H200", (9, 0), 150_000_000_000),))
    assert found.driver.gpus[0].arch == "sm_90"
    for name in ("onnxruntime cpu", "onnxruntime cuda", "tensorrt", "device kernels"):
        assert find(found, name).state is State.WORKS
    assert find(found, "openvino fp32").state is State.MISSING and found.clashes == ()


@pytest.mark.parametrize(
    ("package", "broken"),
    [
        ("onnxruntime-gpu", {"onnxruntime cuda"}),
        ("tensorrt", {"tensorrt"}),
        ("pycuda", {"onnxruntime cuda", "tensorrt", "device kernels"}),
        ("cuda-bindings", {"tensorrt"}),
    ],
)
def test_each_missing_package_is_named(machine: Machine, package: str, broken: set[str]) -> None:
    machine({name: version for name, version in GPU_PACKAGES.items() if name != package}, gpu=H200)
    found = diagnose()
    others = [name for name in doctor.GPU_NEEDS if name != "tensorrt-rtx"]  # which does not run on an H200
    lacking = {name for name in others if find(found, name).state is State.MISSING}
    assert lacking == broken
    for name in broken:
        assert find(found, name).detail == f"no {package}"
        assert find(found, name).remedy == "pip install 'facetrt[gpu]'"


def test_a_broken_library_breaks_only_its_backend(machine: Machine) -> None:
    machine(GPU_PACKAGES, gpu=H200, onnxruntime_cuda={"error": "it crashed (signal 11)"})
    found = diagnose()
    assert find(found, "onnxruntime cuda").detail == "it crashed (signal 11)"
    assert find(found, "onnxruntime cuda").remedy == "pip install 'facetrt[gpu]' --force-reinstall"
    assert find(found, "onnxruntime cpu").state is find(found, "tensorrt").state is State.WORKS


def test_gpu_packages_without_a_driver_or_a_gpu(machine: Machine) -> None:
    machine(GPU_PACKAGES)
    assert "nvidia.com/drivers" in str(find(diagnose(), "tensorrt").remedy)
    machine(GPU_PACKAGES, gpu={"cuda": [13, 0], "driver": None, "error": "the driver sees no GPU"})
    hidden = find(diagnose(), "tensorrt")
    assert hidden.detail == "the driver sees no GPU" and "CUDA_VISIBLE_DEVICES" in str(hidden.remedy)


def test_clashes() -> None:
    assert clashes(CPU_PACKAGES) == clashes(GPU_PACKAGES) == ()
    both = clashes(CPU_PACKAGES | GPU_PACKAGES | {"faiss-cpu": "1", "faiss-gpu-cu12": "1"})
    assert [finding.name for finding in both] == ["onnxruntime and onnxruntime-gpu", "faiss-cpu and faiss-gpu-cu12"]
    assert both[0].remedy == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'facetrt[gpu]'"


def bundle_with(source: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """Lets :func:`diagnose` open a bundle as it would be with plans and kernels."""
    opened = Bundle.open(source)
    listed = {name: FileEntry(1, "0" * 64) for name in changes.pop("files", ())}
    manifest = dataclasses.replace(opened.manifest, files=opened.manifest.files | listed, **changes)
    changed = dataclasses.replace(opened, manifest=manifest)
    monkeypatch.setattr(doctor.Bundle, "open", staticmethod(lambda path: changed))
    return str(source)


def plan(bundle: Path, **changes: Any) -> PlanRecord:
    sha = Bundle.open(bundle).manifest.files[ENCODER].sha256
    profile = {"images": [[1, 32, 32, 3], [1, 64, 64, 3], [16, 96, 96, 3]]}
    known = PlanRecord(
        sha, "tensorrt", "11.4.0", ["sm_90"], profile, [], "fp32", ParityReport([], {}), 10, 3, 3, [1 << 20]
    )
    return dataclasses.replace(known, **changes)


def test_a_bundle_without_anything_for_a_gpu(machine: Machine, tiny_bundle: Path) -> None:
    machine(CPU_PACKAGES | GPU_PACKAGES, gpu=H200)
    report = diagnose(tiny_bundle).bundle
    assert report is not None and report.precision == "fp32" and report.architectures == ()
    tensorrt = next(f for f in report.backends if f.name == "tensorrt")
    assert tensorrt.state is State.MISSING and tensorrt.remedy == f"facetrt export {tiny_bundle} --target tensorrt"
    assert report.kernels.remedy == f"facetrt export {tiny_bundle} --kernels sm_90"
    machine(CPU_PACKAGES)
    report = diagnose(tiny_bundle).bundle
    assert report is not None and report.kernels.state is State.NOT_HERE


def test_a_gpu_that_there_are_no_kernels_for(machine: Machine, tiny_bundle: Path) -> None:
    """No command is named: ``export --kernels`` would refuse the architecture."""
    gpu = {"name": "NVIDIA B300", "capability": [10, 3], "memory": 1 << 38}
    machine(CPU_PACKAGES | GPU_PACKAGES, gpu={**H200, "gpus": [gpu]})
    found = diagnose(tiny_bundle)
    assert found.bundle is not None
    for finding in (found.kernels, found.bundle.kernels):
        assert finding.state is State.NOT_HERE and finding.remedy is None
        assert "this version of facetrt has no kernels for sm_103: use kernels host" in finding.detail
    assert find(found, "onnxruntime cuda").state is State.WORKS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"version": "10.16.1"}, "here version is 11.4.0"),
        ({"version": "11.2.0", "flags": ["version_compatible"]}, None),
        ({"architectures": ["sm_89"]}, "here architecture is sm_90"),
        ({"architectures": ["sm_89"], "flags": ["hardware_compatible"]}, None),
        ({"encoder_sha256": "0" * 64}, "here encoder_sha256 is"),
    ],
)
def test_plans(
    machine: Machine,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str | None,
) -> None:
    files = ["plans/one.plan", "kernels/sm_80/kernels.json", "kernels/sm_90/kernels.json"]
    plans = {"plans/one.plan": plan(tiny_bundle, **changes)}
    path = bundle_with(tiny_bundle, monkeypatch, files=files, plans=plans)
    machine(GPU_PACKAGES, gpu=H200)
    report = diagnose(path).bundle
    assert report is not None and report.architectures == ("sm_80", "sm_90")
    assert report.kernels.state is State.WORKS
    (found,) = report.plans
    tensorrt = next(f for f in report.backends if f.name == "tensorrt")
    if words is None:
        assert found.state is tensorrt.state is State.WORKS and "up to 16 images" in found.detail
    else:
        assert found.state is tensorrt.state is State.MISSING and words in found.detail


def test_tensorrt_for_rtx_on_a_gpu_that_it_runs_on_and_on_one_that_it_does_not(
    machine: Machine, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = plan(tiny_bundle, builder="tensorrt-rtx", version="1.7.1", architectures=["sm_80", "sm_89"])
    path = bundle_with(tiny_bundle, monkeypatch, files=["plans/rtx.plan"], plans={"plans/rtx.plan": rtx})
    packages = {name: v for name, v in GPU_PACKAGES.items() if name != "tensorrt"} | {doctor.RTX_PACKAGE: "1.7.1"}
    card = {"name": "NVIDIA RTX 4090", "capability": [8, 9], "memory": 1 << 34}
    machine(packages, gpu={**H200, "gpus": [card]})
    found = diagnose(path)
    assert found.bundle is not None and find(found, "tensorrt-rtx").state is State.WORKS
    assert states(found.bundle.backends)["tensorrt-rtx"] is found.bundle.plans[0].state is State.WORKS
    assert states(found.bundle.backends)["tensorrt"] is State.MISSING
    machine(packages, gpu=H200)
    found = diagnose(path)
    assert found.bundle is not None
    here = find(found, "tensorrt-rtx")
    assert here.state is State.NOT_HERE and here.detail.startswith("does not run on sm_90, but on sm_75, sm_80")
    assert found.bundle.plans[0].state is State.NOT_HERE
    machine({name: v for name, v in packages.items() if name != doctor.RTX_PACKAGE}, gpu={**H200, "gpus": [card]})
    assert find(diagnose(path), "tensorrt-rtx").remedy == "pip install 'facetrt[rtx]'"


def test_half_precision_bundles_need_the_right_backend(
    machine: Machine, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle_with(tiny_bundle, monkeypatch, precision="bf16")
    machine(CPU_PACKAGES, flags=("avx512_bf16",))
    found = diagnose(path)
    assert found.bundle is not None and not found.runs
    assert next(f for f in found.bundle.backends if f.name == "onnxruntime cpu").detail == "does not run bf16 bundles"
    machine(GPU_PACKAGES, gpu=H200)
    assert diagnose(path).runs  # by onnxruntime cuda


def test_probes_answer_in_a_process_of_their_own() -> None:
    assert "CPUExecutionProvider" in ask("onnxruntime")["providers"]
    driver = read_driver(ask("gpu"))
    assert bool(driver.gpus) == (driver.problem is None)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed (signal 11)"),
        ("raise SystemExit(3)", "it ended with exit code 3"),
        ("import time; time.sleep(60)", "no answer within 0.5 seconds"),
        ("print('noise'); raise ImportError('libcudart.so.12: cannot open\\nmore')", "ImportError: libcudart.so.12"),
    ],
)
def test_a_library_that_fails_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: str) -> None:
    (tmp_path / "onnxruntime.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.5 if "sleep" in code else 30)
    assert str(ask("onnxruntime")["error"]).startswith(error)


def test_an_unknown_probe_is_an_answer_too() -> None:
    done = subprocess.run([sys.executable, "-P", probes.__file__, "magic"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '{"error": "KeyError: \'magic\'"}'
