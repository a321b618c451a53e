"""Checkpoints: reading files of three formats, finding published ones, loading strictly."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from facetrt.engine.bundle import Checkpoint
from facetrt.export import builtin
from facetrt.export.models import ModelSpec, import_export_libraries
from facetrt.kernels.errors import InputError, MissingFileError

MAX_CHECKPOINT_BYTES = 2 << 30
CHUNK = 1 << 20

DownloadProgress = Callable[[int, int | None], None]  # (bytes so far, bytes in all if known)
StateDict = dict[str, Any]  # name → torch tensor


def load_weights(
    spec: ModelSpec, path: Path | None, progress: DownloadProgress | None = None
) -> tuple[StateDict, Checkpoint]:
    """The model's tensors from a file, or from its published checkpoint if ``path`` is None.

    Raises:
        MissingFileError: no such file, or it cannot be downloaded.
        InputError: the file cannot be read.
    """
    if path is not None:
        return read_state_dict(path), Checkpoint(path.name, _sha256(path))
    if spec.name == "builtin":
        return _builtin_state()
    if spec.timm_name is not None:
        return _timm_state(spec.timm_name)
    if spec.url is None:
        raise MissingFileError(
            f"no supervised checkpoint of {spec.name} is published (timm's of that name is DINO's): pass one with "
            "--weights, or export dino_vits8"
        )
    cached = fetch_checkpoint(spec, progress)
    return read_state_dict(cached), Checkpoint(str(spec.url), _sha256(cached))


def read_state_dict(path: Path) -> StateDict:
    """Tensors of a ``.pth``/``.pt`` (never unpickling code), ``.safetensors`` or ``.npz`` file, by name."""
    torch, _ = import_export_libraries()
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: expected a checkpoint (.pth, .safetensors or .npz)")
    if path.stat().st_size > MAX_CHECKPOINT_BYTES:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes: expected at most {MAX_CHECKPOINT_BYTES:,}")
    readers = {".pth": _read_torch, ".pt": _read_torch, ".safetensors": _read_safetensors, ".npz": _read_npz}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: the ending {path.suffix!r} is unknown: expected {', '.join(readers)}")
    try:
        state = reader(path)
    except Exception as error:  # a damaged or hostile file fails in the readers in any way
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{path} cannot be read as a checkpoint: {reason:.200}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is not a plain mapping of names to tensors: expected the backbone's state dict")
    return dict(state)


def _read_torch(path: Path) -> Any:
    torch, _ = import_export_libraries()
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _read_npz(path: Path) -> Any:
    torch, _ = import_export_libraries()
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_CHECKPOINT_BYTES:
        raise ValueError(f"it unpacks to {unpacked:,} bytes, more than {MAX_CHECKPOINT_BYTES:,}")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def load_strictly(model: Any, state: StateDict, dropped: tuple[str, ...], source: str) -> None:
    """Copy ``state`` into ``model``; every tensor must fit.

    Raises:
        InputError: a missing or extra tensor, or one of another shape; the message lists the names.
    """
    state = {name: tensor for name, tensor in state.items() if name not in dropped}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    extra = sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = {"missing": missing, "extra": extra, "of another shape": shapes}
    found = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(
            f"{source} does not fit the model; tensors {'; '.join(found)}; is it another model's checkpoint?"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})


def _listed(names: list[str], limit: int = 12) -> str:
    more = f", … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def cache_folder() -> Path:
    """Where downloaded checkpoints are kept: ``facetrt`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facetrt"


def fetch_checkpoint(spec: ModelSpec, progress: DownloadProgress | None = None) -> Path:
    """The published checkpoint from the cache, downloaded first if it is not there.

    A download goes to a temporary file and is renamed when its size is right, so a broken one leaves nothing.
    """
    url = str(spec.url)
    target = cache_folder() / url.rsplit("/", 1)[1]
    if target.is_file():
        _check_published(spec, target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        _download(url, partial, progress)
        _check_published(spec, partial)
        partial.replace(target)
    except (urllib.error.URLError, OSError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise MissingFileError(
            f"the checkpoint of {spec.name} could not be downloaded ({reason}). It is published at {url}: fetch it "
            f"elsewhere and put it at {target}, or pass it with --weights"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _check_published(spec: ModelSpec, path: Path) -> None:
    """Compare a file with what is known of the published one: its size, and its SHA-256 where that is on record."""
    size = path.stat().st_size
    if spec.published_bytes is not None and size != spec.published_bytes:
        raise InputError(
            f"{path} has {size:,} bytes; the published checkpoint of {spec.name} has {spec.published_bytes:,}: delete "
            "it and export again, or pass a file that you trust with --weights"
        )
    if spec.published_sha256 is not None and _sha256(path) != spec.published_sha256:
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


def _timm_state(name: str) -> tuple[StateDict, Checkpoint]:
    _, timm = import_export_libraries()
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingFileError(
            f"timm could not load the pretrained weights of {name}: {(str(error).splitlines() or [''])[0]:.200}. They "
            f"are published on the Hugging Face hub as timm/{name}: fetch the checkpoint elsewhere and pass "
            "it with --weights"
        ) from error
    state = dict(model.state_dict())
    digest = hashlib.sha256()
    for tensor_name in sorted(state):
        digest.update(tensor_name.encode())
        digest.update(state[tensor_name].numpy().tobytes())
    return state, Checkpoint(f"timm:{name}", digest.hexdigest())


def _builtin_state() -> tuple[StateDict, Checkpoint]:
    torch, _ = import_export_libraries()
    arrays = builtin.state_dict()
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return {n: torch.from_numpy(a) for n, a in arrays.items()}, Checkpoint("closed form", digest.hexdigest())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
