"""TensorRT plans from the recording fake: what is built, what is checked, what is written."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes_tensorrt
import onnx
import pytest
from helpers import export_tiny, facets
from helpers_gpu import FakeGpu, install
from onnx import TensorProto, helper
from typer.testing import CliRunner

from facetrt.engine.backends import plan_check
from facetrt.engine.backends.flavours import RTX
from facetrt.engine.backends.run_options import BackendName, DeviceName, Precision, RunOptions
from facetrt.engine.backends.tensorrt import TensorRtBackend
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.cli.main import program
from facetrt.export import plans
from facetrt.export.export_options import GraphPrecision
from facetrt.export.plan_graph import prepare_graph
from facetrt.export.plans import PlanOptions, build_plan, parse_plan_architectures
from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError, ParityError

SIZES: dict[str, Any] = {"min_size": (8, 8), "opt_size": (24, 32), "max_size": (40, 40)}
QUICK = PlanOptions(opt_batch=2, max_batch=3, allow_unfused=True, **SIZES)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    machine = install(monkeypatch)
    yield machine
    gc.collect()


@pytest.fixture(scope="module")
def static_folder(work: Path, tiny_weights: Path) -> Path:
    names, half = facets("key@1"), GraphPrecision.BF16
    return export_tiny(tiny_weights, work / "static-bf16", size=(24, 32), facets=names, precision=half)


@pytest.fixture
def static(static_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(static_folder, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_static_plan_is_built_compared_and_recorded(static: Path, fake_gpu: FakeGpu) -> None:
    stages: list[str] = []
    name, record = build_plan(static, PlanOptions(opt_batch=2, max_batch=3), report=stages.append)
    assert name == "plans/sm_90-11.4.0.106-b1-2-3.plan"
    bundle = Bundle.open(static)
    assert bundle.manifest.plans == {name: record} and bundle.read(name).startswith(fakes_tensorrt.MAGIC)
    assert record.profile == {"images": [[1, 24, 32, 3], [2, 24, 32, 3], [3, 24, 32, 3]]} and record.max_batch == 3
    assert (record.precision, record.architectures, record.flags) == ("bf16", ["sm_90"], [])
    assert record.encoder_sha256 == bundle.manifest.files["encoder.onnx"].sha256
    assert record.attention == record.fused_attention == 2 and record.layers > 10
    assert record.parity.cases == ["1 × 24×32", "2 × 24×32", "3 × 24×32"]
    assert 1e-4 < record.parity.outputs["key@1"]["relative_frobenius"] <= 0.01
    assert "Building Engine (2 steps)" in stages and not any("Tactic" in stage for stage in stages)
    assert sorted(contents(static)) == ["encoder.onnx", "manifest.json", name]  # nothing temporary


def test_a_dynamic_plan_covers_its_profile(tiny_bundle: Path, tmp_path: Path, fake_gpu: FakeGpu) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    name, record = build_plan(folder, QUICK)
    assert name == "plans/sm_90-11.4.0.106-b1-2-3-8x8-24x32-40x40.plan"
    assert record.profile["rows"] == [[1], [5], [9]] and record.profile["cols"] == [[1], [7], [9]]
    assert record.profile["positional"] == [[1, 1, 1, 48], [1, 5, 7, 48], [1, 9, 9, 48]]
    single, batches = fake_gpu.tensorrt.fake.profiles
    assert [shape[0] for shape in single.shapes["images"]] == [1, 1, 1]
    assert batches.shapes == record.profile
    assert record.parity.cases[-3:] == ["3 × 40×40", "3 × 8×8 step 2", "3 × 24×32 step 2"]
    assert all(metrics["relative_frobenius"] <= 1e-4 for metrics in record.parity.outputs.values())


@pytest.mark.parametrize("version", ["10.16.1.2", "11.0.0.9"])
def test_one_path_for_both_majors(static: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The fake refuses networks that are not strongly typed on 10, and unknown flags on 11."""
    machine = install(monkeypatch, tensorrt=version)
    _, record = build_plan(static, PlanOptions(opt_batch=1, max_batch=1))
    assert record.version == version
    assert not machine.tensorrt.fake.flags  # not even TF32, which is on by default
    gc.collect()


def test_compatibility_flags(static: Path, fake_gpu: FakeGpu) -> None:
    options = PlanOptions(opt_batch=1, max_batch=1, version_compatible=True, hardware_compatible=True)
    name, record = build_plan(static, options)
    assert record.flags == ["hardware_compatible", "version_compatible"] and name.endswith("-version_compatible.plan")
    fake = fake_gpu.tensorrt.fake
    assert [flag.name for flag in fake.flags] == ["VERSION_COMPATIBLE"] and fake.hardware.name == "AMPERE_PLUS"


