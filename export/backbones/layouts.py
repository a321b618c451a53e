"""Checkpoints by other libraries' names: Hugging Face transformers', which has queries, keys and values apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from facetrt.export.backbones.model_spec import StateDict, import_export_libraries

#: transformers' names, in order, and the publishers'
TRANSFORMERS = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"^(dinov2(_with_registers)?|dinov3_vit|vit_msn|vit_mae|model)\.(?=embeddings|encoder|layer|norm)", ""),
        (r"^vision_model\.", ""),
        (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.", ""),
        (r"^(encoder\.)?layers?\.", "blocks."),
        (r"\.(attention\.attention|attention|self_attn)\.(query|key|value|q_proj|k_proj|v_proj)\.", r".attn.apart_\2."),
        (r"apart_(query|key|value)\.", lambda match: f"apart_{match[1][0]}_proj."),
        (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.weights_out\.", ".mlp.w3."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(?<=\d)\.output\.dense\.", ".mlp.fc2."),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(layernorm|post_layernorm)\.", "norm."),
    )
)
MARK = re.compile(r"(^|\.)embeddings\.patch_embeddings?\.")


def is_transformers(names: Iterable[str]) -> bool:
    """Whether tensors have transformers' names."""
    return any(MARK.search(name) for name in names)


def publishers_names(state: StateDict) -> StateDict:
    """A vision model's tensors by the publishers' names, from transformers'; those of text are left out."""
    renamed: StateDict = {}
    gated = any(".mlp.gate_proj." in name for name in state)
    feed = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    towers = any(name.startswith("vision_model.") for name in state)
    for name, tensor in state.items():
        if towers and not name.startswith("vision_model."):
            continue
        for pattern, new in TRANSFORMERS:
            name = pattern.sub(new, name)
        for old, new_part in feed.items():
            name = name.replace(f".mlp.{old}.", f".mlp.{new_part}.")
        renamed[name] = _with_batch(name, tensor)
    return _together(renamed)


def _with_batch(name: str, tensor: Any) -> Any:
    if name in ("cls_token", "pos_embed"):
        return tensor.reshape(1, -1, tensor.shape[-1])
    return tensor


def _together(state: StateDict) -> StateDict:
    """Queries, keys and values of each block in one projection; a bias that one of them lacks is zero."""
    torch, _ = import_export_libraries()
    found = {name: tensor for name, tensor in state.items() if ".apart_" not in name}
    for name in [name for name in state if name.endswith(".apart_q_proj.weight")]:
        block = name.removesuffix("apart_q_proj.weight")
        weights: list[Any] = [state.get(f"{block}apart_{each}_proj.weight") for each in "qkv"]
        biases = [state.get(f"{block}apart_{each}_proj.bias") for each in "qkv"]
        if any(weight is None for weight in weights):
            continue
        found[f"{block}qkv.weight"] = torch.cat(weights)
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            found[f"{block}qkv.bias"] = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in pairs])
    return found


def looks_like(state: StateDict) -> str:
    """What model tensors by the publishers' or timm's names are of, in words, as far as names and shapes tell."""
    names = state.keys()

    def has(*endings: str) -> bool:
        return any(name.endswith(endings) for name in names)

    if has("storage_tokens") or (has("gamma_1", "ls1.gamma") and "pos_embed" not in names):
        family = "DINOv3"
    elif has("ls1.gamma", "gamma_1"):
        family = "DINOv2 with registers" if has("register_tokens", "reg_token") else "DINOv2 without registers"
    elif has("norm_pre.weight", "ln_pre.weight"):
        family = "CLIP"
    elif has("q_proj.weight", "q_bias"):
        family = "EVA-02"
    elif "cls_token" not in names and "pos_embed" in names:
        family = "SigLIP"
    else:
        family = "DINO, MAE or a supervised ViT"
    patches = next((state[name] for name in names if name.endswith(("patch_embed.proj.weight", "conv1.weight"))), None)
    shape = (
        "" if patches is None or patches.ndim != 4 else f" of {patches.shape[0]} channels and patch {patches.shape[-1]}"
    )
    blocks = {match[1] for name in names if (match := re.match(r"(?:blocks|transformer\.resblocks)\.(\d+)\.", name))}
    return f"{family}{shape}, {len(blocks)} blocks"
