"""Shared fixtures: the tiny model's bundles, golden arrays, the device that kernels are tested on, a fake GPU.

Triton reads ``TRITON_INTERPRET`` once, when it is imported, so a process tests kernels either in its interpreter or on
a GPU; the other is skipped.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    GOLDEN_FACETS,
    HERE,
    SHARED,
    TINY,
    deterministic_weights,
    export_tiny,
    facets,
    registered,
    require_openvino,
)
from helpers_gpu import FakeGpu, install, plan_bundle
from numpy.typing import NDArray

from facetrt.engine import Engine
from facetrt.engine.backends.flavours import RTX
from facetrt.export.export_options import ExportOptions
from facetrt.export.exporting import export_bundle
from facetrt.export.models import find_model
from facetrt.kernels.device.runtime.triton_device import TritonDevice

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("facetrt")


@pytest.fixture(scope="session")
def tiny_weights(work: Path) -> Iterator[Path]:
    """Weights file of the tiny model, which is registered while tests run."""
    path = work / "tiny.npz"
    np.savez(path, **deterministic_weights(TINY))
    with registered(TINY):
        yield path


@pytest.fixture(scope="session")
def tiny_bundle(work: Path, tiny_weights: Path) -> Path:
    """Dynamic, stride 4, several facets, saliency."""
    return export_tiny(tiny_weights, work / "tiny", facets=facets("key@1,query@1,key@2,token@2"))


@pytest.fixture(scope="session")
def tiny_engine(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine.open(tiny_bundle, threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden arrays and data sets; tests that need it are skipped where it is not beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: golden arrays and evaluation sets are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def golden() -> dict[str, NDArray[Any]]:
    """A small extract of the reference method's outputs; ``NAME.rows`` tells which rows of NAME it holds."""
    with np.load(HERE / "golden" / "extract.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def objects() -> dict[str, NDArray[Any]]:
    """An extract of what the published programs of object discovery give; keys as in the full set."""
    with np.load(HERE / "golden" / "objects.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_vits8_bundle(work: Path) -> Path:
    """ViT-S/8 with the golden weights at stride 4, and every facet that the golden arrays hold."""
    weights, out = work / "dino_vits8.npz", work / "dino_vits8-4"
    np.savez(weights, **deterministic_weights(find_model("dino_vits8")))
    export_bundle("dino_vits8", out, ExportOptions(facets=facets(GOLDEN_FACETS), measure=False), weights=weights)
    return out


@pytest.fixture(scope="session", params=["onnxruntime", "openvino"])
def golden_vits8(request: pytest.FixtureRequest, golden_vits8_bundle: Path) -> Iterator[Engine]:
    """Every fp32 path runs the golden weights."""
    if request.param == "openvino":
        require_openvino()
    with Engine.open(golden_vits8_bundle, backend=request.param) as engine:
        yield engine


@pytest.fixture(scope="session", autouse=True)
def products_as_on_a_gpu() -> Iterator[None]:
    """The interpreter multiplies by BLAS, where an element's bits may depend on its place in the product.

    On a GPU every element is summed along the inner dimension in one order, and kernels count on that.
    """
    if HAS_GPU or find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create_dot(self: Any, a: Any, b: Any, total: Any, *precision: Any) -> Any:
        left, right, out = (values.data.astype(np.float64) for values in (a, b, total))
        for i in range(left.shape[-1]):
            out += left[..., i, None] * right[..., i, None, :]
        return interpreter.TensorHandle(out.astype(total.data.dtype), total.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[TritonDevice]:
    if request.param == "cuda":
        if not HAS_GPU:
            pytest.skip("no CUDA device: kernels are tested in Triton's interpreter")
        yield TritonDevice("cuda")
        return
    if HAS_GPU:
        pytest.skip("a CUDA device is there: kernels are tested on it, not in the interpreter")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the interpreter's arrays are tiny
    yield TritonDevice("cpu")
    torch.set_num_threads(threads)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A machine with a GPU and everything installed, all of it fakes."""
    machine = install(monkeypatch)
    yield machine
    gc.collect()  # errors hold arrays, which go back to this machine and no later one
    assert not machine.gpu.stack(), "a context was left current"


@pytest.fixture(scope="session")
def planned_bundle(tiny_bundle: Path, work: Path) -> Path:
    """The tiny dynamic bundle with a plan that the fakes built."""
    return plan_bundle(tiny_bundle, work / "planned")


@pytest.fixture
def fake_rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A machine with a GPU that TensorRT for RTX runs on, and that library in place of TensorRT; all of it fakes."""
    machine = install(monkeypatch, rtx=True, capability=(8, 9))
    yield machine
    gc.collect()
    assert not machine.gpu.stack(), "a context was left current"


@pytest.fixture(scope="session")
def rtx_bundle(tiny_bundle: Path, work: Path) -> Path:
    """The tiny dynamic bundle with an engine of TensorRT for RTX that the fakes built; it was compared already."""
    folder = plan_bundle(tiny_bundle, work / "rtx", RTX)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, rtx=True, capability=(8, 9))
        with (
            Engine.open(folder, backend="tensorrt-rtx", kernels="host") as engine,
            pytest.warns(UserWarning, match="runs for the first time"),
        ):
            engine.encode([np.zeros((32, 40, 3), np.uint8)], load_size=None)
        gc.collect()
    return folder
