"""DINO, and what was trained further from it: SelfMask, the built-in model, iBOT, which has its code and layout.

Source: specification, common DINO backbone; iBOT's ``models/vision_transformer.py``.
"""

from __future__ import annotations

from facetrt.engine.bundle.positional import TableRule
from facetrt.export import builtin
from facetrt.export.backbones.model_spec import DINO, SHAPES, Family, ModelSpec

DINO_URL = "https://dl.fbaipublicfiles.com/dino"
SELFMASK_URL = "https://www.robots.ox.ac.uk/~vgg/research/selfmask/shared_files"
IBOT_URL = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"

SELFMASK = Family("selfmask", "SelfMask", "MIT", "the authors' code", TableRule.SIZE)
IBOT = Family("ibot", "iBOT", "Apache-2.0", "timm")
BUILTIN = Family("builtin", "built-in", "Apache-2.0", "its own construction")

S8_HEADS = (0, 2, 4, 5)  # heads 1 and 3 of this checkpoint attend to background; found by the method's authors


def _dino(
    name: str,
    patch: int,
    folder: str,
    *,
    base: bool = False,
    heads: tuple[int, ...] | None = None,
    published_bytes: int | None = None,
    aliases: tuple[str, ...] = (),
) -> ModelSpec:
    return ModelSpec(
        name=name,
        description=f"DINO {'ViT-B' if base else 'ViT-S'}/{patch}",
        patch=patch,
        **SHAPES["base" if base else "small"],
        trained_grid=224 // patch,
        saliency_heads=heads,
        url=f"{DINO_URL}/{folder}/{folder}.pth",
        published_bytes=published_bytes,
        aliases=aliases,
        published_defaults=("match", "cosegment"),
    )


def _ibot(size: str, folder: str, suffix: str = "", *, student: bool = False) -> ModelSpec:
    name, file = f"ibot_vit{size[0]}16{suffix}", f"checkpoint_{'student' if student else 'teacher'}.pth"
    return ModelSpec(
        name=name,
        description=f"iBOT ViT-{size[0].upper()}/16{', ImageNet-22k' if suffix else ''}",
        patch=16,
        **SHAPES[size],
        trained_grid=14,
        url=f"{IBOT_URL}/{folder}/{file}",
        file=f"{name}-{file}",
        family=IBOT,
    )


def _selfmask(queries: int) -> ModelSpec:
    """DINO's ViT-S/8, trained further with a segmenter on its last tokens."""
    name = f"selfmask_nq{queries}"
    return ModelSpec(
        name=name,
        description=f"SelfMask's ViT-S/8 and segmenter of {queries} queries",
        patch=8,
        **SHAPES["small"],
        trained_grid=28,
        url=f"{SELFMASK_URL}/{name}.pt",
        default_facets=("key@11", "normed@11"),
        segmenter=True,
        family=SELFMASK,
    )


def _builtin() -> ModelSpec:
    return ModelSpec(
        name="builtin",
        description="facetrt's small closed-form ViT; not DINO",
        patch=builtin.PATCH,
        dim=builtin.DIM,
        heads=builtin.HEADS,
        depth=builtin.DEPTH,
        mlp_ratio=builtin.MLP_RATIO,
        trained_grid=builtin.GRID,
        saliency_heads=builtin.SALIENCY_HEADS,
        match_facet=builtin.MATCH_FACET,
        cosegment_facet=builtin.COSEGMENT_FACET,
        propagate_facet=builtin.TRACK_FACET,
        track_facet=f"{builtin.MATCH_FACET}+2*{builtin.TRACK_FACET}",
        discover_facet=f"{builtin.COSEGMENT_FACET}-mean",
        published_defaults=("match", "cosegment", "propagate", "track", "discover"),
        default_facets=(builtin.MATCH_FACET, builtin.COSEGMENT_FACET, builtin.TRACK_FACET),
        family=BUILTIN,
    )


MODELS = (
    _dino(
        "dino_vits8",
        8,
        "dino_deitsmall8_pretrain",
        heads=S8_HEADS,
        published_bytes=86_728_949,
        aliases=("vit_small_patch8_224.dino",),
    ),
    _dino("dino_vits8_300ep", 8, "dino_deitsmall8_300ep_pretrain", heads=S8_HEADS),
    _dino("dino_vits16", 16, "dino_deitsmall16_pretrain", aliases=("vit_small_patch16_224.dino",)),
    _dino("dino_vitb8", 8, "dino_vitbase8_pretrain", base=True, aliases=("vit_base_patch8_224.dino",)),
    _dino("dino_vitb16", 16, "dino_vitbase16_pretrain", base=True, aliases=("vit_base_patch16_224.dino",)),
    *(_selfmask(queries) for queries in (10, 20)),
    _builtin(),
    _ibot("small", "vits_16"),
    _ibot("base", "vitb_16"),
    _ibot("large", "vitl_16"),
    _ibot("base", "vitb_16_pt22k", "_22k", student=True),
    _ibot("large", "vitl_16_pt22k", "_22k", student=True),
)
FAMILIES = (DINO, SELFMASK, IBOT, BUILTIN)
