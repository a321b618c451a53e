"""Changing a bundle in its place: a new manifest, and what is damaged taken out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from facetrt.engine.bundle.bundle import check_present, read_later, read_manifest
from facetrt.engine.bundle.manifest import KERNELS, MANIFEST, PLANS, FileEntry, Manifest
from facetrt.engine.files import temporary_sibling
from facetrt.kernels.errors import BundleError


@contextmanager
def staging(place: Path) -> Iterator[Path]:
    """A temporary folder in a bundle's folder of plans or kernels, where a killed build's remains are no foreign files.

    Remains of earlier builds go first; and ``place`` goes at the end if nothing is in it.

    Raises:
        OutputError: the bundle cannot be written.
    """
    try:
        with temporary_sibling(place / "build") as made:
            yield made
    finally:
        with suppress(OSError):  # something is in it
            place.rmdir()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a bundle that may be in use: whoever opens it sees the old one or the new one."""
    places = [folder / name for name in (PLANS, KERNELS)]  # where a killed run's remains are no foreign files
    place = next((place for place in places if place.is_dir()), folder / PLANS)
    with staging(place) as made:
        (made / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        (made / MANIFEST).replace(folder / MANIFEST)


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
        if not read_later(name) or unit in damaged:
            continue
        try:
            check_present(folder, name, entry)
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


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file as the manifest records them."""
    data = path.read_bytes()
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())
