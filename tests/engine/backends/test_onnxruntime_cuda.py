"""What only ONNX Runtime's CUDA provider needs: its presence, its options, numbers for recorded runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes_onnxruntime
import numpy as np
import pytest
from helpers import export_tiny, facets
from helpers_gpu import FakeGpu

from facetrt.engine import Engine
from facetrt.engine.backends import onnxruntime_cuda
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from facetrt.engine.backends.run_options import BackendName, DeviceName, Precision, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.kernels.errors import BackendError, MissingDependencyError

OPTIONS = RunOptions(BackendName.ONNXRUNTIME, DeviceName.CUDA, precision=Precision.FP32)
SIZE = (24, 32)


@pytest.fixture(scope="module")
def static_folder(work: Path, tiny_weights: Path) -> Path:
    return export_tiny(tiny_weights, work / "static-cuda", size=SIZE, facets=facets("key@1"))


def images(batch: int, seed: int) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(seed).integers(0, 256, (batch, *SIZE, 3), np.uint8)}


def test_fixed_sizes_are_recorded_at_fixed_addresses_and_never_stale(static_folder: Path, fake_gpu: FakeGpu) -> None:
    bundle = Bundle.open(static_folder)
    oracle, backend = OnnxRuntimeBackend(bundle, RunOptions()), OnnxRuntimeCudaBackend(bundle, OPTIONS)
    for seed in range(3):
        for batch in range(1, 7):
            got, expected = backend.run(images(batch, seed)), oracle.run(images(batch, seed))
            for name, values in got.items():
                np.testing.assert_allclose(values, expected[name], atol=1e-5)
    (session,) = fake_gpu.onnxruntime.state.sessions
    assert sorted(session.recorded) == ["1", "2", "3", "4"]
    assert session.provider["enable_cuda_graph"] == "1" and session.provider["use_tf32"] == "0"
    assert session.provider["cudnn_conv_algo_search"] == "HEURISTIC"  # the same bytes in every process
    backend.close()


def test_nothing_is_recorded_beside_other_lanes(static_folder: Path, fake_gpu: FakeGpu) -> None:
    """ONNX Runtime records in CUDA's global mode, in which what other threads allocate fails."""
    backend = OnnxRuntimeCudaBackend(Bundle.open(static_folder), replace(OPTIONS, streams=2))
    for seed in range(2):
        backend.run(images(2, seed))
    for session in fake_gpu.onnxruntime.state.sessions:
        assert session.provider["enable_cuda_graph"] == "0" and not session.recorded
    backend.close()


def test_each_lane_has_its_session_on_its_stream(tiny_bundle: Path, fake_gpu: FakeGpu) -> None:
    options = RunOptions(BackendName.ONNXRUNTIME, DeviceName.CUDA, precision=Precision.FP32, streams=3)
    backend = OnnxRuntimeCudaBackend(Bundle.open(tiny_bundle), options)
    backend.activate()
    sessions = fake_gpu.onnxruntime.state.sessions
    assert len({session.provider["user_compute_stream"] for session in sessions}) == 3
    assert all(session.provider["enable_cuda_graph"] == "0" for session in sessions)  # sizes vary
    assert fake_gpu.onnxruntime.state.preloaded == 1
    backend.close()


def test_memory_that_onnxruntime_lacks_is_device_memory(
    static_folder: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 68157440")

    backend = OnnxRuntimeCudaBackend(Bundle.open(static_folder), OPTIONS)
    expected = backend.run(images(1, 0))
    with monkeypatch.context() as patch:
        patch.setattr(fakes_onnxruntime.Session, "run_with_iobinding", fails)
        with pytest.raises(BackendError, match=r"out of device memory on Fake GPU.*68157440.*lower the batch size"):
            backend.run(images(1, 0))
    for name, values in backend.run(images(1, 0)).items():
        np.testing.assert_array_equal(values, expected[name])
    backend.close()


def test_a_build_without_the_provider(tiny_bundle: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    library = fakes_onnxruntime.make(fake_gpu.gpu, available=False)
    monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: library)
    installed = {"onnxruntime": "1.31.1", "onnxruntime-gpu": None}
    monkeypatch.setattr(onnxruntime_cuda, "_version", installed.get)
    with pytest.raises(MissingDependencyError, match=r"no CUDA provider \(onnxruntime 1\.31\.1 is installed\)"):
        Engine.open(tiny_bundle, device="cuda")


def test_a_provider_that_cannot_load_is_no_cpu_run(
    tiny_bundle: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = fakes_onnxruntime.make(fake_gpu.gpu, loads=False)
    monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: library)
    with (
        Engine.open(tiny_bundle, device="cuda", kernels="host") as engine,
        pytest.raises(BackendError, match=r"cannot load here \(it would run on CPUExecutionProvider\)"),
    ):
        engine.encode([np.zeros((40, 40, 3), np.uint8)], load_size=None)


def test_memory_that_our_pools_hold_back_is_given_to_onnxruntime(
    static_folder: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt is not recorded, because nothing can be allocated then; the runs after it are."""
    bundle = Bundle.open(static_folder)
    backend, begun, allocated = OnnxRuntimeCudaBackend(bundle, OPTIONS), set[str](), list[str]()
    backend.activate()
    real = fakes_onnxruntime.Session.run_with_iobinding

    def allocates_once(session: Any, binding: Any, options: Any) -> None:
        """As ONNX Runtime does: the first run of a number allocates, the second one is recorded."""
        number = options.entries["gpu_graph_id"]
        if not allocated and fake_gpu.gpu.free_blocks:
            begun.add(number)
            raise RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 68157440")
        if not allocated and number in begun:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        allocated.append(number)
        real(session, binding, options)

    monkeypatch.setattr(fakes_onnxruntime.Session, "run_with_iobinding", allocates_once)
    with backend.lane() as lane:
        lane.device.empty((1 << 20,), "uint8")  # given back at once, to our pool
    expected = OnnxRuntimeBackend(bundle, RunOptions()).run(images(1, 0))["key@1"]
    for _ in range(2):
        np.testing.assert_allclose(backend.run(images(1, 0))["key@1"], expected, atol=1e-5)
    assert set(fake_gpu.onnxruntime.state.sessions[0].recorded) == {"1"}
    backend.close()


def test_a_size_is_recorded_also_after_a_second_attempt_without_memory(
    static_folder: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 68157440")

    backend = OnnxRuntimeCudaBackend(Bundle.open(static_folder), OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(fakes_onnxruntime.Session, "run_with_iobinding", fails)
        with pytest.raises(BackendError, match="out of device memory"):
            backend.run(images(1, 0))
    backend.run(images(1, 0))
    assert set(fake_gpu.onnxruntime.state.sessions[0].recorded) == {"1"}
    backend.close()


def test_a_recording_that_another_thread_spoils_says_so(
    static_folder: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("CUDA failure 901: operation failed due to a previous error during capture")

    backend = OnnxRuntimeCudaBackend(Bundle.open(static_folder), OPTIONS)
    monkeypatch.setattr(fakes_onnxruntime.Session, "run_with_iobinding", fails)
    with pytest.raises(
        BackendError, match=r"failed to record .*901.*keep other threads off the GPU .*or use streams=2"
    ):
        backend.run(images(1, 0))
    backend.close()


def test_a_session_without_memory(static_folder: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(fake_gpu.onnxruntime, "InferenceSession", fails)
    backend = OnnxRuntimeCudaBackend(Bundle.open(static_folder), OPTIONS)
    with pytest.raises(BackendError, match="out of device memory on Fake GPU, in onnxruntime"):
        backend.activate()
