"""What is added to a bundle that is there already: compiled kernels, TensorRT plans. Needs no torch for plans."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from facetrt.engine.bundle import BUILTIN, KERNELS, PLANS, Bundle, FileEntry, file_entry, read_manifest, write_manifest
from facetrt.kernels.errors import InputError, OutputError

Report = Callable[[str], None]


def compile_into(folder: Path, architectures: Sequence[str], report: Report) -> dict[str, FileEntry]:
    """Compile all kernels into a folder; returns the new files by their names in it.

    Raises:
        MissingDependencyError: triton is not installed.
        InputError: an architecture that it cannot compile for.
    """
    from facetrt.export.kernels import compile_kernels  # triton is needed only here

    compile_kernels(folder, architectures, report=report)
    files = sorted(path for path in (folder / KERNELS).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_entry(path) for path in files}


def add_kernels(folder: Path | str, architectures: Sequence[str], report: Report = lambda stage: None) -> list[str]:
    """Add kernels to a bundle, in place of those for the same architectures; returns the names of the new files.

    Raises:
        InputError: ``builtin``, which is part of the package.
        OutputError: the bundle cannot be written.
    """
    if str(folder) == BUILTIN:
        raise InputError("the bundle inside the package is not changed: export builtin with --out FOLDER first")
    path = Bundle.open(folder).path
    try:
        (path / PLANS).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path / PLANS, prefix=".kernels-") as staging:
            files = compile_into(Path(staging), architectures, report)
            _publish(path, Path(staging), files)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return list(files)


def _publish(folder: Path, staging: Path, files: dict[str, FileEntry]) -> None:
    """Kernels first, manifest last; older ones are taken out of the manifest before they are replaced."""
    replaced = {PurePosixPath(name).parts[1] for name in files}
    old = read_manifest(folder)
    kept = {
        n: entry for n, entry in old.files.items() if not _is_kernel(n) or PurePosixPath(n).parts[1] not in replaced
    }
    if kept != old.files:
        write_manifest(folder, replace(old, files=kept))
    for architecture in replaced:
        target = folder / KERNELS / architecture
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        (staging / KERNELS / architecture).replace(target)
    write_manifest(folder, replace(old, files={**kept, **files}))


def _is_kernel(name: str) -> bool:
    return PurePosixPath(name).parts[0] == KERNELS
