"""Encoding a collection into a store, so that an interrupted run continues where it stopped.

Each image is written beside the store, synchronised with the disk and renamed into it: what is there is whole. A thread
writes while the encoder works on the next image.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from facetrt.engine.encoding.encoder import EncodeOptions, Encoder, OnBroken, Progress, Tally
from facetrt.engine.features.features import Features
from facetrt.engine.features.store import (
    FACET,
    IMAGES,
    METADATA,
    FeatureStore,
    StoreSettings,
    image_key,
    open_store,
    read_attributes,
    stored_numbers,
    synchronise,
    write_image,
    write_root,
)
from facetrt.engine.files import Content, atomic_folder, has_content, is_store, temporary_sibling, try_lock
from facetrt.engine.images.loading import ImageLike
from facetrt.kernels.errors import FacetrtError, InputError, OutputError

WRITES_AHEAD = 2  # encoded images that wait for the disk


def extract_features(
    encoder: Encoder,
    images: Iterable[ImageLike],
    path: Path,
    options: EncodeOptions,
    facets: list[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    on_broken: OnBroken | None = None,
) -> FeatureStore:
    """See ``Engine.extract``."""
    stride = options.stride or encoder.manifest.stride
    settings = StoreSettings(encoder.provenance, facets, options.load_size, options.saliency, stride, options.fit)
    with _opened(path, settings, force=force):
        return _extract(encoder, images, path, options, settings, progress, on_broken)


def _extract(
    encoder: Encoder,
    images: Iterable[ImageLike],
    path: Path,
    options: EncodeOptions,
    settings: StoreSettings,
    progress: Progress | None,
    on_broken: OnBroken | None,
) -> FeatureStore:
    """Into a store that is there and nobody else's."""
    tally, digests, skipped = Tally(images, progress), dict[int, str](), list[dict[str, str]]()

    def skip(image: ImageLike, error: FacetrtError) -> None:
        name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else type(image).__name__
        skipped.append({"image": name, "reason": str(error)})
        if on_broken is not None:
            on_broken(image, error)
        tally.add()

    tally.add(0)
    if isinstance(images, Sequence):
        _check_stored(path, images, tally)
    missing = _missing(images, path, digests, None if isinstance(images, Sequence) else tally)
    with StoreWriter(path, settings, tally) as writer:
        for number, features in encoder.encode_numbered(missing, options, on_broken=on_broken and skip):
            writer.add(number, features, digests.pop(number))
    return _finish(path, settings, tally.done, skipped)


class StoreWriter:
    """Adds images to a store in a thread of its own. Nothing is touched before the first :meth:`add`."""

    def __init__(self, path: Path, settings: StoreSettings, tally: Tally) -> None:
        self._path, self._settings, self._tally = path, settings, tally
        self._stack = ExitStack()
        self._folder: Path | None = None  # where images are written before they are renamed into the store
        self._thread = ThreadPoolExecutor(1, "facetrt-writer")
        self._waiting: deque[Future[None]] = deque()

    def add(self, number: int, features: Features, source_sha256: str) -> None:
        """Hand over an image, waiting while ``WRITES_AHEAD`` others wait for the disk.

        Raises:
            OutputError: an image handed over before cannot be written.
        """
        if self._folder is None:
            _replace_root(self._path, self._settings, complete=False, skipped=[])
            self._folder = self._stack.enter_context(temporary_sibling(self._path))
        while len(self._waiting) >= WRITES_AHEAD:
            self._settle()
        self._waiting.append(self._thread.submit(self._write, self._folder, number, features, source_sha256))

    def _settle(self) -> None:
        self._waiting.popleft().result()
        self._tally.add()

    def _write(self, folder: Path, number: int, features: Features, source_sha256: str) -> None:
        made, target = folder / image_key(number), self._path / IMAGES / image_key(number)
        try:
            write_image(made, features, self._settings, source_sha256)
            made.rename(target)
        except OSError as error:
            raise OutputError(
                f"{features.name} cannot be written to {self._path} ({error.strerror or error}); the "
                f"{len(stored_numbers(self._path))} images there are safe: {_remedy(error)}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            try:
                while self._waiting and error is None:
                    self._settle()
            finally:
                self._thread.shutdown()  # after an interruption too, what was encoded is written


@contextmanager
def _opened(path: Path, settings: StoreSettings, *, force: bool) -> Iterator[None]:
    """A store with these settings, new or to be continued, that no other run writes while the block lasts."""
    for facet in settings.facets:
        if not FACET.fullmatch(facet):
            raise InputError(f"facet {facet!r}: a store needs names of the form KIND@LAYER")
    with ExitStack() as held:
        if force and is_store(path):
            held.enter_context(sole_writer(path))  # nobody may write what is about to be replaced
        if force or is_empty_folder(path) or not path.exists():
            _create(path, settings, force=force)
        difference = open_store(path).settings.difference(settings)
        if difference is not None:
            raise OutputError(
                f"{path} was made with other settings: {difference}; use the same, choose another folder, or delete "
                "it (or facetrt extract --force) to start anew"
            )
        held.enter_context(sole_writer(path))
        yield


def _create(path: Path, settings: StoreSettings, *, force: bool) -> None:
    """A new store, unless another run makes one meanwhile."""
    if not force:
        with suppress(OSError):
            path.rmdir()  # an empty folder gives way
    try:
        with atomic_folder(path, force=force, content=Content.FEATURES) as folder:
            write_root(folder, settings, complete=False, skipped=[])
    except OutputError:
        if force or not is_store(path):
            raise


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """A store that no other run writes while the block lasts; the system gives it back however the process ends.

    Raises:
        OutputError: another run writes it.
    """
    place = path / IMAGES / METADATA  # is never replaced while the store is there
    try:
        try:
            descriptor = os.open(place, os.O_RDWR)  # network file systems lock only what can be written
        except OSError:
            descriptor = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path} is damaged: {place} cannot be read: {error.strerror or error}") from error
    try:
        if not try_lock(descriptor) or not _is_same(descriptor, place):
            raise OutputError(f"another run is writing {path}: wait until it is done, or choose another folder")
        yield
    finally:
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_empty_folder(path: Path) -> bool:
    """Whether a folder is there with nothing in it, what killed runs left apart."""
    try:
        return not has_content(path)
    except OSError:
        return False


