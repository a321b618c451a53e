"""Half-precision graphs in fp32 arithmetic: what ONNX Runtime's CPU can run, to compare others with.

Widened without rounding, a graph gives what its half-precision weights would give in exact arithmetic: the reference
that a TensorRT plan is held to. With rounding, each half-precision tensor is rounded to its type as it is made: that is
what hardware does that sums in fp32 and stores halves, and ONNX Runtime's CPU has no bf16 matrix product of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from facetrt.kernels.errors import InputError

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def widen(model: onnx.ModelProto, *, rounding: bool) -> onnx.ModelProto:
    """The graph with every fp16 and bf16 tensor in fp32, each rounded to its old type where it is made if asked.

    Raises:
        InputError: a node whose type cannot be told, or one with a sub-graph.
    """
    if rounding and model.functions:  # what they make is rounded, too
        model = onnx.inliner.inline_local_functions(model)
    kinds = _kinds(model)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for function in wide.functions:
        for node in function.node:
            _widen_attributes(node)
    del graph.value_info[:]
    nodes = [made for node in graph.node for made in _widen_node(node, kinds, rounding=rounding)]
    del graph.node[:]
    graph.node.extend(nodes)
    return wide


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor that a node makes."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}


def _widen_node(node: onnx.NodeProto, kinds: dict[str, int], *, rounding: bool) -> list[onnx.NodeProto]:
    """The node in fp32, followed by what rounds its results."""
    _widen_attributes(node)
    made = [node]
    for i, name in enumerate(node.output):
        if name and not kinds.get(name):
            raise InputError(f"the type of {name}, made by {node.op_type} {node.name}, cannot be told from the graph")
        if rounding and name and kinds[name] in HALVES and node.op_type != "Constant":
            node.output[i] = f"{name}/exact"
            made.append(helper.make_node("Cast", [node.output[i]], [f"{name}/half"], to=kinds[name]))
            made.append(helper.make_node("Cast", [f"{name}/half"], [name], to=TensorProto.FLOAT))
    return made


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise InputError(f"{node.op_type} {node.name} holds a sub-graph: only flat graphs can be widened")
        if attribute.type == onnx.AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES:
            attribute.i = TensorProto.FLOAT


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in HALVES:
        values: Any = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
