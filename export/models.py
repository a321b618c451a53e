"""The models that can be exported: those of every family, by name, and what is refused."""

from __future__ import annotations

import difflib
import re
from types import ModuleType

from facetrt.export.backbones import clip, dino, dinov2, dinov3, eva, masked, siglip, supervised
from facetrt.export.backbones.model_spec import Family
from facetrt.export.backbones.model_spec import ModelSpec as ModelSpec
from facetrt.export.backbones.model_spec import import_export_libraries as import_export_libraries
from facetrt.kernels.errors import InputError

SUGGESTIONS = 4

#: A file each; a new family is one more.
BACKBONES: tuple[ModuleType, ...] = (dino, supervised, masked, dinov2, dinov3, siglip, clip, eva)

FAMILIES: dict[str, Family] = {family.name: family for module in BACKBONES for family in module.FAMILIES}
MODELS: dict[str, ModelSpec] = {spec.name: spec for module in BACKBONES for spec in module.MODELS}

#: Names that people will try, and why they are not exported.
REFUSED = {
    r"convnext.*|dinov3_convnext.*": "ConvNeXts have no tokens: neither facets nor [CLS] attention",
    r"dinov3_vit7b.*|vit_7b_.*|.*vit7b16.*": "its 6.7 billion weights do not fit into one ONNX file, not even halved",
    r".*siglip_gap.*|naflexvit.*siglip.*": "use a siglip model that is listed, with the same weights",
    r"vit_giantopt_.*": "its 1.1 billion weights were not tried",
    r".*radio.*": "its positional table is cropped out of a square, and timm's networks hold it for one size only",
    r".*franca.*": "timm has no network of it, and its code was not compared with",
    r"dino_xcit.*|xcit.*|dino_resnet.*|swin.*|.*hiera.*|sam.*|beit.*": "its network is no plain ViT of one resolution",
}


def find_model(name: str) -> ModelSpec:
    """The model of that name: ours, timm's, or of the Hugging Face hub.

    Raises:
        InputError: an unknown name, with those that come closest, or one that is refused, with the reason.
    """
    wanted = name.removeprefix("hf-hub:").removeprefix("timm/")
    if wanted in MODELS:
        return MODELS[wanted]
    for spec in MODELS.values():
        if wanted in spec.aliases:
            return spec
    for pattern, reason in REFUSED.items():
        if re.fullmatch(pattern, wanted, re.IGNORECASE):
            raise InputError(f"model {name!r:.80} cannot be exported: {reason}")
    raise InputError(f"model {name!r:.80} is unknown: {_suggestion(wanted)}; 'facetrt models' lists all of them")


def _suggestion(name: str) -> str:
    names = [*MODELS, *(alias for spec in MODELS.values() for alias in spec.aliases)]
    by_fold = {each.lower().replace("-", "_"): each for each in reversed(names)}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(by_fold), SUGGESTIONS, 0.5)
    if not close:
        return f"expected one of {', '.join(list(MODELS)[:SUGGESTIONS])}, …"
    return f"did you mean {' or '.join(by_fold[each] for each in close)}?"
