"""Adding to a bundle that is there: damage is mended in place, and nothing is left lying about."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers_gpu import FakeGpu

from facetrt.engine.bundle.bundle import Bundle
from facetrt.export import kernels
from facetrt.export.additions import add_kernels
from facetrt.export.plans import PlanOptions, build_plan
from facetrt.kernels.errors import BackendError, BundleError

OPTIONS = PlanOptions(allow_unfused=True, opt_batch=1, max_batch=1, min_size=(8, 8), opt_size=(8, 8), max_size=(16, 16))
OTHER = PlanOptions(allow_unfused=True, opt_batch=1, max_batch=1, min_size=(8, 8), opt_size=(8, 8), max_size=(12, 12))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that kernels can be added to in no time."""

    def compile_kernels(folder: Path, architectures: Sequence[str], report: Callable[[str], None]) -> None:
        for name in architectures:
            there = folder / "kernels" / name
            there.mkdir(parents=True)
            (there / "kernels.json").write_text(f"index of {name}")
            (there / "a.cubin").write_text(f"code for {name}")

    monkeypatch.setattr(kernels, "compile_kernels", compile_kernels)
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_kernels_are_added_and_nothing_else(bundle: Path) -> None:
    before = contents(bundle)
    assert add_kernels(bundle, ["sm_90"]) == ["kernels/sm_90/a.cubin", "kernels/sm_90/kernels.json"]
    added = ["kernels", "kernels/sm_90", "kernels/sm_90/a.cubin", "kernels/sm_90/kernels.json"]
    assert contents(bundle) == sorted(before + added)
    assert Bundle.open(bundle).kernel_architectures() == ["sm_90"]


def test_a_failure_leaves_no_empty_folder(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise BackendError("no kernel compiles")

    before = contents(bundle)
    monkeypatch.setattr(kernels, "compile_kernels", fails)
    with pytest.raises(BackendError, match="no kernel compiles"):
        add_kernels(bundle, ["sm_90"])
    assert contents(bundle) == before


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: shutil.rmtree(path.parent)])
def test_damaged_kernels_are_compiled_again(bundle: Path, damage: Callable[[Path], None]) -> None:
    add_kernels(bundle, ["sm_80", "sm_90"])
    damage(bundle / "kernels" / "sm_90" / "a.cubin")
    with pytest.raises(BundleError, match="--kernels sm_90'"):
        Bundle.open(bundle)
    stages: list[str] = []
    add_kernels(bundle, ["sm_90"], stages.append)
    opened = Bundle.open(bundle)
    assert opened.kernel_architectures() == ["sm_80", "sm_90"] and stages == []
    assert opened.read("kernels/sm_90/a.cubin") == b"code for sm_90"


def test_what_is_damaged_and_not_replaced_is_taken_out_and_told(bundle: Path, fake_gpu: FakeGpu) -> None:
    add_kernels(bundle, ["sm_80", "sm_90"])
    name, _ = build_plan(bundle, OPTIONS)
    truncate(bundle / name)
    truncate(bundle / "kernels" / "sm_80" / "kernels.json")
    stages: list[str] = []
    add_kernels(bundle, ["sm_90"], stages.append)
    opened = Bundle.open(bundle)
    assert opened.kernel_architectures() == ["sm_90"] and opened.manifest.plans == {}
    assert len(stages) == 2
    assert any(stage.startswith("kernels/sm_80 is taken out") and "--kernels sm_80'" in stage for stage in stages)
    assert any(stage.startswith(f"{name} is taken out") and "--target tensorrt'" in stage for stage in stages)


def test_building_a_plan_mends_plans(bundle: Path, fake_gpu: FakeGpu) -> None:
    kept, damaged = build_plan(bundle, OPTIONS)[0], build_plan(bundle, OTHER)[0]
    add_kernels(bundle, ["sm_90"])
    truncate(bundle / damaged)
    (bundle / "kernels" / "sm_90" / "a.cubin").unlink()
    with pytest.raises(BundleError, match=r"--target tensorrt'|--kernels sm_90'"):
        Bundle.open(bundle)
    assert build_plan(bundle, OTHER)[0] == damaged
    assert set(Bundle.open(bundle).manifest.plans) == {kept, damaged}
    (bundle / damaged).unlink()
    build_plan(bundle, OPTIONS)  # there already, and nothing is built
    assert set(Bundle.open(bundle).manifest.plans) == {kept}


def test_remains_of_dead_builds_go_and_others_stay(bundle: Path) -> None:
    add_kernels(bundle, ["sm_90"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    remains = {pid: bundle / "kernels" / f".build.facetrt-{socket.gethostname()}-{pid}-x.tmp" for pid in (dead.pid, 1)}
    for folder in remains.values():
        folder.mkdir()
        (folder / "half.cubin").write_bytes(b"half")
    add_kernels(bundle, ["sm_80"])
    assert [folder.exists() for folder in remains.values()] == [False, True]
    assert Bundle.open(bundle).kernel_architectures() == ["sm_80", "sm_90"]
