"""Deterministic weights made to behave like trained ones where that hurts: peaky attention and massive activations."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from helpers import TINY, deterministic_weights
from numpy.typing import NDArray

from facetrt.export.models import ModelSpec

SPEC = replace(TINY, name="trained-like", dim=96, depth=5)  # deep enough for blocks before and after the massive ones
KINDS = ("sharp1", "sharp2", "sharp3", "sharp6", "sharp8", "massive", "both")
Weights = dict[str, NDArray[np.float32]]


def trained_like(kind: str, spec: ModelSpec = SPEC) -> Weights:
    """Weights of one of ``KINDS``, or ``ill``: so ill-conditioned that float32 itself is wrong."""
    params = deterministic_weights(spec)
    late = range(spec.depth // 3 + 2, spec.depth)
    if match := re.fullmatch(r"sharp([0-9.]+)", kind):
        _sharpen(params, spec.dim, range(spec.depth - 1, spec.depth), float(match[1]))
    elif kind == "massive":
        _massive(params, spec, 2000)
    elif kind == "both":
        _massive(params, spec, 2000)
        _sharpen(params, spec.dim, late, 1.6)
    elif kind == "ill":
        _massive(params, spec, 2e5)
        for i in late:
            params[f"blocks.{i}.norm1.weight"] *= np.float32(6)
        _sharpen(params, spec.dim, late, 3)
    return params


def _sharpen(params: Weights, dim: int, blocks: range, factor: float) -> None:
    """Multiply q and k of these blocks: logits grow by the factor's square."""
    for i in blocks:
        for name in (f"blocks.{i}.attn.qkv.weight", f"blocks.{i}.attn.qkv.bias"):
            params[name][: 2 * dim] *= np.float32(factor)


def _massive(params: Weights, spec: ModelSpec, height: float) -> None:
    """In two blocks one hidden unit that few tokens switch on writes ``height`` into two residual channels."""
    channels, first = [spec.dim // 7, spec.dim // 3], spec.depth // 3
    for i, unit, threshold in ((first, 11, 1.6), (first + 1, 29, 2.0)):
        row = params[f"blocks.{i}.mlp.fc1.weight"]
        length = float(np.linalg.norm(row[unit]))
        row[unit] *= np.float32(4)
        params[f"blocks.{i}.mlp.fc1.bias"][unit] = -4 * threshold * length  # inputs are normalised: few tokens pass
        params[f"blocks.{i}.mlp.fc2.weight"][channels, unit] = np.float32([height, -0.6 * height]) / np.float32(
            4 * length
        )
    for i in range(first + 2, spec.depth):  # later blocks look at other channels, as trained LayerNorms do
        for norm in ("norm1", "norm2"):
            params[f"blocks.{i}.{norm}.weight"][channels] *= np.float32(0.05)
