"""What is added to a bundle that is there already: compiled kernels, TensorRT plans, FOUND's head.

Only a head that is read from a checkpoint needs torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from facetrt.engine.bundle.bundle import BUILTIN, Bundle, read_manifest
from facetrt.engine.bundle.manifest import KERNELS, FileEntry, LinearHead, Manifest
from facetrt.engine.tasks.discovery.heads import read_head
from facetrt.export.mending import file_entry, staging, without_damaged, write_manifest
from facetrt.kernels.errors import BundleError, InputError, OutputError

Made = TypeVar("Made")

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


def add_found_head(folder: Path | str, path: Path) -> LinearHead:
    """Put FOUND's head into a bundle's manifest, in place of one that is there.

    Args:
        path: a head of ``facetrt found-head``, or a checkpoint like the published ``decoder_weights.pt``.

    Raises:
        InputError: ``builtin``, which is part of the package, a file without a head, or a head that does not fit.
        OutputError: the bundle cannot be written.
    """
    if str(folder) == BUILTIN:
        raise InputError("the bundle inside the package is not changed: export builtin with --out FOLDER first")
    bundle = Bundle.open(folder, complete=False)
    head = load_found_head(path, bundle.manifest)
    try:
        write_manifest(bundle.path, with_found_head(bundle.manifest, head))
    except OSError as error:
        raise OutputError(f"{bundle.path} cannot be written: {error.strerror or error}") from error
    return head


def load_found_head(path: Path, manifest: Manifest) -> LinearHead:
    """A head from a file of either kind; a checkpoint's is for the last block's keys."""
    if path.suffix == ".json":
        return read_head(path)
    from facetrt.export.checkpoints import read_checkpoint

    facet = f"key@{manifest.architecture.depth - 1}"
    found = list(_tensors_of(read_checkpoint(path)))
    weights = [tensor for tensor in found if tensor.numel() == manifest.architecture.dim]
    biases = [tensor for tensor in found if tensor.numel() == 1]
    if len(weights) != 1 or len(biases) != 1 or len(found) != 2:
        sizes = ", ".join(str(tensor.numel()) for tensor in found[:8]) or "nothing"
        raise InputError(
            f"{path} holds tensors of {sizes} numbers: expected FOUND's head, {manifest.architecture.dim} weights and "
            "one bias"
        )
    numbers = [float(value) for value in weights[0].flatten().float().tolist()]
    return _checked(lambda: LinearHead(facet, numbers, float(biases[0].flatten()[0]), path.name), path)


def with_found_head(manifest: Manifest, head: LinearHead) -> Manifest:
    """The manifest with a head.

    Raises:
        InputError: a head for another width, or for a facet that was not exported.
    """
    facet = head.facet.removesuffix("-mean")
    if facet not in manifest.facets:
        raise InputError(manifest.missing_facet(facet))
    return _checked(lambda: replace(manifest, found_head=head), head.source)


def _checked(make: Callable[[], Made], source: object) -> Made:
    try:
        return make()
    except BundleError as error:
        raise InputError(f"{source}: {error}") from None


def _tensors_of(value: Any, depth: int = 0) -> Iterator[Any]:
    """All tensors in dictionaries of dictionaries."""
    if hasattr(value, "numel"):
        yield value
    elif isinstance(value, Mapping) and depth < 4:
        for entry in value.values():
            yield from _tensors_of(entry, depth + 1)


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
