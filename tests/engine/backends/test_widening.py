"""Half-precision graphs in fp32 arithmetic."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import TINY, export_tiny, facets, require_openvino
from onnx import TensorProto, helper

from facetrt.engine import Engine, InputError
from facetrt.engine.backends import parity
from facetrt.engine.backends.widening import HALVES, widen
from facetrt.engine.bundle.bundle import Bundle
from facetrt.export.export_options import GraphPrecision

KINDS = {GraphPrecision.FP16: TensorProto.FLOAT16, GraphPrecision.BF16: TensorProto.BFLOAT16}


@pytest.fixture(scope="module", params=KINDS)
def half(request: pytest.FixtureRequest, work: Path, tiny_weights: Path) -> Path:
    names = facets("key@1,token@2")
    return export_tiny(tiny_weights, work / f"wide-{request.param}", precision=request.param, facets=names)


def run(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = {
        "images": rng.integers(0, 256, (2, 36, 52, 3), np.uint8),
        "positional": rng.standard_normal((1, 8, 12, TINY.dim)).astype(np.float32),
        "rows": np.arange(8),
        "cols": np.arange(12),
    }
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def error(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    reports = [
        parity.compare_output(got[n].reshape(-1, got[n].shape[-1]), v.reshape(-1, v.shape[-1]))
        for n, v in expected.items()
    ]
    return max(report["relative_frobenius"] for report in reports)


def test_half_precision_is_where_it_pays(half: Path) -> None:
    manifest = Bundle.open(half).manifest
    graph = onnx.load(half / "encoder.onnx").graph
    weights = [t for t in graph.initializer if len(t.dims) == 2 and t.data_type != TensorProto.INT64]
    kinds = Counter(t.data_type for t in weights)
    kept = manifest.fp32_parts(manifest.precision)  # four products in a block, and two more of [CLS] attention
    exact = 4 * len(kept.blocks) + 2 * (kept.cls_attention and TINY.depth - 1 not in kept.blocks)
    assert kinds[TensorProto.FLOAT] == exact and kinds[KINDS[GraphPrecision(manifest.precision)]] >= 4
    assert kinds.total() == exact + kinds[KINDS[GraphPrecision(manifest.precision)]] >= 9
    shaped = onnx.shape_inference.infer_shapes(onnx.load(half / "encoder.onnx")).graph
    made = {value.name: value.type.tensor_type.elem_type for value in shaped.value_info}
    for node in shaped.node:
        if node.op_type in ("LayerNormalization", "Softmax", "Conv") and node.output[0] in made:
            assert made[node.output[0]] == TensorProto.FLOAT, node.op_type
    assert all(metrics["relative_frobenius"] <= 0.01 for metrics in manifest.parity.outputs.values())


def test_nothing_is_half_and_every_rounding_is_seen(half: Path) -> None:
    model = onnx.load(half / "encoder.onnx")
    plain, rounded = widen(model, rounding=False), widen(model, rounding=True)
    kinds = {value.type.tensor_type.elem_type for value in onnx.shape_inference.infer_shapes(plain).graph.value_info}
    assert not kinds & set(HALVES) and not {t.data_type for t in plain.graph.initializer} & set(HALVES)
    exact, lossy = run(plain), run(rounded)
    precision = Bundle.open(half).manifest.precision
    low, high = (1e-5, 2e-3) if precision == "fp16" else (1e-3, 1e-2)  # bf16 has three bits less
    assert low < error(lossy, exact) < high
    assert model.graph.initializer[0].data_type == onnx.load(half / "encoder.onnx").graph.initializer[0].data_type


def test_processors_refuse_bf16_bundles(half: Path) -> None:
    if Bundle.open(half).manifest.precision != "bf16":
        pytest.skip("fp16 runs on processors")
    for backend in ("auto", "onnxruntime", "openvino"):
        if backend == "openvino":
            require_openvino()
        with pytest.raises(
            InputError, match=r"this bundle is bf16, which runs on a GPU only: use device cuda .*tensorrt"
        ):
            Engine.open(half, backend=backend)


def graph_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    half = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2]) for name in ("x", "y")]
    graph = helper.make_graph(list(nodes), "g", half[:1], half[1:])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def test_inputs_outputs_and_constants() -> None:
    values = helper.make_tensor("c", TensorProto.FLOAT16, [2], np.array([1 / 3, 1], np.float16))
    model = graph_of(helper.make_node("Constant", [], ["c"], value=values), helper.make_node("Add", ["x", "c"], ["y"]))
    for rounding, expected in ((False, np.float32(np.float16(1 / 3)) + np.float32(1e-4)), (True, None)):
        session = onnxruntime.InferenceSession(
            widen(model, rounding=rounding).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (got,) = session.run(None, {"x": np.array([1e-4, 0], np.float32)})
        assert got.dtype == np.float32
        assert got[0] == (np.float32(np.float16(np.float16(1 / 3) + np.float32(1e-4))) if rounding else expected)


def test_graphs_that_cannot_be_widened() -> None:
    branch = helper.make_graph([], "b", [], [])
    with pytest.raises(InputError, match="If n holds a sub-graph"):
        widen(
            graph_of(helper.make_node("If", ["x"], ["y"], "n", then_branch=branch, else_branch=branch)), rounding=True
        )
    foreign = graph_of(
        helper.make_node("Mystery", ["x"], ["z"], "m", domain="a.b"), helper.make_node("Identity", ["z"], ["y"])
    )
    foreign.opset_import.append(helper.make_opsetid("a.b", 1))
    with pytest.raises(InputError, match="the type of z, made by Mystery m, cannot be told"):
        widen(foreign, rounding=False)
