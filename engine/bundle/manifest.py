"""A bundle's manifest: what it says of the encoder and its files, parsed strictly."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from facetrt.engine.bundle.positional import Rotation, TableRule
from facetrt.engine.images.geometry import grid_size
from facetrt.kernels.errors import BundleError, InputError

SCHEMA = 5  # 5: families, registers, rotation; 4: what was measured of each precision; 3: TensorRT plans and kernels
MANIFEST = "manifest.json"
ENCODER = "encoder.onnx"
POSITIONAL = "positional.npy"
ROTATION = "rotation.npy"  # the periods of what queries and keys turn by
PADDING = "padding.npy"
SEGMENTER = "segmenter.npz"
MAX_HEAD = 65_536  # channels that a head may weigh
CLS_ATTENTION = "cls_attention"  # name of the graph output that saliency is made from

PRECISIONS = ("fp32", "fp16", "bf16")

PLANS = "plans"  # folder of TensorRT plans
PLAN_BUILDERS = ("tensorrt", "tensorrt-rtx")
ARCHITECTURE = re.compile(r"sm_[1-9]\d{1,2}")
KERNELS = "kernels"  # folder of compiled kernels, one folder for each architecture

FACET_KINDS = ("key", "query", "value", "token", "normed")
ROTATED_KINDS = ("rotated_key", "rotated_query")  # as attention takes them, of models that rotate
MAX_FILES = 10_000  # listed, or found in the folder: plans and kernels of a few architectures are some hundreds
MAX_ARCHITECTURE = {
    "dim": 1 << 14, "depth": 256, "heads": 256, "patch": 256, "trained_grid": 1024, "prefix": 256,
}  # fmt: skip  # no ViT is larger
MIN_ARCHITECTURE = {"trained_grid": 0, "prefix": 0}  # a model without a table, one without [CLS]
MAX_SIDE = 1 << 16  # pixels of a fixed size
FACET = re.compile(r"[a-z_]{1,32}@(\d{1,3})", re.ASCII)


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: size in bytes and SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights came from."""

    source: str
    sha256: str


@dataclass(frozen=True)
class Architecture:
    """Shape of the ViT.

    Attributes:
        trained_grid: side of the square grid that its positional table covers; 0 if it has none.
        prefix: how many tokens stand before those of cells: [CLS], if any, then registers.
    """

    dim: int
    depth: int
    heads: int
    patch: int
    trained_grid: int
    prefix: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low, high = MIN_ARCHITECTURE.get(name, 1), MAX_ARCHITECTURE[name]
            if not low <= value <= high:
                raise BundleError(f"architecture.{name} is {value}: expected {low} to {high:,}")
        if self.dim % self.heads:
            raise BundleError(f"architecture.heads is {self.heads}, which does not divide dim, {self.dim}")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads


