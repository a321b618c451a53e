"""The bundle: a self-describing, checked, relocatable folder that export writes and the engine opens."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.graph import check_graph
from facetrt.engine.images.geometry import grid_size
from facetrt.kernels.errors import BundleError, InputError, MissingFileError

SCHEMA = 4  # 4: what was measured of each precision; 3: TensorRT plans and compiled kernels
MANIFEST = "manifest.json"
ENCODER = "encoder.onnx"
POSITIONAL = "positional.npy"
CLS_ATTENTION = "cls_attention"  # name of the graph output that saliency is made from
BUILTIN = "builtin"
PRECISIONS = ("fp32", "fp16", "bf16")

PLANS = "plans"  # folder of TensorRT plans
PLAN_BUILDERS = ("tensorrt", "tensorrt-rtx")
ARCHITECTURE = re.compile(r"sm_[1-9]\d{1,2}")
KERNELS = "kernels"  # folder of compiled kernels, one folder for each architecture

FACET_KINDS = ("key", "query", "value", "token", "normed")

MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 2 << 30  # protobuf's own limit for a single-file graph
MAX_FILES = 10_000  # listed, or found in the folder: plans and kernels of a few architectures are some hundreds
MAX_ARCHITECTURE = {"dim": 1 << 14, "depth": 256, "heads": 256, "patch": 256, "trained_grid": 1024}  # no ViT is larger
MAX_SIDE = 1 << 16  # pixels of a fixed size
FACET = re.compile(r"[a-z_]{1,32}@(\d{1,3})", re.ASCII)
NPY_HEADER = 128  # bytes before a table's numbers: version 1.0's header, always padded to this length


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
    """Shape of the ViT. ``trained_grid`` is the side of the square grid that its positional table covers."""

    dim: int
    depth: int
    heads: int
    patch: int
    trained_grid: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 1 <= value <= MAX_ARCHITECTURE[name]:
                raise BundleError(f"architecture.{name} is {value}: expected 1 to {MAX_ARCHITECTURE[name]:,}")
        if self.dim % self.heads:
            raise BundleError(f"architecture.heads is {self.heads}, which does not divide dim, {self.dim}")


@dataclass(frozen=True)
class Normalisation:
    """Per-channel RGB mean and standard deviation; they are folded into the graph."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class ParityReport:
    """How far the exported graph is from the torch model, the worst over all compared images and outputs.

    ``cases`` lists the inputs; ``outputs`` gives each output's figures, which
    :mod:`facetrt.engine.encoding.parity` explains.
    """

    cases: list[str]
    outputs: dict[str, dict[str, float]]


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
class PrecisionRecord:
    """How exact an encoder is in one precision, as it was measured at export.

    Attributes:
        missed: the worst figure and its bound, in words; empty if the contract holds.
        measured: with what: a backend and its version, or emulated rounding.
        fp32: what stays in fp32, so that the contract holds; the least that was found to do.
        outputs: figures of each output against the torch model in float64, the worst of the export's images.
        relative_time: of the encoder, as a multiple of its time in fp32 by the same backend; None if not measured.
    """

    missed: str
    measured: str
    fp32: Fp32Parts
    outputs: dict[str, dict[str, float]]
    relative_time: float | None

    @property
    def holds(self) -> bool:
        """Whether the contract of the precision holds."""
        return not self.missed


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
class Manifest:
    """Everything the engine needs to know about an encoder.

    ``size`` is None for a bundle of any size. ``plans`` describes the TensorRT plans among the files, by file name;
    ``precisions`` says how exact the encoder is in each precision that it was measured in.
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

    def __post_init__(self) -> None:
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
        for name, channels in vars(self.normalisation).items():
            if len(channels) != 3 or not all(math.isfinite(value) for value in channels):
                raise BundleError(f"normalisation.{name} is {channels!r:.60}: expected three finite numbers")
        if self.precision not in PRECISIONS:
            raise BundleError(f"precision {self.precision!r:.60}: expected {', '.join(PRECISIONS)}")
        if len(self.files) > MAX_FILES:
            raise BundleError(f"the manifest lists {len(self.files):,} files: expected at most {MAX_FILES:,}")

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
        return self.defaults.get(task, self.facets[-1])

    def missing_facet(self, facet: str) -> str:
        """The message where ``facet`` is asked for and was not exported: what there is, and what the model can have."""
        kind, _, layer = facet.partition("@")
        there = f"{facet} was not exported: this bundle has {', '.join(self.facets)}"
        if kind in FACET_KINDS and layer.isdecimal() and int(layer) < self.architecture.depth:
            return f"{there}; export the model again with --facets {','.join([*self.facets, facet])}"
        return f"{there}; its model has {' and '.join(FACET_KINDS)} of layers 0 to {self.architecture.depth - 1}"

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
                "schema": SCHEMA,
                "precisions": {},
                "ranges": empty,
                "plans": _plans_of_schema_3(data.get("plans")),
            }
            schema = SCHEMA
        if schema != SCHEMA:
            raise BundleError(
                f"{MANIFEST} has schema {schema!r}; this version of facetrt reads schemas 3 and {SCHEMA}: export again"
            )
        try:
            manifest: Manifest = _parse(Manifest, data, "")
        except InputError as error:
            raise BundleError(f"{MANIFEST}: {error}") from error
        return manifest


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
    if not isinstance(value, dict) or set(value) != set(names):
        given = sorted(set(value) ^ set(names)) if isinstance(value, dict) else value
        raise BundleError(f"{MANIFEST}: {where or 'the manifest'} has missing or unknown fields: {given!r:.200}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _parse(hints[name], value[name], f"{where}.{name}".lstrip(".")) for name in names})


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


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files have been checked. Open one with :meth:`open`."""

    path: Path
    manifest: Manifest
    encoder: bytes = field(repr=False)
    positional: NDArray[np.float32] | None = field(repr=False)

    @staticmethod
    def open(path: Path | str, *, complete: bool = True) -> Bundle:
        """Read a bundle folder (or the name ``builtin``) and check every file's presence and size.

        The SHA-256 of the encoder and its table are checked here, those of plans and kernels by :meth:`read`, at use.

        Args:
            complete: False opens it with plans and kernels that are missing or damaged, which is for replacing them.

        Raises:
            MissingFileError: the folder or its manifest does not exist.
            BundleError: unknown schema; a file that is missing, changed, foreign or outside the folder; a graph that
                the exporter would not have written, see :mod:`facetrt.engine.bundle.graph`.
        """
        folder = builtin_path() if str(path) == BUILTIN else Path(path)
        manifest = read_manifest(folder)
        _refuse_foreign(folder, manifest.files)
        for name, entry in manifest.files.items():
            if complete or not _read_later(name):
                _check_present(folder, name, entry)
        contents = {n: _read_checked(folder, n, entry) for n, entry in manifest.files.items() if not _read_later(n)}
        if ENCODER not in contents:
            raise BundleError(f"{folder}: {MANIFEST} does not list {ENCODER}; export the bundle again")
        positional = _read_positional(contents.get(POSITIONAL), manifest) if manifest.dynamic else None
        try:
            check_graph(contents[ENCODER], manifest)
        except BundleError as error:
            raise BundleError(f"{folder}: {error}") from None
        return Bundle(folder, manifest, contents[ENCODER], positional)

    def read(self, name: str) -> bytes:
        """Contents of a listed file, checked.

        Raises:
            BundleError: a file that the manifest does not list, or one that is missing or changed.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: {MANIFEST} does not list {name}; export the bundle again")
        return _read_checked(self.path, name, entry)

    def kernel_architectures(self) -> list[str]:
        """Architectures that the bundle has compiled kernels for, like ``sm_90``, ascending."""
        paths = [PurePosixPath(name) for name in self.manifest.files]
        found = [p.parts[1] for p in paths if len(p.parts) == 3 and p.parts[0] == KERNELS and p.name == "kernels.json"]
        return sorted(found, key=lambda architecture: (len(architecture), architecture))


def builtin_path() -> Path:
    """Folder of the small model that ships inside the package."""
    return Path(__file__).parents[1] / "builtin"


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, without checking the files it lists."""
    if "\0" in str(folder) or _regular_size(folder / MANIFEST, _inside(folder, MANIFEST)) is None:
        raise MissingFileError(
            f"{folder} is not a bundle: it has no {MANIFEST}; give a folder written by 'facetrt export', or 'builtin'"
        )
    return Manifest.from_json(_read_bounded(folder, MANIFEST, MAX_MANIFEST_BYTES))


