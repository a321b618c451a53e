"""One network by every name: the publisher's, timm's, transformers', OpenAI's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_backbones import published_weights
from helpers_backbones import tiny, weights

from facetrt.engine import InputError
from facetrt.export.backbones.model_spec import ModelSpec
from facetrt.export.models import FAMILIES, MODELS, find_model
from facetrt.export.weights import find_cached, load_strictly, load_weights
from facetrt.kernels.errors import MissingFileError

State = dict[str, Any]
Get = Callable[[str], tuple[Any, Path, Any]]
SMALL = {"dim": 96, "heads": 3, "depth": 2}


def cut(state: State, spec: ModelSpec) -> State:
    """The first channels of the first blocks of a golden network; of queries, keys and values each."""
    found: State = {}
    for name, value in state.items():
        if name.startswith("blocks.") and int(name.split(".")[1]) >= spec.depth:
            continue
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        wide = value.shape[0] // 3 if "qkv" in name else 0
        if wide:
            tensor = torch.cat([third[: spec.dim] for third in tensor.split(wide)])
        sizes = {384: spec.dim, 1536: 4 * spec.dim}
        for axis, size in enumerate(tensor.shape):
            tensor = tensor.narrow(axis, 0, sizes.get(size, size))
        found[name] = tensor.clone()
    return found


def digest(spec: ModelSpec, state: State, folder: Path) -> str:
    torch.save(state, folder / "w.pth")
    loaded, checkpoint = load_weights(spec, folder / "w.pth")
    load_strictly(spec.build(), loaded, "w.pth")
    return checkpoint.sha256


def small(name: str) -> ModelSpec:
    return replace(find_model(name), **SMALL)


def published(golden: str, name: str) -> tuple[ModelSpec, State]:
    spec = small(name)
    return spec, cut(published_weights(golden), spec)


TRANSFORMERS = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.", "pos_embed": "embeddings.position_embeddings",
    "cls_token": "embeddings.cls_token", "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token", "blocks.": "encoder.layer.", "attn.proj.": "attention.output.dense.",
    "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
}  # fmt: skip
TRANSFORMERS_V3 = {
    "patch_embed.proj.": "embeddings.patch_embeddings.", "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens", "mask_token": "embeddings.mask_token", "blocks.": "layer.",
    "attn.proj.": "attention.o_proj.", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1.": "mlp.up_proj.", "mlp.fc2.": "mlp.down_proj.",
}  # fmt: skip


def by_transformers(state: State, names: dict[str, str], thirds: str) -> State:
    found: State = {}
    for name, tensor in state.items():
        if name.endswith(("bias_mask", "periods")):
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        if name.startswith("norm."):
            name = name.replace("norm.", "layernorm.") if "encoder.layer." in names.values() else name
        if ".attn.qkv." in name:
            for third, own in zip(tensor.chunk(3), ("query", "key", "value"), strict=True):
                short = own if thirds == "attention.attention" else f"{own[0]}_proj"
                found[name.replace("attn.qkv", f"{thirds}.{short}")] = third
        else:
            found[name] = tensor
    return found


def test_dinov2_with_registers(tmp_path: Path) -> None:
    spec, state = published("dinov2_vits14_reg", "dinov2_vits14_reg")
    own = digest(spec, state, tmp_path)
    timm = {name: tensor for name, tensor in state.items() if name not in ("mask_token", "register_tokens")}
    timm |= {"reg_token": state["register_tokens"], "pos_embed": state["pos_embed"][:, 1:]}
    timm["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    assert digest(spec, timm, tmp_path) == own
    assert digest(spec, {"model": {f"backbone.{n}": t for n, t in state.items()}}, tmp_path) == own
    assert digest(spec, by_transformers(state, TRANSFORMERS, "attention.attention"), tmp_path) == own


@pytest.mark.parametrize("biases", [False, True])
def test_dinov3(biases: bool, tmp_path: Path) -> None:
    spec, state = published(f"dinov3_vits16{'_qkvb' if biases else ''}", "dinov3_vits16")
    state["rope_embed.periods"] = state["rope_embed.periods"][::2]  # heads of half the channels
    own = digest(spec, state, tmp_path)
    timm: State = {}
    for name, tensor in state.items():
        for old, new in {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}.items():
            name = name.replace(old, new)
        if name.endswith("qkv.bias"):
            if biases:
                timm |= {name.replace("qkv.bias", f"{n}_bias"): tensor.chunk(3)[i] for n, i in (("q", 0), ("v", 2))}
        elif not name.endswith(("bias_mask", "periods", "mask_token")):
            timm[name] = tensor
    assert digest(spec, timm, tmp_path) == own
    masked = {n: t.clone() for n, t in state.items()}
    for name in [n for n in masked if n.endswith("qkv.bias")]:
        masked[name] *= masked[f"{name}_mask"]
    assert digest(spec, by_transformers(masked, TRANSFORMERS_V3, "attention"), tmp_path) == own


def test_dinov3_with_periods_or_masks_that_are_not_its(tmp_path: Path) -> None:
    spec, state = published("dinov3_vits16_qkvb", "dinov3_vits16")
    state["rope_embed.periods"] = state["rope_embed.periods"][::2]
    own = digest(spec, state, tmp_path)
    exact = state | {"rope_embed.periods": 100 ** (torch.arange(8) / 8.0)}
    assert digest(spec, exact, tmp_path) != own  # a checkpoint's own count
    mask = "blocks.0.attn.qkv.bias_mask"
    with pytest.raises(InputError, match=r"qkv\.bias_mask has values that are not finite"):
        digest(spec, state | {mask: state[mask] * torch.nan}, tmp_path)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv\.bias: the bias of keys is not zero and not masked"):
        digest(spec, {n: t for n, t in state.items() if n != mask}, tmp_path)


def test_clip_by_openais_names(tmp_path: Path) -> None:
    spec = small("clip_vitb16")
    state = torch.load(weights(spec, tmp_path), weights_only=True)
    own = digest(spec, state, tmp_path)
    names = {
        "patch_embed.proj.": "conv1.", "pos_embed": "positional_embedding", "cls_token": "class_embedding",
        "blocks.": "transformer.resblocks.", "norm_pre.": "ln_pre.", "norm1.": "ln_1.", "norm2.": "ln_2.",
        "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj.",
        "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
    }  # fmt: skip
    openai: State = {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.ones(9)}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        name = name.replace("norm.", "ln_post.") if name.startswith("norm.") else name
        openai[f"visual.{name}"] = tensor[0, 0] if name == "class_embedding" else tensor
    openai["visual.positional_embedding"] = state["pos_embed"][0]
    openai["visual.proj"] = torch.zeros(96, 64)
    assert digest(spec, openai, tmp_path) == own


def test_siglip_leaves_its_pooling_out(tmp_path: Path) -> None:
    spec = small("siglip2_vitb16_224")
    state = torch.load(weights(spec, tmp_path), weights_only=True)
    own = digest(spec, state, tmp_path)
    within = {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
    assert digest(spec, within | {"visual.trunk.attn_pool.q.weight": torch.ones(9)}, tmp_path) == own


def test_what_a_file_of_another_family_looks_like(tmp_path: Path) -> None:
    v2, state = published("dinov2_vits14_reg", "dinov2_vits14_reg")
    with pytest.raises(InputError, match=r"looks like DINOv2 with registers of 96 channels and patch 14, 2 blocks"):
        digest(small("dinov3_vits16"), state, tmp_path)
    _, other = published("dinov3_vits16", "dinov3_vits16")
    with pytest.raises(InputError, match=r"looks like DINOv3 of 96 channels and patch 16"):
        digest(v2, other, tmp_path)
    del state["register_tokens"]
    with pytest.raises(InputError, match=r"1 missing: reg_token.*looks like DINOv2 without registers"):
        digest(v2, state, tmp_path)


def test_names_of_models() -> None:
    for name in (
        "vit_small_patch16_dinov3",
        "vit_small_patch16_dinov3_qkvb.lvd1689m",
        "facebook/dinov3-vits16-pretrain-lvd1689m",
    ):
        assert find_model(name) is MODELS["dinov3_vits16"]
    assert find_model("timm/vit_base_patch16_clip_224.openai").architecture == "vit_base_patch16_clip_quickgelu_224"
    assert find_model("ViT-B/16") is MODELS["clip_vitb16"]
    aliases = [alias for spec in MODELS.values() for alias in spec.aliases]
    assert len(set(aliases)) == len(aliases) and not set(aliases) & set(MODELS)
    with pytest.raises(InputError, match=r"unknown: did you mean dinov2_vits14_reg or"):
        find_model("dinov2-vits14-reg")
    with pytest.raises(InputError, match=r"cannot be exported: ConvNeXts have no tokens"):
        find_model("convnext_tiny.dinov3_lvd1689m")
    with pytest.raises(
        InputError, match=r"stride 4 does not divide the patch size 14 of dinov2_vits14: expected 14, 7, 2, 1"
    ):
        from facetrt.export.export_options import ExportOptions
        from facetrt.export.exporting import resolve_options

        resolve_options(find_model("dinov2_vits14"), ExportOptions(stride=4))


def test_every_model_is_of_a_family_and_its_network_has_its_shape() -> None:
    for spec in MODELS.values():
        assert FAMILIES[spec.family.name] is spec.family or spec.name == "tiny"
        assert spec.dim % spec.heads == 0 and spec.default_stride in spec.strides
        assert all(
            int(facet.partition("@")[2].partition("-")[0].partition("+")[0]) < spec.depth for facet in spec.exported
        )


def test_weights_in_other_libraries_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = replace(tiny("dinov2_vits14"), url="https://127.0.0.1/dinov2_vits14_pretrain.pth")
    assert find_cached(spec) is None
    place = tmp_path / "torch" / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    place.parent.mkdir(parents=True)
    shutil.copy(weights(spec, tmp_path), place)
    notes: list[str] = []
    _, checkpoint = load_weights(spec, None, report=notes.append)
    assert notes == [f"found {place}"] and checkpoint.source == place.name


def test_a_checkpoint_has_one_source_whenever_it_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = replace(tiny("ibot_vits16"), url="http://127.0.0.1:9/checkpoint_teacher.pth", file="ibot-teacher.pth")
    (tmp_path / "facetrt").mkdir()
    shutil.copy(weights(spec, tmp_path), tmp_path / "facetrt" / "ibot-teacher.pth")
    notes: list[str] = []
    assert load_weights(spec, None, report=notes.append)[1].source == spec.url and not notes
    assert len({spec.file_name for spec in MODELS.values() if spec.url}) == sum(1 for s in MODELS.values() if s.url)


def test_weights_that_need_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr("facetrt.export.weights.find_cached", lambda spec: None)
    place = tmp_path / "facetrt" / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    with pytest.raises(
        MissingFileError, match=rf"no network.*--weights, or put the publisher's .* at {place}.*account"
    ):
        load_weights(find_model("dinov3_vits16"), None)
    place.parent.mkdir(parents=True)
    place.write_bytes(b"PK")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"has SHA-256 .*; the published checkpoint of dinov3_vits16 has 08c60483"):
        load_weights(find_model("dinov3_vits16"), None)