def test_a_plan_is_kept_only_if_everything_is_the_same(static: Path, fake_gpu: FakeGpu) -> None:
    options, stages = PlanOptions(opt_batch=1, max_batch=1), list[str]()
    name, record = build_plan(static, options)
    calls = fake_gpu.tensorrt.fake.calls
    calls.clear()
    assert build_plan(static, options, report=stages.append) == (name, record)
    assert "build_serialized_network" not in calls and "kept" in stages[-1]

    data = json.loads((static / "manifest.json").read_text())
    data["plans"][name]["encoder_sha256"] = "0" * 64
    (static / "manifest.json").write_text(json.dumps(data))
    assert build_plan(static, options, report=stages.append) == (name, record)
    assert any("another encoder_sha256: building anew" in stage for stage in stages)

    damaged = bytearray((static / name).read_bytes())
    damaged[-1] ^= 1
    (static / name).write_bytes(damaged)
    build_plan(static, options, report=stages.append)
    assert any("'sha256' differs" in stage and "building anew" in stage for stage in stages)
    assert calls.count("build_serialized_network") == 2


def test_a_wrong_plan_is_not_written(static: Path, fake_gpu: FakeGpu) -> None:
    before = contents(static)
    fake_gpu.tensorrt.fake.scale = 1.02
    with pytest.raises(ParityError, match=r"not reproduce its graph: bf16 misses its contract: .* has .*no plan was"):
        build_plan(static, PlanOptions(opt_batch=1, max_batch=2))
    assert contents(static) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("parse", InputError, "TensorRT cannot read the graph: No importer registered for op: Fancy"),
        ("build_serialized_network", BackendError, "could not build the plan: .*Could not find any implementation"),
        ("add_optimization_profile", InputError, "TensorRT refuses the profile"),
        ("deserialize_cuda_engine", BackendError, "cannot load the plan that it built"),
    ],
)
def test_failures_of_the_builder(
    static: Path, fake_gpu: FakeGpu, call: str, error: type[Exception], message: str
) -> None:
    before = contents(static)
    fake_gpu.tensorrt.fake.fail.add(call)
    with pytest.raises(error, match=message):
        build_plan(static, PlanOptions(opt_batch=1, max_batch=1))
    assert contents(static) == before


