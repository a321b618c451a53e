"""Attention as one operation of the exported graph.

Written out, attention holds a t × t matrix per head. The graph calls a function instead, whose body is that very
formula in standard operators and whose name is that of ONNX Runtime's fused kernel: ONNX Runtime runs the kernel, block
by block, and every other runtime reads the body (OpenVINO and TensorRT fuse it by themselves). For ViT-S/8 at stride 4
and 224 pixels ONNX Runtime's peak memory falls from 955 to 420 MiB and its time by 7 %; the numbers change by less than
4e-6. In half precision the body's softmax is of fp32.
"""

from __future__ import annotations

from typing import Any

import onnx_ir
import torch
from onnx import TensorProto, helper
from torch import Tensor

DOMAIN, NAME = "com.microsoft", "MultiHeadAttention"


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """Softmax attention of ``(B, t, C)`` queries, keys and values, heads head-major in C; the result likewise."""
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (query, key, value),
            {"num_heads": heads, "scale": scale},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))  # (B, heads, t, d)
    weights = torch.softmax(((q * scale) @ k.transpose(2, 3)).float(), dim=-1)
    mixed: Tensor = weights.to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2)


def add_body(model: onnx_ir.Model, opset: int, kind: int) -> None:
    """Give the graph the function that its attention nodes call, if it has any.

    Args:
        kind: of their inputs, as ONNX numbers it; the softmax is of fp32 whatever they are.
    """
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, NAME)]
    if not nodes:
        return
    heads, scale = nodes[0].attributes["num_heads"].as_int(), nodes[0].attributes["scale"].as_float()
    body = onnx_ir.serde.deserialize_function(_body(heads, scale, opset, kind))
    model.functions[body.identifier()] = body


def _body(heads: int, scale: float, opset: int, kind: int) -> Any:
    """The formula of :func:`attention`; all nodes of a graph have the same heads and scale."""
    split, join = ("split", [0, 0, heads, -1]), ("join", [0, 0, -1])
    shapes = [
        helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape))
        for name, shape in (split, join)
    ]
    factor = helper.make_tensor("scale", kind, [], [scale])
    nodes = [*shapes, helper.make_node("Constant", [], ["factor"], value=factor)]
    for name, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}_heads"]))
        nodes.append(helper.make_node("Transpose", [f"{name}_heads"], [f"{name}_split"], perm=order))
    nodes += [
        helper.make_node("Mul", ["query_split", "factor"], ["query_scaled"]),
        helper.make_node("MatMul", ["query_scaled", "key_split"], ["logits"]),
        *_softmax(kind),
        helper.make_node("MatMul", ["weights", "value_split"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["mixed_cells"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["mixed_cells", "join"], ["output"]),
    ]
    opsets = [helper.make_opsetid("", opset)]
    names = ["query", "key", "value"]
    return helper.make_function(DOMAIN, NAME, names, ["output"], nodes, opsets, ["num_heads", "scale"])


def _softmax(kind: int) -> list[Any]:
    if kind == TensorProto.FLOAT:
        return [helper.make_node("Softmax", ["logits"], ["weights"], axis=-1)]
    return [
        helper.make_node("Cast", ["logits"], ["wide_logits"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["wide_logits"], ["wide_weights"], axis=-1),
        helper.make_node("Cast", ["wide_weights"], ["weights"], to=kind),
    ]
