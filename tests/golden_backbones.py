"""Deterministic weights of other backbones by the publishers' names, those that the golden arrays were made with."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
DEPTH = 12


@dataclass(frozen=True)
class Golden:
    """A network of the golden arrays: ``model`` is the name that facetrt has for it."""

    model: str
    dim: int
    patch: int
    grid: int
    registers: int = 0
    biases: bool = True


GOLDEN = {
    "dinov2_vits14": Golden("dinov2_vits14", 384, 14, 37),
    "dinov2_vits14_reg": Golden("dinov2_vits14_reg", 384, 14, 37, 4),
    "dinov3_vits16": Golden("dinov3_vits16", 384, 16, 0, 4, biases=False),
    "dinov3_vits16_qkvb": Golden("dinov3_vits16", 384, 16, 0, 4),
    "siglip_vitb16": Golden("siglip_vitb16_224", 768, 16, 14),
    "clip_vitb16": Golden("clip_vitb16_laion2b", 768, 16, 14),
}


def published_weights(name: str) -> dict[str, Float]:
    """Parameter name → float32 array, as the published checkpoint names them."""
    golden, family, dim = GOLDEN[name], name.partition("_")[0], GOLDEN[name].dim
    made: dict[str, Float] = {}

    def random(parameter: str, *shape: int, std: float, mean: float = 0.0) -> None:
        generator = np.random.RandomState(zlib.crc32(f"{name}/{parameter}".encode()))
        values = generator.uniform(-std * 3**0.5, std * 3**0.5, shape).astype(np.float32)
        made[parameter] = values + np.float32(mean)

    def norm(layer: str) -> None:
        random(f"{layer}.weight", dim, std=0.1, mean=1.0)
        random(f"{layer}.bias", dim, std=0.1)

    def linear(layer: str, rows: int, columns: int) -> None:
        random(f"{layer}.weight", rows, columns, std=columns**-0.5)
        random(f"{layer}.bias", rows, std=0.1)

    dino, rotating = family.startswith("dino"), family == "dinov3"
    if family != "siglip":
        random("cls_token", 1, 1, dim, std=0.5)
    if dino:
        random("mask_token", 1, dim, std=0.5)
    if golden.registers:
        random("storage_tokens" if rotating else "register_tokens", 1, golden.registers, dim, std=0.5)
    if golden.grid:
        random("pos_embed", 1, golden.grid**2 + (family != "siglip"), dim, std=0.3)
    random("patch_embed.proj.weight", dim, 3, golden.patch, golden.patch, std=(3 * golden.patch**2) ** -0.5)
    if family == "clip":
        norm("norm_pre")
    else:
        random("patch_embed.proj.bias", dim, std=0.1)
    if rotating:
        made["rope_embed.periods"] = to_bfloat16((100 ** (2 * np.arange(16) / 32)).astype(np.float32))
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * dim, dim)
        made[f"{block}.attn.qkv.weight"][: 2 * dim] *= np.float32(1.5)
        if rotating:
            made[f"{block}.attn.qkv.bias"] *= np.float32(golden.biases)
            made[f"{block}.attn.qkv.bias_mask"] = np.repeat(np.float32([1, 0, 1]), dim)
        linear(f"{block}.attn.proj", dim, dim)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", 4 * dim, dim)
        linear(f"{block}.mlp.fc2", dim, 4 * dim)
        if dino:
            random(f"{block}.ls1.gamma", dim, std=0.2, mean=0.6)
            random(f"{block}.ls2.gamma", dim, std=0.2, mean=0.6)
    norm("norm")
    return made


def to_bfloat16(values: Float) -> Float:
    """The nearest values of bfloat16, as float32."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)
