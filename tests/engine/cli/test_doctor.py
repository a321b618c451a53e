from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from facetrt.engine.cli import doctor as command
from facetrt.engine.cli.main import program
from facetrt.engine.doctor.diagnosis import BundleReport, Diagnosis, Driver, Finding, Gpu, State

runner = CliRunner()


def diagnosis(state: State = State.WORKS, **changes: Any) -> Diagnosis:
    known: dict[str, Any] = {
        "packages": {"python": "3.11", "tensorrt": "11.4.0"},
        "processor": "a processor",
        "flags": ("avx2",),
        "driver": Driver("580.65.06", (13, 0), (Gpu("NVIDIA H200", (9, 0), 141 << 30),)),
        "clashes": (),
        "backends": (Finding("tensorrt", state, "no pycuda", "pip install 'facetrt[gpu]'"),),
        "kernels": Finding("device kernels", State.NOT_HERE, "none"),
    }
    return Diagnosis(**known | changes)


def invoke(monkeypatch: pytest.MonkeyPatch, found: Diagnosis, *options: str) -> Any:
    monkeypatch.setattr(command, "diagnose", lambda bundle: found)
    return runner.invoke(program(), ["doctor", *options], catch_exceptions=False)


def test_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, diagnosis())
    assert result.exit_code == 0
    for expected in (
        "✓ │ tensorrt",
        "– │ device kernels",
        "NVIDIA H200, sm_90, 141.0 GiB",
        "580.65.06",
        "13.0",
        "[avx2]",
    ):
        assert expected in result.stdout


def test_what_is_missing_comes_with_its_remedy_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, diagnosis(State.MISSING))
    assert result.exit_code == 1 and "✗ │ tensorrt" in result.stdout
    assert "to mend: pip install 'facetrt[gpu]'" in result.stdout


def test_a_bundle_that_cannot_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Finding("plan one", State.MISSING, "TensorRT 10.16", "facetrt export b --target tensorrt")
    kernels = Finding("device kernels", State.WORKS, "for sm_90")
    absent = Finding("tensorrt", State.MISSING, "no plan fits", plan.remedy)
    report = BundleReport("b", "dino_vits8", "fp16", ("sm_90",), (absent,), kernels, (plan,))
    result = invoke(monkeypatch, diagnosis(bundle=report), "--bundle", "b")
    assert result.exit_code == 1 and "b: dino_vits8, fp16" in result.stdout
    assert result.stdout.count("to mend: facetrt export b --target tensorrt") == 1


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch, diagnosis(driver=Driver(problem="no NVIDIA driver")), "--json")
    data = json.loads(result.stdout)
    assert data["command"] == "doctor" and data["runs"] is True
    assert data["backends"][0]["state"] == "works" and data["driver"]["problem"] == "no NVIDIA driver"
    assert invoke(monkeypatch, diagnosis(driver=Driver(problem="no NVIDIA driver"))).exit_code == 0


def test_this_machine_for_real() -> None:
    result = runner.invoke(program(), ["doctor", "--json"], catch_exceptions=False)
    assert result.exit_code == 0 and json.loads(result.stdout)["packages"]["facetrt"]
