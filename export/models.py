"""The models that can be exported, and where their checkpoints are published."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from facetrt.engine.bundle.manifest import BY_SIZE
from facetrt.export import builtin
from facetrt.kernels.errors import InputError, MissingDependencyError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SELFMASK_URL = "https://www.robots.ox.ac.uk/~vgg/research/selfmask/shared_files"
DINO_URL = "https://dl.fbaipublicfiles.com/dino"


@dataclass(frozen=True)
class ModelSpec:
    """A ViT and its checkpoint.

    Attributes:
        trained_grid: side of the grid that the positional table covers.
        saliency_heads: heads of the last layer whose [CLS] attention is averaged; all if None.
        url: where an official DINO checkpoint is published. timm's models have none: timm downloads them.
        published_bytes, published_sha256: of that file, where known; a download that differs is refused.
        match_facet, cosegment_facet, propagate_facet: the facet that each task uses; ``track_facet`` is that for
            matching if None, ``discover_facet`` that for co-segmentation.
        default_facets: what is exported unless facets are named.
        segmenter: whether its checkpoint holds SelfMask's segmenter as well.
        positional_rule: as in the manifest: ``size`` where its table is interpolated to a size.
    """

    name: str
    description: str
    patch: int
    dim: int
    heads: int
    depth: int = 12
    mlp_ratio: float = 4.0
    trained_grid: int = 0
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET
    saliency_heads: tuple[int, ...] | None = None
    url: str | None = None
    published_bytes: int | None = None
    published_sha256: str | None = None
    timm_name: str | None = None
    match_facet: str = "key@9"
    cosegment_facet: str = "key@11"
    propagate_facet: str = "normed@11"
    track_facet: str | None = None
    discover_facet: str | None = None
    default_facets: tuple[str, ...] = ("key@9", "key@11")
    segmenter: bool = False
    positional_rule: str | None = None

    @property
    def defaults(self) -> dict[str, str]:
        """The facet that each task uses."""
        return {
            "match": self.match_facet,
            "cosegment": self.cosegment_facet,
            "propagate": self.propagate_facet,
            "track": self.track_facet or self.match_facet,
            "discover": self.discover_facet or self.cosegment_facet,
        }

    def build(self) -> Any:
        """An untrained ``timm.models.VisionTransformer`` of this shape, without classifier."""
        torch, timm = import_export_libraries()
        return timm.models.VisionTransformer(
            img_size=self.trained_grid * self.patch,
            patch_size=self.patch,
            embed_dim=self.dim,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            num_classes=0,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        ).eval()


def import_export_libraries() -> tuple[Any, Any]:
    """torch and timm, or an error that names the extra."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import timm
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"export needs {error.name}, which is not installed: pip install 'facetrt[export,cpu]'"
        ) from error
    return torch, timm


def _dino(
    name: str,
    patch: int,
    folder: str,
    *,
    base: bool = False,
    heads: tuple[int, ...] | None = None,
    published_bytes: int | None = None,
) -> ModelSpec:
    return ModelSpec(
        name=name,
        description=f"DINO {'ViT-B' if base else 'ViT-S'}/{patch}",
        patch=patch,
        dim=768 if base else 384,
        heads=12 if base else 6,
        trained_grid=224 // patch,
        saliency_heads=heads,
        url=f"{DINO_URL}/{folder}/{folder}.pth",
        published_bytes=published_bytes,
    )


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
        dim=768 if size == "base" else 384,
        heads=12 if size == "base" else 6,
        trained_grid=224 // patch,
        normalisation=HALF,
        timm_name=f"{name}.augreg_in21k_ft_in1k" if published else None,
    )


def _selfmask(queries: int) -> ModelSpec:
    """DINO's ViT-S/8, trained further with a segmenter on its last tokens."""
    name = f"selfmask_nq{queries}"
    return ModelSpec(
        name=name,
        description=f"SelfMask's ViT-S/8 and segmenter of {queries} queries",
        patch=8,
        dim=384,
        heads=6,
        trained_grid=28,
        url=f"{SELFMASK_URL}/{name}.pt",
        default_facets=("key@11", "normed@11"),
        segmenter=True,
        positional_rule=BY_SIZE,
    )


def _builtin() -> ModelSpec:
    return ModelSpec(
        name="builtin",
        description="facetrt's small closed-form ViT; not DINO",
        patch=builtin.PATCH,
        dim=builtin.DIM,
        heads=builtin.HEADS,
        depth=builtin.DEPTH,
        mlp_ratio=builtin.MLP_RATIO,
        trained_grid=builtin.GRID,
        saliency_heads=builtin.SALIENCY_HEADS,
        match_facet=builtin.MATCH_FACET,
        cosegment_facet=builtin.COSEGMENT_FACET,
        propagate_facet=builtin.TRACK_FACET,
        track_facet=f"{builtin.MATCH_FACET}+2*{builtin.TRACK_FACET}",
        discover_facet=f"{builtin.COSEGMENT_FACET}-mean",
        default_facets=(builtin.MATCH_FACET, builtin.COSEGMENT_FACET, builtin.TRACK_FACET),
    )


S8_HEADS = (0, 2, 4, 5)  # heads 1 and 3 of this checkpoint attend to background; found by the method's authors

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _dino("dino_vits8", 8, "dino_deitsmall8_pretrain", heads=S8_HEADS, published_bytes=86_728_949),
        _dino("dino_vits8_300ep", 8, "dino_deitsmall8_300ep_pretrain", heads=S8_HEADS),
        _dino("dino_vits16", 16, "dino_deitsmall16_pretrain"),
        _dino("dino_vitb8", 8, "dino_vitbase8_pretrain", base=True),
        _dino("dino_vitb16", 16, "dino_vitbase16_pretrain", base=True),
        *(_selfmask(queries) for queries in (10, 20)),
        *(_supervised(size, patch) for size in ("small", "base") for patch in (8, 16)),
        _builtin(),
    )
}


def find_model(name: str) -> ModelSpec:
    """The model of that name, or :class:`InputError` listing all names."""
    if name not in MODELS:
        raise InputError(f"model {name!r} is unknown: expected one of {', '.join(MODELS)}")
    return MODELS[name]
