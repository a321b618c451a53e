"""The bundle: a self-describing, checked, relocatable folder that export writes and the engine opens."""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.graph import check_graph
from facetrt.engine.bundle.manifest import (
    ENCODER,
    KERNELS,
    MANIFEST,
    MAX_FILES,
    PADDING,
    PLANS,
    POSITIONAL,
    ROTATION,
    SEGMENTER,
    FileEntry,
    Manifest,
)
from facetrt.engine.bundle.positional import Cells, positional_table, rotation_table
from facetrt.kernels.errors import BundleError, MissingFileError

BUILTIN = "builtin"


MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 2 << 30  # protobuf's own limit for a single-file graph
NPY_HEADER = 128  # bytes before a table's numbers: version 1.0's header, always padded to this length


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files have been checked. Open one with :meth:`open`."""

    path: Path
    manifest: Manifest
    encoder: bytes = field(repr=False)
    positional: NDArray[np.float32] | None = field(repr=False)
    padding: NDArray[np.float32] | None = field(repr=False, default=None)
    periods: NDArray[np.float32] | None = field(repr=False, default=None)

    @staticmethod
    def open(path: Path | str, *, complete: bool = True) -> Bundle:
        """Read a bundle folder (or the name ``builtin``) and check every file's presence and size.

        The SHA-256 of the encoder and its tables are checked here, those of plans, of kernels and of the segmenter by
        :meth:`read`, at use.

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
            if complete or not read_later(name):
                check_present(folder, name, entry)
        now = {n: entry for n, entry in manifest.files.items() if not read_later(n) and n != SEGMENTER}
        contents = {name: _read_checked(folder, name, entry) for name, entry in now.items()}
        if ENCODER not in contents:
            raise BundleError(f"{folder}: {MANIFEST} does not list {ENCODER}; export the bundle again")
        model, positional, padding, periods = manifest.architecture, None, None, None
        if manifest.dynamic:
            shape = (model.trained_grid, model.trained_grid, model.dim)
            if model.trained_grid:
                positional = _read_table(POSITIONAL, contents.get(POSITIONAL), shape)
            if manifest.rotation is not None:
                periods = _read_table(ROTATION, contents.get(ROTATION), (model.head_dim // 4,))
                if not (periods > 0).all():
                    raise BundleError(f"{folder / ROTATION} holds periods that are not positive: export again")
            if PADDING in contents:
                padding = _read_table(PADDING, contents[PADDING], (model.patch, model.patch, model.dim))
        try:
            check_graph(contents[ENCODER], manifest)
        except BundleError as error:
            raise BundleError(f"{folder}: {error}") from None
        return Bundle(folder, manifest, contents[ENCODER], positional, padding, periods)

    def positions(self, cells: Cells) -> dict[str, NDArray[Any]]:
        """What tells a dynamic encoder where cells are, by the names of its inputs.

        ``positional (1, grid_h, grid_w, C)`` is added to the cells' embeddings, zeros where the model has no table;
        ``rotation (2, grid_h, grid_w, d / 2)``, of models that rotate, holds sines and cosines; ``carriers``, of
        encoders with riders, the tokens whose keys and values are taken, see :meth:`Cells.carriers`.
        """
        grid, model = cells.grid, self.manifest.architecture
        if self.positional is None:
            found: dict[str, NDArray[Any]] = {"positional": np.zeros((1, *grid, model.dim), np.float32)}
        else:
            found = {"positional": positional_table(self.positional, cells, self.manifest.table_rule)[None]}
        if self.periods is not None and self.manifest.rotation is not None:
            found["rotation"] = rotation_table(self.periods, cells, self.manifest.rotation)
        if self.manifest.riders is not None:
            found["carriers"] = cells.carriers(model.prefix)
        return found

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


def read_later(name: str) -> bool:
    """Whether a file is read at use: a bundle may hold plans and kernels for machines other than this one."""
    return PurePosixPath(name).parts[:1] in ((PLANS,), (KERNELS,))


def check_present(folder: Path, name: str, entry: FileEntry) -> None:
    """Raise :class:`BundleError` unless a listed file is there, inside the bundle, and of the size that is listed."""
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
    check_present(folder, name, entry)
    path, data = folder / name, _read_bounded(folder, name, entry.bytes)
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise BundleError(
            f"{path}: field 'sha256' differs: {digest[:12]}… on disk, {entry.sha256[:12]}… in {MANIFEST}; "
            f"{_remedy(folder, name)}"
        )
    return data


def _refuse_foreign(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Unlisted plans and kernels are what a killed build left: they are never read, but no link may lead outside."""
    known = {MANIFEST, *files}
    for count, path in enumerate(_walk(folder)):
        if count == MAX_FILES:
            raise BundleError(f"{folder} holds more than {MAX_FILES:,} files: expected a folder of a bundle alone")
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            _inside(folder, name)
        if not path.is_dir() and name not in known and not read_later(name):
            raise BundleError(f"{path} does not belong to the bundle: {MANIFEST} does not list it; remove it")


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder, links not followed."""
    for place, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            yield Path(place, name)


def _read_table(name: str, data: bytes | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The array in a file; its header is checked before NumPy makes room for what it states."""
    expected = math.prod(shape) * 4 + NPY_HEADER
    if data is None or len(data) != expected:
        given = "is not listed" if data is None else f"has {len(data):,} bytes"
        raise BundleError(
            f"{name} {given}: expected {expected:,} bytes for a table of {'×'.join(map(str, shape))} float32"
        )
    stated = _npy_header(name, data[:NPY_HEADER])
    if stated != (shape, False, np.dtype("<f4")):
        order = "Fortran" if stated[1] else "C"
        raise BundleError(f"{name} is {stated[2]} {stated[0]} in {order} order: expected float32 {shape} in C order")
    table = np.frombuffer(data, "<f4", offset=NPY_HEADER).reshape(shape)
    if not np.isfinite(table).all():
        raise BundleError(f"{name} holds numbers that are not finite: export the bundle again")
    return np.asarray(table, np.float32)


def _npy_header(name: str, data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        stated: tuple[tuple[int, ...], bool, np.dtype[Any]] = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # it parses Python, and fails in as many ways
        raise BundleError(f"{name} is not a NumPy array: {' '.join(str(error).split()):.120}") from error
    if version != (1, 0) or file.tell() != NPY_HEADER:
        raise BundleError(f"{name} has a header of version {version}, {file.tell()} bytes: expected {NPY_HEADER}")
    return stated
