"""Deterministic weights, a tiny model and pictures for the tests."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.export.exporting import export_bundle
from facetrt.export.models import ModelSpec
from facetrt.export.options import ExportOptions, Facet

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"

GOLDEN_FACETS = "key@0,query@5,key@9,value@9,key@11,query@11,token@11"

TINY = ModelSpec(
    name="tiny", description="untrained, for tests", patch=8, dim=48, heads=3, depth=3, trained_grid=6,
    match_facet="key@1", cosegment_facet="key@2", propagate_facet="normed@2", default_facets=("key@1", "key@2"), url="http://127.0.0.1:9/tiny.pth",
)  # fmt: skip


def facets(text: str) -> tuple[Facet, ...]:
    return tuple(Facet.parse(part) for part in text.split(","))


def uniform(name: str, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
    half_width = std * 3**0.5
    return np.random.RandomState(zlib.crc32(name.encode())).uniform(-half_width, half_width, shape).astype(np.float32)


def deterministic_weights(spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
    """Weights that make every part of the network matter; for the golden models, the golden weights."""
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
    state = {name: uniform(f"{spec.name}/{name}", shape, std) for name, (shape, std) in shapes.items()}
    for name in state:
        if "norm" in name and name.endswith("weight"):
            state[name] += 1.0
    return state


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth colourful image with a bright disc, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (7, 7, 3), np.uint8)
    image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    y, x = np.indices((height, width))
    disc = (y - height * 0.5) ** 2 + (x - width * 0.5) ** 2 < (0.25 * min(height, width)) ** 2
    image[disc] = (230, 60, 40)
    return image


def export_tiny(weights: Path, out: Path, **options: Any) -> Path:
    export_bundle("tiny", out, ExportOptions(**options), weights=weights)
    return out
