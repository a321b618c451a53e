"""What is added to a bundle that is there already: compiled kernels, TensorRT plans. Needs no torch for plans."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from facetrt.engine.bundle.bundle import BUILTIN, Bundle, read_manifest
from facetrt.engine.bundle.manifest import KERNELS, FileEntry
from facetrt.export.mending import file_entry, staging, without_damaged, write_manifest
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

    Other kernels and plans that are damaged are taken out of the bundle and reported: it would not open with them.

    Raises:
        InputError: ``builtin``, which is part of the package.
        OutputError: the bundle cannot be written.
    """
    if str(folder) == BUILTIN:
        raise InputError("the bundle inside the package is not changed: export builtin with --out FOLDER first")
    path = Bundle.open(folder, complete=False).path
    try:
        with staging(path / KERNELS) as made:
            files = compile_into(made, architectures, report)
            _publish(path, made, files, report)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return list(files)


def _publish(folder: Path, made: Path, files: dict[str, FileEntry], report: Report) -> None:
    """Kernels first, manifest last; older ones are taken out of the manifest before they are replaced."""
    replaced = {PurePosixPath(name).parts[1] for name in files}
    old = read_manifest(folder)
    kept = {
        n: entry for n, entry in old.files.items() if not _is_kernel(n) or PurePosixPath(n).parts[1] not in replaced
    }
    manifest = without_damaged(folder, replace(old, files=kept), report)
    if manifest != old:
        write_manifest(folder, manifest)
    for architecture in replaced:
        target = folder / KERNELS / architecture
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        (made / KERNELS / architecture).replace(target)
    write_manifest(folder, replace(manifest, files={**manifest.files, **files}))


def _is_kernel(name: str) -> bool:
    return PurePosixPath(name).parts[0] == KERNELS
