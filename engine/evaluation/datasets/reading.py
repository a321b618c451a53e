"""Reading annotation files, with errors that say which file of the data set was expected where."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.files import read_bytes
from facetrt.engine.images.finding import images_in, natural_order
from facetrt.engine.images.label_images import GREY_MODES, VOID, labels_of, open_label_image
from facetrt.engine.images.loading import check_pixels, decoding, open_image
from facetrt.kernels.errors import InputError, MissingDependencyError, MissingFileError, reading


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
    """Folders directly in ``folder``, in natural order; hidden ones are left out."""
    folders = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    return sorted(folders, key=natural_order)


def member(root: Path, name: str, annotation: Path) -> Path:
    """The file ``name`` under ``root`` that an annotation speaks of.

    Raises:
        InputError: a name that leads elsewhere.
    """
    parts = PurePosixPath(name).parts
    short = all(len(part.encode(errors="replace")) < 256 for part in parts)
    if not parts or name.startswith("/") or ".." in parts or not name.isprintable() or not short:
        raise InputError(f"{annotation} names the image {name[:100]!r}: expected one inside {root}")
    return root / name


def image_size(path: Path) -> tuple[int, int]:
    """``(height, width)`` from the file's header."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing: an annotation names it")
    with decoding(str(path)), open_image(path) as image:
        check_pixels(image, str(path))
        return image.height, image.width


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


def read_grey(path: Path) -> NDArray[np.uint8]:
    """An annotation's grey values, ``(H, W)`` uint8.

    Of a palette or of single bits, 255 stands for what :func:`read_mask` takes for foreground.
    """
    image = open_label_image(path)
    if image.mode == "P" or image.mode == "1":
        return np.asarray(read_mask(path), np.uint8) * 255
    return np.asarray(image if image.mode == "L" else image.convert("L"), np.uint8)


def read_mat(path: Path, key: str) -> NDArray[np.float64]:
    """One array of a MATLAB file.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.io import loadmat, whosmat
    except ImportError as error:
        raise MissingDependencyError(
            f"{path.name} is a MATLAB file and needs scipy: pip install 'facetrt[eval]'"
        ) from error
    data = read_bytes(path, MAT_FILE, MAX_MAT_BYTES)
    with reading(path, MAT_FILE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy, on what it makes of damage
        shapes = {name: shape for name, shape, _ in whosmat(io.BytesIO(data))}  # headers only
        if key not in shapes:
            names = ", ".join(name for name in shapes if not name.startswith("__"))
            raise InputError(f"{path} has no variable {key}: it has {names or 'none'}")
        if math.prod(shapes[key]) > MAX_MAT_NUMBERS:
            raise InputError(f"{path}: {key} has shape {shapes[key]}: expected at most {MAX_MAT_NUMBERS:,} numbers")
        found = np.asarray(loadmat(io.BytesIO(data), variable_names=[key])[key])
        if found.dtype.kind not in "buif":
            raise InputError(f"{path}: {key} holds {found.dtype}: expected numbers")
        return found.astype(np.float64)


MAT_FILE = "a MATLAB file"
MAX_MAT_BYTES = 4 << 20  # of a file of keypoints; those of PF-WILLOW have a few hundred
MAX_MAT_NUMBERS = 1 << 20


def read_rows(path: Path, columns: int, *, skip: int = 0) -> list[list[str]]:
    """Lines split at blanks; ``skip`` header lines are left out.

    Raises:
        InputError: a line with another number of columns, named with its number, or no UTF-8.
    """
    with reading(path, "a list in UTF-8"):
        text = read_bytes(path, "a list of lines").decode()
    rows = []
    for number, line in enumerate(text.splitlines()[skip:], start=skip + 1):
        fields = line.split()
        if fields and len(fields) != columns:
            raise InputError(f"{path}, line {number}: {len(fields)} columns, expected {columns}: {line[:60]!r}")
        if fields:
            rows.append(fields)
    return rows


def numbers(fields: Sequence[str], path: Path) -> list[float]:
    """Texts as finite floats, or an error that names the file."""
    with suppress(ValueError, OverflowError):
        found = [float(field) for field in fields]
        if all(map(math.isfinite, found)):
            return found
    raise InputError(f"{path}: {' '.join(fields)[:60]!r} are not all numbers")


def digest(root: Path, paths: Iterable[Path]) -> str:
    """A hash over names and sizes of files: tells two versions of a data set apart without reading them all."""
    hashed = hashlib.sha256()
    for path in sorted(set(paths)):
        hashed.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n".encode())
    return hashed.hexdigest()[:16]
