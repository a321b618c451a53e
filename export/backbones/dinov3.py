"""DINOv3, and EUPE and LingBot-Vision, which have the same network: RoPE, no positional table, four registers.

* Queries and keys of cells turn in every block, all heads by the same table; [CLS] and registers don't.
* Meta's checkpoints hold the periods rounded to bfloat16; timm drops them and computes in float32, which changes
  results by 2e-3. Here a checkpoint's own periods count, and where it has none, as timm's, those that its network
  was trained with: rounded ones for Meta's.
* The bias of keys is masked to zero. Meta's other biases of queries, keys and values are zero as well.

Source: specification, backbones in detail §3; facebookresearch/dinov3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from facetrt.engine.bundle.positional import Rotation
from facetrt.export.backbones.model_spec import (
    IMAGENET,
    SHAPES,
    Family,
    ModelSpec,
    Shape,
    StateDict,
    import_export_libraries,
    renamed,
)
from facetrt.kernels.errors import InputError

PERIODS = "rope.periods"
BASE = 100.0  # the longest period is this to the power of almost one
SAT = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
ACCESS = (
    "DINOv3's weights need an account: accept the licence at https://ai.meta.com/resources/models-and-libraries/dinov3-"
    "downloads or on the Hugging Face hub"
)
NAMES = {
    "storage_tokens": "reg_token", "register_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2",
    "mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2.", "rope_embed.periods": PERIODS,
}  # fmt: skip


def timm_names(state: StateDict, spec: ModelSpec, *, rounded: bool) -> StateDict:
    """Bring tensors, by the publisher's or timm's names, to timm's network with biases and periods.

    Args:
        rounded: whether the network was trained with periods of bfloat16, where the checkpoint does not say.

    Raises:
        InputError: a mask of biases that is not finite, or keys that keep a bias.
    """
    torch, _ = import_export_libraries()
    found = renamed(state, NAMES)
    for name in [name for name in found if name.endswith("attn.qkv.bias")]:
        query, value = _without_key_bias(found.pop(name), found.get(f"{name}_mask"), name)
        found[name.replace("qkv.bias", "q_bias")], found[name.replace("qkv.bias", "v_bias")] = query, value
    found = {name: tensor for name, tensor in found.items() if not name.endswith("bias_mask")}
    for name in [name for name in found if name.endswith("attn.qkv.weight")]:  # timm has networks without biases, too
        for bias in ("q_bias", "v_bias"):
            found.setdefault(name.replace("qkv.weight", bias), torch.zeros(found[name].shape[1]))
    if PERIODS not in found:
        found[PERIODS] = periods(spec.dim // spec.heads, rounded=rounded)
    found[PERIODS] = found[PERIODS].float()
    return found


def _without_key_bias(bias: Any, mask: Any, name: str) -> tuple[Any, Any]:
    if mask is not None:
        if not mask.isfinite().all():
            raise InputError(
                f"{name}_mask has values that are not finite: expected 1 for queries and values, 0 for keys"
            )
        bias = bias * mask
    query, key, value = bias.chunk(3)
    if key.any():
        raise InputError(f"{name}: the bias of keys is not zero and not masked: expected DINOv3's, where it is")
    return query + 0.0, value + 0.0  # masks make negative zeros


def periods(head_dim: int, *, rounded: bool) -> Any:
    """``100 ** (4 j / d)`` for j below d / 4, float32; of bfloat16's values if ``rounded``."""
    torch, _ = import_export_libraries()
    found = BASE ** (2.0 * torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 2))
    return found.to(torch.bfloat16).float() if rounded else found


class RotatingSpec(ModelSpec):
    """A model whose checkpoint holds periods."""

    def build(self) -> Any:
        """timm's network, with the periods as a part of its state."""
        vit = super().build()
        vit.rope.register_buffer("periods", vit.rope.periods, persistent=True)
        return vit


def _family(name: str, title: str, licence: str, compared: str, *, rounded: bool, access: str = "") -> Family:
    return Family(
        name,
        title,
        licence,
        compared,
        rotation=Rotation(2.0, 0.0, -1.0, x_first=False),
        timm_names=partial(timm_names, rounded=rounded),
        access=access,
    )


DINOV3 = _family("dinov3", "DINOv3", "DINOv3 licence", "the publisher's code and timm", rounded=True, access=ACCESS)
EUPE = _family("eupe", "EUPE", "FAIR non-commercial", "timm", rounded=False)
LINGBOT = _family("lingbot", "LingBot-Vision", "Apache-2.0", "timm", rounded=False)

PLUS = {"small_plus": SHAPES["small"], "huge_plus": Shape(dim=1280, heads=20, depth=32)}


def _dinov3(size: str, digits: str, data: str = "lvd1689m") -> ModelSpec:
    short = size[0]
    plus = "plus" if size.endswith("plus") else ""
    architecture, suffix = f"vit_{size}_patch16_dinov3", "" if data == "lvd1689m" else "_sat"
    hub = f"facebook/dinov3-vit{short}16{plus}-pretrain-{data}"
    names = (architecture, f"{architecture}_qkvb")
    return RotatingSpec(
        name=f"dinov3_vit{short}16{plus}{suffix}",
        description=f"DINOv3 ViT-{short.upper()}{'+' if plus else ''}/16{', satellite images' if suffix else ''}",
        patch=16,
        **(SHAPES | PLUS)[size],
        prefix=5,
        normalisation=SAT if suffix else IMAGENET,
        published_sha256=digits,
        file=f"dinov3_vit{short}16{plus}_pretrain_{data}-{digits}.pth",
        timm_name=f"{architecture}_qkvb.{data}",
        hub=(hub, *(f"timm/{name}.{data}" for name in names)),
        aliases=(*(names if not suffix else ()), *(f"{name}.{data}" for name in names), hub),
        architecture=f"{architecture}_qkvb",
        published_defaults=("propagate",),
        family=DINOV3,
    )


def _relative(family: Family, size: str, architecture: str, tag: str, title: str, **settings: Any) -> ModelSpec:
    short = size[0]
    return RotatingSpec(
        name=f"{family.name}_vit{short}16",
        description=f"{title} ViT-{short.upper()}/16",
        patch=16,
        **SHAPES[size],
        prefix=5,
        timm_name=f"{architecture}.{tag}",
        hub=(f"timm/{architecture}.{tag}",),
        aliases=(f"{architecture}.{tag}", *((architecture,) if family is LINGBOT else ())),
        architecture=architecture,
        settings=settings,
        family=family,
    )


MODELS = (
    _dinov3("small", "08c60483"),
    _dinov3("small_plus", "4057cbaa"),
    _dinov3("base", "73cec8be"),
    _dinov3("large", "8aa4cbdd"),
    _dinov3("huge_plus", "7c1da9a5"),
    _dinov3("large", "eadcf0ff", "sat493m"),
    *(
        _relative(EUPE, size, f"vit_{size}_patch16_dinov3_qkvb", "eupe_lvd1689m", "EUPE")
        for size in ("tiny", "small", "base")
    ),
    *(
        _relative(LINGBOT, size, f"vit_{size}_patch16_lingbot", "robbyant", "LingBot-Vision")
        for size in ("small", "base", "large")
    ),
)
FAMILIES = (DINOV3, EUPE, LINGBOT)