def _check_stored(path: Path, images: Sequence[ImageLike], tally: Tally) -> None:
    """Before anything is written: all stored images are those of the list."""
    numbers = stored_numbers(path)
    _check_count(path, numbers, len(images))
    for number in numbers:
        _check_same(path, number, images[number], image_sha256(images[number]))
        tally.add()


def _check_count(path: Path, numbers: list[int], count: int) -> None:
    if numbers and numbers[-1] >= count:
        raise OutputError(
            f"{path} was made from more than the {count} images given: give the same list, choose another folder, or "
            "delete it (or facetrt extract --force) to start anew"
        )


def _missing(
    images: Iterable[ImageLike], path: Path, digests: dict[int, str], tally: Tally | None
) -> Iterator[tuple[int, ImageLike]]:
    """The images that the store lacks, with their numbers; their hashes go to ``digests``.

    With a ``tally``, those it holds are checked and counted on the way.
    """
    stored = set(stored_numbers(path))
    for number, image in enumerate(images):
        if number not in stored:
            digests[number] = image_sha256(image)
            yield number, image
        elif tally is not None:
            _check_same(path, number, image, image_sha256(image))
            tally.add()


def _check_same(path: Path, number: int, image: ImageLike, digest: str) -> None:
    there = read_attributes(path / IMAGES / image_key(number))
    name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else there.get("name")
    for field, value, given in (("name", there.get("name"), name), ("content", there.get("source_sha256"), digest)):
        if value != given:
            raise OutputError(
                f"{path} was made from other images: the {field} of image {number} is {value!s:.200} there and "
                f"{given!s:.200} now; give the same list, choose another folder, or delete it (or facetrt extract "
                "--force) to start anew"
            )


def image_sha256(image: ImageLike) -> str:
    """The hash of a file's bytes or of pixels; empty for what cannot be read, which loading will say more clearly."""
    try:
        if isinstance(image, (str, os.PathLike)):
            with Path(image).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if isinstance(image, (np.ndarray, Image.Image)):
            pixels = np.ascontiguousarray(image)
            digest = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
            digest.update(pixels.tobytes())
            return digest.hexdigest()
    except (OSError, SyntaxError, ValueError):  # the last two from Pillow
        pass
    return ""


def _finish(path: Path, settings: StoreSettings, count: int, skipped: list[dict[str, str]]) -> FeatureStore:
    store = open_store(path)
    if not store:
        reason = f": {skipped[0]['reason']}" if skipped else ""
        raise InputError(f"none of the {count} images could be encoded{reason}")
    _check_count(path, store.numbers, count)
    if not store.complete or store.skipped != skipped:
        _replace_root(path, settings, complete=True, skipped=skipped)
    return open_store(path)


def _replace_root(path: Path, settings: StoreSettings, *, complete: bool, skipped: list[dict[str, str]]) -> None:
    """Change a store's attributes, all or nothing."""
    try:
        with temporary_sibling(path) as folder:
            write_root(folder / path.name, settings, complete=complete, skipped=skipped)
            synchronise(path / IMAGES)
            (folder / path.name / METADATA).replace(path / METADATA)
            synchronise(path)
    except OSError as error:
        if isinstance(error, FacetrtError):
            raise
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}); the images there are safe: {_remedy(error)}"
        ) from error


def _remedy(error: OSError) -> str:
    mend = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    return f"{mend}, then run the same again (without force) to continue"
