"""Writing results so that nothing is ever half-made."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facetrt.engine.bundle.bundle import read_manifest
from facetrt.kernels.errors import FacetrtError, InputError, OutputError, reading
from facetrt.kernels.machine import check_system

try:
    import fcntl
except ImportError:
    check_system()
    raise

RESULTS = "results.json"
REPOSITORY = "repository.json"  # the mark of a model repository
FEATURES = "features.zarr"  # the store in an output folder of extract
MAX_TEXT_BYTES = 64 << 20  # of a JSON or text file


class Content(StrEnum):
    """What an output folder holds; ``force`` replaces a folder only by one of the same kind."""

    RESULTS = "results"
    FEATURES = "a feature store"
    BUNDLE = "bundle"
    REPOSITORY = "a model repository"


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
        made = _Temporary(Path(tempfile.mkdtemp(dir=target.parent, prefix=_temporary_prefix(target), suffix=SUFFIX)))
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    with made:
        yield made.path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """An empty temporary file to write, with the same ending; it takes ``path``'s place only if the block succeeds.

    Raises:
        OSError: the place cannot be written.
    """
    path = Path(path).absolute()
    if path.parent not in _swept:  # once: a folder may hold many files
        _swept.add(path.parent)
        remove_leftovers(path)
    made = path.with_name(f"{_temporary_prefix(path)}{secrets.token_hex(4)}{SUFFIX}{path.suffix}")
    os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    with _Temporary(made) as temporary:
        yield temporary
        temporary.replace(path)


_swept: set[Path] = set()


class _Temporary:
    """A file or folder that is removed when its block ends; listed and locked meanwhile.

    The lock, which the system gives up when the process ends in whatever way, tells the next run that it is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _open_locked(path)
        _temporaries.add(path)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        _remove(self.path)
        _temporaries.discard(self.path)
        if self._lock is not None:
            os.close(self._lock)


_temporaries: set[Path] = set()  # that exist now, for a process that ends without leaving its blocks


def discard_temporaries() -> None:
    """Remove all temporary files and folders of this process, from any thread, before it ends."""
    for path in list(_temporaries):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


class _Finishing:
    """What is worth keeping and must be ended properly, like a video: a signal waits until it is."""

    def __init__(self) -> None:
        self.depth = 0
        self.after: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if not self.depth:
            self.after()


finishing = _Finishing()


def is_finishing() -> bool:
    """Whether a signal has to wait."""
    return finishing.depth > 0


def on_finished(call: Callable[[], None]) -> None:
    """Have a function called whenever such a block ends."""
    finishing.after = call


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder for this process alone, without waiting; False if another has it.

    The system gives the lock up when the process ends in whatever way. File systems that know no locks have none.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
    return True


