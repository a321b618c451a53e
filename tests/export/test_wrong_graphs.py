"""The export's check tells rounding from a wrong graph, on ordinary weights and on such as training makes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import facets, registered
from onnx import helper, numpy_helper
from trained_like import KINDS, SPEC, trained_like

from facetrt.engine import ParityError
from facetrt.engine.bundle.manifest import Checkpoint, Manifest
from facetrt.export import exporting
from facetrt.export.export_options import ExportOptions
from facetrt.export.exporting import load_model, resolve_options, verify

OPTIONS = ExportOptions(stride=8, facets=facets("key@1,query@3,token@3,key@4"), saliency_heads=(0, 2))


@dataclass(frozen=True)
class Traced:
    """A graph, written, and the torch model that it was made from."""

    folder: Path
    manifest: Manifest
    vit: Any
    right: onnx.ModelProto

    def verify(self, graph: onnx.ModelProto) -> None:
        onnx.save(graph, self.folder / "encoder.onnx")
        verify(self.folder, self.manifest, self.vit, SPEC)

    def graph(self) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(self.right)
        return copy


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Traced]]:
    """Graphs of any weights: traced once, the weights replaced afterwards; the torch model runs once for each."""
    folder = tmp_path_factory.mktemp("traced")
    options = resolve_options(SPEC, OPTIONS)
    base = load(folder, "sharp1")
    manifest = exporting.write_files(
        folder, base, SPEC, options, exporting._manifest(SPEC, options, Checkpoint("w.npz", "0"))
    )
    graph = onnx.load(folder / "encoder.onnx")
    made: dict[str, Traced] = {}

    def get(kind: str) -> Traced:
        if kind not in made:
            vit = load(folder, kind)
            right = with_weights(graph, encoder(base, options), encoder(vit, options))
            made[kind] = Traced(folder, manifest, vit, right)
        return made[kind]

    with registered(SPEC), pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "reference_outputs", once_for_each_model(exporting.reference_outputs))
        patch.setattr(exporting, "check_graph", lambda data, manifest: None)  # operators of ours or not: numbers decide
        yield get


def load(folder: Path, kind: str) -> Any:
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        np.savez(Path(place) / "w.npz", **trained_like(kind))
        return load_model(SPEC, Path(place) / "w.npz")[0]


def encoder(vit: Any, options: ExportOptions) -> dict[str, np.ndarray]:
    manifest = exporting._manifest(SPEC, options, Checkpoint("w.npz", "0"))
    made = exporting.make_encoder(vit, SPEC, options, manifest)
    return {name: tensor.detach().numpy() for name, tensor in made.state_dict().items()}


def with_weights(graph: onnx.ModelProto, old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The graph with its weights, which the exporter may have transposed, replaced."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    for tensor in changed.graph.initializer:
        values = numpy_helper.to_array(tensor)
        for name, value in old.items():
            if values.size > 1 and any(np.array_equal(values, form) for form in (value, value.T)):
                right = new[name] if np.array_equal(values, value) else new[name].T
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(right), tensor.name))
    return changed


def once_for_each_model(run: Callable[..., Any]) -> Callable[..., Any]:
    kept: dict[tuple[int, str], Any] = {}

    def outputs(vit: Any, *arguments: Any) -> Any:
        key = (id(vit), str(arguments[-1]))
        if key not in kept:
            kept[key] = (run(vit, *arguments), vit)
        return kept[key][0]

    return outputs


# ------------------------------------------------------------------------------------------------------------ mutations
def nodes(graph: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in graph.graph.node if node.op_type == kind]


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


def constant(graph: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in graph.graph.initializer if t.name == name)


def change(graph: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = constant(graph, name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(edit(numpy_helper.to_array(tensor).copy())), name))


def bypass(graph: onnx.ModelProto, node: onnx.NodeProto, kept: int) -> None:
    """The node's result becomes its input number ``kept``."""
    source, result = node.input[kept], node.output[0]
    node.CopyFrom(helper.make_node("Identity", [source], [result]))


def swapped_head(graph: onnx.ModelProto) -> None:
    """Saliency of head 1 where head 2 was asked."""
    (gather,) = nodes(graph, "GatherND")
    change(graph, gather.input[1], lambda index: np.where(index == 2, 1, index))


def swapped_heads_of_a_projection(graph: onnx.ModelProto) -> None:
    dim, size = SPEC.dim, SPEC.dim // SPEC.heads

    def edit(bias: np.ndarray) -> np.ndarray:
        order = np.r_[size : 2 * size, :size, 2 * size : dim]
        bias[2 * dim :] = bias[2 * dim :][order]
        return bias

    change(graph, "blocks.2.qkv.bias", edit)


def missing_bias(graph: onnx.ModelProto) -> None:
    change(graph, "blocks.3.proj.bias", np.zeros_like)


def missing_bias_of_the_norm(graph: onnx.ModelProto) -> None:
    change(graph, "blocks.0.norm2.bias", np.zeros_like)


