"""Reading annotation files, with errors that say which file of the data set was expected where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from facetrt.engine.files import images_in
from facetrt.engine.label_images import GREY_MODES, VOID, labels_of, open_label_image
from facetrt.kernels.errors import InputError, MissingDependencyError, MissingFileError


def require(path: Path, data_set: str, what: str) -> Path:
    """``path``, or an error that names it as part of ``data_set``."""
    if not path.exists():
        raise MissingFileError(f"{path} is missing: {data_set} has {what} there; is this the data set's own folder?")
    return path


def first_of(root: Path, names: Sequence[str], data_set: str, what: str) -> Path:
    """The first of several places, relative to ``root``, that exists."""
    for name in names:
        if (root / name).exists():
            return root / name
    places = " or ".join(str(root / name) for name in names)
    raise MissingFileError(f"{places} is missing: {data_set} has {what} there; is this the data set's own folder?")


def list_images(folder: Path) -> list[Path]:
    """Image files directly in ``folder``, in natural order; hidden ones are left out."""
    return images_in(folder)


def list_folders(folder: Path) -> list[Path]:
    """Folders directly in ``folder``, sorted; hidden ones are left out."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))


def image_size(path: Path) -> tuple[int, int]:
    """``(height, width)`` from the file's header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing: an annotation names it") from error
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A binary annotation, ``(H, W)``: foreground is more than half of the largest value in the file.

    Where a file holds values between 0 and 255 *and* 255 in a palette, 255 is the void border and not foreground.
    """
    image = open_label_image(path)
    if image.mode == "P":
        labels = labels_of(image)
        if len(np.unique(labels)) > 2:
            return np.asarray((labels > 0) & (labels != VOID))
    else:
        labels = labels_of(image if image.mode in GREY_MODES else image.convert("L"))
    return np.asarray(labels > labels.max(initial=0) / 2)


def read_mat(path: Path, key: str) -> NDArray[np.float64]:
    """One array of a MATLAB file.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingDependencyError(
            f"{path.name} is a MATLAB file and needs scipy: pip install 'facetrt[eval]'"
        ) from error
    try:
        content = loadmat(path)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as a MATLAB file: {error}") from error
    if key not in content:
        names = ", ".join(name for name in content if not name.startswith("__"))
        raise InputError(f"{path} has no variable {key}: it has {names or 'none'}")
    return np.asarray(content[key], np.float64)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}: expected a JSON object")
    return data


def read_rows(path: Path, columns: int, *, skip: int = 0) -> list[list[str]]:
    """Lines split at blanks; ``skip`` header lines are left out.

    Raises:
        InputError: a line with another number of columns, named with its number.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[skip:], start=skip + 1):
        fields = line.split()
        if fields and len(fields) != columns:
            raise InputError(f"{path}, line {number}: {len(fields)} columns, expected {columns}: {line[:60]!r}")
        if fields:
            rows.append(fields)
    return rows


def numbers(fields: Sequence[str], path: Path) -> list[float]:
    """Texts as floats, or an error that names the file."""
    try:
        return [float(field) for field in fields]
    except ValueError as error:
        raise InputError(f"{path}: {' '.join(fields)[:60]!r} are not all numbers") from error


def digest(root: Path, paths: Iterable[Path]) -> str:
    """A hash over names and sizes of files: tells two versions of a data set apart without reading them all."""
    hashed = hashlib.sha256()
    for path in sorted(set(paths)):
        hashed.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n".encode())
    return hashed.hexdigest()[:16]
