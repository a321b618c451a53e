"""Checkpoint files as people have them: told apart by their content, read without running code, one line on failure."""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from facetrt.export.backbones.model_spec import import_export_libraries
from facetrt.kernels.errors import InputError, MissingFileError

MAX_CHECKPOINT_BYTES = 5 << 30  # DINOv2's giant has 4.5 billion
MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own bound
FORMATS = "a file that torch.save wrote, .safetensors or .npz"
MAGIC = 0x1950A86A20F9469CFC6C  # begins a file that torch wrote before 1.6
PROTOCOL = 3  # of pickles: the last that torch reads without running code; it writes 2 unless told otherwise
LEGACY_PICKLES = 4  # of such a file: that number, version, system, content

#: Libraries whose objects lie beside weights (arguments, configurations, schedules). They are replaced by stand-ins
#: that do nothing: nothing of these libraries is imported or called.
BESIDE_WEIGHTS = {
    "addict", "argparse", "box", "datetime", "decimal", "easydict", "enum", "fractions", "fvcore", "hydra", "lightning",
    "lightning_fabric", "mmengine", "ml_collections", "munch", "numpy", "omegaconf", "pathlib", "pytorch_lightning",
    "types", "typing", "uuid", "yacs",
}  # fmt: skip
BESIDE_WEIGHTS_NAMES = {
    "builtins.bool", "builtins.bytes", "builtins.complex", "builtins.dict", "builtins.float", "builtins.int",
    "builtins.list", "builtins.object", "builtins.range", "builtins.slice", "builtins.str", "builtins.tuple",
    "builtins.type", "collections.defaultdict", "functools.partial", "torch.torch_version.TorchVersion",
}  # fmt: skip
MAPPINGS = {
    "AttrDict", "AttributeDict", "Box", "CfgNode", "ConfigDict", "Dict", "DictConfig", "EasyDict", "FrozenConfigDict",
    "Munch", "defaultdict",
}  # fmt: skip


class Unreadable(Exception):
    """Why a file cannot be read, in our words."""


class _Nothing:
    """Stands for an object beside the weights; whatever it is made with is forgotten."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __new__(cls, *arguments: Any, **options: Any) -> _Nothing:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


class _NoMapping:
    """Stands for a dictionary of another library, which the unpickler fills: weights may be in it."""

    def __new__(cls, *arguments: Any, **options: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_checkpoint(path: Path) -> Any:
    """What a file holds: torch tensors, most often in dictionaries of dictionaries.

    Raises:
        MissingFileError: no such file.
        InputError: it is no checkpoint, is damaged, or could only be read by running what it holds.
    """
    import_export_libraries()
    if path.is_dir():
        raise InputError(f"{path} is a folder: expected {FORMATS}")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: expected {FORMATS}")
    size = path.stat().st_size
    if size > MAX_CHECKPOINT_BYTES:
        raise InputError(f"{path} has {size:,} bytes: expected at most {MAX_CHECKPOINT_BYTES:,}")
    try:
        return _reader(path)(path)
    except Exception as error:  # a damaged or hostile file fails in any way, and in words that are not ours
        reason = str(error) if isinstance(error, Unreadable) else "it is damaged or cut off"
        if isinstance(error, MemoryError):
            reason = "it needs more memory than there is"
        raise InputError(f"{path} cannot be read as a checkpoint: {reason}") from error


def _reader(path: Path) -> Callable[[Path], Any]:
    """The reader for a file, by its first bytes: endings are not to be relied on."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise Unreadable("it is empty")
    if head.startswith(b"version https://git-lfs"):
        raise Unreadable("it is a pointer of Git LFS, not the file itself: fetch that by `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        raise Unreadable("it is a web page, perhaps of a download that failed: fetch the file itself")
    if head.startswith(b"PK"):
        return _read_zip
    if (
        head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd"))
        or head[257:262] == b"ustar"
    ):
        raise Unreadable("it is an archive: unpack it first")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER:
        return _read_safetensors
    if head.startswith(b"\x80"):
        return _read_legacy
    raise Unreadable(f"its content is none that is known here: expected {FORMATS}")


def _read_zip(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        raise Unreadable("it is cut off: its table of contents, which comes last, is missing")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > MAX_CHECKPOINT_BYTES:
            raise Unreadable(f"it unpacks to {unpacked:,} bytes, more than {MAX_CHECKPOINT_BYTES:,}")
        names = [entry.filename for entry in entries]
        if any(name.endswith("/constants.pkl") for name in names):
            raise Unreadable("it is a TorchScript program: save its state_dict() instead")
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if pickles:
            return _load(path, [archive.read(pickles[0])])
    if names and all(name.endswith(".npy") for name in names):
        return _read_npz(path)
    raise Unreadable("it is a zip archive without a checkpoint's entries: unpack it first")


def _read_npz(path: Path) -> dict[str, Any]:
    torch, _ = import_export_libraries()
    tensors = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            try:
                values = np.array(arrays[name])
            except ValueError:
                raise Unreadable(f"{name} is damaged, or holds objects instead of numbers") from None
            if values.dtype.kind in "fiub":  # others, like texts, lie beside the weights
                tensors[name] = torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
    return tensors


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _read_legacy(path: Path) -> Any:
    """Files of torch before 1.6: a number that tells them from other pickles comes first."""
    with path.open("rb") as file:
        if (
            next((value for _, value, _ in pickletools.genops(file) if isinstance(value, int) and value > 2**32), 0)
            != MAGIC
        ):
            raise Unreadable(
                "it is a pickle that torch.save did not write, which could run code: write it by torch.save"
            )
        file.seek(0)
        return _load(path, file)


def _load(path: Path, pickles: list[bytes] | BinaryIO) -> Any:
    """``torch.load`` without running code; what lies beside the weights is replaced by stand-ins."""
    torch, _ = import_export_libraries()
    found = set(_globals(pickles))
    if any(name.startswith("torch.distributed") for name in found):
        raise Unreadable("its tensors are spread over processes (torch.distributed): save whole ones")
    stand_ins = [
        (_NoMapping if name.rpartition(".")[2] in MAPPINGS else _Nothing, name) for name in found if _beside(name)
    ]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about its own old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # all else in torch's message is advice that is not ours
        if refused is None:
            raise
        raise Unreadable(
            f"it holds {refused[1]}, an object that only running its code could make: save tensors alone, like "
            "torch.save(model.state_dict(), PATH)"
        ) from None


def _beside(name: str) -> bool:
    return name.partition(".")[0] in BESIDE_WEIGHTS or name in BESIDE_WEIGHTS_NAMES


def _globals(pickles: list[bytes] | BinaryIO) -> Iterator[str]:
    """Names of classes and functions in pickles, which are taken apart and not run."""
    files = [io.BytesIO(content) for content in pickles] if isinstance(pickles, list) else [pickles] * LEGACY_PICKLES
    for file in files:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "PROTO" and int(str(argument)) > PROTOCOL:
                raise Unreadable(
                    f"it was written with pickle protocol {argument}, which torch only reads by running its code: "
                    "write it by torch.save without pickle_protocol"
                )
            if operation.name == "GLOBAL":
                yield _today(str(argument))


def _today(name: str) -> str:
    """A name of Python 2's library, which torch's files use, as unpicklers translate it."""
    module, _, rest = name.partition(" ")
    if (module, rest) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[module, rest])
    return f"{IMPORT_MAPPING.get(module, module)}.{rest}"
