"""ViT-S/8 with the golden weights on a real GPU: fp16 and bf16, TensorRT and ONNX Runtime, and fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import deterministic_weights

from facetrt.engine import Engine
from facetrt.engine.doctor.diagnosis import ask, read_driver
from facetrt.export.additions import add_kernels
from facetrt.export.export_options import ExportOptions, GraphPrecision
from facetrt.export.exporting import export_bundle
from facetrt.export.models import find_model
from facetrt.export.plans import build_plan

MODEL = "dino_vits8"


@pytest.fixture(scope="session")
def gpu() -> str:
    """Architecture of the GPU; without one the test is skipped, which ``run_gpu.sh`` counts as a failure."""
    driver = read_driver(ask("gpu"))
    if not driver.gpus:
        pytest.skip(f"no GPU: {driver.problem}")
    return driver.gpus[0].arch


@pytest.fixture(scope="session")
def weights(work: Path) -> Path:
    path = work / "gpu_weights.npz"
    np.savez(path, **deterministic_weights(find_model(MODEL)))
    return path


@pytest.fixture(scope="session")
def exact(gpu: str, work: Path, weights: Path) -> Iterator[Engine]:
    """In fp32 on the CPU."""
    export_bundle(MODEL, work / "exact", weights=weights)
    with Engine.open(work / "exact", backend="onnxruntime") as engine:
        yield engine


@pytest.fixture(scope="session", params=["fp16", "bf16"])
def bundle(request: pytest.FixtureRequest, gpu: str, work: Path, weights: Path) -> Path:
    """With kernels and a plan for this GPU."""
    folder = work / f"gpu_{request.param}"
    export_bundle(MODEL, folder, ExportOptions(precision=GraphPrecision(request.param)), weights=weights)
    add_kernels(folder, [gpu])
    build_plan(folder)
    return folder


@pytest.fixture(scope="session", params=["tensorrt", "onnxruntime"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def engine(bundle: Path, backend: str) -> Iterator[Engine]:
    with Engine.open(bundle, device="cuda", backend=backend) as opened:
        yield opened
