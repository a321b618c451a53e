"""Results of an evaluation's items, kept on disk as they come, so that an interrupted run goes on where it stopped.

``items.jsonl`` in the output folder: the first line is the fingerprint of the run (data, options, model), each further
one an item's record. A line is written by one call and counts only with its newline, so a kill costs at most the item
in progress.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from facetrt.engine.evaluation.protocol import Record
from facetrt.engine.files import atomic_file, has_content, read_bytes, try_lock
from facetrt.kernels.errors import InputError, OutputError

ITEMS = "items.jsonl"
RESULTS = "results.json"
PICTURES = "pictures"
START = b'{"fingerprint": '  # of the first line
MAX_BYTES = 1 << 30  # an item has some hundreds

Fingerprint = Mapping[str, Any]


class ItemStore:
    """The records of one run. Use as a context manager; only one process may have it open."""

    def __init__(self, folder: Path, fingerprint: Fingerprint, *, force: bool = False) -> None:
        """Open ``folder`` for a run with this fingerprint, new or continued.

        Raises:
            OutputError: the folder holds something else, another run's items (``force`` replaces those), is in use, or
                cannot be written.
        """
        self.folder = folder
        self.records: dict[str, Record] = {}
        _check_ours(folder)
        self._file = _open_locked(folder)
        try:
            if force:
                _clear(folder, self._file)
            self._restore(json.loads(json.dumps(fingerprint, default=str)))
        except BaseException:
            os.close(self._file)
            raise
        self.resumed = len(self.records)

    @property
    def pictures(self) -> Path:
        """Folder for pictures of this run."""
        return self.folder / PICTURES

    def add(self, key: str, record: Record) -> None:
        """Keep an item's record; it survives a kill from here on."""
        line = json.dumps({"key": key, "record": record}, default=str)
        self.records[key] = json.loads(line)["record"]
        _write(self._file, line)

    def close(self) -> None:
        """Let other processes have the folder."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _restore(self, fingerprint: Fingerprint) -> None:
        path = self.folder / ITEMS
        content = read_bytes(path, "items of an evaluation", MAX_BYTES)
        if content and not START.startswith(content[: len(START)]):
            raise OutputError(f"{path} was not written by facetrt: choose another --out")
        complete = content[: content.rfind(b"\n") + 1]
        lines = [_parse(path, number, line) for number, line in enumerate(complete.split(b"\n")[:-1], start=1)]
        os.ftruncate(self._file, len(complete))  # drops an item whose writing was cut off
        if len(lines) <= 1:  # new, or a run that came to nothing
            os.ftruncate(self._file, 0)
            _write(self._file, json.dumps({"fingerprint": fingerprint}))
            return
        header, *items = lines
        differences = list_differences(header["fingerprint"], fingerprint)
        if differences:
            raise OutputError(
                f"{self.folder} holds results of another run ({'; '.join(differences[:4])}): choose another --out, or "
                "start again with --force"
            )
        self.records = {line["key"]: line["record"] for line in items}


def list_differences(there: Any, now: Any, name: str = "") -> list[str]:
    """Fields in which two nested dictionaries differ, one message each."""
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        found = []
        for key in [*there, *(k for k in now if k not in there)]:
            found += list_differences(there.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        return found
    return [] if there == now else [f"{name} is {there!s:.60} there and {now!s:.60} now"]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, never a part."""
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _check_ours(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose another --out")
    if folder.is_dir() and has_content(folder) and not (folder / ITEMS).is_file():
        raise OutputError(f"{folder} holds other files and no {ITEMS} to continue: choose another --out")


def _open_locked(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ITEMS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    if not try_lock(file):
        os.close(file)
        raise OutputError(f"another run is writing {folder}: wait until it is done, or choose another --out")
    return file


def _clear(folder: Path, file: int) -> None:
    with (folder / ITEMS).open("rb") as opened:
        first = opened.read(len(START))
    if not START.startswith(first):
        raise OutputError(f"{folder / ITEMS} was not written by facetrt, so --force does not replace it")
    os.ftruncate(file, 0)
    (folder / RESULTS).unlink(missing_ok=True)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)


def _write(file: int, line: str) -> None:
    data = line.encode() + b"\n"
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    except OSError as error:
        raise OutputError(f"an item cannot be written: {error.strerror or error}; run again to continue") from error


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        parsed = json.loads(line)
        if isinstance(parsed, dict) and ("fingerprint" in parsed if number == 1 else _is_item(parsed)):
            return parsed
    raise InputError(f"{path}, line {number} is damaged: start again with --force")


def _is_item(parsed: dict[str, Any]) -> bool:
    return isinstance(parsed.get("key"), str) and isinstance(parsed.get("record"), dict)
