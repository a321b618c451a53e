"""A model repository for Triton: one model for each task, and the encoder they share; and what has changed since.

Everything in it follows from the bundle and the options, so that :func:`differences` can make it again.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.bundle.bundle import BUILTIN, Bundle
from facetrt.engine.bundle.manifest import MANIFEST, Manifest
from facetrt.engine.files import REPOSITORY, Content, atomic_folder, read_object, write_json
from facetrt.engine.samples import sample_paths
from facetrt.engine.serving.tasks import TASKS, TaskName, TaskOptions
from facetrt.engine.serving.triton_config import (
    ENCODER_MODEL,
    VERSION,
    EncoderPlatform,
    RepositoryOptions,
    encoder_config,
    images_of,
    task_config,
    warms_up,
)
from facetrt.engine.settings import options_of, values_of
from facetrt.engine.version import installed_version
from facetrt.kernels.errors import InputError, reading

LEARNED = "learned.npz"
CONFIG = "config.pbtxt"
WARM = "warmup"  # the folder of a model where Triton looks for what it is tried with
MODEL = "from facetrt.engine.serving.triton_model import TritonPythonModel as TritonPythonModel\n"


def write_repository(
    bundle: str | Path,
    folder: Path,
    tasks: TaskOptions,
    options: RepositoryOptions,
    running: RunOptions | None = None,
    *,
    force: bool = False,
) -> list[str]:
    """Write a repository; it appears complete or not at all.

    Args:
        bundle: a bundle's folder or ``builtin``. With an encoder of its own the repository holds a copy of it, and
            without one its address.
        running: how the encoder runs inside the tasks.

    Returns:
        The names of its models.

    Raises:
        InputError: the bundle has no plan for TensorRT.
        OutputError: the folder exists and ``force`` is off, or was not written by facetrt.
    """
    wanted = Wanted.of(bundle, tasks, options, running or RunOptions())
    with atomic_folder(folder, force=force, content=Content.REPOSITORY) as made:
        for name, content in wanted.files():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(content)
        if wanted.has_encoder:
            shutil.copytree(wanted.source, made / ENCODER_MODEL / str(VERSION), dirs_exist_ok=True)
        write_json(made / REPOSITORY, wanted.mark())
    return wanted.models


def differences(folder: Path) -> list[str]:
    """What a repository holds that its bundle, options and this facetrt would not write, a line each; empty if nothing.

    Raises:
        InputError: no repository that facetrt wrote is there.
    """
    mark = read_object(folder / REPOSITORY, "the mark of a repository that facetrt wrote")
    with reading(folder / REPOSITORY, "the mark of a repository that facetrt wrote"):
        wanted, version = Wanted.read(mark, folder), mark["facetrt"]
    found = [] if version == installed_version() else [f"facetrt {version} wrote it, and this is {installed_version()}"]
    for name, content in wanted.files():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.read_bytes() != content:
            found.append(f"{name} is not what would be written now")
    if mark["manifest_sha256"] != _sha256(wanted.source / MANIFEST):
        found.append(f"{wanted.source} is another bundle by now than the one it was written of")
    return found + (list(_damaged(folder)) if wanted.has_encoder else [])


def _damaged(folder: Path) -> Iterator[str]:
    """What a copy of the bundle, plans included, holds that its manifest does not mean."""
    here = folder / ENCODER_MODEL / str(VERSION)
    entries = Bundle.open(here, complete=False).manifest.files
    for name, entry in entries.items():
        if not (here / name).is_file():
            yield f"{ENCODER_MODEL}/{VERSION}/{name} is missing"
        elif _sha256(here / name) != entry.sha256:
            yield f"{ENCODER_MODEL}/{VERSION}/{name} is not what the bundle's manifest means"


@dataclass(frozen=True)
class Wanted:
    """What a repository should hold.

    Attributes:
        bundle: as it was named; ``source`` is its folder.
        learned: the content of the learned model's file, if apply is served.
    """

    bundle: str
    source: Path
    manifest: Manifest = field(repr=False)
    tasks: TaskOptions
    options: RepositoryOptions
    running: RunOptions
    learned: bytes | None = field(repr=False)

    @classmethod
    def of(cls, bundle: str | Path, tasks: TaskOptions, options: RepositoryOptions, running: RunOptions) -> Wanted:
        """What was asked for.

        Raises:
            InputError: the bundle has no plan for TensorRT.
        """
        opened = Bundle.open(bundle)
        if options.encoder is EncoderPlatform.TENSORRT and not opened.manifest.plans:
            raise InputError(f"{bundle} has no TensorRT plan: add one with 'facetrt export {bundle} --target tensorrt'")
        named = BUILTIN if str(bundle) == BUILTIN else str(Path(bundle).absolute())
        learned = None if tasks.learned is None else tasks.learned.read_bytes()
        return cls(named, opened.path.absolute(), opened.manifest, tasks, options, running, learned)

    @classmethod
    def read(cls, mark: Mapping[str, Any], folder: Path) -> Wanted:
        """What a repository's mark says was asked for."""
        names = tuple(TaskName(name) for name in mark["tasks"])
        learned = folder / TaskName.APPLY / str(VERSION) / LEARNED if TaskName.APPLY in names else None
        tasks = TaskOptions(**_restored(TaskOptions, mark["task_options"]) | {"tasks": names, "learned": learned})
        options = RepositoryOptions(**_restored(RepositoryOptions, mark["options"]))
        return cls.of(mark["bundle"], tasks, options, RunOptions(**_restored(RunOptions, mark["running"])))

    @property
    def has_encoder(self) -> bool:
        """Whether the encoder is a model of its own."""
        return self.options.encoder is not EncoderPlatform.INSIDE

    @property
    def models(self) -> list[str]:
        """Their names."""
        return [*map(str, self.tasks.tasks), *([ENCODER_MODEL] if self.has_encoder else [])]

    def mark(self) -> dict[str, Any]:
        """What :meth:`read` reads."""
        return {
            "tool": "facetrt",
            "facetrt": installed_version(),
            "bundle": self.bundle,
            "manifest_sha256": _sha256(self.source / MANIFEST),
            "tasks": list(self.tasks.tasks),
            "task_options": _plain(self.tasks, without=("tasks", "learned")),
            "options": _plain(self.options),
            "running": _plain(self.running),
        }

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Path and content of each file, but for the copy of the bundle."""
        for name in self.tasks.tasks:
            task = TASKS[name]
            yield f"{name}/{CONFIG}", task_config(task, self.tasks, self.options, self.settings(name)).encode()
            yield f"{name}/{VERSION}/model.py", MODEL.encode()
            if warms_up(task, self.options):
                yield from ((f"{name}/{WARM}/{tensor.name}", _photograph()) for tensor in images_of(task))
        if self.learned is not None:
            yield f"{TaskName.APPLY}/{VERSION}/{LEARNED}", self.learned
        if self.has_encoder:
            yield f"{ENCODER_MODEL}/{CONFIG}", encoder_config(self.manifest, self.options).encode()

    def settings(self, name: TaskName) -> dict[str, Any]:
        """What a task's process is told."""
        options = _plain(self.tasks, without=("tasks", "learned")) | {"tasks": str(name)}
        if name is TaskName.APPLY:
            options["learned"] = LEARNED
        told = {"options": options, "running": {} if self.has_encoder else _plain(self.running)}
        if self.has_encoder:  # whose folder is the copy of the bundle
            return told | {"bundle": f"../../{ENCODER_MODEL}/{VERSION}", "encoder": ENCODER_MODEL}
        return told | {"bundle": str(self.source), "encoder": None}


def _photograph() -> bytes:
    """One as Triton reads BYTES from a file: the length, then the content."""
    data = next(iter(sample_paths().values())).read_bytes()
    return struct.pack("<I", len(data)) + data


def _plain(options: Any, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """Options that are not the default, as JSON has them."""
    kind: Any = type(options)
    known = options_of(kind)
    given = values_of(options, without=without)
    return {name: _json(value) for name, value in given.items() if value != known[name].default}


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if value is None:
        return "none"
    return value if isinstance(value, (bool, int, float)) and not isinstance(value, str) else str(value)


def _restored(kind: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_plain`."""
    known = options_of(kind)
    return {name: known[name].read(value) if isinstance(value, str) else value for name, value in plain.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
