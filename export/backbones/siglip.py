"""SigLIP and SigLIP 2: no [CLS], and so no saliency; a pooling head of attention, which is not used.

timm's networks, whose GELU is exact in some sizes and approximated in others: the network is asked. Source:
specification, backbones in detail §7.
"""

from __future__ import annotations

from facetrt.engine.bundle.positional import TableRule
from facetrt.export.backbones.model_spec import HALF, SHAPES, Family, ModelSpec

SIGLIP = Family("siglip", "SigLIP", "Apache-2.0", "timm", TableRule.ANTIALIAS)

#: size, patch, pixels of a side, whether of SigLIP 1, whether of SigLIP 2
PUBLISHED = (
    ("base", 16, 224, True, True), ("base", 16, 256, True, True), ("base", 16, 384, True, True),
    ("base", 16, 512, True, True), ("base", 32, 256, False, True), ("large", 16, 256, True, True),
    ("large", 16, 384, True, True), ("large", 16, 512, False, True), ("so400m", 14, 224, True, True),
    ("so400m", 14, 378, True, True), ("so400m", 16, 256, False, True), ("so400m", 16, 384, False, True),
    ("so400m", 16, 512, False, True),
)  # fmt: skip


def _siglip(size: str, patch: int, pixels: int, version: int, *, newest: bool) -> ModelSpec:
    """``newest``: no later version has the network, whose plain name is then this one's."""
    short = size if size == "so400m" else f"vit{size[0]}"
    architecture, tag = f"vit_{size}_patch{patch}_siglip_{pixels}", "webli" if version == 1 else "v2_webli"
    return ModelSpec(
        name=f"siglip{'' if version == 1 else version}_{short}{patch}_{pixels}",
        description=f"SigLIP{'' if version == 1 else f' {version}'} {short}/{patch} of {pixels} pixels",
        patch=patch,
        **SHAPES[size],
        trained_grid=pixels // patch,
        prefix=0,
        normalisation=HALF,
        timm_name=f"{architecture}.{tag}",
        hub=(f"timm/{architecture}.{tag}",),
        aliases=(f"{architecture}.{tag}", *((architecture,) if newest else ())),
        architecture=architecture,
        family=SIGLIP,
    )


MODELS = (
    *(_siglip(size, patch, side, 1, newest=not second) for size, patch, side, first, second in PUBLISHED if first),
    *(_siglip(size, patch, side, 2, newest=True) for size, patch, side, _, second in PUBLISHED if second),
)
FAMILIES = (SIGLIP,)
