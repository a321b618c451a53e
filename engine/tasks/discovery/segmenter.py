"""SelfMask's trained segmenter: queries that look at an image's tokens, each with a mask and how much an object it is.

Its weights lie in a bundle beside the encoder that was trained with them. It is small beside the encoder and runs on
the processor, in fp32, whatever runs the encoder.
Source: Shin et al., "Unsupervised Salient Object Detection with Spectral Cluster Voting"; specification, selfmask B.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Float
from facetrt.kernels.errors import BundleError
from facetrt.kernels.parallel import one_blas_thread

HEAD_WIDTH = 64  # channels of a head, as in the encoder
EPSILON = 1e-5  # of the decoder's normalisations; the encoder's is 1e-6
MAX_QUERIES, MAX_LAYERS = 1024, 64


@dataclass(frozen=True)
class Decoded:
    """What the last layer says: ``queries (Q, C)`` float32 and ``objectness (Q,)`` float32 in [0, 1]."""

    queries: Float
    objectness: Float


@dataclass(frozen=True)
class Segmenter:
    """The decoder's weights, by the names of the published checkpoint. Make one with :meth:`of` or :meth:`read`."""

    weights: Mapping[str, Float]
    layers: int

    @property
    def width(self) -> int:
        """Channels of the tokens that it takes."""
        return int(self.weights["query_embed"].shape[1])

    @staticmethod
    def of(weights: Mapping[str, Float], source: str) -> Segmenter:
        """Check that ``weights`` are a decoder's, all of them and no others.

        Raises:
            BundleError: a tensor that is missing, extra, of another shape or not finite; the message names it.
        """
        if "query_embed" not in weights or weights["query_embed"].ndim != 2:
            raise BundleError(f"{source} holds no segmenter: expected a tensor query_embed (queries, channels)")
        queries, width = weights["query_embed"].shape
        numbers = [int(found[1]) for name in weights if (found := re.match(r"decoder\.layers\.(\d{1,3})\.", name))]
        layers = 1 + max(numbers, default=-1)
        if not (0 < queries <= MAX_QUERIES and 0 < layers <= MAX_LAYERS and width % HEAD_WIDTH == 0 < width):
            raise BundleError(
                f"{source}: a segmenter of {queries} queries, {layers} layers and {width} channels: expected 1 to "
                f"{MAX_QUERIES}, 1 to {MAX_LAYERS}, and a multiple of {HEAD_WIDTH}"
            )
        hidden = weights.get("decoder.layers.0.linear1.bias", np.zeros(0)).size
        expected = _shapes(queries, width, layers, hidden)
        for name in sorted({*expected, *weights}):
            if name not in expected or name not in weights:
                raise BundleError(f"{source}: {name} is {'missing' if name in expected else 'no part of a segmenter'}")
            if weights[name].shape != expected[name]:
                raise BundleError(f"{source}: {name} has shape {weights[name].shape}: expected {expected[name]}")
            if not np.isfinite(weights[name]).all():
                raise BundleError(f"{source}: {name} has values that are not finite")
        return Segmenter({name: np.ascontiguousarray(values, np.float32) for name, values in weights.items()}, layers)

    @staticmethod
    def read(data: bytes, source: str) -> Segmenter:
        """The segmenter in the bytes of an NPZ file; ``source`` is how messages call it.

        Raises:
            BundleError: it is none.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                weights = {name: arrays[name] for name in arrays.files} if unpacked <= len(data) else {}
        except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError, MemoryError) as error:
            raise BundleError(f"{source} cannot be read: it is cut off, or no NPZ file") from error
        if unpacked > len(data):
            raise BundleError(f"{source} is compressed: expected plain arrays")
        if wrong := [name for name, values in weights.items() if values.dtype != np.float32]:
            raise BundleError(f"{source}: {wrong[0]} is {weights[wrong[0]].dtype}: expected float32")
        return Segmenter.of(weights, source)

    def to_bytes(self) -> bytes:
        """An NPZ file, which :meth:`read` takes."""
        file = io.BytesIO()
        np.savez(file, **dict(self.weights))  # type: ignore[arg-type]
        return file.getvalue()

    def decode(self, tokens: Float) -> Decoded:
        """Queries of the last layer, after the final norm, from ``tokens (cells, C)``: the last block's, normed."""
        with one_blas_thread:
            places = self.weights["query_embed"]
            queries = np.zeros_like(places)
            for number in range(self.layers):
                queries = self._layer(f"decoder.layers.{number}.", queries, places, tokens)
            queries = self._norm("decoder.norm.", queries)
            return Decoded(queries, _sigmoid(self._objectness(queries)))

    def _layer(self, name: str, queries: Float, places: Float, tokens: Float) -> Float:
        """One layer: queries look at each other, then at the tokens; what they look from is told by their places."""
        here = queries + places
        queries = self._norm(f"{name}norm1.", queries + self._attend(f"{name}self_attn.", here, here, queries))
        seen = self._attend(f"{name}multihead_attn.", queries + places, tokens, tokens)
        queries = self._norm(f"{name}norm2.", queries + seen)
        hidden = np.maximum(self._linear(f"{name}linear1.", queries), 0)
        return self._norm(f"{name}norm3.", queries + self._linear(f"{name}linear2.", hidden))

    def _attend(self, name: str, queries: Float, keys: Float, values: Float) -> Float:
        """Attention of many heads: ``queries (Q, C)``, ``keys`` and ``values (n, C)``."""
        weights, biases = (np.split(self.weights[f"{name}in_proj_{part}"], 3) for part in ("weight", "bias"))
        q, k, v = (
            _heads(given @ weight.T + bias)
            for given, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
        )
        logits = q @ k.transpose(0, 2, 1) / np.float32(HEAD_WIDTH**0.5)  # (heads, Q, n)
        shares = np.exp(logits - logits.max(axis=2, keepdims=True))
        shares /= shares.sum(axis=2, keepdims=True)
        mixed = (shares @ v).transpose(1, 0, 2).reshape(len(queries), -1)
        return np.asarray(mixed @ self.weights[f"{name}out_proj.weight"].T + self.weights[f"{name}out_proj.bias"])

    def _objectness(self, queries: Float) -> Float:
        for number in range(3):
            queries = self._linear(f"ffn.layers.{number}.", queries if number == 0 else np.maximum(queries, 0))
        return queries[:, 0]

    def _linear(self, name: str, rows: Float) -> Float:
        return np.asarray(rows @ self.weights[f"{name}weight"].T + self.weights[f"{name}bias"], np.float32)

    def _norm(self, name: str, rows: Float) -> Float:
        centred = rows - rows.mean(axis=1, keepdims=True)
        scale = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.float32(EPSILON))
        return np.asarray(centred * scale * self.weights[f"{name}weight"] + self.weights[f"{name}bias"], np.float32)


