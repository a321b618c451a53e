"""Files of models: NPZ archives of plain arrays, one of them JSON, without pickle.

A file is read as if its author meant harm: compressed, repeated or too many members, and headers that promise more than
there is, are refused before memory is taken.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.files import atomic_file, read_bytes
from facetrt.kernels.errors import FacetrtError, InputError, OutputError, reading

Arrays = dict[str, NDArray[Any]]

TOOL = "facetrt"
METADATA = "metadata"
MAX_BYTES = 16 << 20  # of a file; 92 centroids of 1024 numbers take 0.4 MB
MAX_MEMBERS = 8


def write_model(path: Path, metadata: dict[str, Any], arrays: Arrays, *, force: bool) -> None:
    """An NPZ file that is complete or not there.

    Raises:
        OutputError: the place is taken (see :func:`check_model_path`) or cannot be written.
    """
    check_model_path(path, force=force)
    text = json.dumps({"tool": TOOL, **metadata}).encode()
    members: dict[str, Any] = {METADATA: np.frombuffer(text, np.uint8)}
    members |= {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **members)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; nothing was kept") from error


def check_model_path(path: Path, *, force: bool) -> None:
    """Raise :class:`OutputError` unless the place is free for a model, or ``force`` replaces one that is there."""
    try:
        if not (path.exists() or path.is_symlink()):
            return
        if not force:
            raise OutputError(f"{path} exists already: choose another file for the model, or replace it with --force")
        if path.is_symlink() or not _is_model(path):
            raise OutputError(f"{path} is no model of facetrt, so --force does not replace it: choose another file")
    except FacetrtError:
        raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _is_model(path: Path) -> bool:
    """Whether facetrt wrote this file, told by what it says, not by its name; of whatever schema."""
    try:
        parse_metadata(read_members(path))
    except FacetrtError:
        return False
    return True


def read_members(path: Path) -> dict[str, bytes]:
    """The files in a stored (not compressed) zip archive, by name; nothing can be larger than the archive itself."""
    with reading(path, "a model"):
        data = read_bytes(path, "a model", MAX_BYTES)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            stored = all(m.compress_type == zipfile.ZIP_STORED and m.file_size <= MAX_BYTES for m in members)
            if not stored or len(members) > MAX_MEMBERS or len({m.filename for m in members}) < len(members):
                raise InputError(f"{path} is not a model: its members are compressed, repeated, too many or too large")
            return {member.filename: archive.read(member) for member in members}


def parse_metadata(members: Mapping[str, bytes]) -> dict[str, Any]:
    """What the file says about itself, without the mark that it is facetrt's."""
    text = parse_array(METADATA, members, "|u1").tobytes()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its member {METADATA} is not JSON ({error})") from error
    if not isinstance(data, dict) or data.pop("tool", None) != TOOL:
        raise InputError("facetrt did not write it")
    return data


def parse_array(name: str, members: Mapping[str, bytes], dtype: str) -> NDArray[Any]:
    """A member as an array of ``dtype``. Its header is believed only as far as there are bytes."""
    data = members.get(f"{name}.npy")
    if data is None:
        raise InputError(f"it has no member {name}")
    stream = io.BytesIO(data)
    shape, found = read_header(name, stream, len(data))
    if found.str != dtype:
        raise InputError(f"its member {name} is {found} of shape {shape}: expected {dtype}")
    return np.frombuffer(data, found, offset=stream.tell()).reshape(shape).copy()


def read_header(name: str, stream: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in a member of ``size`` bytes; the stream then stands where its numbers begin.

    Raises:
        InputError: no array, one that is not stored row by row, or another number of bytes than the header states.
    """
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # damaged headers fail in any way
        raise InputError(f"its member {name} is no NumPy array ({error})") from error
    rest = size - stream.tell()
    whole = min(shape, default=0) >= 0 and math.prod(shape) * found.itemsize == rest
    if version != (1, 0) or found.hasobject or fortran or not whole:
        raise InputError(
            f"its member {name} is {found} of shape {shape} in {rest} bytes: expected plain numbers, row by row"
        )
    return shape, found
