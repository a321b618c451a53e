"""Models that learnt by masking, in DINO's layout: MAE and MSN.

Both leave overlapping patches open; their positional tables are brought to a grid by its size, without antialiasing
(MAE's ``util/pos_embed.py``, MSN's ``src/deit.py``), here at the true centres of the cells.
"""

from __future__ import annotations

from facetrt.engine.bundle.positional import TableRule
from facetrt.export.backbones.model_spec import SHAPES, Family, ModelSpec

MAE_URL = "https://dl.fbaipublicfiles.com/mae/pretrain"
MSN_URL = "https://dl.fbaipublicfiles.com/msn"

MAE = Family("mae", "MAE", "CC-BY-NC-4.0", "timm", TableRule.SIZE_CENTRES)
MSN = Family("msn", "MSN", "CC-BY-NC-4.0", "timm", TableRule.SIZE_CENTRES)


def _mae(size: str, patch: int) -> ModelSpec:
    timm_name = f"vit_{size}_patch{patch}_224.mae"
    return ModelSpec(
        name=f"mae_vit{size[0]}{patch}",
        description=f"MAE ViT-{size[0].upper()}/{patch}",
        patch=patch,
        **SHAPES[size],
        trained_grid=224 // patch,
        url=f"{MAE_URL}/mae_pretrain_vit_{size}.pth",
        timm_name=timm_name,
        hub=(f"timm/{timm_name}",),
        aliases=(timm_name,),
        family=MAE,
    )


def _msn(size: str, patch: int, epochs: int) -> ModelSpec:
    return ModelSpec(
        name=f"msn_vit{size[0]}{patch}",
        description=f"MSN ViT-{size[0].upper()}/{patch}",
        patch=patch,
        **SHAPES[size],
        trained_grid=224 // patch,
        url=f"{MSN_URL}/vit{size[0]}{patch}_{epochs}ep.pth.tar",
        family=MSN,
    )


MODELS = (
    *(_mae(size, patch) for size, patch in (("base", 16), ("large", 16), ("huge", 14))),
    *(
        _msn(*each)
        for each in (("small", 16, 800), ("base", 16, 600), ("large", 16, 600), ("base", 4, 300), ("large", 7, 200))
    ),
)
FAMILIES = (MAE, MSN)