def _read_bounded(folder: Path, name: str, limit: int) -> bytes:
    """Contents of a regular file that lies inside the bundle, never more than ``limit`` bytes.

    What is no regular file is not opened: a pipe would be waited for, and a device does who knows what.
    """
    path = _inside(folder, name)
    size = _regular_size(folder / name, path)
    if size is not None and size > limit:
        raise BundleError(f"{folder / name} has {size:,} bytes: expected at most {limit:,}")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)  # it may have been replaced just now
            data = file.read(limit + 1) if regular else b""
    except OSError as error:
        raise BundleError(f"{folder / name} cannot be read: {error.strerror}") from error
    if not regular or len(data) > limit:
        raise BundleError(f"{folder / name} changed while it was read: open the bundle again when nobody writes to it")
    return data


def _regular_size(shown: Path, path: Path) -> int | None:
    """Size of a regular file, or None if there is nothing at ``path``; anything else raises."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BundleError(f"{shown} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{shown} is no regular file; export or copy the bundle again")
    return found.st_size


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a bundle that may be in use: whoever opens it sees the old one or the new one."""
    places = [folder / name for name in (PLANS, KERNELS)]  # where a killed run's remains are no foreign files
    place = next((place for place in places if place.is_dir()), folder / PLANS)
    temporary = place / f".{MANIFEST}.{os.getpid()}"
    place.mkdir(exist_ok=True)
    try:
        temporary.write_text(manifest.to_json(), encoding="utf-8")
        temporary.replace(folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def _read_later(name: str) -> bool:
    """Whether a file is read at use: a bundle may hold plans and kernels for machines other than this one."""
    return PurePosixPath(name).parts[:1] in ((PLANS,), (KERNELS,))


def _check_present(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    size = _regular_size(path, _inside(folder, name))
    if size is None:
        raise BundleError(f"{path} is missing, but {MANIFEST} lists it; {_remedy(folder, name)}")
    if size != entry.bytes or size > MAX_FILE_BYTES:
        raise BundleError(
            f"{path}: field 'bytes' differs: {size:,} on disk, {entry.bytes:,} in {MANIFEST}; {_remedy(folder, name)}"
        )


def _inside(folder: Path, name: str) -> Path:
    """The path of a file without links, the bundle's own folder aside. Raises for one that leads outside."""
    path = folder / name
    try:
        root, resolved = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise BundleError(f"{path} is a link that leads nowhere: copy the file itself into the bundle") from error
    if not resolved.is_relative_to(root):
        raise BundleError(f"{path} is a link that leads outside the bundle; copy the file itself into it")
    return resolved


def _remedy(folder: Path, name: str) -> str:
    """What to do about a file that is not what the manifest says."""
    parts = PurePosixPath(name).parts
    if len(parts) > 1 and parts[0] == KERNELS:
        return f"copy it again, or compile it with 'facetrt export {folder} --kernels {parts[1]}'"
    if len(parts) > 1 and parts[0] == PLANS:
        target = "tensorrt-rtx" if parts[1].startswith("rtx") else "tensorrt"
        return f"copy it again, or build one with 'facetrt export {folder} --target {target}'"
    return "export or copy the bundle again"


def _read_checked(folder: Path, name: str, entry: FileEntry) -> bytes:
    _check_present(folder, name, entry)
    path, data = folder / name, _read_bounded(folder, name, entry.bytes)
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise BundleError(
            f"{path}: field 'sha256' differs: {digest[:12]}… on disk, {entry.sha256[:12]}… in {MANIFEST}; "
            f"{_remedy(folder, name)}"
        )
    return data


def drop_damaged(folder: Path, report: Callable[[str], None]) -> None:
    """Take out of a bundle what :func:`without_damaged` would: with it the bundle does not open."""
    old = read_manifest(folder)
    kept = without_damaged(folder, old, report)
    if kept != old:
        write_manifest(folder, kept)


def without_damaged(folder: Path, manifest: Manifest, report: Callable[[str], None]) -> Manifest:
    """Without plans that are missing or of another size, and without architectures with such kernels.

    Args:
        report: called for each with what is wrong with it, and the command that adds it again.
    """
    damaged: dict[str, None] = {}
    for name, entry in manifest.files.items():
        unit = _unit(name)
        if not _read_later(name) or unit in damaged:
            continue
        try:
            _check_present(folder, name, entry)
        except BundleError as error:
            report(f"{unit} is taken out of the bundle: {error}")
            damaged[unit] = None
    files = {name: entry for name, entry in manifest.files.items() if _unit(name) not in damaged}
    plans = {name: plan for name, plan in manifest.plans.items() if name not in damaged}
    return dataclasses.replace(manifest, files=files, plans=plans)


def _unit(name: str) -> str:
    """What belongs together: a file, or all kernels of an architecture."""
    parts = PurePosixPath(name).parts
    return "/".join(parts[:2]) if parts[:1] == (KERNELS,) else name


def _refuse_foreign(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Unlisted plans and kernels are what a killed build left: they are never read, but no link may lead outside."""
    known = {MANIFEST, *files}
    for count, path in enumerate(_walk(folder)):
        if count == MAX_FILES:
            raise BundleError(f"{folder} holds more than {MAX_FILES:,} files: expected a folder of a bundle alone")
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            _inside(folder, name)
        if not path.is_dir() and name not in known and not _read_later(name):
            raise BundleError(f"{path} does not belong to the bundle: {MANIFEST} does not list it; remove it")


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder, links not followed."""
    for place, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            yield Path(place, name)


def _read_positional(data: bytes | None, manifest: Manifest) -> NDArray[np.float32]:
    """The header is checked before NumPy makes room for what it states."""
    side, dim = manifest.architecture.trained_grid, manifest.architecture.dim
    shape = (side, side, dim)
    expected = math.prod(shape) * 4 + NPY_HEADER
    if data is None or len(data) != expected:
        given = "is not listed" if data is None else f"has {len(data):,} bytes"
        raise BundleError(
            f"{POSITIONAL} {given}: expected {expected:,} bytes for a table of {side}×{side}×{dim} float32"
        )
    stated = _npy_header(data[:NPY_HEADER])
    if stated != (shape, False, np.dtype("<f4")):
        order = "Fortran" if stated[1] else "C"
        raise BundleError(
            f"{POSITIONAL} is {stated[2]} {stated[0]} in {order} order: expected float32 {shape} in C order"
        )
    table = np.frombuffer(data, "<f4", offset=NPY_HEADER).reshape(shape)
    if not np.isfinite(table).all():
        raise BundleError(f"{POSITIONAL} holds numbers that are not finite: export the bundle again")
    return np.asarray(table, np.float32)


def _npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        stated: tuple[tuple[int, ...], bool, np.dtype[Any]] = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # it parses Python, and fails in as many ways
        raise BundleError(f"{POSITIONAL} is not a NumPy array: {' '.join(str(error).split()):.120}") from error
    if version != (1, 0) or file.tell() != NPY_HEADER:
        raise BundleError(f"{POSITIONAL} has a header of version {version}, {file.tell()} bytes: expected {NPY_HEADER}")
    return stated


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file as the manifest records them."""
    data = path.read_bytes()
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())
