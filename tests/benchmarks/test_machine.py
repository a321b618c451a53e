from __future__ import annotations

import platform

import pytest

from facetrt.benchmarks import machine


def test_machine_and_versions() -> None:
    found = machine.machine()
    assert found["cpu"] and found["cores"] >= 1 and found["memory_gib"] > 0.1
    assert set(found["flags"]) <= machine.cpu_flags()
    assert machine.versions()["python"] == platform.python_version() and "numpy" in machine.versions()


@pytest.mark.parametrize(("flags", "expected"), [({"avx2", "avx512f"}, False), ({"avx512_bf16"}, True)])
def test_bf16(monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: bool) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    assert machine.has_bf16() is expected


def test_no_commit_outside_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    assert machine.commit() is None
    answers = {"ls-files": "machine.py", "rev-parse": "0123456789ab", "status": " M engine/engine.py"}
    monkeypatch.setattr(machine, "_git", lambda *arguments: answers[arguments[0]])
    assert machine.commit() == "0123456789ab+"
