"""NVIDIA's own parser and builder, those of TensorRT for RTX, which need no GPU, on the graphs that are exported."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from helpers import TINY, export_tiny, facets
from helpers_backbones import tiny as tiny_of
from onnx import TensorProto, helper
from typer.testing import CliRunner

from facetrt.engine.backends.flavours import RTX
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import Checkpoint, Manifest
from facetrt.engine.cli.main import program
from facetrt.export import exporting
from facetrt.export.export_options import ExportOptions, GraphPrecision
from facetrt.export.exporting import resolve_options
from facetrt.export.models import ModelSpec, find_model
from facetrt.export.plan_builder import Built, PlanBuilder, Settings
from facetrt.export.plan_graph import PreparedGraph, prepare_graph, profile_shapes, profiles
from facetrt.export.plans import PlanOptions, build_plan
from facetrt.kernels.errors import InputError

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="the extra rtx is not installed")

ALL_KINDS = facets("key@0,query@1,value@1,token@1,normed@2,key@2")  # with saliency, of the last block
WORKSPACE = 20 << 20  # bytes of scratch memory that are taken whatever the size
BYTES = 32  # more for each token and channel, at most; a t × t matrix would take thousands
FP16, BF16, FP32 = GraphPrecision.FP16, GraphPrecision.BF16, GraphPrecision.FP32
NEWER = Settings(architectures=[name for name in RTX.architectures or () if name != "sm_75"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PreparedGraph, Manifest]]:
    """Graphs of the tiny model, each traced once."""
    known: dict[str, tuple[PreparedGraph, Manifest]] = {}

    def make(**options: object) -> tuple[PreparedGraph, Manifest]:
        key = str(sorted(options.items()))
        if key not in known:
            known[key] = graph_of(TINY, tmp_path_factory.mktemp("tiny"), **options)
        return known[key]

    return make


def graph_of(spec: ModelSpec, folder: Path, **options: object) -> tuple[PreparedGraph, Manifest]:
    """The graph as it is exported, with weights that nobody trained."""
    chosen = resolve_options(spec, ExportOptions(**options))  # type: ignore[arg-type]
    manifest = exporting._manifest(spec, chosen, Checkpoint("untrained", ""))
    manifest = exporting.write_files(folder, spec.build(), spec, chosen, manifest)
    return prepare_graph((folder / "encoder.onnx").read_bytes()), manifest


def build(graph: PreparedGraph, manifest: Manifest, *, batch: int = 1, largest: int = 448) -> Built:
    sizes = ((64, 64), (min(224, largest),) * 2, (largest,) * 2)
    shapes = profile_shapes(manifest, (1, batch, batch), sizes)  # type: ignore[arg-type]
    return PlanBuilder(graph, RTX, lambda stage: None).build(profiles(shapes), NEWER)


def tokens(manifest: Manifest, side: int) -> int:
    cells = 1 + (side - manifest.architecture.patch) // manifest.stride
    return 1 + cells**2


def check_scratch(built: Built, manifest: Manifest, largest: int, batches: tuple[int, ...]) -> None:
    """Linear in tokens."""
    for nbytes, batch in zip(built.scratch_bytes, batches, strict=True):
        assert nbytes <= WORKSPACE + batch * tokens(manifest, largest) * manifest.architecture.dim * BYTES


@pytest.mark.parametrize("size", [None, (112, 96)], ids=["dynamic", "static"])
@pytest.mark.parametrize("precision", [FP16, BF16])
def test_attention_is_one_kernel_in_half_precision(
    tiny: Callable[..., tuple[PreparedGraph, Manifest]], precision: GraphPrecision, size: tuple[int, int] | None
) -> None:
    graph, manifest = tiny(facets=ALL_KINDS, precision=precision, size=size)
    assert graph.attention == ("attention_0", "attention_1", "attention_2")
    built = build(graph, manifest, batch=4, largest=224)
    assert built.unfused == () and built.layers > 30 and len(built.data) > 1000
    check_scratch(built, manifest, 224 if size is None else 112, (1, 4))


def test_scratch_memory_grows_with_the_tokens_and_not_with_their_square(
    tiny: Callable[..., tuple[PreparedGraph, Manifest]],
) -> None:
    graph, manifest = tiny(facets=ALL_KINDS, precision=FP16, size=None)
    (small,), (large,) = (build(graph, manifest, largest=side).scratch_bytes for side in (112, 448))
    assert large / small <= 1.2 * tokens(manifest, 448) / tokens(manifest, 112)


def test_attention_in_fp32_is_not_fused_and_holds_its_square(
    tiny: Callable[..., tuple[PreparedGraph, Manifest]],
) -> None:
    graph, manifest = tiny(facets=ALL_KINDS, precision=FP32, size=None)
    built = build(graph, manifest, largest=224)
    assert built.unfused == graph.attention
    assert built.scratch_bytes[0] > manifest.architecture.heads * tokens(manifest, 224) ** 2 * 4


def test_the_built_in_model(tmp_path: Path) -> None:
    """The command that is in the README, from a checkpoint to a bundle that says what it holds."""
    out = str(tmp_path / "bundle")
    command = ["export", "builtin", "--target", "tensorrt-rtx", "--precision", "fp16", "--out", out]
    result = CliRunner().invoke(program(), [*command, "--max-batch", "2"], catch_exceptions=False)
    assert "3 of 3 attentions fused" in " ".join(result.output.split())
    ((name, record),) = Bundle.open(out).manifest.plans.items()
    assert record.builder == "tensorrt-rtx" and "sm_89" in record.architectures and record.parity.cases == []
    assert name.startswith("plans/rtx-") and Bundle.open(out).read(name) and len(record.scratch_bytes) == 2
    shown = " ".join(CliRunner().invoke(program(), ["info", out]).output.split())
    for words in ("sm_89", "fused", "MB", "runs", RTX.title.split()[-1]):
        assert words in shown


@pytest.mark.parametrize(
    ("model", "precision", "size", "largest"),
    [("dino_vits8", FP16, None, 448), ("dino_vits16", BF16, (224, 224), 224)],
    ids=["vits8-dynamic", "vits16-static"],
)
def test_vit_s(
    model: str, precision: GraphPrecision, size: tuple[int, int] | None, largest: int, tmp_path: Path
) -> None:
    graph, manifest = graph_of(
        find_model(model), tmp_path, facets=facets("key@9,token@11"), precision=precision, size=size
    )
    built = build(graph, manifest, largest=largest)
    assert len(graph.attention) == 12 and built.unfused == ()
    assert built.scratch_bytes[0] < 120e6
    check_scratch(built, manifest, largest, (1,))


@pytest.mark.parametrize(
    ("name", "precision"), [("dinov3_vits16", FP16), ("dinov3_vits16plus", BF16), ("eva02_vitb14", FP16)]
)
def test_attention_of_every_family_is_fused(name: str, precision: GraphPrecision, tmp_path: Path) -> None:
    """That of models which rotate included, with both kinds of keys leaving the graph."""
    spec = tiny_of(name)
    wanted = "key@1,token@2,rotated_key@1" if spec.family.rotation else "key@1,token@2"
    graph, manifest = graph_of(spec, tmp_path, facets=facets(wanted), precision=precision)
    built = build(graph, manifest, largest=224)
    assert len(graph.attention) == spec.depth and built.unfused == ()
    check_scratch(built, manifest, 224, (1,))


def test_attention_that_is_not_fused_fails_the_export(tiny_weights: Path, tmp_path: Path) -> None:
    bundle = export_tiny(tiny_weights, tmp_path / "fp32", size=(64, 64), facets=facets("key@1"), measure=False)
    options = PlanOptions(opt_batch=1, max_batch=1)
    with pytest.raises(InputError, match="does not fuse attention in fp32"):
        build_plan(bundle, options, flavour=RTX)
    _, record = build_plan(bundle, PlanOptions(opt_batch=1, max_batch=1, allow_unfused=True), flavour=RTX)
    assert (record.attention, record.fused_attention) == (2, 0) and "sm_75" not in record.architectures
    with pytest.raises(InputError, match="sm_75 has no fp32 matrix products in TensorRT for RTX"):
        build_plan(bundle, PlanOptions(architectures=("sm_75",), allow_unfused=True), flavour=RTX)


@pytest.mark.parametrize("operation", ["Softmax", "LayerNormalization", "ReduceMean"])
def test_sums_in_half_precision_are_refused(operation: str) -> None:
    ones = helper.make_tensor("ones", TensorProto.FLOAT16, [3], [1.0] * 3)
    more = ["ones"] if operation == "LayerNormalization" else []
    nodes = [
        helper.make_node("Cast", ["images"], ["half"], "cast", to=TensorProto.FLOAT16),
        helper.make_node(operation, ["half", *more], ["out"], "sum"),
    ]
    values = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 8, 8, 3])
    shape = [1, 1, 1, 1] if operation == "ReduceMean" else [1, 8, 8, 3]
    made = helper.make_tensor_value_info("out", TensorProto.FLOAT16, shape)
    graph = helper.make_graph(nodes, "g", [values], [made], [ones] if more else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    with pytest.raises(InputError, match="sums in half precision"):
        PlanBuilder(PreparedGraph(model.SerializeToString(), ()), RTX, lambda stage: None)


def test_profiles_that_the_builder_refuses(tiny: Callable[..., tuple[PreparedGraph, Manifest]]) -> None:
    graph, manifest = tiny(facets=ALL_KINDS, precision=FP16, size=None)
    shapes = profile_shapes(manifest, (1, 1, 1), ((64, 64), (96, 96), (112, 112)))
    builder = PlanBuilder(graph, RTX, lambda stage: None)
    for wrong in ([[2, 64, 64, 3], [1, 96, 96, 3], [1, 112, 112, 3]], [[-1, 64, 64, 3]] * 3):
        with pytest.raises(InputError, match="TensorRT for RTX refuses the profile"):
            builder.build([{**shapes, "images": wrong}], NEWER)
