"""Attention of long sequences in bf16: over chunks of the keys, merged exactly.

OpenVINO's fused attention slows down beyond 8,192 keys: on a Zen 4 with 1 MB of L2 cache a score takes 1.3 to 1.4 times
as long, up to 16,384 keys, and as long as before beyond. Those bounds do not depend on the heads' width. Attention to
shorter chunks of the keys stays fast. In fp32 nothing is gained.

The merge needs to know how much a chunk weighs, which fused attention does not tell. So each chunk gets one more key,
the mean of all keys, which has one logit ``m`` for a query in all chunks. Values get two more columns, which hold the
shares that the chunk's own keys and the mean key have::

    x = Σ exp(logits) / (Σ exp(logits) + exp(m))        y = exp(m) / (Σ exp(logits) + exp(m))

``output / y`` and ``x / y`` are then the chunk's values and weight in a unit that all chunks share, and the sum of the
former by that of the latter is attention to all keys. The exponential is convex, so these weigh at least as much as
they are many: nothing goes wrong unless a ``y`` underflows, which the extreme weights tell (:func:`is_exact`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY_WEIGHTS = "key_weights"  # an output: logarithms of the extreme weights of all keys, in units of the mean key's
LONG = range(8193, 16385)  # keys
CHUNK = 3100  # keys at most; 12,322 keys take as long in 4 to 8 chunks, and 5 to 8 % longer in 3 or 12
EXACT = (0.0, 69.0)  # logarithms of weights: at exp(69) a share is 1e-30, far from underflow


def is_long(keys: int) -> bool:
    """Whether attention over so many keys is faster in chunks."""
    return keys in LONG


def is_exact(weights: NDArray[np.float32]) -> bool:
    """Whether a run with this output ``key_weights`` merged its chunks exactly; not if one is NaN."""
    return bool(weights.min() >= EXACT[0] and weights.max() <= EXACT[1])


def chunk_attention(openvino: Any, model: Any) -> tuple[set[str], set[str]]:
    """Rewrite the model's attention over a long, known number of keys, in place.

    The model then has the output ``key_weights``.

    Returns:
        The names of the nodes that must stay in fp32 when the model runs in bf16, and of the products among them. Both
        are empty, and the model is what it was, if no attention is long.
    """
    chunks = _Chunks(openvino)
    for node in model.get_ordered_ops():
        if _pays(node):
            chunks.rewrite(node)
    if chunks.weights:
        model.add_outputs(chunks.all_weights())
    return chunks.names, chunks.products


def is_fused(compiled: Any, products: set[str]) -> bool:
    """Whether each of these products runs inside a fused attention that gives fp32.

    An attention that is not fused writes all scores to memory, and one that gives bf16 rounds once more.
    """
    found: set[str] = set()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].value == "Subgraph" and info["runtimePrecision"].value == "f32":
            found |= products.intersection(info["originalLayersNames"].value.split(","))
    return found == products


def _pays(node: Any) -> bool:
    """Whether it is attention without a mask, over so many keys that chunks of them pay."""
    if node.get_type_name() != "ScaledDotProductAttention" or node.get_attributes()["causal"]:
        return False
    masked = node.get_input_size() > 3 and node.input(3).get_partial_shape().rank != 0
    keys = node.input(1).get_partial_shape()[2]
    return not masked and keys.is_static and is_long(keys.get_length())


class _Chunks:
    """Rewrites nodes of attention.

    OpenVINO makes other nodes of divisions and reciprocals, which lose their marks for fp32: shares are divided as
    logarithms, and the rest is additions and products.

    Attributes:
        names: of the nodes made that must stay in fp32.
        products: of those among them that multiply shares and values.
        weights: the lightest and the heaviest of each node, ``(1, 1, 1, 1)`` each.
    """

    def __init__(self, openvino: Any) -> None:
        self.names: set[str] = set()
        self.products: set[str] = set()
        self.weights: list[Any] = []
        self._ops, self._softmax = openvino.opset14, openvino.opset1.softmax

    def all_weights(self) -> Any:
        """One output of all weights."""
        output = self._fp32(self._ops.concat(self.weights, 0)).output(0)
        output.set_names({KEY_WEIGHTS})
        return output

    def rewrite(self, node: Any) -> None:
        """Replace one node of attention in its model."""
        query, key, value = (node.input_value(i) for i in range(3))
        scale = node.input_value(4) if node.get_input_size() > 4 else np.float32(_length(query, 3) ** -0.5)
        chunks = self._attended(self._ops.multiply(query, scale), key, value)
        merged = self._merged(chunks, _length(value, 3))
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(merged.output(0))

    def _attended(self, query: Any, key: Any, value: Any) -> list[Any]:
        """What attention gives for each chunk: ``(B, heads, queries, width + 2)``, the shares x and y last."""
        keys, mean = _length(key, 2), self._ops.reduce_mean(key, np.array([2]), True)
        count = -(-keys // CHUNK)
        bounds = pairwise(keys * i // count for i in range(count + 1))
        return [
            self._attend(
                query,
                self._ops.concat([self._cut(key, 2, begin, end), mean], 2),
                self._extended(self._cut(value, 2, begin, end)),
            )
            for begin, end in bounds
        ]

    def _attend(self, query: Any, key: Any, value: Any) -> Any:
        """Attention that is fused, and written so that a mark on its last product lives."""
        shares = self._softmax(self._ops.matmul(query, key, False, True), 3)
        product = self._fp32(self._ops.matmul(shares, value, False, False))
        self.products.add(product.get_friendly_name())
        return product

    def _extended(self, value: Any) -> Any:
        """Values with the mean key's row, which is zero, and the columns that sum shares."""
        keys, width = _length(value.output(0), 2), _length(value.output(0), 3)
        ones = np.zeros((1, 1, keys + 1, width + 2), np.float32)
        ones[..., :keys, width] = ones[..., keys, width + 1] = 1
        padded = self._ops.pad(value, np.zeros(4, int), np.array([0, 0, 1, 2]), "constant", np.float32(0))
        return self._ops.add(padded, ones)

    def _merged(self, chunks: list[Any], width: int) -> Any:
        """Outputs of the chunks, each by ``1 / y`` and all by the sum of ``x / y``."""
        own, mean = (
            [self._fp32(self._ops.log(self._cut(chunk, 3, width + i, width + i + 1))) for chunk in chunks]
            for i in (0, 1)
        )
        weight = self._fp32(self._ops.log(self._sum([self._ratio(*pair) for pair in zip(own, mean, strict=True)])))
        for extreme in (self._ops.reduce_min, self._ops.reduce_max):
            self.weights.append(self._fp32(extreme(weight, np.arange(4), True)))
        factors = [self._ratio(np.float32(0), self._fp32(self._ops.add(share, weight))) for share in mean]
        outputs = [self._cut(chunk, 3, 0, width) for chunk in chunks]
        return self._sum([self._fp32(self._ops.multiply(*pair)) for pair in zip(outputs, factors, strict=True)])

    def _ratio(self, a: Any, b: Any) -> Any:
        """One number by another, of their logarithms."""
        return self._fp32(self._ops.exp(self._fp32(self._ops.subtract(a, b))))

    def _sum(self, terms: list[Any]) -> Any:
        total, *rest = terms
        for term in rest:
            total = self._fp32(self._ops.add(total, term))
        return total

    def _cut(self, whole: Any, axis: int, begin: int, end: int) -> Any:
        return self._ops.slice(whole, *(np.array([number]) for number in (begin, end, 1, axis)))

    def _fp32(self, node: Any) -> Any:
        self.names.add(node.get_friendly_name())
        return node


def _length(value: Any, axis: int) -> int:
    return int(value.get_partial_shape()[axis].get_length())
