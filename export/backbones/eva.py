"""EVA-02 and Perception Encoder's spatial models: a positional table and RoPE, of neighbouring channels.

EVA-02 counts patches, scaled to the grid it was trained on; its final norm belongs to its pooling, so there are no
``normed`` facets. PE counts from 1, columns first, and has no final norm either. Source: specification, backbones in
detail §7, from timm's code; the publishers' code was not read.
"""

from __future__ import annotations

from facetrt.engine.bundle.positional import Rotation, TableRule
from facetrt.export.backbones.model_spec import CLIP, HALF, SHAPES, Family, ModelSpec

EVA_GRID, PE_GRID = 16, 32  # patches that angles refer to

EVA02 = Family(
    "eva02",
    "EVA-02",
    "MIT",
    "timm",
    TableRule.ANTIALIAS,
    Rotation(float(EVA_GRID), -EVA_GRID / 2, 0.0, x_first=False),
    final_norm=False,
)
PE = Family(
    "pe-spatial",
    "PE spatial",
    "Apache-2.0",
    "timm",
    TableRule.ANTIALIAS,
    Rotation(float(PE_GRID), PE_GRID / 2, 0.0, x_first=True),
    final_norm=False,
)


def _eva02(size: str, tag: str = "mim_in22k") -> ModelSpec:
    architecture = f"eva02_{size}_patch14_224"
    return ModelSpec(
        name=f"eva02_vit{size[0]}14{'' if tag == 'mim_in22k' else '_m38m'}",
        description=f"EVA-02 ViT-{'Ti' if size == 'tiny' else size[0].upper()}/14",
        patch=14,
        **SHAPES[size],
        trained_grid=16,
        normalisation=CLIP,
        timm_name=f"{architecture}.{tag}",
        hub=(f"timm/{architecture}.{tag}",),
        aliases=(f"{architecture}.{tag}", *((architecture,) if tag == "mim_in22k" else ())),
        architecture=architecture,
        family=EVA02,
    )


def _pe(size: str, patch: int) -> ModelSpec:
    pixels = 512 if patch == 16 else 448
    architecture = f"vit_pe_spatial_{size}_patch{patch}_{pixels}"
    return ModelSpec(
        name=f"pe_spatial_vit{size[0]}{patch}",
        description=f"PE spatial ViT-{'Ti' if size == 'tiny' else size[0].upper()}/{patch}",
        patch=patch,
        **SHAPES[size],
        trained_grid=pixels // patch,
        normalisation=HALF,
        timm_name=f"{architecture}.fb",
        hub=(f"timm/{architecture}.fb",),
        aliases=(architecture, f"{architecture}.fb"),
        architecture=architecture,
        family=PE,
    )


MODELS = (
    *(_eva02(size) for size in ("tiny", "small", "base", "large")),
    _eva02("large", "mim_m38m"),
    *(_pe(size, patch) for size, patch in (("tiny", 16), ("small", 16), ("base", 16), ("large", 14))),
)
FAMILIES = (EVA02, PE)