@dataclass(frozen=True)
class Normalisation:
    """Per-channel RGB mean and standard deviation; they are folded into the graph."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class ParityReport:
    """How far the exported graph is from the torch model, the worst over all compared images and outputs.

    ``cases`` lists the inputs; ``outputs`` gives each output's figures, which
    :mod:`facetrt.engine.backends.parity` explains.
    """

    cases: list[str]
    outputs: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Riders:
    """An encoder whose cells between those of the patch grid are riders: they ask, and nobody asks them.

    From block ``from_block`` on, attention takes keys and values of *carriers* alone: [CLS], registers and the cells
    that the network has at the stride of its patch (:meth:`facetrt.engine.bundle.positional.Cells.carriers`).

    Attributes:
        deviation: what that changes: how far outputs are from those of the full network, both in float64.
    """

    from_block: int
    deviation: ParityReport

    def __str__(self) -> str:
        return f"riders from block {self.from_block}"


@dataclass(frozen=True)
class Fp32Parts:
    """What stays in fp32 where the rest runs in half precision, beside the patch convolution and the residual stream.

    ``blocks`` are whole blocks, by number; ``cls_attention`` is that of the last block, projections included.
    """

    cls_attention: bool = False
    blocks: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        parts = ["[CLS] attention"] * self.cls_attention
        if self.blocks:
            parts.append(f"block{'s' * (len(self.blocks) > 1)} {', '.join(map(str, self.blocks))}")
        return " and ".join(parts) or "nothing"


@dataclass(frozen=True)
class TaskAgreement:
    """How far tasks agree with what they find in fp32, on photographs; each figure is 1 where they agree in full.

    Attributes:
        measured: on what and how, in words.
        figures: ``buddies``, the share of best buddies that both find, up to one cell; ``points``, the same of the
            selected pairs, up to one patch; ``labels``, the adjusted Rand index of co-segmentation's clusters;
            ``masks``, the share of cells on the same side of its masks; ``pca``, how alike (RV coefficient) the cells'
            coordinates on three principal components are.
        absent: tasks without figures, and why.
        missed: the figures out of their bounds, in words; empty if all are within.
    """

    measured: str
    figures: dict[str, float]
    absent: dict[str, str]
    missed: str


@dataclass(frozen=True)
class PrecisionRecord:
    """How exact an encoder is in one precision, as it was measured at export.

    Attributes:
        missed: the worst figure and its bound, in words; empty if the contract holds.
        measured: with what: a backend and its version, or emulated rounding.
        fp32: what stays in fp32, so that the contract holds; the least that was found to do.
        outputs: figures of each output against the torch model in float64, the worst of the export's images.
        relative_time: of the encoder, as a multiple of its time in fp32 by the same backend; None if not measured.
        tasks: what tasks make of it, of half precision; None if not measured.
    """

    missed: str
    measured: str
    fp32: Fp32Parts
    outputs: dict[str, dict[str, float]]
    relative_time: float | None
    tasks: TaskAgreement | None = None

    @property
    def holds(self) -> bool:
        """Whether the contract of the precision holds."""
        return not self.missed


@dataclass(frozen=True)
class Candidate:
    """A precision that an export weighed, which was to choose one.

    Attributes:
        fp32: what stays in fp32 beside it.
        taken: whether it is the bundle's; one candidate is.
        why: why it was taken or not, in words and with figures.
        tasks: what tasks make of it; None if it was ruled out before they were measured.
    """

    precision: str
    fp32: Fp32Parts
    taken: bool
    why: str
    tasks: TaskAgreement | None


@dataclass(frozen=True)
class Ranges:
    """Largest absolute values in each block on the export's images: attention logits, and everything that is stored."""

    logits: list[float]
    activations: list[float]


@dataclass(frozen=True)
class PlanRecord:
    """What a TensorRT plan was built from, and what its build found.

    Attributes:
        encoder_sha256: of the graph it was built from.
        builder: ``tensorrt``, whose plans run on the kind of GPU that built them, or ``tensorrt-rtx``.
        version: of the builder.
        architectures: that it was built for, like ``sm_90``.
        profile: each input's smallest, most likely and largest shape.
        flags: of the builder, sorted: ``hardware_compatible``, ``version_compatible``.
        precision: of the graph.
        parity: how far it is from ONNX Runtime's fp32 result of the same graph; empty of a plan that was built without
            the GPU that runs it, and is compared there when it first runs.
        layers: of the built engine.
        attention: how many attentions over all tokens the graph has.
        fused_attention: how many of them are one kernel, which never holds a t × t matrix.
        scratch_bytes: device memory that a run needs beside weights, inputs and outputs, by profile: single images, and
            batches if the plan takes any. A lane takes as much as its largest profile in use.
    """

    encoder_sha256: str
    builder: str
    version: str
    architectures: list[str]
    profile: dict[str, list[list[int]]]
    flags: list[str]
    precision: str
    parity: ParityReport
    layers: int
    attention: int
    fused_attention: int
    scratch_bytes: list[int]

    def __post_init__(self) -> None:
        shapes = self.profile.get("images", [])
        if len(shapes) != 3 or any(len(shape) != 4 for shape in shapes):
            raise BundleError(f"a plan's profile of images is {shapes}: expected three shapes of four numbers")
        if self.builder not in PLAN_BUILDERS:
            raise BundleError(f"a plan's builder is {self.builder!r:.60}: expected {' or '.join(PLAN_BUILDERS)}")
        foreign = [name for name in self.architectures if not ARCHITECTURE.fullmatch(name)]
        if foreign or not self.architectures:
            raise BundleError(f"a plan's architectures are {self.architectures!r:.60}: expected names like sm_90")

    @property
    def max_batch(self) -> int:
        """The most images in one run."""
        return self.profile["images"][2][0]

    @property
    def architecture(self) -> str:
        """All architectures, in words."""
        return ", ".join(self.architectures)