def _open_locked(path: Path) -> int | None:
    """A descriptor that holds the lock; None where the file system has none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try_lock(descriptor)
    return descriptor


def check_replaceable(
    path: Path | str, *, force: bool, content: Content = Content.RESULTS, inputs: Iterable[Path | str] = ()
) -> None:
    """Raise :class:`OutputError` unless ``path`` is free, or ``force`` may replace it.

    ``inputs`` are files and folders that the command reads: a folder that holds one of them is never replaced.
    """
    target = Path(path).absolute()
    try:
        if target.parent.is_dir():
            remove_leftovers(target)  # a result that a killed run was replacing is there again
        if not (target.exists() or target.is_symlink()):
            return
        if not force:
            raise OutputError(f"{target} exists already: choose another --out, or replace it with --force")
        if target.is_symlink() or not target.is_dir() or (has_content(target) and not _is_ours(target, content)):
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
    if content is Content.REPOSITORY:
        return read_mark(target / REPOSITORY).get("tool") == "facetrt"
    return is_store(target / FEATURES) or read_mark(target / RESULTS).get("tool") == "facetrt"


def is_store(folder: Path) -> bool:
    """Whether facetrt wrote this feature store."""
    attributes = read_mark(folder / "zarr.json").get("attributes")
    return isinstance(attributes, dict) and "facetrt" in attributes


def read_mark(path: Path) -> dict[str, Any]:
    """The JSON object that tells what a file or folder is; empty if there is none, or anything else."""
    try:
        return read_object(path)
    except FacetrtError:
        return {}


def read_object(path: Path, what: str = "a JSON object", limit: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """A JSON object from a file of any content; errors as :func:`read_bytes`."""
    with reading(path, what):
        data = json.loads(read_bytes(path, what, limit))
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}: expected {what}")
    return data


def read_bytes(path: Path, what: str, limit: int = MAX_TEXT_BYTES) -> bytes:
    """A plain file in full; a pipe or a device is never waited for.

    Raises:
        MissingFileError, InputError: no such file, something else than a file, or one of more than ``limit`` bytes.
    """
    with reading(path, what):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is not {what}: expected a plain file")
        if found.st_size > limit:
            raise InputError(f"{path} is not {what}: {found.st_size:,} bytes, expected a file of at most {limit:,}")
        return path.read_bytes()


def _publish(made: Path, target: Path, *, force: bool, content: Content) -> None:
    if not target.exists():
        made.rename(target)
        return
    check_replaceable(target, force=force, content=content)  # it may have appeared meanwhile
    old = made.with_name(made.name + OLD)
    lock = _open_locked(target)
    with finishing:  # between the two there is neither
        target.rename(old)
        try:
            made.rename(target)
        except OSError:
            old.rename(target)
            raise
        replaced = _Temporary(old)
    with replaced:
        if lock is not None:
            os.close(lock)


SUFFIX = ".tmp"
OLD = ".old"  # of a result that is being replaced
FRESH = 10.0  # seconds that a temporary may be there before it is locked
TEMPORARY = re.compile(r"\..+\.facetrt-(?P<host>.+)-(?P<process>\d{1,9})-[a-z0-9_]+\.tmp(\.[^.]*)?")


def _temporary_prefix(target: Path) -> str:
    return f".{_label(target)}.facetrt-{socket.gethostname()}-{os.getpid()}-"


def _label(target: Path) -> str:
    """What the temporary's name begins with: the target's, or of a long one a hash, as names have a limit."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= 100 else hashlib.sha256(name).hexdigest()[:32]


def is_temporary(path: Path) -> bool:
    """Whether a name is one of our temporaries', alive or left by a killed run: it is nobody's data."""
    return TEMPORARY.fullmatch(path.name) is not None


def has_content(folder: Path) -> bool:
    """Whether there is anything in a folder, our temporaries apart."""
    return not all(map(is_temporary, folder.iterdir()))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder where the system has such (``TMPDIR``); those of killed runs are removed as well.

    Raises:
        OutputError: the place cannot be written.
    """
    with temporary_sibling(Path(tempfile.gettempdir()) / "scratch") as made:
        yield made


def remove_leftovers(target: Path) -> None:
    """Delete what killed runs on this machine left beside ``target``; a result that one was replacing is put back."""
    mine = f".{_label(target)}.facetrt-"
    for path in target.parent.iterdir():
        found = TEMPORARY.fullmatch(path.name)
        if found is None or found["host"] != socket.gethostname() or _in_use(path, int(found["process"])):
            continue
        if not path.name.endswith(OLD):
            _remove(path)
        elif path.name.startswith(mine):
            if target.exists():
                _remove(path)
            else:
                path.rename(target)


def _in_use(path: Path, process: int) -> bool:
    """Whether a temporary's process is alive: one with its number is, and the lock is taken, or was not yet.

    Numbers come again, in containers soon; so a lock that nobody holds tells more than a process that is there.
    """
    if not _alive(process):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not try_lock(descriptor) or time.time() - os.fstat(descriptor).st_mtime < FRESH
    finally:
        os.close(descriptor)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


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
