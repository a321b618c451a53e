"""Weights: from files and from where they are published, checked, hashed and loaded strictly."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from facetrt.engine.bundle.manifest import Checkpoint
from facetrt.engine.files import atomic_file
from facetrt.export import builtin
from facetrt.export.backbone import find_backbone, listed
from facetrt.export.backbones.layouts import looks_like
from facetrt.export.backbones.model_spec import ModelSpec, StateDict, import_export_libraries
from facetrt.export.checkpoints import MAX_CHECKPOINT_BYTES, read_checkpoint
from facetrt.kernels.errors import InputError, MissingFileError

CHUNK = 1 << 20
HUB_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")

DownloadProgress = Callable[[int, int | None], None]  # (bytes so far, bytes in all if known)
Report = Callable[[str], None]


def load_weights(
    spec: ModelSpec,
    path: Path | None,
    progress: DownloadProgress | None = None,
    report: Report = lambda note: None,
) -> tuple[StateDict, Checkpoint]:
    """The model's tensors in float32 from a file, or from its published checkpoint if ``path`` is None.

    The checkpoint's SHA-256 is that of the tensors, so it is the same for whatever file holds them.

    Args:
        report: called with what was taken from a file that holds more than the backbone.

    Raises:
        MissingFileError: no such file, or it cannot be downloaded.
        InputError: the file cannot be read.
    """
    if path is not None:
        return _finished(spec, read_state_dict(path, report), path.name)
    if spec.name == "builtin":
        torch, _ = import_export_libraries()
        tensors = {name: torch.from_numpy(values) for name, values in builtin.state_dict().items()}
        return _finished(spec, tensors, "closed form")
    kept = find_cached(spec) if spec.url is None else fetch_checkpoint(spec, progress)
    if kept is not None:
        source = spec.url if kept.parent == cache_folder() else None  # the same whether it was downloaded now or before
        if source is None:
            report(f"found {kept}")
        return _finished(spec, read_state_dict(kept, report), source or kept.name)
    if spec.timm_name is not None:
        return _finished(spec, _timm_state(spec, report), f"timm:{spec.timm_name}")
    raise MissingFileError(
        f"no supervised checkpoint of {spec.name} is published (timm's of that name is DINO's): pass one with "
        "--weights, or export dino_vits8"
    )


def find_cached(spec: ModelSpec) -> Path | None:
    """The model's checkpoint where our, torch's and Hugging Face's downloads lie, by the names it has there."""
    if spec.file_name is not None:
        folders = (cache_folder(), _torch_home() / "hub" / "checkpoints")
        for path in (folder / spec.file_name for folder in folders):
            if path.is_file():
                _check_published(spec, path)
                return path
    if not spec.hub:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for repository in spec.hub:
        for name in HUB_FILES:
            found = try_to_load_from_cache(repository, name)
            if isinstance(found, str):
                return Path(found)
    return None


def _torch_home() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch"
    return Path(os.environ.get("TORCH_HOME") or home)


def read_state_dict(path: Path, report: Report = lambda note: None) -> StateDict:
    """The backbone's tensors from a checkpoint file of any layout, by name (see ``find_backbone``)."""
    return _backbone(read_checkpoint(path), str(path), report)


def _backbone(loaded: Any, source: str, report: Report) -> StateDict:
    found = find_backbone(loaded, source)
    for note in found.notes():
        report(f"{source}: {note}")
    return found.tensors


def _finished(spec: ModelSpec, state: StateDict, source: str) -> tuple[StateDict, Checkpoint]:
    """The tensors in float32 by timm's names, and their SHA-256: of names, shapes and values, in order of names.

    Raises:
        InputError: tensors that are no weights: of integers, sparse, not finite, or larger in all than a checkpoint.
    """
    torch, _ = import_export_libraries()
    count = sum(tensor.numel() for tensor in state.values())  # before they are converted: views may be of any size
    if 4 * count > MAX_CHECKPOINT_BYTES:
        raise InputError(f"{source} has {count:,} weights: expected at most {MAX_CHECKPOINT_BYTES // 4:,}")
    try:
        state = spec.family.timm_names(state, spec)
    except InputError as error:
        raise InputError(f"{source}: {error}; the file looks like {looks_like(state)}") from None
    digest, weights = hashlib.sha256(), {}
    for name in sorted(state):
        tensor = state[name]
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            raise InputError(f"{source}: {name} is {tensor.dtype}, {tensor.layout}: expected floating-point numbers")
        weights[name] = tensor.detach().to(torch.float32).contiguous()
        if not weights[name].isfinite().all():
            raise InputError(f"{source}: {name} has values that are not finite: expected a trained model's weights")
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(weights[name].numpy().astype("<f4", copy=False).tobytes())
    return weights, Checkpoint(source, digest.hexdigest())


