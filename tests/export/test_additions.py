"""Adding to a bundle that is there: damage is mended in place, and nothing is left lying about."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_gpu import FakeGpu
from safetensors.torch import save_file

from facetrt.engine import Engine
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import LinearHead
from facetrt.engine.tasks.discovery.heads import write_head
from facetrt.export import kernels
from facetrt.export.additions import add_found_head, add_kernels
from facetrt.export.plans import PlanOptions, build_plan
from facetrt.kernels.errors import BackendError, BundleError, InputError

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


def test_a_head_is_added_from_any_file(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    weight, bias = np.linspace(-1, 1, 48, dtype=np.float32), np.array([0.25], np.float32)
    head = LinearHead("key@2", [float(value) for value in weight], 0.25, "trained")
    write_head(head, tmp_path / "head.json")
    tensors = {"weight": torch.from_numpy(weight).reshape(1, 48, 1, 1), "bias": torch.from_numpy(bias)}
    torch.save({"decoder": tensors}, tmp_path / "decoder_weights.pt")
    np.savez(tmp_path / "head.npz", weight=weight, bias=bias)
    save_file(tensors, tmp_path / "head.safetensors")
    for name in ("head.json", "decoder_weights.pt", "head.npz", "head.safetensors"):
        added = add_found_head(folder, tmp_path / name)
        kept = Bundle.open(folder).manifest.found_head
        assert kept == added and (kept.facet, kept.weight, kept.bias) == (head.facet, head.weight, head.bias)
    with Engine.open(folder) as engine:
        assert engine.discovery("found").name == "key@2"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": np.zeros(47, "f4"), "bias": np.zeros(1, "f4")}, "47, 1 numbers: expected FOUND's head, 48 weights"),
        ({"weight": np.zeros(48, "f4")}, "expected FOUND's head"),
        ({"weight": np.full(48, np.nan, "f4"), "bias": np.zeros(1, "f4")}, "finite"),
    ],
)
def test_what_is_no_head_leaves_the_bundle_as_it_was(
    tiny_bundle: Path, tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "head.npz", **tensors)
    before = (tiny_bundle / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=message):
        add_found_head(tiny_bundle, tmp_path / "head.npz")
    assert (tiny_bundle / "manifest.json").read_bytes() == before


def test_heads_for_other_facets_and_the_shipped_bundle_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    write_head(LinearHead("value@0", [1.0] * 48, 0.0, "trained"), tmp_path / "head.json")
    with pytest.raises(InputError, match="value@0 was not exported"):
        add_found_head(tiny_bundle, tmp_path / "head.json")
    with pytest.raises(InputError, match="is not changed"):
        add_found_head("builtin", tmp_path / "head.json")
