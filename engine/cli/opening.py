"""What most commands begin with: images in, a folder out, and an engine between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from facetrt.engine.backends.run_options import BackendName, DeviceName, Precision, RunOptions
from facetrt.engine.cli.app import BundleOption, ForceOption, ImagesArgument, OutOption, errors, progress_bar
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.files import atomic_folder, check_replaceable
from facetrt.engine.images.finding import find_images
from facetrt.engine.images.loading import LoadSize
from facetrt.engine.settings import values_of
from facetrt.kernels.errors import InputError


@dataclass(frozen=True)
class Job:
    """What a command reads and writes."""

    images: ImagesArgument
    bundle: BundleOption
    out: OutOption
    force: ForceOption = False

    @cached_property
    def paths(self) -> list[Path]:
        """The images that were named, one by one or by their folder."""
        return find_images(self.images)

    def pair(self, command: str) -> list[Path]:
        """The images of a command that takes two."""
        if len(self.paths) != 2:
            raise InputError(f"{len(self.paths)} images were given: {command} needs exactly 2")
        return self.paths

    def check_place(self, *inputs: Path | None) -> None:
        """Raise :class:`OutputError` now if results cannot be written later; ``inputs`` are read beside the images."""
        read = [path for path in inputs if path is not None]
        check_replaceable(self.out, force=self.force, inputs=[*self.paths, self.bundle, *read])

    def folder(self) -> AbstractContextManager[Path]:
        """The results' folder, which appears complete or not at all."""
        return atomic_folder(self.out, force=self.force)


def open_engine(bundle: str | Path, running: RunOptions) -> Engine:
    """Open a bundle; what runs is said where something was asked for or left to facetrt."""
    engine = Engine.open(bundle, **values_of(running))
    if (running.backend, running.device, running.precision) != (BackendName.AUTO, DeviceName.AUTO, Precision.AUTO):
        errors.print(f"running {engine.backend} in {engine.precision} on {engine.device}")
    return engine


def encode_pair(engine: Engine, paths: Sequence[Path], load_size: LoadSize) -> tuple[Features, Features]:
    """Features of two images, with a progress bar."""
    with progress_bar("encoding", len(paths)) as update:
        a, b = engine.encode(paths, load_size=load_size, progress=update)
    return a, b
