"""The bundle: a self-describing, checked, relocatable folder that export writes and the engine opens."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.geometry import grid_size
from facetrt.kernels.errors import BundleError, InputError, MissingFileError

SCHEMA = 4  # 4: what was measured of each precision; 3: TensorRT plans and compiled kernels
MANIFEST = "manifest.json"
ENCODER = "encoder.onnx"
POSITIONAL = "positional.npy"
CLS_ATTENTION = "cls_attention"  # name of the graph output that saliency is made from
BUILTIN = "builtin"

PLANS = "plans"  # folder of TensorRT plans
KERNELS = "kernels"  # folder of compiled kernels, one folder for each architecture

FACET_KINDS = ("key", "query", "value", "token", "normed")

MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 2 << 30  # protobuf's own limit for a single-file graph


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
            if not 1 <= value <= 1 << 16:
                raise BundleError(f"architecture.{name} is {value}: expected a positive number")


@dataclass(frozen=True)
class Normalisation:
    """Per-channel RGB mean and standard deviation; they are folded into the graph."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class ParityReport:
    """How far the exported graph is from the torch model, the worst over all compared images and outputs.

    ``cases`` lists the inputs; ``outputs`` gives each output's figures, which :mod:`facetrt.engine.parity` explains.
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
        tensorrt: version that built it.
        architecture: of the GPU it was built on, like ``sm_90``.
        profile: each input's smallest, most likely and largest shape.
        flags: of the builder, sorted: ``hardware_compatible``, ``version_compatible``.
        precision: of the graph.
        parity: how far it is from ONNX Runtime's fp32 result of the same graph.
        layers: of the built engine.
        fused_attention: how many of them are fused attentions.
    """

    encoder_sha256: str
    tensorrt: str
    architecture: str
    profile: dict[str, list[list[int]]]
    flags: list[str]
    precision: str
    parity: ParityReport
    layers: int
    fused_attention: int

    def __post_init__(self) -> None:
        shapes = self.profile.get("images", [])
        if len(shapes) != 3 or any(len(shape) != 4 for shape in shapes):
            raise BundleError(f"a plan's profile of images is {shapes}: expected three shapes of four numbers")

    @property
    def max_batch(self) -> int:
        """The most images in one run."""
        return self.profile["images"][2][0]


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
        if self.size is not None and len(self.size) != 2:
            raise BundleError(f"size {self.size}: expected [height, width]")
        if not self.facets:
            raise BundleError("the manifest lists no facets: expected at least one")
        if self.size is not None:
            grid_size((self.size[0], self.size[1]), self.architecture.patch, self.stride)
        for name in self.files:
            _check_name(name)
        unlisted = sorted(set(self.plans) - set(self.files))
        if unlisted:
            raise BundleError(f"{MANIFEST} describes the plans {unlisted}, but does not list these files")

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
            data |= {"schema": SCHEMA, "precisions": {}, "ranges": empty}
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
    if origin is list:
        return [_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return value


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    names = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(value, dict) or set(value) != set(names):
        given = sorted(set(value) ^ set(names)) if isinstance(value, dict) else value
        raise BundleError(f"{MANIFEST}: {where or 'the manifest'} has missing or unknown fields: {given!r:.200}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _parse(hints[name], value[name], f"{where}.{name}".lstrip(".")) for name in names})


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
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
            BundleError: unknown schema; a file that is missing, changed, foreign or outside the folder.
        """
        folder = builtin_path() if str(path) == BUILTIN else Path(path)
        manifest = read_manifest(folder)
        _refuse_foreign(folder, manifest.files)
        for name, entry in manifest.files.items():
            if complete or not _read_later(name):
                _check_present(folder, name, entry)
            _check_inside(folder, name)
        contents = {n: _read_checked(folder, n, entry) for n, entry in manifest.files.items() if not _read_later(n)}
        if ENCODER not in contents:
            raise BundleError(f"{folder}: {MANIFEST} does not list {ENCODER}; export the bundle again")
        positional = _read_positional(contents.get(POSITIONAL), manifest) if manifest.dynamic else None
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
    return Path(__file__).parent / "builtin"


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, without checking the files it lists."""
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingFileError(
            f"{folder} is not a bundle: it has no {MANIFEST}; give a folder written by 'facetrt export', or 'builtin'"
        )
    return Manifest.from_json(_read(path, MAX_MANIFEST_BYTES))


def _read(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise BundleError(f"{path} has {size:,} bytes: expected at most {limit:,}")
    return path.read_bytes()


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


def _check_present(folder: Path, name: str, entry: FileEntry) -> Path:
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path} is missing, but {MANIFEST} lists it; {_remedy(folder, name)}")
    _check_inside(folder, name)
    size = path.stat().st_size
    if size != entry.bytes or size > MAX_FILE_BYTES:
        raise BundleError(
            f"{path}: field 'bytes' differs: {size:,} on disk, {entry.bytes:,} in {MANIFEST}; {_remedy(folder, name)}"
        )
    return path


def _check_inside(folder: Path, name: str) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link that leads outside the bundle; copy the file itself into it")


def _remedy(folder: Path, name: str) -> str:
    """What to do about a file that is not what the manifest says."""
    parts = PurePosixPath(name).parts
    if len(parts) > 1 and parts[0] == KERNELS:
        return f"copy it again, or compile it with 'facetrt export {folder} --kernels {parts[1]}'"
    if len(parts) > 1 and parts[0] == PLANS:
        return f"copy it again, or build one here with 'facetrt export {folder} --target tensorrt'"
    return "export or copy the bundle again"


def _read_checked(folder: Path, name: str, entry: FileEntry) -> bytes:
    path = _check_present(folder, name, entry)
    data = path.read_bytes()
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
    """Unlisted plans and kernels are what a killed build left: they are never read."""
    known = {MANIFEST, *files}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in known and not _read_later(name):
            raise BundleError(f"{path} does not belong to the bundle: {MANIFEST} does not list it; remove it")


def _read_positional(data: bytes | None, manifest: Manifest) -> NDArray[np.float32]:
    side, dim = manifest.architecture.trained_grid, manifest.architecture.dim
    expected = side * side * dim * 4 + 128
    if data is None or len(data) != expected:
        given = "is not listed" if data is None else f"has {len(data):,} bytes"
        raise BundleError(
            f"{POSITIONAL} {given}: expected {expected:,} bytes for a table of {side}×{side}×{dim} float32"
        )
    try:
        table = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BundleError(f"{POSITIONAL} is not a NumPy array: {error}") from error
    if table.shape != (side, side, dim) or table.dtype != np.float32:
        raise BundleError(f"{POSITIONAL} is {table.dtype} {table.shape}: expected float32 {(side, side, dim)}")
    return np.asarray(table, np.float32)


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file as the manifest records them."""
    data = path.read_bytes()
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())
