"""What only TensorRT for RTX does: kernels that are compiled and kept here, a comparison when it first runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import export_tiny, facets
from helpers_gpu import FakeGpu, plan_bundle

from facetrt.engine import Engine
from facetrt.engine.backends.choice import resolve
from facetrt.engine.backends.flavours import RTX, TENSORRT
from facetrt.engine.backends.run_options import BackendName, DeviceName, Precision, RunOptions, Specialisation
from facetrt.engine.backends.tensorrt import PlanKey, find_plan
from facetrt.engine.backends.tensorrt_rtx import TensorRtRtxBackend
from facetrt.engine.bundle.bundle import Bundle
from facetrt.export import export_options
from facetrt.kernels.errors import InputError, MissingDependencyError, OutputError, ParityError

OPTIONS = RunOptions(
    BackendName.TENSORRT_RTX, DeviceName.CUDA, precision=Precision.FP16, specialisation=Specialisation.EAGER
)
SIZE = (24, 32)


@pytest.fixture(scope="module")
def built(work: Path, tiny_weights: Path) -> Path:
    """Of one size, in half precision, with an engine that never ran."""
    half = export_options.GraphPrecision.FP16
    plain = export_tiny(tiny_weights, work / "rtx-plain", size=SIZE, facets=facets("key@1"), precision=half)
    return plan_bundle(plain, work / "rtx-built", RTX)


@pytest.fixture
def fresh(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def cached(fresh: Path, fake_rtx: FakeGpu, tmp_path: Path) -> Iterator[TensorRtRtxBackend]:
    """Compared already, with a cache folder of its own."""
    backend = TensorRtRtxBackend(Bundle.open(fresh), replace(OPTIONS, cache=tmp_path / "cache"))
    with pytest.warns(UserWarning, match="first time"):
        backend.activate()
    yield backend
    backend.close()


def images(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(seed).integers(0, 256, (batch, *SIZE, 3), np.uint8)}


def test_an_engine_is_compared_when_it_first_runs_and_never_again(fresh: Path, fake_rtx: FakeGpu) -> None:
    backend = TensorRtRtxBackend(Bundle.open(fresh), OPTIONS)
    with pytest.warns(UserWarning, match=r"runs for the first time on .*: it is compared with ONNX Runtime"):
        first = backend.run(images())
    backend_gpu = backend._devices[0].name
    assert backend.parity is not None and len(backend.parity.cases) == 3
    backend.close()
    beside = fresh.with_name("bundle.cache")
    records = [json.loads(path.read_bytes().splitlines()[0]) for path in beside.iterdir()]
    assert sorted(record["what"] for record in records) == ["kernels", "parity"]
    assert {record["gpu"] for record in records} == {f"{backend_gpu} sm_89"}
    assert all(record["version"] == "1.7.1.116" and "CUDA" in record["driver"] for record in records)
    Bundle.open(fresh)  # nothing foreign lies in it

    fake_rtx.tensorrt.fake.kernels.clear()
    again = TensorRtRtxBackend(Bundle.open(fresh), OPTIONS)
    again.activate()  # a warning would be an error of pytest's
    assert again.parity == backend.parity and fake_rtx.tensorrt.fake.kernels  # those of the first process
    for name, values in again.run(images()).items():
        np.testing.assert_array_equal(values, first[name])
    again.close()


def test_an_engine_that_is_wrong_on_this_gpu_is_an_error_and_nothing_is_recorded(
    fresh: Path, fake_rtx: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    from facetrt.engine.backends import plan_check

    real = plan_check._references

    def wrong(*arguments: Any) -> Any:
        found = real(*arguments)
        return {key: [{n: v * 1.1 for n, v in one.items()} for one in ones] for key, ones in found.items()}

    monkeypatch.setattr(plan_check, "_references", wrong)
    backend = TensorRtRtxBackend(Bundle.open(fresh), OPTIONS)
    with (
        pytest.warns(UserWarning, match="first time"),
        pytest.raises(ParityError, match=r"does not reproduce its graph on .*, where it ran for the first time: fp16"),
    ):
        backend.run(images())
    assert not fresh.with_name("bundle.cache").exists()
    assert fake_rtx.tensorrt.fake.live == {"runtime": 0, "engine": 0, "context": 0}


def test_what_is_kept_belongs_to_the_driver_and_the_choice_of_kernels(
    cached: TensorRtRtxBackend, fake_rtx: FakeGpu, fresh: Path, tmp_path: Path
) -> None:
    cached.close()
    count = len(list((tmp_path / "cache").iterdir()))
    fake_rtx.gpu.driver_version += 10
    other = TensorRtRtxBackend(Bundle.open(fresh), replace(OPTIONS, cache=tmp_path / "cache"))
    with pytest.warns(UserWarning, match="first time"):
        other.activate()
    other.close()
    assert len(list((tmp_path / "cache").iterdir())) == 2 * count == 4


@pytest.mark.parametrize("chosen", [Specialisation.EAGER, Specialisation.LAZY, Specialisation.NONE])
def test_when_kernels_are_compiled_for_the_shapes(
    fresh: Path, fake_rtx: FakeGpu, chosen: Specialisation, recwarn: pytest.WarningsRecorder
) -> None:
    backend = TensorRtRtxBackend(Bundle.open(fresh), replace(OPTIONS, specialisation=chosen))
    backend.activate()
    backend.close()
    assert f"specialisation {chosen.name}" in fake_rtx.tensorrt.fake.calls


def test_nothing_is_recorded_while_kernels_are_compiled(cached: TensorRtRtxBackend, fake_rtx: FakeGpu) -> None:
    fake = fake_rtx.tensorrt.fake
    fake.compiling = True
    plain = [cached.run(images(3, seed)) for seed in range(4)]  # a size that the comparison did not record
    fake.compiling = False
    for seed in range(4):
        for name, values in cached.run(images(3, seed)).items():
            np.testing.assert_array_equal(values, plain[seed][name])


def test_a_cache_folder_that_cannot_be_written(fresh: Path, fake_rtx: FakeGpu, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    chosen = TensorRtRtxBackend(Bundle.open(fresh), replace(OPTIONS, cache=tmp_path / "file"))
    with pytest.warns(UserWarning), pytest.raises(OutputError, match="choose another cache folder"):
        chosen.activate()
    fresh.with_name("bundle.cache").write_bytes(b"")
    beside = TensorRtRtxBackend(Bundle.open(fresh), OPTIONS)
    with pytest.warns(UserWarning, match="every start compiles and compares anew"):
        assert beside.run(images())
    beside.close()


def test_auto_takes_it_where_there_is_no_plan_of_tensorrt(rtx_bundle: Path, fake_rtx: FakeGpu) -> None:
    found = resolve(Bundle.open(rtx_bundle), RunOptions(device=DeviceName.CUDA))
    assert found.backend is BackendName.TENSORRT_RTX
    assert resolve(Bundle.open(rtx_bundle), RunOptions(BackendName.TENSORRT_RTX)).device is DeviceName.CUDA


@pytest.mark.parametrize("capability", [(9, 0), (8, 7)])
def test_gpus_that_it_does_not_run_on(rtx_bundle: Path, fake_rtx: FakeGpu, capability: tuple[int, int]) -> None:
    fake_rtx.gpu.capability = capability
    name = "sm_{}{}".format(*capability)
    with pytest.raises(InputError, match=rf"RTX does not run on {name}, the GPU here, but on sm_75, .*use"):
        Engine.open(rtx_bundle, backend="tensorrt-rtx", kernels="host")
    assert resolve(Bundle.open(rtx_bundle), RunOptions(device=DeviceName.CUDA)).backend is BackendName.ONNXRUNTIME


def test_plans_of_one_library_are_none_of_the_other(rtx_bundle: Path, planned_bundle: Path) -> None:
    for path, flavour, other in ((rtx_bundle, RTX, TENSORRT), (planned_bundle, TENSORRT, RTX)):
        bundle = Bundle.open(path)
        ((name, record),) = bundle.manifest.plans.items()
        key = PlanKey.here(bundle.manifest, record.version, record.architectures[-1])
        assert find_plan(bundle, key, flavour) == name
        with pytest.raises(InputError, match=f"has no {other.title} plan: build one .*--target {other.backend}'"):
            find_plan(bundle, replace(key, architecture="sm_89"), other)
        with pytest.raises(InputError, match=r"field 'architecture' is .* in the plan and sm_86 here"):
            find_plan(
                replace(
                    bundle,
                    manifest=replace(bundle.manifest, plans={name: replace(record, architectures=["sm_89", "sm_120"])}),
                ),
                replace(key, architecture="sm_86"),
                flavour,
            )


def test_what_cannot_be(rtx_bundle: Path, planned_bundle: Path, fake_rtx: FakeGpu) -> None:
    with pytest.raises(InputError, match="specialisation lazy is for backends openvino and tensorrt-rtx, and"):
        Engine.open(rtx_bundle, device="cuda", backend="onnxruntime", kernels="host", specialisation="lazy")
    with pytest.raises(InputError, match="specialisation none is for backends openvino and tensorrt-rtx, and"):
        Engine.open(rtx_bundle, specialisation="none")
    fake_rtx.tensorrt.__version__ = "2.0.0.1"
    with pytest.raises(MissingDependencyError, match=r"2\.0\.0\.1 is installed: expected 1\.7 or newer, up to 1\.x"):
        Engine.open(rtx_bundle, backend="tensorrt-rtx", kernels="host")
