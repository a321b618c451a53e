"""SigLIP and SigLIP 2: no [CLS], and so no saliency; a pooling head of attention, which is not used.

timm's networks, whose GELU is exact in some sizes and approximated in others: the network is asked. Source:
specification, backbones in detail §7.
"""

from __future__ import annotations

from facetrt.engine.bundle.positional import TableRule
from facetrt.export.backbones.model_spec import HALF, Family, ModelSpec

SIGLIP = Family("siglip", "SigLIP", "Apache-2.0", "timm", TableRule.ANTIALIAS)

#: timm's size: short name, width, heads, depth
SIZES = {"base": ("vitb", 768, 12, 12), "large": ("vitl", 1024, 16, 24), "so400m": ("so400m", 1152, 16, 27)}
#: size, patch, pixels of a side, whether of SigLIP 1, whether of SigLIP 2
PUBLISHED = (
    ("base", 16, 224, True, True), ("base", 16, 256, True, True), ("base", 16, 384, True, True),
    ("base", 16, 512, True, True), ("base", 32, 256, False, True), ("large", 16, 256, True, True),
    ("large", 16, 384, True, True), ("large", 16, 512, False, True), ("so400m", 14, 224, True, True),
    ("so400m", 14, 378, True, True), ("so400m", 16, 256, False, True), ("so400m", 16, 384, False, True),
    ("so400m", 16, 512, False, True),
)  # fmt: skip


def _siglip(size: str, patch: int, pixels: int, version: int) -> ModelSpec:
    short, dim, heads, depth = SIZES[size]
    architecture, tag = f"vit_{size}_patch{patch}_siglip_{pixels}", "webli" if version == 1 else "v2_webli"
    return ModelSpec(
        name=f"siglip{'' if version == 1 else version}_{short}{patch}_{pixels}",
        description=f"SigLIP{'' if version == 1 else f' {version}'} {short}/{patch} of {pixels} pixels",
        patch=patch,
        dim=dim,
        heads=heads,
        depth=depth,
        trained_grid=pixels // patch,
        prefix=0,
        normalisation=HALF,
        timm_name=f"{architecture}.{tag}",
        hub=(f"timm/{architecture}.{tag}",),
        aliases=(f"{architecture}.{tag}", *((architecture,) if version == 2 or not _has(size, patch, pixels) else ())),
        architecture=architecture,
        family=SIGLIP,
    )


def _has(size: str, patch: int, pixels: int) -> bool:
    """Whether SigLIP 2 has the network, whose plain name is then its."""
    return any(each[:3] == (size, patch, pixels) and each[4] for each in PUBLISHED)


MODELS = (
    *(_siglip(*each[:3], 1) for each in PUBLISHED if each[3]),
    *(_siglip(*each[:3], 2) for each in PUBLISHED if each[4]),
)
FAMILIES = (SIGLIP,)
