"""What stays in fp32 when OpenVINO runs an encoder in bf16: marks that it heeds, and a check that it did."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from facetrt.engine.bundle.manifest import CLS_ATTENTION, Fp32Parts
from facetrt.kernels.errors import BackendError

ISLANDS = "patch convolution, residual stream"  # what bf16 always leaves in fp32; part of the cache's key
KEEP_FP32 = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}


def keep_in_fp32(openvino: Any, core: Any, model: Any, parts: Fp32Parts) -> tuple[Any, set[str]]:
    """The model with its patch convolution, residual stream and ``parts`` marked to stay in fp32 when it runs in bf16.

    In bf16 the convolution of 0..255 bytes loses what the folded mean would cancel, and the residual stream loses a
    little in each of its additions. With both in fp32 the relative error of ViT-S/8's layer-9 keys falls from 1.33 % to
    0.70 % and the time grows by 1 %. Beside the model come the names of the products of ``parts``.
    """
    marked, products = _stem(model) | _residuals(model), set[str]()
    kept = _parts(model, parts)
    if kept:
        unfused = _Unfused(openvino, model)
        for node in kept:
            unfused.rewrite(node)
        marked |= {node.get_friendly_name() for node in kept} | unfused.names
        products = unfused.products
    return mark_fp32(openvino, core, model, marked), products


def mark_fp32(openvino: Any, core: Any, model: Any, names: Collection[str]) -> Any:
    """The model with the nodes of these names marked to stay in fp32, beside those that are marked already.

    The mark can be set only in OpenVINO's own file format, so the model goes through a file.
    """
    with tempfile.TemporaryDirectory(prefix="facetrt-") as folder:
        path = Path(folder) / "encoder.xml"
        openvino.serialize(model, str(path))
        tree = ElementTree.parse(path)
        for layer in tree.iter("layer"):
            if layer.get("name") in names:
                _mark(layer)
        tree.write(path)
        return core.read_model(str(path))


def _mark(layer: ElementTree.Element) -> None:
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        layer.insert(0 if layer.find("data") is None else 1, info)
    ElementTree.SubElement(info, "attribute", KEEP_FP32)


def _stem(model: Any) -> set[str]:
    """Everything before the first matrix product: bytes, patch convolution, positional table."""
    names: set[str] = set()
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            break
        names.add(node.get_friendly_name())
    return names


def _residuals(model: Any) -> set[str]:
    """Additions of two computed tensors; biases are constants."""
    return {node.get_friendly_name() for node in model.get_ordered_ops() if _is_residual(node)}


def _is_residual(node: Any) -> bool:
    return node.get_type_name() == "Add" and all(source.get_type_name() != "Constant" for source in _sources(node))


def _parts(model: Any, parts: Fp32Parts) -> list[Any]:
    """The nodes that ``parts`` are made of.

    A node's block is told by how many residual additions lie before it, of which a block has two. [CLS] attention is
    what its output needs of the last block.
    """
    blocks = _blocks(model)
    names = {name for name, block in blocks.items() if block in parts.blocks}
    results = model.get_results() if parts.cls_attention else []
    waiting = [node for node in results if CLS_ATTENTION in node.get_friendly_name()]
    last = max((blocks[node.get_friendly_name()] for node in waiting), default=0)
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        name = node.get_friendly_name()
        if name not in seen and blocks.get(name) == last:
            seen.add(name)
            waiting += _sources(node)
    return [node for node in model.get_ordered_ops() if node.get_friendly_name() in names | seen]


class _Unfused:
    """Rewrites products and attention so that a mark on them lives.

    OpenVINO turns a product with constant weights into another operation, attention into a fused one, and moves
    constant factors about; marks are lost on the way. So constants get a zero added that is known at run time only, and
    the softmax of attention goes over the other axis, which is not fused.

    Attributes:
        names: of all nodes made.
        products: of those among them that must run in fp32.
    """

    def __init__(self, openvino: Any, model: Any) -> None:
        self.names: set[str] = set()
        self.products: set[str] = set()
        self._ops, self._softmax = openvino.opset14, openvino.opset1.softmax
        images = next(port for port in model.inputs if "images" in port.get_names())
        pixels = self._made(self._ops.reshape(images, np.array([-1]), False))
        first = self._made(self._ops.gather(pixels, np.array([0]), np.array(0)))
        number = self._made(self._ops.convert(first, "f32"))
        self._zero = self._made(self._ops.multiply(number, np.zeros(1, np.float32)))

    def rewrite(self, node: Any) -> None:
        """Replace one node, if it is of those kinds, in the model."""
        kind, sources = node.get_type_name(), _sources(node)
        if kind == "ScaledDotProductAttention":
            self._attend(node)
        elif kind == "MatMul" and sources[1].get_type_name() == "Constant":
            weights = self._made(self._ops.unsqueeze(self._input(node, 1), np.array(0)))
            self._replace(node, self._product(self._input(node, 0), self._varying(weights)))
        elif kind == "Multiply" and not sources[1].get_output_partial_shape(0).rank.get_length():
            self._replace(node, self._ops.multiply(self._input(node, 0), self._varying(self._input(node, 1))))

    def _attend(self, node: Any) -> None:
        query, key, value = (self._input(node, i) for i in range(3))
        scale: Any = np.float32(query.get_partial_shape()[3].get_length() ** -0.5)
        if node.get_input_size() > 4:
            scale = self._input(node, 4)
        scaled = self._made(self._ops.multiply(query, self._varying(scale)))
        logits = self._product(key, scaled, transpose_b=True)  # (B, heads, keys, queries)
        weights = self._made(self._softmax(logits, 2))
        self._replace(node, self._product(weights, value, transpose_a=True))

    def _product(self, a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False) -> Any:
        made = self._made(self._ops.matmul(a, b, transpose_a, transpose_b))
        self.products.add(made.get_friendly_name())
        return made

    def _varying(self, constant: Any) -> Any:
        return self._made(self._ops.add(constant, self._zero))

    def _replace(self, node: Any, other: Any) -> None:
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(self._made(other).output(0))

    def _made(self, node: Any) -> Any:
        self.names.add(node.get_friendly_name())
        return node

    @staticmethod
    def _input(node: Any, number: int) -> Any:
        return node.input(number).get_source_output()


def _sources(node: Any) -> list[Any]:
    return [value.get_source_output().get_node() for value in node.inputs()]


def _blocks(model: Any) -> dict[str, int]:
    """The block of each computed node by name; nodes before the first block are in none."""
    before: dict[str, int] = {}
    stem = _stem(model)
    for node in model.get_ordered_ops():
        sources = _sources(node)
        before[node.get_friendly_name()] = max(
            (before[s.get_friendly_name()] + (s.get_friendly_name() not in stem and _is_residual(s)) for s in sources),
            default=0,
        )
    constants = {node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == "Constant"}
    return {name: count // 2 for name, count in before.items() if name not in stem | constants}


def check_islands(compiled: Any, openvino: Any, products: set[str]) -> None:
    """Raise :class:`BackendError` if this OpenVINO did not heed the marks of the convolution or of a product."""
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kept = products.intersection(info["originalLayersNames"].value.split(","))
        if (info["layerType"].value == "Convolution" or kept) and info["runtimePrecision"].value != "f32":
            what = "a product" if kept else "the patch convolution"
            raise BackendError(
                f"openvino {openvino.get_version()} does not keep {what} in fp32, so bf16 would miss its accuracy: "
                "install openvino 2026.4 or newer, or use precision fp32"
            )
