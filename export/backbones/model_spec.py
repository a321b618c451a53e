"""A model that can be exported, and the family it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from facetrt.engine.bundle.positional import Rotation, TableRule
from facetrt.kernels.errors import InputError, MissingDependencyError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Shape(TypedDict):
    """Width, heads and blocks of a ViT, as arguments of :class:`ModelSpec`."""

    dim: int
    heads: int
    depth: int


SHAPES = {
    "tiny": Shape(dim=192, heads=3, depth=12),
    "small": Shape(dim=384, heads=6, depth=12),
    "base": Shape(dim=768, heads=12, depth=12),
    "large": Shape(dim=1024, heads=16, depth=24),
    "so400m": Shape(dim=1152, heads=16, depth=27),
    "huge": Shape(dim=1280, heads=16, depth=32),
    "giant": Shape(dim=1536, heads=24, depth=40),
}
DEFAULT_STRIDE = 4
StateDict = dict[str, Any]  # name → torch tensor


def own_names(state: StateDict, spec: ModelSpec) -> StateDict:
    """Tensors that have timm's names already."""
    return state


@dataclass(frozen=True)
class Family:
    """What models of one kind share.

    Attributes:
        title: for people.
        licence: of the checkpoints, as their publisher states it.
        compared: with whose code the family's arithmetic is compared by tests.
        positional_rule: how positional tables are brought to other grids; of the model, where it has one.
        rotation: how queries and keys turn; None if they don't.
        timm_names: brings a checkpoint's tensors, of either layout, to timm's names and shapes.
        final_norm: whether there is one of all tokens.
        access: how to get gated weights, in words.
    """

    name: str
    title: str
    licence: str
    compared: str
    positional_rule: TableRule = TableRule.SCALE
    rotation: Rotation | None = None
    timm_names: Callable[[StateDict, ModelSpec], StateDict] = own_names
    final_norm: bool = True
    access: str = ""


DINO = Family("dino", "DINO", "Apache-2.0", "the authors' code and timm")


@dataclass(frozen=True)
class ModelSpec:
    """A ViT and its checkpoint.

    Attributes:
        trained_grid: side of the grid that the positional table covers; 0 if there is none.
        prefix: tokens before those of cells: [CLS], if any, then registers.
        saliency_heads: heads of the last layer whose [CLS] attention is averaged; all if None.
        url: where a checkpoint is published; ``published_bytes``, ``published_sha256`` (or its first digits) are those
            of that file, where they are stated; a download that differs is refused.
        file: what the file is called in caches, where the address does not tell, or where there is none because it
            takes an account.
        timm_name: the checkpoint that timm has.
        hub: repositories on the Hugging Face hub with the same weights, which are looked for in its cache.
        aliases: other names of the same model.
        architecture: timm's name of the network, and ``settings`` beside it; DINO's own layout if None.
        match_facet, cosegment_facet, propagate_facet: the facet that each task uses; ``track_facet`` is that for
            matching if None, ``discover_facet`` that for co-segmentation. By default keys at three quarters of the
            depth for matches, else of the last layer, as for DINO; normalised tokens for propagation.
        published_defaults: tasks whose facet somebody published; the others follow DINO's.
        default_facets: what is exported unless facets are named: those of matches and co-segmentation if None.
        segmenter: whether its checkpoint holds SelfMask's segmenter as well.
        positional_rule: the family's if None.
    """

    name: str
    description: str
    patch: int
    dim: int
    heads: int
    depth: int = 12
    mlp_ratio: float = 4.0
    trained_grid: int = 0
    prefix: int = 1
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET
    saliency_heads: tuple[int, ...] | None = None
    url: str | None = None
    published_bytes: int | None = None
    published_sha256: str | None = None
    file: str | None = None
    timm_name: str | None = None
    hub: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    architecture: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    match_facet: str | None = None
    cosegment_facet: str | None = None
    propagate_facet: str | None = None
    track_facet: str | None = None
    discover_facet: str | None = None
    published_defaults: tuple[str, ...] = ()
    default_facets: tuple[str, ...] | None = None
    segmenter: bool = False
    positional_rule: TableRule | None = None
    family: Family = DINO

    @property
    def defaults(self) -> dict[str, str]:
        """The facet that each task uses."""
        match = self.match_facet or f"key@{3 * self.depth // 4}"
        cosegment = self.cosegment_facet or f"key@{self.depth - 1}"
        return {
            "match": match,
            "cosegment": cosegment,
            "propagate": self.propagate_facet or f"{'normed' if self.family.final_norm else 'token'}@{self.depth - 1}",
            "track": self.track_facet or match,
            "discover": self.discover_facet or cosegment,
        }

    @property
    def exported(self) -> tuple[str, ...]:
        """The facets that are exported unless others are named."""
        return self.default_facets or tuple(dict.fromkeys((self.defaults["match"], self.defaults["cosegment"])))

    @property
    def table_rule(self) -> TableRule:
        """How its positional table is brought to another grid."""
        return self.positional_rule or self.family.positional_rule

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides that divide the patch, largest first."""
        return tuple(stride for stride in range(self.patch, 0, -1) if self.patch % stride == 0)

    @property
    def default_stride(self) -> int:
        """4, or the largest stride of overlapping patches where 4 does not divide the patch."""
        if self.patch % DEFAULT_STRIDE == 0:
            return DEFAULT_STRIDE
        return self.strides[min(1, len(self.strides) - 1)]

    @property
    def file_name(self) -> str | None:
        """What its checkpoint's file is called in caches."""
        return self.file or (self.url.rsplit("/", 1)[1] if self.url else None)

    def build(self) -> Any:
        """An untrained timm network of this shape, without classifier and pooling.

        Raises:
            MissingDependencyError: timm is too old to know it.
        """
        torch, _ = import_export_libraries()
        vit = self._plain() if self.architecture is None else self._by_name(self.architecture)
        for name in ("head", "fc_norm"):
            setattr(vit, name, torch.nn.Identity())
        vit.attn_pool = None
        return vit.eval()

    def _plain(self) -> Any:
        """DINO's own layout, which is timm's plain one."""
        from functools import partial

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
        )

    def _by_name(self, architecture: str) -> Any:
        _, timm = import_export_libraries()
        if not timm.is_model(architecture):
            raise MissingDependencyError(
                f"timm {timm.__version__} does not know {architecture}, the network of {self.name}: pip install -U timm"
            )
        shape = {"embed_dim": self.dim, "depth": self.depth, "num_heads": self.heads, "patch_size": self.patch}
        size = {"img_size": self.trained_grid * self.patch} if self.trained_grid else {}
        return timm.create_model(
            architecture, pretrained=False, num_classes=0, dynamic_img_size=True, **(shape | size | dict(self.settings))
        )


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


def renamed(state: StateDict, changes: Mapping[str, str]) -> StateDict:
    """Tensors with each part of a name replaced, in order.

    Raises:
        InputError: two tensors would get one name.
    """
    found: StateDict = {}
    for name, tensor in state.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        if name in found:
            raise InputError(f"two tensors would both be {name}: expected one model's state dict")
        found[name] = tensor
    return found