def test_branches_are_refused(static: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.tensorrt.fake.conditional = True
    with pytest.raises(InputError, match="parser made branches"):
        build_plan(static, PlanOptions(opt_batch=1, max_batch=1))
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    branch = helper.make_graph([], "b", [], [value])
    node = helper.make_node("If", ["x"], ["y"], "fork", then_branch=branch, else_branch=branch)
    source = helper.make_tensor_value_info("x", TensorProto.BOOL, [1])
    with pytest.raises(InputError, match=r"the graph branches \(fork\)"):
        prepare_graph(helper.make_model(helper.make_graph([node], "g", [source], [value])).SerializeToString())


def test_the_prepared_graph_is_standard_and_casts_bytes_first(tiny_bundle: Path) -> None:
    model = onnx.load_from_string(prepare_graph((tiny_bundle / "encoder.onnx").read_bytes()).data)
    onnx.checker.check_model(model)
    assert not model.functions and [entry.domain for entry in model.opset_import] == [""]
    readers = [node.op_type for node in model.graph.node if "images" in node.input]
    assert readers == ["Cast"] and model.graph.node[0].op_type == "Cast"


@pytest.mark.parametrize("step", ["built", "unlisted", "placed"])
def test_a_killed_build_leaves_a_bundle_that_opens(
    static: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """``KeyboardInterrupt`` at each step of publishing, once over an older plan of the same name."""
    options = PlanOptions(opt_batch=1, max_batch=1)
    name, _ = build_plan(static, options)
    (static / name).write_bytes(b"x" * (static / name).stat().st_size)  # damaged: it is built again
    real, count = plans.write_manifest, 0

    def interrupted(folder: Path, manifest: Any) -> None:
        nonlocal count
        count += 1
        if (step, count) in (("built", 1), ("placed", 2)):
            raise KeyboardInterrupt
        real(folder, manifest)
        if step == "unlisted":
            raise KeyboardInterrupt

    monkeypatch.setattr(plans, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_plan(static, options)
    (static / "plans" / ".building-killed").mkdir()
    (static / "plans" / ".building-killed" / "half.plan").write_bytes(b"half")
    assert Bundle.open(static).manifest.facets == ["key@1"]
    monkeypatch.setattr(plans, "write_manifest", real)
    assert build_plan(static, options)[0] in Bundle.open(static).manifest.plans


def test_the_timing_cache_is_kept_and_a_foreign_one_refused(static: Path, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    build_plan(static, PlanOptions(opt_batch=1, max_batch=1, timing_cache=cache))
    assert cache.read_bytes() == b"timed"
    build_plan(static, PlanOptions(opt_batch=1, max_batch=2, timing_cache=cache))
    assert cache.read_bytes() == b"timedtimed"
    cache.write_bytes(b"another version's")
    with pytest.raises(InputError, match=r"cannot use the timing cache .*choose another file"):
        build_plan(static, PlanOptions(opt_batch=1, max_batch=3, timing_cache=cache))
    with pytest.raises(InputError, match="there is no such folder"):
        build_plan(static, PlanOptions(opt_batch=1, max_batch=3, timing_cache=tmp_path / "no" / "cache"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt_batch": 3, "max_batch": 2}, "opt batch 3, max batch 2: expected 1 ≤ opt ≤ max"),
        ({"min_size": (300, 64)}, "min, opt and max size are 300x64, 224x224, 448x448"),
        ({"max_size": (448, 100)}, "expected them to ascend"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PlanOptions(**options)


def test_images_too_large_to_compare(static: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_check, "fits", lambda needed: False)
    with pytest.raises(InputError, match=r"the largest image, 24x32, makes .* use a smaller --max-size"):
        build_plan(static)


def test_fp32_attention_beyond_a_share_of_the_gpu_is_refused_before_it_is_built(
    tiny_bundle: Path, fake_gpu: FakeGpu
) -> None:
    with pytest.raises(InputError, match=r"does not fuse attention in fp32, .* --precision fp16 or bf16, or .*unfused"):
        build_plan(tiny_bundle)
    with pytest.raises(InputError, match=r"16 × 448×448, needs .* GB of scratch .* 50% of .*: use --precision fp16"):
        build_plan(tiny_bundle, PlanOptions(allow_unfused=True))
    assert not fake_gpu.tensorrt.fake.calls


def test_scratch_beyond_a_share_of_the_gpu_is_refused_by_the_builder_s_own_figure(
    static: Path, fake_gpu: FakeGpu
) -> None:
    fake_gpu.tensorrt.fake.scratch = fake_gpu.gpu.total // 3
    assert build_plan(static, PlanOptions(opt_batch=1, max_batch=1))[1].scratch_bytes == [fake_gpu.gpu.total // 3]
    with pytest.raises(InputError, match=r"2 × 24×32, needs .*: use a smaller --max-batch or --max-size"):
        build_plan(static, PlanOptions(opt_batch=2, max_batch=2))


def test_attention_that_is_not_fused_is_named(static: Path, fake_gpu: FakeGpu) -> None:
    fake_gpu.tensorrt.fake.unfused.add("attention_1")
    before = contents(static)
    with pytest.raises(InputError, match=r"did not fuse attention_1 \(.*; 1 of 2\), .*--allow-unfused"):
        build_plan(static, PlanOptions(opt_batch=1, max_batch=1))
    assert contents(static) == before
    _, record = build_plan(static, PlanOptions(opt_batch=1, max_batch=1, allow_unfused=True))
    assert (record.attention, record.fused_attention) == (2, 1)


def test_graphs_that_sum_in_half_precision_are_refused(
    static: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = fakes_tensorrt.Tensor(fakes_tensorrt.DataType.HALF)
    monkeypatch.setattr(fakes_tensorrt.Layer, "get_input", lambda self, index: half)
    with pytest.raises(InputError, match=r"sums in half precision \(.*attention_0.*\)"):
        build_plan(static)


def test_nothing_long_is_begun_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = CliRunner().invoke(
        program(), ["export", "builtin", "--out", str(tmp_path / "out"), "--target", "tensorrt"]
    )
    assert isinstance(result.exception, MissingDependencyError) and "facetrt[gpu]" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_command_adds_a_plan_to_a_bundle(static: Path, fake_gpu: FakeGpu) -> None:
    command = ["export", str(static), "--target", "tensorrt", "--opt-batch", "2", "--version-compatible"]
    result = CliRunner().invoke(program(), command, catch_exceptions=False)
    assert "2 of 2 attentions fused" in " ".join(result.output.split())
    (record,) = Bundle.open(static).manifest.plans.values()
    assert [shape[0] for shape in record.profile["images"]] == [1, 2, 2] and record.flags == ["version_compatible"]
    backend = TensorRtBackend(
        Bundle.open(static), RunOptions(BackendName.TENSORRT, DeviceName.CUDA, precision=Precision.BF16)
    )
    backend.activate()
    backend.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BUNDLE"], "is a bundle already: add --target, --kernels or --found-head"),
        (["BUNDLE", "--target", "tensorrt", "--stride", "2", "--out", "x"], "--out, --stride cannot change the bundle"),
        (["builtin"], "--out is missing"),
        (["builtin", "--out", "x", "--max-batch", "3"], "--max-batch shape a TensorRT plan: add --target tensorrt"),
        (["BUNDLE", "--target", "tensorrt", "--max-size", "224"], "max_size='224': expected HEIGHTxWIDTH"),
        (["BUNDLE", "--kernels", "sm_1"], "sm_1"),
    ],
)
def test_commands_that_cannot_be(static: Path, fake_gpu: FakeGpu, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(program(), ["export", *(str(static) if a == "BUNDLE" else a for a in arguments)])
    assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_the_package_s_own_bundle_is_not_changed(fake_gpu: FakeGpu) -> None:
    with pytest.raises(InputError, match="export builtin with --out"):
        build_plan("builtin")


def test_old_gpus_have_no_bf16(static: Path, monkeypatch: pytest.MonkeyPatch, fake_gpu: FakeGpu) -> None:
    monkeypatch.setattr(plans, "gpu_architecture", lambda: "sm_75")
    with pytest.raises(InputError, match="sm_75 has no bf16 arithmetic"):
        build_plan(static, replace(QUICK, max_batch=2))


# --------------------------------------------------------------------------------------------------- ahead of time
@pytest.fixture
def fake_rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """TensorRT for RTX, on a machine whose GPU nobody may ask."""
    machine = install(monkeypatch, rtx=True)
    monkeypatch.setattr(plans, "gpu_architecture", lambda: pytest.fail("the GPU was asked"))
    yield machine
    gc.collect()


def test_an_engine_is_built_for_named_gpus_without_one(static: Path, fake_rtx: FakeGpu) -> None:
    options = PlanOptions(opt_batch=2, max_batch=3, architectures=("sm_86", "sm_120"))
    name, record = build_plan(static, options, flavour=RTX)
    assert name == "plans/rtx-sm_86-sm_120-1.7.1.116-b1-2-3.plan"
    assert fake_rtx.tensorrt.fake.capabilities == ["SM86", "SM120"]
    assert (record.builder, record.version) == ("tensorrt-rtx", "1.7.1.116")
    assert record.architectures == ["sm_86", "sm_120"] and record.parity.cases == []
    assert (record.attention, record.fused_attention, record.scratch_bytes) == (2, 2, [1 << 20, 2 << 20])
    assert Bundle.open(static).manifest.plans == {name: record}
    stages: list[str] = []
    assert build_plan(static, options, flavour=RTX, report=stages.append) == (name, record) and "kept" in stages[-1]
    _, other = build_plan(static, PlanOptions(opt_batch=1, max_batch=1), flavour=RTX)
    assert other.architectures == ["sm_80", "sm_86", "sm_89", "sm_120", "sm_121"]  # 7.5 has no bf16
    with pytest.raises(InputError, match=r"sm_75 has no bf16 arithmetic: .*or for newer GPUs"):
        build_plan(static, PlanOptions(architectures=("sm_75", "sm_80")), flavour=RTX)


def test_a_builder_that_says_nothing(static: Path, fake_rtx: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes_tensorrt.Builder, "_report_of", lambda self, layers, profiles: ["in other words"])
    with pytest.raises(BackendError, match=r"1\.7\.1\.116 does not say what it built, .*pip install 'tensorrt-rtx"):
        build_plan(static, PlanOptions(opt_batch=1, max_batch=1), flavour=RTX)


def test_attention_must_be_one_kernel_in_every_profile(
    static: Path, fake_rtx: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fakes_tensorrt.Network.layers_of_plan

    def only_single_images(network: Any, count: int) -> list[dict[str, str]]:
        layers = real(network, count)
        return [layer for layer in layers if "_myl1_" not in layer["Name"] or "attention_0" not in layer["Metadata"]]

    monkeypatch.setattr(fakes_tensorrt.Network, "layers_of_plan", only_single_images)
    with pytest.raises(InputError, match=r"did not fuse attention_0 \(.*1 of 2"):
        build_plan(static, PlanOptions(opt_batch=2, max_batch=2), flavour=RTX)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--version-compatible"], "--version-compatible is for plans of --target tensorrt"),
        (["--timing-cache", "t"], "--timing-cache is for plans of --target tensorrt"),
        (["--architectures", "sm90"], "does not run on sm_90: expected all, or some of sm_75,sm_80"),
        (["--architectures", "sm75,,x"], "does not run on sm_, sm_x"),
    ],
)
def test_options_that_it_has_no_place_for(static: Path, fake_rtx: FakeGpu, options: list[str], message: str) -> None:
    result = CliRunner().invoke(program(), ["export", str(static), "--target", "tensorrt-rtx", *options])
    assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_architectures_are_for_it_alone(static: Path, fake_gpu: FakeGpu) -> None:
    command = ["export", str(static), "--target", "tensorrt", "--architectures", "sm_80"]
    result = CliRunner().invoke(program(), command)
    assert "--architectures is for --target tensorrt-rtx" in str(result.exception)
    assert parse_plan_architectures("all") is None
    assert parse_plan_architectures("sm75, SM_120,120,sm75") == ("sm_75", "sm_120")
