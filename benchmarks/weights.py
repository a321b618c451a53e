"""Deterministic weights for a ViT: untrained, and good enough wherever only time or agreement is measured."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from facetrt.export.models import ModelSpec


def deterministic_weights(spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
    """Weights that make every part of the network matter; the same on every machine."""
    dim, hidden = spec.dim, int(spec.dim * spec.mlp_ratio)
    shapes: dict[str, tuple[tuple[int, ...], float]] = {
        "cls_token": ((1, 1, dim), 0.5),
        "pos_embed": ((1, 1 + spec.trained_grid**2, dim), 0.3),
        "patch_embed.proj.weight": ((dim, 3, spec.patch, spec.patch), (3 * spec.patch**2) ** -0.5),
        "patch_embed.proj.bias": ((dim,), 0.1),
    }
    for i in range(spec.depth):
        layers = {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (hidden, dim),
            "mlp.fc2": (dim, hidden),
        }
        for layer, (rows, columns) in layers.items():
            shapes[f"blocks.{i}.{layer}.weight"] = ((rows, columns), columns**-0.5)
            shapes[f"blocks.{i}.{layer}.bias"] = ((rows,), 0.1)
    for norm in [*(f"blocks.{i}.norm{j}" for i in range(spec.depth) for j in (1, 2)), "norm"]:
        shapes |= {f"{norm}.weight": ((dim,), 0.1), f"{norm}.bias": ((dim,), 0.1)}
    state = {name: _uniform(f"{spec.name}/{name}", shape, std) for name, (shape, std) in shapes.items()}
    for name in state:
        if "norm" in name and name.endswith("weight"):
            state[name] += 1.0
    return state


def _uniform(name: str, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    """Uniform numbers of mean 0 and standard deviation ``std``, seeded by the tensor's name."""
    half_width = std * 3**0.5
    return np.random.RandomState(zlib.crc32(name.encode())).uniform(-half_width, half_width, shape).astype(np.float32)
