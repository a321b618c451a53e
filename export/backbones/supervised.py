"""Vision transformers that were trained with labels, in timm's plain layout."""

from __future__ import annotations

from facetrt.export.backbones.model_spec import HALF, SHAPES, Family, ModelSpec

SUPERVISED = Family("supervised", "supervised ViT", "Apache-2.0", "timm")


def _supervised(size: str, patch: int) -> ModelSpec:
    """timm's supervised model of that name, with the checkpoint that the reference's timm 0.4.12 had for it.

    ViT-S/8 has none today: timm's default of that name is DINO's checkpoint, which must not pass for a supervised one.
    """
    name = f"vit_{size}_patch{patch}_224"
    published = (size, patch) != ("small", 8)
    return ModelSpec(
        name=name,
        description=f"supervised ViT-{size[0].upper()}/{patch} (timm)",
        patch=patch,
        **SHAPES[size],
        trained_grid=224 // patch,
        normalisation=HALF,
        timm_name=f"{name}.augreg_in21k_ft_in1k" if published else None,
        family=SUPERVISED,
    )


MODELS = tuple(_supervised(size, patch) for size in ("small", "base") for patch in (8, 16))
FAMILIES = (SUPERVISED,)
