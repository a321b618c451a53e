"""A short run of the fuzzer, and that it finds what it is for."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest

from facetrt.kernels.errors import InputError

FUZZ = Path(__file__).with_name("fuzz.py")


def test_damaged_files_are_read_or_refused() -> None:
    done = subprocess.run([sys.executable, FUZZ, "--runs", "80"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "80 runs" in done.stdout and done.stdout.rstrip().endswith("0 findings")


@pytest.mark.parametrize(
    ("content", "found"),
    [("raise KeyError('a')", "KeyError"), ("os._exit(3)", "ended with code 3"), ("time.sleep(60)", "hangs")],
)
def test_what_is_wrong_is_found(content: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"import os, sys, time\nfor line in sys.stdin:\n    {content}\n"
    if found == "KeyError":
        case = fuzz.Case(lambda folder: None, lambda folder: exec(content))
        assert found in str(fuzz.complaint(case, tmp_path))
        return
    monkeypatch.setattr(fuzz, "TIMEOUT", 5.0)
    worker = fuzz.Worker([])
    worker._command = [sys.executable, "-c", program]
    start = time.monotonic()
    assert found in worker.do(0)["wrong"] and time.monotonic() - start < 30
    worker.close()


def test_errors_of_ours_must_be_one_printable_line(tmp_path: Path) -> None:
    class Raw(InputError):
        def __str__(self) -> str:
            return "a\nb"

    def read(folder: Path) -> None:
        raise Raw

    assert "one printable line" in str(fuzz.complaint(fuzz.Case(lambda folder: None, read), tmp_path))
    assert str(InputError("a\nb\x1b[31m \ud800 é")) == "a b\\x1b[31m \\ud800 é"


QUICK = (
    "labels",
    "mat",
    "spair",
    "cub",
    "celeba",
    "items",
    "model",
    "manifest",
    "kernels",
    "results",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_hundred_kinds_of_damage(name: str, tmp_path: Path) -> None:
    """In this process, where no time goes into starting one."""
    fuzz.make_seeds(tmp_path, [name])
    for run in range(100):
        wrong = fuzz.run_one(tmp_path, [name], 0, run)[1]
        assert wrong is None, f"run {run}: {wrong}"
