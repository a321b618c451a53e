from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from facetrt.engine.machine.driver import driver_version


def test_the_driver_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: "580.65.06")
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert driver_version() == "580.65.06"


def test_without_its_library_the_kernel_module_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) == "/sys/module/nvidia/version")
    monkeypatch.setattr(Path, "read_text", lambda path: "570.1\n")
    assert driver_version() == "570.1"


def test_a_library_that_finds_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=no_driver))
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    assert driver_version() is None
