"""The backbone in a checkpoint: which dictionary, under which prefix, and what beside it is not used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from facetrt.export.backbones.layouts import is_transformers, publishers_names
from facetrt.export.backbones.model_spec import import_export_libraries
from facetrt.kernels.errors import InputError

#: Keys and prefixes that hold a model, the one to take first. An average of the student over time is the better model.
ROLES = ("teacher", "model_ema", "state_dict_ema", "student")  # the averages of DeiT's and of timm's training
CONTAINERS = ("model", "state_dict", "model_state_dict", "target_encoder")
PREFIXES = ("backbone", "encoder", "net", "trunk", "vision_encoder", "visual", "vit")
ORDER = (*ROLES, *CONTAINERS)
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
KNOWN = {*ORDER, *PREFIXES, *WRAPPERS}
#: First parts of names that belong to classifiers and to what only training needs.
HEADS = {
    "attn_pool", "classifier", "cls_norm", "decoder", "decoder_blocks", "decoder_embed", "decoder_norm",
    "decoder_pos_embed", "decoder_pred",
    "dino_head", "fc", "fc_norm", "head", "head_dist", "heads", "ibot_head", "linear", "lm_head", "local_cls_norm",
    "mask_token", "masked_embed", "pre_logits", "predictor", "projection_head", "projector", "projectors", "prototypes",
}  # fmt: skip
#: Any of them: a ViT by timm's and DINO's names, or by OpenAI's.
ANCHORS = {"cls_token", "pos_embed", "patch_embed.proj.weight", "class_embedding", "conv1.weight"}
MAX_DEPTH = 8
SHOWN = 4


@dataclass
class Backbone:
    """Tensors by the model's own names, and what was decided on the way.

    Attributes:
        taken: where they were, like ``teacher.backbone``; empty if they lay at the top under their own names.
        passed_over: other places that hold such a model.
        heads: names of tensors of classifiers and projection heads, which are not used.
    """

    tensors: dict[str, Any]
    taken: str = ""
    passed_over: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    def notes(self) -> Iterator[str]:
        """One line each, for people; none if the file held the backbone alone."""
        if self.taken:
            beside = f"; also there, and not used: {', '.join(self.passed_over)}" if self.passed_over else ""
            yield f"took the weights under {self.taken}{beside}"
        if self.heads:
            yield f"not used: {len(self.heads)} tensors of heads ({listed(self.heads, SHOWN)})"


def find_backbone(loaded: Any, source: str) -> Backbone:
    """The tensors of one ViT, the teacher's first, under the model's own names.

    Raises:
        InputError: no such tensors, or two models of which neither goes first.
    """
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    found = list(_tensors(loaded))
    if is_transformers(name for _, name, _ in found):
        found = [((), *each) for each in publishers_names({name: tensor for _, name, tensor in found}).items()]
    for path, name, tensor in found:
        prefix, own = _split(path, name)
        group = groups.setdefault(prefix, {})
        if own in group and not _same(group[own], tensor):
            raise InputError(f"{source} holds two tensors that would both be {own}: expected one model's state dict")
        group[own] = tensor
    models = sorted((prefix for prefix, group in groups.items() if ANCHORS & group.keys()), key=_rank)
    if not models:
        raise InputError(_nothing_found(loaded, source))
    if len(models) > 1 and _rank(models[0]) == _rank(models[1]):
        both = " and ".join(map(_shown, models[:2]))
        raise InputError(f"{source} holds two models, under {both}: save the one that is meant by itself")
    chosen = models[0]
    tensors = {name: tensor for name, tensor in groups[chosen].items() if not _is_head(name)}
    heads = [name for name in groups[chosen] if _is_head(name)]
    for prefix, group in groups.items():  # DINO's heads lie beside its backbone: teacher.head, teacher.backbone
        if prefix != chosen and prefix == chosen[: len(prefix)]:
            heads += [".".join((*prefix, name)) for name in group if _is_head(name)]
    return Backbone(tensors, _shown(chosen) if chosen else "", [_shown(prefix) for prefix in models[1:]], sorted(heads))


def _tensors(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """All tensors of the dictionaries that hold models, with the keys that lead to their dictionary."""
    torch, _ = import_export_libraries()
    if not isinstance(value, Mapping) or len(path) > MAX_DEPTH:
        return
    for key, entry in value.items():
        if isinstance(entry, torch.Tensor) and isinstance(key, str):
            yield path, key, entry
        elif key in KNOWN:
            yield from _tensors(entry, (*path, key))


def tensors_of(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of a checkpoint that belongs to a model, by its name without the keys that lead there."""
    for path, name, tensor in _tensors(loaded):
        yield _split(path, name)[1], tensor


def _split(path: tuple[str, ...], name: str) -> tuple[tuple[str, ...], str]:
    """Keys and prefixes that lead to a model, and the tensor's name in it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    count = next((i for i, part in enumerate(parts[:-1]) if part not in KNOWN), len(parts) - 1)
    prefix = [part for part in (*path, *parts[:count]) if part not in WRAPPERS]
    return tuple(prefix), ".".join(parts[count:])


def _same(one: Any, other: Any) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())


def _rank(prefix: tuple[str, ...]) -> int:
    return min((ORDER.index(part) for part in prefix if part in ORDER), default=len(ORDER))


def _is_head(name: str) -> bool:
    return name.partition(".")[0] in HEADS


def _shown(prefix: tuple[str, ...]) -> str:
    return repr(".".join(prefix)) if prefix else "the top"


def _nothing_found(loaded: Any, source: str) -> str:
    expected = "expected names like blocks.0.attn.qkv.weight, cls_token and pos_embed, at the top or under "
    expected += ", ".join((*ORDER, *PREFIXES, *WRAPPERS[:2]))
    names = [".".join((*path, name)) for path, name in _names(loaded)]
    if not names:
        keys = [str(key) for key in loaded] if isinstance(loaded, Mapping) else [f"a {type(loaded).__name__}"]
        return f"{source} holds no tensors, but {listed(keys, SHOWN) or 'nothing'}: {expected}"
    return f"{source} holds no ViT that is known here; its first tensors are {listed(names, SHOWN)}: {expected}"


def _names(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The names of every tensor, in whatever dictionary."""
    torch, _ = import_export_libraries()
    if isinstance(value, Mapping) and len(path) <= MAX_DEPTH:
        for key, entry in value.items():
            if isinstance(entry, torch.Tensor):
                yield path, str(key)
            else:
                yield from _names(entry, (*path, str(key)))


def listed(names: list[str], limit: int = 12) -> str:
    """Names for a message, the first ones if they are many."""
    more = f", … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
