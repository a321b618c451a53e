"""A machine with a GPU and everything installed, all of it fakes; and a bundle with a plan for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fakes_cuda
import fakes_onnxruntime
import fakes_tensorrt
import pytest

from facetrt.engine.backends import onnxruntime_cuda
from facetrt.engine.backends.flavours import RTX, TENSORRT, Flavour
from facetrt.engine.bundle.bundle import read_manifest
from facetrt.engine.bundle.manifest import KERNELS
from facetrt.export.mending import file_entry, write_manifest
from facetrt.export.plans import PlanOptions, build_plan
from facetrt.kernels.device.catalogue import programs

SIZES = PlanOptions(opt_batch=2, max_batch=4, min_size=(8, 8), opt_size=(32, 40), max_size=(64, 64), allow_unfused=True)


@dataclass
class FakeGpu:
    """The fakes, for tests to look at and to break."""

    gpu: fakes_cuda.Gpu
    tensorrt: Any
    onnxruntime: Any


def install(
    monkeypatch: pytest.MonkeyPatch, *, tensorrt: str = "11.4.0.106", rtx: bool = False, **options: Any
) -> FakeGpu:
    """Put the fakes in place for one test; ``rtx`` for TensorRT for RTX in place of TensorRT."""
    gpu = fakes_cuda.install(monkeypatch, **options)
    library = fakes_onnxruntime.make(gpu)
    monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: library)
    module: ModuleType = fakes_tensorrt.install(monkeypatch, gpu, version="1.7.1.116" if rtx else tensorrt, rtx=rtx)
    return FakeGpu(gpu, module, library)


def plan_bundle(source: Path, folder: Path, flavour: Flavour = TENSORRT, sizes: PlanOptions = SIZES) -> Path:
    """A copy of a bundle, with a plan."""
    shutil.copytree(source, folder)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, rtx=flavour is RTX)
        build_plan(folder, sizes, flavour=flavour)
    return folder


def add_kernels(folder: Path, machine: FakeGpu) -> Path:
    """Put fake cubins of all programs into a bundle, for the GPU of ``machine``."""
    there = folder / KERNELS / "sm_{}{}".format(*machine.gpu.capability)
    there.mkdir(parents=True)
    for name, content in machine.gpu.compiled(programs().values()).items():
        (there / name).write_bytes(content)
    manifest = read_manifest(folder)
    files = {path.relative_to(folder).as_posix(): file_entry(path) for path in there.iterdir()}
    write_manifest(folder, replace(manifest, files={**manifest.files, **files}))
    return folder
