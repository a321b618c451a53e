"""DINOv2 with and without registers, and TIPSv2, which has its layout.

The position is added to [CLS] and cells; registers are put between them afterwards and have none. Without registers
tables are resized by the scale (n + 0.1) / 37, with registers by size and with antialiasing; timm does the latter to
both. Source: specification, backbones in detail §2; facebookresearch/dinov2.
"""

from __future__ import annotations

from facetrt.engine.bundle.positional import TableRule
from facetrt.export.backbones.model_spec import SHAPES, Family, ModelSpec, StateDict, import_export_libraries, renamed

URL = "https://dl.fbaipublicfiles.com/dinov2"
NO_NORMALISATION = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def timm_names(state: StateDict, spec: ModelSpec) -> StateDict:
    """Bring tensors to timm's names: with registers timm adds [CLS]'s position once and for all."""
    found = renamed(state, {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2.", "register_tokens": "reg_token"})
    for gate in [name for name in found if ".mlp.w1." in name]:  # apart in transformers
        torch, _ = import_export_libraries()
        up = found.pop(gate.replace(".w1.", ".w2."))
        found[gate.replace(".w1.", ".fc1.")] = torch.cat([found.pop(gate), up])
    if "register_tokens" in state and {"cls_token", "pos_embed"} <= found.keys():
        table = found["pos_embed"]
        found["cls_token"] = found["cls_token"] + table[:, :1]
        found["pos_embed"] = table[:, 1:]
    return found


DINOV2 = Family(
    "dinov2", "DINOv2", "Apache-2.0", "the publisher's code and timm", TableRule.SCALE_CENTRES, timm_names=timm_names
)
TIPSV2 = Family("tipsv2", "TIPSv2", "Apache-2.0", "timm", TableRule.ANTIALIAS, timm_names=timm_names)


def _dinov2(size: str, *, registers: bool) -> ModelSpec:
    short = f"dinov2_vit{size[0]}14"
    architecture = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    hub = f"facebook/dinov2-{'with-registers-' if registers else ''}{size}"
    return ModelSpec(
        name=f"{short}_reg" if registers else short,
        description=f"DINOv2 ViT-{size[0].upper()}/14{' with 4 registers' if registers else ''}",
        patch=14,
        **SHAPES[size],
        trained_grid=37,
        prefix=5 if registers else 1,
        url=f"{URL}/{short}/{short}_{'reg4_' if registers else ''}pretrain.pth",
        timm_name=f"{architecture}.lvd142m",
        hub=(hub, f"timm/{architecture}.lvd142m"),
        aliases=(architecture, f"{architecture}.lvd142m", hub),
        architecture=architecture,
        match_facet=f"token@{SHAPES[size]['depth'] - 1}",  # A Tale of Two Features, at stride 14
        published_defaults=("match",),
        positional_rule=TableRule.ANTIALIAS if registers else None,
        family=DINOV2,
    )


def _tipsv2(size: str) -> ModelSpec:
    architecture = f"vit_{size}_patch14_reg1_tipsv2"
    short = size if size == "so400m" else f"vit{size[0]}"
    return ModelSpec(
        name=f"tipsv2_{short}14",
        description=f"TIPSv2 {size if size == 'so400m' else f'ViT-{size[0].upper()}'}/14",
        patch=14,
        **SHAPES[size],
        trained_grid=32,
        prefix=2,
        normalisation=NO_NORMALISATION,
        timm_name=f"{architecture}.webli",
        hub=(f"timm/{architecture}.webli",),
        aliases=(architecture, f"{architecture}.webli"),
        architecture=architecture,
        family=TIPSV2,
    )


MODELS = (
    *(
        _dinov2(size, registers=registers)
        for registers in (False, True)
        for size in ("small", "base", "large", "giant")
    ),
    *(_tipsv2(size) for size in ("base", "large", "so400m", "giant")),
)
FAMILIES = (DINOV2, TIPSV2)
