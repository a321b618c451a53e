"""Writing results so that nothing is ever half-made, and finding images."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facetrt.engine.bundle import read_manifest
from facetrt.kernels.errors import FacetrtError, InputError, MissingFileError, OutputError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
RESULTS = "results.json"
FEATURES = "features.zarr"  # the store in an output folder of extract
MAX_MARK_BYTES = 64 << 20


class Content(StrEnum):
    """What an output folder holds; ``force`` replaces a folder only by one of the same kind."""

    RESULTS = "results"
    FEATURES = "a feature store"
    BUNDLE = "bundle"


@contextmanager
def atomic_folder(path: Path | str, *, force: bool = False, content: Content = Content.RESULTS) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write into; it takes ``path``'s place only if the block succeeds.

    Raises:
        OutputError: ``path`` exists and ``force`` is off, ``force`` would replace a folder that facetrt did not write,
            or the place cannot be written.
    """
    target = Path(path).absolute()
    check_replaceable(target, force=force, content=content)
    with temporary_sibling(target) as made:
        try:
            made.chmod(0o755)
            yield made
            _publish(made, target, force=force, content=content)
        except OSError as error:
            if isinstance(error, FacetrtError):
                raise
            raise OutputError(f"writing {target} failed: {error.strerror or error}; nothing was kept") from error


@contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``, on the same disk; those of killed runs are removed as well.

    Raises:
        OutputError: the place cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=_temporary_prefix(target, os.getpid()), suffix=".tmp"))
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write; it takes ``path``'s place only if the block succeeds."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(
    path: Path | str, *, force: bool, content: Content = Content.RESULTS, inputs: Iterable[Path | str] = ()
) -> None:
    """Raise :class:`OutputError` unless ``path`` is free, or ``force`` may replace it.

    ``inputs`` are files and folders that the command reads: a folder that holds one of them is never replaced.
    """
    target = Path(path).absolute()
    try:
        if not (target.exists() or target.is_symlink()):
            return
        if not force:
            raise OutputError(f"{target} exists already: choose another --out, or replace it with --force")
        if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not _is_ours(target, content)):
            raise OutputError(
                f"{target} was not written by facetrt as {content}, so --force does not replace it: choose another "
                "--out"
            )
        for given in inputs:
            if Path(given).resolve().is_relative_to(target.resolve()):
                raise OutputError(f"{given} lies in {target}, which --force would delete: choose another --out")
    except FacetrtError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {target}: {error.strerror or error}") from error


def _is_ours(target: Path, content: Content) -> bool:
    """Whether facetrt wrote this folder, told by what its mark says, not by its name."""
    if content is Content.BUNDLE:
        try:
            read_manifest(target)
        except FacetrtError:
            return False
        return True
    if content is Content.FEATURES:
        return is_store(target)
    return is_store(target / FEATURES) or _read_mark(target / RESULTS).get("tool") == "facetrt"


def is_store(folder: Path) -> bool:
    """Whether facetrt wrote this feature store."""
    attributes = _read_mark(folder / "zarr.json").get("attributes")
    return isinstance(attributes, dict) and "facetrt" in attributes


def _read_mark(path: Path) -> dict[str, Any]:
    """The JSON object that tells what a folder is; empty if there is none."""
    try:
        readable = path.is_file() and path.stat().st_size <= MAX_MARK_BYTES  # a pipe would be waited for
        data = json.loads(path.read_bytes()) if readable else None
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _publish(made: Path, target: Path, *, force: bool, content: Content) -> None:
    if not target.exists():
        made.rename(target)
        return
    check_replaceable(target, force=force, content=content)  # it may have appeared meanwhile
    old = made.with_suffix(".old")
    target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _temporary_prefix(target: Path, process: int) -> str:
    return f".{target.name}.facetrt-{socket.gethostname()}-{process}-"


def remove_leftovers(target: Path) -> None:
    """Delete what killed runs on this machine left beside ``target``: temporary folders whose process is gone."""
    pattern = re.compile(re.escape(f".{target.name}.facetrt-{socket.gethostname()}-") + r"(\d{1,9})-[a-z0-9_]+\.tmp")
    for folder in target.parent.iterdir():
        found = pattern.fullmatch(folder.name)
        if found is not None and not _alive(int(found[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
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
    stems: dict[str, None] = {}
    for path in paths:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}-{number}", number + 1
        stems[stem] = None
    return list(stems)


def write_results(folder: Path, data: dict[str, Any]) -> None:
    """``results.json`` of an output folder, marked as facetrt's; complete or not there."""
    with atomic_file(folder / RESULTS) as path:
        write_json(path, {"tool": "facetrt", **data})


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
