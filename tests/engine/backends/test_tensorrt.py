"""What only TensorRT does: plans that must fit, profiles, recorded runs, and whose memory goes when."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes_tensorrt
import numpy as np
import pytest
from helpers import export_tiny, facets
from helpers_gpu import FakeGpu

from facetrt.engine import Engine
from facetrt.engine.backends.choice import resolve
from facetrt.engine.backends.cuda import MAX_REPLAYS
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.run_options import BackendName, DeviceName, Kernels, Precision, RunOptions
from facetrt.engine.backends.tensorrt import TensorRtBackend, TensorRtLane
from facetrt.engine.bundle.bundle import Bundle
from facetrt.export import export_options
from facetrt.export.plans import PlanOptions, build_plan
from facetrt.kernels.errors import BackendError, BundleError, InputError, MissingDependencyError

OPTIONS = RunOptions(BackendName.TENSORRT, DeviceName.CUDA, precision=Precision.FP32)
HALF = replace(OPTIONS, precision=Precision.FP16)
SIZE = (24, 32)


@pytest.fixture(scope="module")
def static_folder(work: Path, tiny_weights: Path) -> Path:
    half = export_options.GraphPrecision.FP16
    return export_tiny(tiny_weights, work / "static-half", size=SIZE, facets=facets("key@1"), precision=half)


@pytest.fixture
def static(static_folder: Path, fake_gpu: FakeGpu) -> Iterator[TensorRtBackend]:
    if not Bundle.open(static_folder).manifest.plans:
        build_plan(static_folder, PlanOptions(opt_batch=2, max_batch=6))
    fake_gpu.tensorrt.fake.calls.clear()
    backend = TensorRtBackend(Bundle.open(static_folder), HALF)
    yield backend
    backend.close()


@pytest.fixture
def dynamic(planned_bundle: Path, fake_gpu: FakeGpu) -> Iterator[TensorRtBackend]:
    backend = TensorRtBackend(Bundle.open(planned_bundle), OPTIONS)
    yield backend
    backend.close()


def images(batch: int, seed: int) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(seed).integers(0, 256, (batch, *SIZE, 3), np.uint8)}


def grid_inputs(batch: int = 1, side: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(side)
    return {
        "images": rng.integers(0, 256, (batch, 4 * side + 4, 4 * side + 4, 3), np.uint8),
        "positional": rng.standard_normal((1, side, side, 48)).astype(np.float32),
        "rows": np.arange(side),
        "cols": np.arange(side),
    }


def test_runs_of_one_shape_are_recorded_and_replayed(static: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    oracle = OnnxRuntimeBackend(static.bundle, RunOptions(precision=Precision.FP16))
    calls, kept = fake_gpu.tensorrt.fake.calls, []
    for seed in range(5):
        got, expected = static.run(images(2, seed)), oracle.run(images(2, seed))
        for name, values in got.items():
            np.testing.assert_allclose(values, expected[name], atol=2e-3)
        kept.append((got, {name: values.copy() for name, values in got.items()}))
    assert calls.count("execute_async_v3") == 3  # plain, once more before it is recorded, recorded
    for got, copied in kept:
        for name, values in got.items():
            np.testing.assert_array_equal(values, copied[name])


def test_only_a_few_batch_sizes_are_recorded(static: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    expected = {batch: static.run(images(batch, batch)) for batch in range(1, 7)}
    for _ in range(3):
        for batch in range(1, 7):
            for name, values in static.run(images(batch, batch)).items():
                np.testing.assert_array_equal(values, expected[batch][name])
    assert fake_gpu.tensorrt.fake.live["context"] == 1 + MAX_REPLAYS


def test_a_batch_beyond_the_profile(static: TensorRtBackend) -> None:
    with pytest.raises(BackendError, match=r"images has shape \(7, 24, 32, 3\), and .* takes \(1, 24, 32, 3\) to \(6,"):
        static.run(images(7, 0))
    assert static.run(images(6, 0)) and static.max_batch == 6


def test_one_image_has_a_profile_of_its_own(dynamic: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    dynamic.activate()
    fake_gpu.tensorrt.fake.calls.clear()
    for batch in (1, 2, 3, 1):
        dynamic.run(grid_inputs(batch))
    switches = [call for call in fake_gpu.tensorrt.fake.calls if call.startswith("set_optimization_profile")]
    assert switches == ["set_optimization_profile_async 1", "set_optimization_profile_async 0"]


def test_an_image_beyond_the_profile_is_named(dynamic: TensorRtBackend) -> None:
    with pytest.raises(BackendError, match=r"images has shape \(1, 84, 84, 3\), and the plan's profile takes"):
        dynamic.run(grid_inputs(1, 20))
    assert dynamic.run(grid_inputs())


@pytest.mark.parametrize("call", ["execute_async_v3", "set_input_shape"])
def test_a_failure_gives_the_reason_and_the_backend_goes_on(
    dynamic: TensorRtBackend, fake_gpu: FakeGpu, call: str
) -> None:
    first = dynamic.run(grid_inputs())
    fake_gpu.tensorrt.fake.fail.add(call)
    with pytest.raises(BackendError, match=r"TensorRT failed to .*: ") as caught:
        dynamic.run(grid_inputs())
    assert call != "execute_async_v3" or "illegal memory access" in str(caught.value)
    fake_gpu.tensorrt.fake.fail.clear()
    for name, values in dynamic.run(grid_inputs()).items():
        np.testing.assert_array_equal(values, first[name])


def test_no_memory_for_a_context(dynamic: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    fake_gpu.tensorrt.fake.fail.add("create_execution_context")
    with pytest.raises(
        BackendError, match=r"cannot make an execution context: .* could not be allocated; use fewer streams"
    ):
        dynamic.run(grid_inputs())
    gc.collect()  # the error's traceback held them
    assert fake_gpu.tensorrt.fake.live == {"runtime": 0, "engine": 0, "context": 0}
    fake_gpu.tensorrt.fake.fail.clear()
    assert dynamic.run(grid_inputs())


@pytest.mark.parametrize("call", ["create_execution_context", "execute_async_v3"])
def test_memory_that_our_pools_hold_back_is_given_to_tensorrt(
    dynamic: TensorRtBackend, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    kind = {"create_execution_context": "CudaEngine", "execute_async_v3": "ExecutionContext"}[call]
    real, attempts = getattr(getattr(fakes_tensorrt, kind), call), list[bool]()

    def needs_all(thing: Any, *arguments: Any) -> Any:
        attempts.append(not fake_gpu.gpu.free_blocks)
        if attempts[-1]:
            return real(thing, *arguments)
        logger = getattr(thing, "engine", thing).logger
        logger.log(fakes_tensorrt.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 123 bytes.)")
        logger.log(fakes_tensorrt.Severity.ERROR, "Error Code 4: Internal Error")
        return None if call == "create_execution_context" else False

    expected = dynamic.run(grid_inputs())
    with dynamic.lane() as lane:
        lane.device.empty((1 << 20,), "uint8")  # given back at once, to our pool
    monkeypatch.setattr(getattr(fakes_tensorrt, kind), call, needs_all)
    if call == "create_execution_context":
        with dynamic.lane() as lane, lane.device.activate():
            lane._context()
    else:
        for name, values in dynamic.run(grid_inputs()).items():
            np.testing.assert_array_equal(values, expected[name])
    assert attempts == [False, True]


def test_out_of_device_memory(dynamic: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    dynamic.run(grid_inputs())
    total, fake_gpu.gpu.total = fake_gpu.gpu.total, 20_000
    with pytest.raises(BackendError, match="out of device memory"):
        dynamic.run(grid_inputs(4, 9))
    fake_gpu.gpu.total = total
    assert dynamic.run(grid_inputs(4, 9))


def test_arrays_of_another_lane_are_refused(planned_bundle: Path, fake_gpu: FakeGpu) -> None:
    backend = TensorRtBackend(Bundle.open(planned_bundle), replace(OPTIONS, streams=2))
    with backend.lane() as one, backend.lane() as two:
        assert one.device.stream_handle != two.device.stream_handle
        foreign = {name: two.device.upload(values) for name, values in grid_inputs().items()}
        with pytest.raises(BackendError, match="belongs to another stream"):
            one.run(foreign)
        with pytest.raises(BackendError, match=r"inputs \['images'\] were given"):
            two.run({"images": foreign["images"]})
    backend.close()


def test_everything_goes_in_order_and_a_lane_in_use_goes_last(planned_bundle: Path, fake_gpu: FakeGpu) -> None:
    fake = fake_gpu.tensorrt.fake
    backend = TensorRtBackend(Bundle.open(planned_bundle), replace(OPTIONS, streams=2))
    with backend.lane() as lane:
        backend.close()
        assert fake.live == {"runtime": 1, "engine": 1, "context": 1}
        outputs = lane.run({name: lane.device.upload(values) for name, values in grid_inputs().items()})
        assert np.isfinite(lane.device.download(outputs["key@1"])).all()
        del outputs
    assert fake.live == {"runtime": 0, "engine": 0, "context": 0}
    assert not [call for call in fake.calls if call.startswith("RuleBroken")]
    with pytest.raises(BackendError, match="this engine is closed"), backend.lane():
        pass


def test_types_that_the_manifest_does_not_mean(
    dynamic: TensorRtBackend, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = fakes_tensorrt.DataType.HALF
    monkeypatch.setattr(fakes_tensorrt.CudaEngine, "get_tensor_dtype", lambda self, name: half)
    with pytest.raises(BundleError, match="tensor images has type float16: expected uint8"):
        dynamic.activate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["sm_80"]}, "field 'architecture' is sm_80 in the plan and sm_90 here"),
        ({"version": "10.16.1.2"}, r"field 'version' is 10\.16\.1\.2 in the plan and 11\.4\.0\.106 here"),
        ({"encoder_sha256": "0" * 64}, "field 'encoder_sha256' is 0{48} in the plan"),
        ({"precision": "fp16"}, "field 'precision' is fp16 in the plan and fp32 here"),
        ({"architectures": ["sm_80"], "flags": ["version_compatible"]}, "field 'architecture'"),
        ({"version": "10.16.1.2", "flags": ["version_compatible"]}, "field 'version'"),  # another major
        ({"version": "11.9.0.1", "flags": ["version_compatible"]}, "field 'version'"),  # newer than this one
    ],
)
def test_plans_that_do_not_fit_name_the_field(
    planned_bundle: Path, fake_gpu: FakeGpu, change: dict[str, Any], message: str
) -> None:
    bundle = Bundle.open(planned_bundle)
    plans = {name: replace(plan, **change) for name, plan in bundle.manifest.plans.items()}
    other = replace(bundle, manifest=replace(bundle.manifest, plans=plans))
    with pytest.raises(InputError, match=f"does not run here: {message}.*--target tensorrt'"):
        TensorRtBackend.check_supported(other, OPTIONS)
    assert resolve(other, RunOptions(device=DeviceName.CUDA)).backend is BackendName.ONNXRUNTIME


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["sm_80"], "flags": ["hardware_compatible"]},
        {"version": "11.0.0.9", "flags": ["version_compatible"]},
    ],
)
def test_compatible_plans_run_elsewhere(planned_bundle: Path, fake_gpu: FakeGpu, change: dict[str, Any]) -> None:
    bundle = Bundle.open(planned_bundle)
    plans = {name: replace(plan, **change) for name, plan in bundle.manifest.plans.items()}
    TensorRtBackend.check_supported(replace(bundle, manifest=replace(bundle.manifest, plans=plans)), OPTIONS)


def test_no_plan_says_how_to_build_one(tiny_bundle: Path, fake_gpu: FakeGpu) -> None:
    with pytest.raises(InputError, match=r"has no TensorRT plan: .* 'facetrt export .*tiny --target tensorrt'"):
        Engine.open(tiny_bundle, backend="tensorrt", kernels="host")


def test_how_auto_is_resolved_on_a_gpu(planned_bundle: Path, tiny_bundle: Path, fake_gpu: FakeGpu) -> None:
    planned, plain = Bundle.open(planned_bundle), Bundle.open(tiny_bundle)
    cuda = RunOptions(device=DeviceName.CUDA)
    found = resolve(planned, cuda)
    assert (found.backend, found.device, found.kernels) == (BackendName.TENSORRT, DeviceName.CUDA, Kernels.DEVICE)
    assert resolve(plain, cuda).backend is BackendName.ONNXRUNTIME
    assert resolve(planned, RunOptions()).device is DeviceName.CPU  # nothing moves to a GPU by itself
    assert resolve(planned, RunOptions(BackendName.TENSORRT)).device is DeviceName.CUDA
    assert resolve(planned, RunOptions()).kernels is Kernels.HOST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt", "device": "cpu"}, "backend tensorrt does not run on device cpu: use device cuda"),
        ({"backend": "openvino", "device": "cuda"}, "backend openvino does not run on device cuda"),
        ({"streams": 2}, "streams=2 are parallel lanes of a GPU, and the device is cpu"),
        ({"streams": 0}, "streams=0: expected 1 to 16"),
        ({"kernels": "device"}, "kernels=device needs a GPU"),
        ({"kernels": "gpu"}, "kernels 'gpu': expected one of auto, device, host"),
        ({"device": "cuda", "precision": "fp16"}, "runs in its own precision, fp32, and fp16 was asked"),
        ({"device": "cuda", "hint": "throughput"}, "use streams=2"),
        ({"device": "cuda", "cache": "folder"}, "on a GPU tensorrt-rtx does"),
    ],
)
def test_what_cannot_be(planned_bundle: Path, fake_gpu: FakeGpu, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine.open(planned_bundle, **options)


def test_a_bundle_without_kernels(planned_bundle: Path, fake_gpu: FakeGpu) -> None:
    with pytest.raises(BackendError, match=r"planned: kernels missing .*--kernels sm_90, or use kernels host"):
        Engine.open(planned_bundle, device="cuda")
    with Engine.open(planned_bundle, device="cuda", kernels="host") as engine:
        assert engine.backend == "tensorrt"


def test_tensorrt_missing_or_too_old(planned_bundle: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.tensorrt.__version__ = "8.6.1"
    with pytest.raises(MissingDependencyError, match=r"TensorRT 8\.6\.1 is installed: expected 10\.16 or newer"):
        Engine.open(planned_bundle, backend="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'facetrt\[gpu\]'"):
        Engine.open(planned_bundle, backend="tensorrt")
    assert resolve(Bundle.open(planned_bundle), RunOptions(device=DeviceName.CUDA)).backend is BackendName.ONNXRUNTIME


def test_a_machine_without_a_gpu(planned_bundle: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    for options in ({"backend": "tensorrt"}, {"device": "cuda"}, {"device": "cuda", "backend": "onnxruntime"}):
        with pytest.raises(MissingDependencyError, match=r"a GPU needs pycuda: pip install 'facetrt\[gpu\]'"):
            Engine.open(planned_bundle, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ scratch memory
def test_a_lane_has_one_block_as_large_as_the_profile_in_use(static: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    """The stand-in refuses runs in less memory than their profile needs, and in memory that was given back."""
    static.run(images(1, 0))
    with static.lane() as lane:
        assert isinstance(lane, TensorRtLane) and lane._scratch is not None
        small = lane._scratch.nbytes
        assert small == fake_gpu.tensorrt.fake.scratch  # of single images
    for seed in range(4):
        static.run(images(3, seed))
    with static.lane() as lane:
        assert isinstance(lane, TensorRtLane) and lane._scratch is not None and lane._scratch.nbytes == 2 * small
        assert {replay._scratch.pointer for replay in lane._replays.values()} == {lane._scratch.pointer}
    assert static.run(images(1, 0)) and static.run(images(3, 0))
    strategies = {strategy.name for strategy in fake_gpu.tensorrt.fake.strategies}
    assert strategies == {"USER_MANAGED"}


def test_recordings_are_made_anew_when_the_block_grows(static: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    expected = [static.run(images(1, seed)) for seed in range(3)]  # recorded in the small block
    static.run(images(3, 0))
    for _ in range(3):
        for seed in range(3):
            for name, values in static.run(images(1, seed)).items():
                np.testing.assert_array_equal(values, expected[seed][name])
    with static.lane() as lane:
        assert isinstance(lane, TensorRtLane) and len(lane._replays) == 1


def test_no_memory_for_the_block(dynamic: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    dynamic.activate()
    with dynamic.lane() as lane:
        lane._profiles.scratch_bytes[0] = 2 * fake_gpu.gpu.total  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="out of device memory"):
        dynamic.run(grid_inputs())
    with dynamic.lane() as lane:
        lane._profiles.scratch_bytes[0] = fake_gpu.tensorrt.fake.scratch  # type: ignore[attr-defined]
    assert dynamic.run(grid_inputs())


def test_shapes_that_cannot_be_inferred(dynamic: TensorRtBackend, fake_gpu: FakeGpu) -> None:
    fake_gpu.tensorrt.fake.fail.add("infer_shapes")
    with pytest.raises(BackendError, match=r"failed to infer shapes: Shape inference failed: .*broadcast failed"):
        dynamic.run(grid_inputs())
    fake_gpu.tensorrt.fake.fail.clear()
    assert dynamic.run(grid_inputs())
