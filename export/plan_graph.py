"""A bundle's graph as TensorRT's parser takes it, and the attentions in it that must become one kernel each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.images.geometry import grid_size
from facetrt.kernels.errors import InputError

Shapes = dict[str, list[list[int]]]  # input → smallest, most likely and largest shape
Size = tuple[int, int]


@dataclass(frozen=True)
class PreparedGraph:
    """An ONNX graph in standard operators.

    Attributes:
        data: the serialised model.
        attention: names of the nodes that are the softmax of an attention over all tokens, in order: that of block 0
            first. [CLS] attention is none of them: it is one row, of which nothing grows with the square of the tokens.
    """

    data: bytes
    attention: tuple[str, ...]


def prepare_graph(encoder: bytes) -> PreparedGraph:
    """The graph for TensorRT's parser.

    The attention function, which is one operation elsewhere, is written out in standard operators, and bytes are cast
    before anything else reads them: TensorRT has bytes at its edge only.

    Raises:
        InputError: a graph with ``If``, which TensorRT has been seen to build wrongly.
    """
    import onnx
    import onnx.inliner

    model = onnx.inliner.inline_local_functions(onnx.load_from_string(encoder))
    branches = [node.name or node.op_type for node in model.graph.node if node.op_type == "If"]
    if branches:
        raise InputError(
            f"the graph branches ({', '.join(branches[:3])}): TensorRT is not trusted with If; export again"
        )
    used = {node.domain for node in model.graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    _cast_first(model.graph)
    names = _name_attention(model.graph)
    return PreparedGraph(bytes(model.SerializeToString()), names)


def _cast_first(graph: Any) -> None:
    """Let everything that reads the images read them after their cast."""
    nodes = list(graph.node)
    cast = next((node for node in nodes if node.op_type == "Cast" and node.input[0] == "images"), None)
    if cast is None:
        raise InputError("the graph does not cast its images first: it is not one of facetrt's; export again")
    nodes.remove(cast)
    for node in nodes:
        for i, name in enumerate(node.input):
            if name == "images":
                node.input[i] = cast.output[0]
    nodes.insert(0, cast)
    del graph.node[:]
    graph.node.extend(nodes)


def _name_attention(graph: Any) -> tuple[str, ...]:
    """Give each attention's softmax the name that messages and the builder's layers then know it by."""
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = [node for node in graph.node if node.op_type == "Softmax" and _is_multiplied(node, readers)]
    for block, node in enumerate(found):
        node.name = f"attention_{block}"
    return tuple(node.name for node in found)


def _is_multiplied(node: Any, readers: dict[str, list[Any]]) -> bool:
    """Whether a node's result, cast or not, goes into a matrix product: with the values."""
    following = readers.get(node.output[0], [])
    return any(n.op_type == "MatMul" or (n.op_type == "Cast" and _is_multiplied(n, readers)) for n in following)


def profile_shapes(manifest: Manifest, batches: tuple[int, int, int], sizes: tuple[Size, Size, Size]) -> Shapes:
    """Smallest, most likely and largest shape of each input.

    The smallest grid is that of the smallest image with the stride of a whole patch, which low-resolution saliency and
    larger strides take; carriers are those of whole patches at any stride. A bundle of one size has that size.
    """
    if manifest.size is not None:
        return {"images": [[batch, *manifest.size, 3] for batch in batches]}
    model = manifest.architecture
    patch, half = model.patch, model.head_dim // 2
    strides = (patch, manifest.stride, manifest.stride)
    grids = [grid_size(size, patch, stride) for size, stride in zip(sizes, strides, strict=True)]
    carriers = [[model.prefix + math.prod(grid_size(size, patch, patch))] for size in sizes]
    return {
        "images": [[batch, *size, 3] for batch, size in zip(batches, sizes, strict=True)],
        "positional": [[1, *grid, model.dim] for grid in grids],
        **({} if manifest.rotation is None else {"rotation": [[2, *grid, half] for grid in grids]}),
        "rows": [[grid[0]] for grid in grids],
        "cols": [[grid[1]] for grid in grids],
        **({} if manifest.riders is None else {"carriers": carriers}),
    }


def profiles(shapes: Shapes) -> list[Shapes]:
    """Profiles to build with: one image first, because kernels chosen for a batch are slow for one, then batches."""
    low, likely, high = shapes["images"]
    if high[0] == 1:
        return [shapes]
    single = [[1, *shape[1:]] for shape in (low, likely, high)]
    return [{**shapes, "images": single}, shapes]
