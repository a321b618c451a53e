"""CLIP's image towers: OpenAI's, LAION's, DataComp's, MetaCLIP's and Apple's.

All tokens are normalised before the first block, and the patch convolution has no bias. OpenAI's, MetaCLIP's and DFN's
weights need QuickGELU, whatever timm's plain names say; LAION's and DataComp's the exact GELU. Source: specification,
backbones in detail §7.
"""

from __future__ import annotations

import re

from facetrt.engine.bundle.positional import TableRule
from facetrt.export.backbones.model_spec import CLIP as NORMALISATION
from facetrt.export.backbones.model_spec import HALF, SHAPES, Family, ModelSpec, StateDict

#: what OpenAI and open_clip call timm's parts
NAMES = {
    "conv1.": "patch_embed.proj.", "positional_embedding": "pos_embed", "class_embedding": "cls_token",
    "transformer.resblocks.": "blocks.", "ln_pre.": "norm_pre.", "ln_post.": "norm.", "ln_1.": "norm1.",
    "ln_2.": "norm2.", "in_proj_": "qkv.", "out_proj.": "proj.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
}  # fmt: skip


def timm_names(state: StateDict, spec: ModelSpec) -> StateDict:
    """Bring tensors by OpenAI's and open_clip's names, or timm's, to timm's; without the projection to words."""
    found: StateDict = {}
    for name, tensor in state.items():
        if name == "proj":
            continue
        for old, new in NAMES.items():
            name = re.sub(rf"(?<![a-z_]){re.escape(old)}", new, name)
        if name == "cls_token" and tensor.ndim == 1:
            tensor = tensor[None, None]
        found[name] = tensor[None] if name == "pos_embed" and tensor.ndim == 2 else tensor
    return found


CLIP = Family("clip", "CLIP", "of each publisher", "timm", TableRule.ANTIALIAS, timm_names=timm_names)

#: timm's size and patch: open_clip's name
SIZES = {("base", 32): "ViT-B-32", ("base", 16): "ViT-B-16", ("large", 14): "ViT-L-14"}
#: publisher as in names: timm's tag, and of which sizes and patches the weights need QuickGELU
PUBLISHERS: dict[str, tuple[str, tuple[tuple[str, int], ...]]] = {
    "openai": ("openai", tuple(SIZES)),
    "laion2b": ("laion2b", ()),
    "laion400m": ("laion400m_e32", (("base", 32),)),
    "datacomp": ("datacompxl", ()),
    "metaclip": ("metaclip_2pt5b", tuple(SIZES)),
    "dfn2b": ("dfn2b", (("large", 14),)),
}


def _clip(size: str, patch: int, publisher: str) -> ModelSpec:
    tag, natively_quick = PUBLISHERS[publisher]
    quick, short = (size, patch) in natively_quick, SIZES[size, patch]
    plain, quicker = f"vit_{size}_patch{patch}_clip_224", f"vit_{size}_patch{patch}_clip_quickgelu_224"
    architecture = quicker if quick else plain
    aliases = [f"{plain}.{tag}", f"{quicker}.{tag}"] if quick else [f"{plain}.{tag}"]
    if publisher == "openai":
        aliases += [quicker, short.replace("B-", "B/").replace("L-", "L/"), f"{short}-quickgelu"]
    if publisher == "laion2b":
        aliases += [plain]
    return ModelSpec(
        name=f"clip_vit{size[0]}{patch}{'' if publisher == 'openai' else f'_{publisher}'}",
        description=f"CLIP ViT-{size[0].upper()}/{patch} ({publisher})",
        patch=patch,
        **SHAPES[size],
        trained_grid=224 // patch,
        normalisation=HALF if (publisher, size) == ("laion2b", "large") else NORMALISATION,
        timm_name=f"{architecture}.{tag}",
        hub=(f"timm/{plain}.{tag}",),
        aliases=tuple(aliases),
        architecture=architecture,
        family=CLIP,
    )


MODELS = tuple(
    _clip(size, patch, publisher)
    for publisher in PUBLISHERS
    for size, patch in SIZES
    if (publisher, patch) != ("dfn2b", 32)
)
FAMILIES = (CLIP,)