def load_strictly(model: Any, state: StateDict, source: str) -> None:
    """Copy ``state`` into ``model``; every tensor must fit.

    Raises:
        InputError: a missing or extra tensor, or one of another shape; the message lists the names.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = {"missing": missing, "extra": extra, "of another shape": shapes}
    found = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(
            f"{source} does not fit the model; tensors {'; '.join(found)}; is it another model's checkpoint? It looks "
            f"like {looks_like(state)}"
        )
    model.load_state_dict(state)


def cache_folder() -> Path:
    """Where downloaded checkpoints are kept: ``facetrt`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facetrt"


def fetch_checkpoint(spec: ModelSpec, progress: DownloadProgress | None = None) -> Path:
    """The published checkpoint from a cache, downloaded to ours if it is in none.

    A download goes to a temporary file and is renamed when its size is right, so a broken one leaves nothing.
    """
    kept = find_cached(spec)
    if kept is not None:
        return kept
    url = str(spec.url)
    target = cache_folder() / str(spec.file_name)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(target) as partial:
            _download(url, partial, progress)
            _check_published(spec, partial)
    except (urllib.error.URLError, OSError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise MissingFileError(
            f"the checkpoint of {spec.name} could not be downloaded ({reason}). It is published at {url}: fetch it "
            f"elsewhere and put it at {target}, or pass it with --weights"
        ) from error
    return target


def _check_published(spec: ModelSpec, path: Path) -> None:
    """Compare a file with what is known of the published one: its size, and its SHA-256 where that is on record."""
    size = path.stat().st_size
    if spec.published_bytes is not None and size != spec.published_bytes:
        raise InputError(
            f"{path} has {size:,} bytes; the published checkpoint of {spec.name} has {spec.published_bytes:,}: delete "
            "it and export again, or pass a file that you trust with --weights"
        )
    if spec.published_sha256 is not None and not _sha256(path).startswith(spec.published_sha256):
        raise InputError(
            f"{path} has SHA-256 {_sha256(path)[:12]}…; the published checkpoint of {spec.name} has "
            f"{spec.published_sha256[:12]}…: delete it and export again, or pass a file that you trust with --weights"
        )


def _download(url: str, path: Path, progress: DownloadProgress | None) -> None:
    with urllib.request.urlopen(url, timeout=30) as response, path.open("wb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        if total is not None and total > MAX_CHECKPOINT_BYTES:
            raise OSError(f"the server announces {total:,} bytes")
        done = 0
        while chunk := response.read(CHUNK):
            done += len(chunk)
            if done > MAX_CHECKPOINT_BYTES:
                raise OSError(f"more than {MAX_CHECKPOINT_BYTES:,} bytes arrived")
            file.write(chunk)
            if progress is not None:
                progress(done, total)
        if total is not None and done != total:
            raise OSError(f"{done:,} of {total:,} bytes arrived")


def _timm_state(spec: ModelSpec, report: Report) -> StateDict:
    _, timm = import_export_libraries()
    name = spec.timm_name
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        gated = f". {spec.family.access}" if spec.family.access else ""
        place = f", or put the publisher's {spec.file} at {cache_folder() / spec.file}" if spec.file else ""
        raise MissingFileError(
            f"timm could not load the pretrained weights of {name}: {(str(error).splitlines() or [''])[0]:.200}. They "
            f"are published on the Hugging Face hub as timm/{name}: fetch the checkpoint elsewhere and pass "
            f"it with --weights{place}{gated}"
        ) from error
    return _backbone(dict(model.state_dict()), f"timm's {name}", report)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