def wrong_attention_scale(graph: onnx.ModelProto) -> None:
    attribute(nodes(graph, "MultiHeadAttention")[-1], "scale").f *= 1.05


def unscaled_attention(graph: onnx.ModelProto) -> None:
    attribute(nodes(graph, "MultiHeadAttention")[0], "scale").f = 1.0


def unscaled_cls_logit(graph: onnx.ModelProto) -> None:
    (softmax,) = nodes(graph, "Softmax")
    made = {output: node for node in graph.graph.node for output in node.output}
    bypass(graph, made[made[softmax.input[0]].input[0]], 0)


def wrong_eps(graph: onnx.ModelProto) -> None:
    for node in nodes(graph, "LayerNormalization"):
        attribute(node, "epsilon").f = 1e-5


def swapped_query_and_key(graph: onnx.ModelProto) -> None:
    node = nodes(graph, "MultiHeadAttention")[1]
    node.input[0], node.input[1] = node.input[1], node.input[0]


def dropped_residual(graph: onnx.ModelProto) -> None:
    constants = {t.name for t in graph.graph.initializer}
    adds = [node for node in nodes(graph, "Add") if not set(node.input) & constants]
    bypass(graph, adds[-1], 0)


def tanh_gelu(graph: onnx.ModelProto) -> None:
    """The tanh form: erf(x / √2) ≈ tanh(√(2/π)·(x + 0.044715 x³))."""
    for erf in nodes(graph, "Erf"):
        x, result = erf.input[0], erf.output[0]  # x is already divided by √2
        numbers = {f"{result}/a": np.sqrt(4 / np.pi), f"{result}/b": 0.044715 * 2}
        graph.graph.initializer.extend(numpy_helper.from_array(np.float32(v), n) for n, v in numbers.items())
        made = [
            helper.make_node("Mul", [x, x], [f"{result}/2"]),
            helper.make_node("Mul", [f"{result}/2", x], [f"{result}/3"]),
            helper.make_node("Mul", [f"{result}/3", f"{result}/b"], [f"{result}/cubic"]),
            helper.make_node("Add", [x, f"{result}/cubic"], [f"{result}/sum"]),
            helper.make_node("Mul", [f"{result}/sum", f"{result}/a"], [f"{result}/scaled"]),
            helper.make_node("Tanh", [f"{result}/scaled"], [result]),
        ]
        place = list(graph.graph.node).index(erf)
        others = list(graph.graph.node)
        del graph.graph.node[:]
        graph.graph.node.extend([*others[:place], *made, *others[place + 1 :]])


def channel_order(graph: onnx.ModelProto) -> None:
    change(graph, "patches.weight", lambda weight: weight[:, ::-1])


def half_a_cell_off(graph: onnx.ModelProto) -> None:
    """Positions averaged with their right neighbours: a table that was read half a cell off."""
    add = next(node for node in nodes(graph, "Add") if "positional" in node.input)
    for name, size in (("starts", [1]), ("ends", [2**31]), ("axes", [2]), ("last", [-1])):
        graph.graph.initializer.append(numpy_helper.from_array(np.array(size, np.int64), f"shift/{name}"))
    graph.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "shift/half"))
    made = [
        helper.make_node("Slice", ["positional", "shift/starts", "shift/ends", "shift/axes"], ["shift/rest"]),
        helper.make_node("Slice", ["positional", "shift/last", "shift/ends", "shift/axes"], ["shift/edge"]),
        helper.make_node("Concat", ["shift/rest", "shift/edge"], ["shift/moved"], axis=2),
        helper.make_node("Add", ["positional", "shift/moved"], ["shift/sum"]),
        helper.make_node("Mul", ["shift/sum", "shift/half"], ["shift/positional"]),
    ]
    add.input[list(add.input).index("positional")] = "shift/positional"
    others = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*made, *others])


MUTATIONS = (
    swapped_head, swapped_heads_of_a_projection, missing_bias, missing_bias_of_the_norm, wrong_attention_scale,
    unscaled_attention, unscaled_cls_logit, wrong_eps, swapped_query_and_key, dropped_residual, tanh_gelu,
    channel_order, half_a_cell_off,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_right_graphs_are_accepted(template: Callable[[str], Traced], kind: str) -> None:
    traced = template(kind)
    traced.verify(traced.graph())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("kind", ["sharp1", "sharp8", "both"])
def test_wrong_graphs_are_refused(
    template: Callable[[str], Traced], kind: str, mutation: Callable[[onnx.ModelProto], None]
) -> None:
    traced = template(kind)
    graph = traced.graph()
    mutation(graph)
    with pytest.raises(ParityError, match=r"does not reproduce the model: fp32 misses its contract: \S+ has \w+ "):
        traced.verify(graph)


def test_weights_that_float32_cannot_serve_are_refused_with_that_reason(template: Callable[[str], Traced]) -> None:
    traced = template("ill")
    with pytest.raises(ParityError, match=r"float32 of torch is [\d.]+% off float64 .*cannot be served in fp32"):
        traced.verify(traced.graph())