@dataclass(frozen=True)
class LinearHead:
    """FOUND's head: foreground is where ``weight · row + bias`` of a facet's rows is positive.

    The facet may end with ``-mean``: rows less the image's mean.
    """

    facet: str
    weight: list[float]
    bias: float
    source: str

    def __post_init__(self) -> None:
        if FACET.fullmatch(self.facet.removesuffix("-mean")) is None:
            raise BundleError(f"found_head: facet {self.facet!r:.60}: expected a kind, @ and a layer, like key@11")
        if not 0 < len(self.weight) <= MAX_HEAD or not all(map(math.isfinite, [*self.weight, self.bias])):
            raise BundleError(f"found_head has {len(self.weight)} weights: expected 1 to {MAX_HEAD:,} finite numbers")


def parse_head(value: Any) -> LinearHead:
    """A head from JSON; raises :class:`BundleError` that names the field that is wrong."""
    head: LinearHead = _parse(LinearHead, value, "found_head")
    return head


@dataclass(frozen=True)
class Manifest:
    """Everything the engine needs to know about an encoder.

    ``size`` is None for a bundle of any size. ``plans`` describes the TensorRT plans among the files, by file name;
    ``precisions`` says how exact the encoder is in each precision that it was measured in; ``candidates``, in the order
    they were weighed, why it has its own, or None where that was asked for. ``positional_rule`` is how its positional
    table is brought to another grid, see :class:`facetrt.engine.bundle.positional.TableRule`; ``rotation`` how queries
    and keys turn, None where they don't; ``found_head`` is FOUND's, where one was added; ``family`` is the model's;
    ``riders`` says that the encoder is an approximation, None if it is the model itself.
    """

    schema: int
    model: str
    description: str
    checkpoint: Checkpoint
    architecture: Architecture
    stride: int
    facets: list[str]
    saliency_heads: list[int] | None
    normalisation: Normalisation
    size: list[int] | None
    precision: str
    opset: int
    defaults: dict[str, str]
    parity: ParityReport
    precisions: dict[str, PrecisionRecord]
    ranges: Ranges
    tools: dict[str, str]
    files: dict[str, FileEntry] = field(default_factory=dict)
    plans: dict[str, PlanRecord] = field(default_factory=dict)
    candidates: list[Candidate] | None = None
    positional_rule: str | None = None
    rotation: Rotation | None = None
    found_head: LinearHead | None = None
    family: str = "dino"
    riders: Riders | None = None

    def __post_init__(self) -> None:
        if self.positional_rule not in (None, *TableRule):
            raise BundleError(
                f"positional_rule {self.positional_rule!r:.60}: expected {', '.join(TableRule)}, or nothing"
            )
        if self.stride < 1 or self.architecture.patch % self.stride:
            raise BundleError(f"stride {self.stride} does not divide the patch size {self.architecture.patch}")
        if self.size is not None and (len(self.size) != 2 or not all(1 <= side <= MAX_SIDE for side in self.size)):
            raise BundleError(f"size {self.size!r:.60}: expected [height, width], at most {MAX_SIDE:,} each")
        self._check_outputs()
        self._check_numbers()
        if self.size is not None:
            grid_size((self.size[0], self.size[1]), self.architecture.patch, self.stride)
        for name in self.files:
            _check_name(name)
        if self.found_head is not None and len(self.found_head.weight) != self.architecture.dim:
            raise BundleError(
                f"found_head has {len(self.found_head.weight)} weights: expected {self.architecture.dim}, as many as "
                "there are channels"
            )
        unlisted = sorted(set(self.plans) - set(self.files))
        if unlisted:
            raise BundleError(f"{MANIFEST} describes the plans {unlisted}, but does not list these files")

    def _check_outputs(self) -> None:
        if not self.facets:
            raise BundleError("the manifest lists no facets: expected at least one")
        if len(set(self.facets)) < len(self.facets):
            raise BundleError("the manifest lists a facet twice")
        depth, heads = self.architecture.depth, self.architecture.heads
        for facet in self.facets:
            found = FACET.fullmatch(facet)
            if found is None or int(found[1]) >= depth:
                raise BundleError(
                    f"facet {facet!r:.60}: expected a kind, @ and a layer of 0 to {depth - 1}, like key@0"
                )
        chosen = self.saliency_heads
        if chosen is not None and (
            not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(heads))
        ):
            raise BundleError(f"saliency_heads {chosen!r:.60}: expected some of the heads 0 to {heads - 1}, each once")

    def _check_numbers(self) -> None:
        if self.rotation is not None:
            if not all(map(math.isfinite, (self.rotation.scale, self.rotation.per_patch, self.rotation.offset))):
                raise BundleError(f"rotation {self.rotation}: expected finite numbers")
            if self.architecture.head_dim % 4:
                raise BundleError(
                    f"heads of {self.architecture.head_dim} channels cannot turn: expected a multiple of 4"
                )
        for name, channels in vars(self.normalisation).items():
            if len(channels) != 3 or not all(math.isfinite(value) for value in channels):
                raise BundleError(f"normalisation.{name} is {channels!r:.60}: expected three finite numbers")
        self._check_riders()
        if self.precision not in PRECISIONS:
            raise BundleError(f"precision {self.precision!r:.60}: expected {', '.join(PRECISIONS)}")
        if len(self.files) > MAX_FILES:
            raise BundleError(f"the manifest lists {len(self.files):,} files: expected at most {MAX_FILES:,}")

    def _check_riders(self) -> None:
        if self.riders is None:
            return
        if self.stride == self.architecture.patch:
            raise BundleError(f"riders at stride {self.stride}, the patch size: expected none, as no cell lies between")
        if not 0 <= self.riders.from_block < self.architecture.depth:
            raise BundleError(
                f"riders.from_block is {self.riders.from_block}: expected 0 to {self.architecture.depth - 1}"
            )

    @property
    def title(self) -> str:
        """The model's name, and that this is an approximation of it where it is."""
        return self.model if self.riders is None else f"{self.model}, {self.riders}"

    @property
    def table_rule(self) -> TableRule:
        """How its positional table is brought to another grid."""
        return TableRule(self.positional_rule or TableRule.SCALE)

    @property
    def facet_kinds(self) -> tuple[str, ...]:
        """What its model has of each layer."""
        return FACET_KINDS if self.rotation is None else (*FACET_KINDS, *ROTATED_KINDS)

    @property
    def dynamic(self) -> bool:
        """Whether images of any size can be encoded."""
        return self.size is None

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [*self.facets, *([CLS_ATTENTION] if self.saliency_heads is not None else [])]

    def fp32_parts(self, precision: str) -> Fp32Parts:
        """What a backend leaves in fp32 where it runs in ``precision``."""
        record = self.precisions.get(precision)
        return Fp32Parts() if record is None else record.fp32

    def default_facet(self, task: str) -> str:
        """The facet that a task uses with this model, for example ``key@9`` for ``match``."""
        if task == "discover" and task not in self.defaults:
            task = "cosegment"  # the same, for bundles that were exported before there was discovery
        return self.defaults.get(task, self.facets[-1])

    def missing_facet(self, *facets: str) -> str:
        """The message where facets are asked for and were not exported: what there is, and what the model can have."""
        were = "was" if len(facets) == 1 else "were"
        there = f"{' and '.join(facets)} {were} not exported: this bundle has {', '.join(self.facets)}"
        if all(map(self._could_have, facets)):
            return f"{there}; export the model again with --facets {','.join([*self.facets, *facets])}"
        return f"{there}; its model has {' and '.join(self.facet_kinds)} of layers 0 to {self.architecture.depth - 1}"

    def _could_have(self, facet: str) -> bool:
        kind, _, layer = facet.partition("@")
        return kind in self.facet_kinds and layer.isdecimal() and int(layer) < self.architecture.depth

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        """Parse and check; unknown, missing or mistyped fields are errors that name the field."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is not JSON: {error}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema == 3:  # the same, but nothing was measured of other precisions
            empty = dataclasses.asdict(Ranges([], []))
            data |= {
                "precisions": {},
                "ranges": empty,
                "plans": _plans_of_schema_3(data.get("plans")),
            }
            schema = 4
        if schema == 4:  # all models had [CLS] and no registers, and none rotated
            data |= {"schema": SCHEMA, "family": "dino", "architecture": _with_prefix(data.get("architecture"))}
            schema = SCHEMA
        if schema != SCHEMA:
            raise BundleError(
                f"{MANIFEST} has schema {schema!r}; this version of facetrt reads schemas 3 to {SCHEMA}: export again"
            )
        try:
            manifest: Manifest = _parse(Manifest, data, "")
        except InputError as error:
            raise BundleError(f"{MANIFEST}: {error}") from error
        return manifest


def _with_prefix(architecture: Any) -> Any:
    return {**architecture, "prefix": 1} if isinstance(architecture, dict) else architecture


def _plans_of_schema_3(plans: Any) -> Any:
    return {name: _plan_of_schema_3(plan) for name, plan in plans.items()} if isinstance(plans, dict) else plans


def _plan_of_schema_3(plan: Any) -> Any:
    """Only TensorRT built plans then, for one architecture; nobody noted what is not fused and what a run takes."""
    if not isinstance(plan, dict) or not {"tensorrt", "architecture", "fused_attention"} <= set(plan):
        return plan  # the fields that are missing are named when it is parsed
    version, architecture = plan["tensorrt"], plan["architecture"]
    kept = {name: value for name, value in plan.items() if name not in ("tensorrt", "architecture")}
    known = {"builder": "tensorrt", "version": version, "architectures": [architecture], "scratch_bytes": []}
    return {**kept, **known, "attention": plan["fused_attention"]}


def _parse(kind: Any, value: Any, where: str) -> Any:
    """``value`` (from JSON) as ``kind``: a dataclass, list, dict, optional or plain type; strict."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _parse(inner, value, where)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    accepted: Any = (int, float) if kind is float else origin or kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise BundleError(f"{MANIFEST}: field {where} is {value!r:.60}: expected {getattr(kind, '__name__', kind)}")
    if isinstance(value, str):
        _check_text(value, where)
    if origin is list:
        return [_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        for key in value:
            _check_text(key, where)
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return value


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    names = [f.name for f in dataclasses.fields(kind)]
    newer = {f.name for f in dataclasses.fields(kind) if f.default is None}  # bundles of the same schema may lack them
    if not isinstance(value, dict) or not set(names) - newer <= set(value) <= set(names):
        given = sorted((set(value) ^ set(names)) - newer) if isinstance(value, dict) else value
        raise BundleError(f"{MANIFEST}: {where or 'the manifest'} has missing or unknown fields: {given!r:.200}")
    hints = typing.get_type_hints(kind)
    return kind(
        **{name: _parse(hints[name], value[name], f"{where}.{name}".lstrip(".")) for name in names if name in value}
    )


def _check_text(text: str, where: str) -> None:
    """A lone surrogate can be written to no file, terminal or path."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BundleError(f"{MANIFEST}: field {where} holds {ascii(text)[:60]}, which is no text")


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if len(name) > 1024 or any(len(part.encode()) > 255 for part in path.parts):
        raise BundleError(f"{MANIFEST} names the file {name[:60]!r}…, which is too long a name")
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise BundleError(f"{MANIFEST} names the file {name!r}, which would lie outside the bundle")
