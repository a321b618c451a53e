"""Writing results so that nothing is ever half-made, and finding images."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facetrt.kernels.errors import InputError, MissingFileError, OutputError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
RESULT_MARKS = ("manifest.json", "results.json")  # one of these makes a folder ours, so that `force` may replace it


@contextmanager
def atomic_folder(path: Path | str, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write into; it takes ``path``'s place only if the block succeeds.

    Raises:
        OutputError: ``path`` exists and ``force`` is off, ``force`` would replace a folder that facetrt did not write,
            or the place cannot be written.
    """
    target = Path(path).absolute()
    check_replaceable(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=f".{os.getpid()}.tmp"))
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        made.chmod(0o755)
        yield made
        _publish(made, target, force=force)
    except OSError as error:
        if isinstance(error, (MissingFileError, OutputError)):
            raise
        raise OutputError(f"writing {target} failed: {error.strerror or error}; nothing was kept") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_replaceable(target: Path, *, force: bool) -> None:
    """Raise :class:`OutputError` unless ``target`` is free, or ``force`` may replace it."""
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise OutputError(f"{target} exists already: choose another --out, or replace it with --force")
    marked = any((target / mark).is_file() for mark in RESULT_MARKS)
    if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not marked):
        raise OutputError(f"{target} was not written by facetrt, so --force does not replace it: choose another --out")


def _publish(made: Path, target: Path, *, force: bool) -> None:
    if not target.exists():
        made.rename(target)
        return
    check_replaceable(target, force=force)  # it may have appeared meanwhile
    old = made.with_name(made.name + ".old.tmp")
    target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Delete what killed runs left beside ``target``: temporary folders whose process is gone."""
    for folder in target.parent.glob(f".{target.name}.*.tmp"):
        numbers = [part for part in folder.name.split(".") if part.isdigit()]
        if numbers and not _alive(int(numbers[-1])):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """Image files named directly or found in named folders (sorted, not recursive), in order.

    Raises:
        MissingFileError: a path that does not exist.
        InputError: a folder that holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise InputError(f"{path} holds no image: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise MissingFileError(f"{path} does not exist: expected an image file or a folder of images")
    return found


def unique_stems(paths: Iterable[Path]) -> list[str]:
    """A distinct file stem for each path, in order: repeated stems get ``-2``, ``-3``, …"""
    stems: list[str] = []
    for path in paths:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}-{number}", number + 1
        stems.append(stem)
    return stems


def write_json(path: Path, data: Any) -> None:
    """Indented JSON; NumPy scalars and arrays become numbers and lists."""
    path.write_text(json.dumps(data, indent=2, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return str(value)


def write_png(path: Path, pixels: np.ndarray[Any, np.dtype[Any]]) -> None:
    """``(H, W)`` or ``(H, W, 3)`` uint8 as PNG; a bool mask becomes 0 and 255."""
    data = pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels
    Image.fromarray(data).save(path)
