"""Tiny models of every family, with weights of which every part matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from helpers import facets

from facetrt.export.backbones.model_spec import ModelSpec
from facetrt.export.export_options import Facet
from facetrt.export.models import find_model

#: One for each kind of part: tables by each rule, registers, SwiGLU packed and apart, RoPE by halves and by neighbours,
#: projections apart, inner norms, a norm in front, no [CLS], and every activation.
NAMES = (
    "dinov2_vits14", "dinov2_vitg14", "dinov2_vits14_reg", "tipsv2_vitb14", "dinov3_vits16", "dinov3_vits16plus",
    "siglip2_so400m16_256", "clip_vitb16", "eva02_vits14", "eva02_vitb14", "pe_spatial_vits16", "mae_vitb16",
)  # fmt: skip
DEPTH, DIM, HEADS = 3, 48, 3


def tiny(name: str) -> ModelSpec:
    """A model's tiny sister, known by its name while ``registered`` is in force."""
    spec = find_model(name)
    return replace(
        spec, name=f"{name}_tiny", dim=DIM, heads=HEADS, depth=DEPTH, match_facet="key@1", propagate_facet=None,
        aliases=(), url=None, hub=(), file=None, published_sha256=None,
    )  # fmt: skip


def weights(spec: ModelSpec, folder: Path) -> Path:
    """A file of random weights by timm's names."""
    generator = torch.Generator().manual_seed(0)
    state = spec.build().state_dict()
    for name, tensor in state.items():
        if name == "rope.periods":
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            scales = name.endswith(("weight", "gamma", "gamma_1", "gamma_2"))
            tensor.copy_(0.2 * noise + (1 if scales else 0))
        else:
            tensor.copy_(noise * (0.5 if tensor.ndim == 3 else 1.3 * tensor[0].numel() ** -0.5))
    path = folder / f"{spec.name}.pth"
    torch.save(state, path)
    return path


def all_facets(spec: ModelSpec) -> tuple[Facet, ...]:
    """Every kind that a model has."""
    kinds = ["key@0", "query@1", "value@1", "key@2", "token@0", "token@1", "token@2"]
    if spec.family.final_norm:
        kinds.append("normed@2")
    if spec.family.rotation is not None:
        kinds += ["rotated_key@1", "rotated_query@2"]
    return facets(",".join(kinds))
