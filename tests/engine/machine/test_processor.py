from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

from facetrt.engine.machine.processor import cpu_field, installed_versions, processor_flags

X86 = "processor\t: 0\nmodel name\t: Some: Processor\nflags\t\t: fpu avx2\nprocessor\t: 1\nflags\t\t: other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


@pytest.mark.parametrize(("text", "flags"), [(X86, {"fpu", "avx2"}), (ARM, {"fp", "asimd", "bf16"}), ("", None)])
def test_flags_are_the_first_processors(text: str, flags: set[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path, **options: text)
    assert processor_flags() == flags


def test_a_field_may_hold_a_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path, **options: X86)
    assert cpu_field("model name") == "Some: Processor"


def test_systems_without_that_file_do_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path, **options: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert processor_flags() is None and cpu_field("model name") == ""


def test_packages_that_are_not_installed_are_left_out() -> None:
    found = installed_versions(["numpy", "no-such-package-anywhere"])
    assert found == {"python": platform.python_version(), "numpy": np.__version__}