def _heads(rows: Float) -> Float:
    """``(n, C)`` as ``(heads, n, channels of a head)``."""
    return np.asarray(rows.reshape(len(rows), -1, HEAD_WIDTH).transpose(1, 0, 2))


def _sigmoid(values: Float) -> NDArray[np.float32]:
    return np.asarray(1 / (1 + np.exp(-values)), np.float32)


def _shapes(queries: int, width: int, layers: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """All tensors of a segmenter."""

    def linear(name: str, out: int, taken: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}weight": (out, taken), f"{name}bias": (out,)}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}weight": (width,), f"{name}bias": (width,)}

    shapes: dict[str, tuple[int, ...]] = {"query_embed": (queries, width), **norm("decoder.norm.")}
    for number in range(layers):
        layer = f"decoder.layers.{number}."
        for attention in (f"{layer}self_attn.", f"{layer}multihead_attn."):
            shapes |= linear(f"{attention}in_proj_", 3 * width, width) | linear(f"{attention}out_proj.", width, width)
        shapes |= linear(f"{layer}linear1.", hidden, width) | linear(f"{layer}linear2.", width, hidden)
        shapes |= norm(f"{layer}norm1.") | norm(f"{layer}norm2.") | norm(f"{layer}norm3.")
    for number, out in enumerate((width, width, 1)):
        shapes |= linear(f"ffn.layers.{number}.", out, width)
    return shapes
