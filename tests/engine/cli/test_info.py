from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_gpu import FakeGpu, add_kernels
from typer.testing import CliRunner

from facetrt.engine.bundle.manifest import KERNELS
from facetrt.engine.cli.app import console
from facetrt.engine.cli.main import program
from facetrt.kernels.errors import BundleError


@pytest.fixture
def bundle(planned_bundle: Path, tmp_path: Path, fake_gpu: FakeGpu) -> Path:
    """With a plan and kernels."""
    return add_kernels(Path(shutil.copytree(planned_bundle, tmp_path / "bundle")), fake_gpu)


def info(bundle: Path) -> str:
    result = CliRunner().invoke(program(), ["info", str(bundle)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_plans_and_kernels_are_listed(bundle: Path) -> None:
    shown = info(bundle)
    assert f"{KERNELS}/sm_90/" in shown and ".cubin" not in shown
    assert "TensorRT plans" in shown and "11.4.0.106" in shown


def test_a_narrow_terminal_cuts_nothing_off(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 80)
    shown = info(bundle)
    for words in (" fused", "scratch memory of a lane", "sm_90", "cls_attention", "relative", "frobenius"):
        assert words in shown
    assert "nan" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_every_file_is_checked_in_full(bundle: Path) -> None:
    cubin = next((bundle / KERNELS / "sm_90").glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[::-1])
    with pytest.raises(BundleError, match=cubin.name):
        info(bundle)
