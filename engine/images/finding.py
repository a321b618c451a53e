"""Image files in folders: which are read, in which order, and distinct names for what is made of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from facetrt.engine.images.loading import image_suffixes
from facetrt.kernels.errors import InputError, MissingFileError

IMAGE_SUFFIXES = image_suffixes()
UNREAD_SUFFIXES = frozenset({  # pictures that are not read: where they lie among others, that is said
    ".ai", ".arw", ".cr2", ".cr3", ".dds", ".dng", ".emf", ".eps", ".exr", ".fits", ".hdr", ".heic", ".heif", ".hif",
    ".icns", ".ico", ".jxl", ".jxr", ".nef", ".nrw", ".orf", ".pcx", ".pdf", ".pef", ".pfm", ".psb", ".psd", ".qoi",
    ".raf", ".raw", ".rw2", ".sr2", ".srw", ".svg", ".svgz", ".tga", ".wmf", ".x3f", ".xcf",
})  # fmt: skip
CONVERT = "convert them to PNG or JPEG, if they belong to it"


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """Image files named directly or found in named folders (in natural order, not recursive), in order.

    Pictures in a folder whose format is not read, HEIC perhaps, are counted and named in a warning. Hidden files, the
    ``._`` ones of macOS among them, are no data.

    Raises:
        MissingFileError: a path that does not exist.
        InputError: a folder that holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = visible_files(path)
            images = [p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES]
            unread = [p for p in inside if p.suffix.lower() in UNREAD_SUFFIXES - IMAGE_SUFFIXES]
            if not images:
                raise InputError(f"{path} holds no image{_but(unread)}: expected files ending in {_known_suffixes()}")
            if unread:
                warnings.warn(f"{path} holds pictures that are not used{_but(unread)}: {CONVERT}", stacklevel=2)
            found += images
        elif path.exists():
            found.append(path)
        else:
            raise MissingFileError(f"{path} does not exist: expected an image file or a folder of images")
    return found


def images_in(folder: Path) -> list[Path]:
    """Image files directly in ``folder``, in natural order."""
    return [path for path in visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def visible_files(folder: Path) -> list[Path]:
    """Plain files directly in ``folder`` that are not hidden, in natural order."""
    return sorted((p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file()), key=natural_order)


def _known_suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def _but(unread: Sequence[Path]) -> str:
    """``" but 3 of formats that are not read (.heic, .psd; a.heic is the first)"``, or nothing."""
    if not unread:
        return ""
    kinds = ", ".join(sorted({path.suffix.lower() for path in unread}))
    return f" ({len(unread)} ending in {kinds}, {unread[0].name} the first)"


def natural_order(path: Path) -> tuple[Any, ...]:
    """Sort key by which ``frame2`` comes before ``frame10``: numbers of any length by value, words without case.

    Names that are alike in this are told apart by their characters, so the order never depends on the disk.
    """
    return _natural(path.stem), _natural(path.suffix), path.name


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Words before numbers; a number by its count of digits, then by them, as Python refuses very long ones."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [
        (1, len(number), number) if part[0] in "0123456789" else (0, 0, part.casefold())
        for part in parts
        for number in [part.lstrip("0")]
    ]


def unique_stems(paths: Iterable[Path]) -> list[str]:
    """A distinct file stem for each path, in order: repeated stems get ``-2``, ``-3``, …"""
    stems: dict[str, None] = {}
    for path in paths:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}-{number}", number + 1
        stems[stem] = None
    return list(stems)
