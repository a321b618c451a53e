"""Features of a collection on disk: a chunked Zarr store (version 3) that others open with ``zarr.open_group``.

    features.zarr/
      zarr.json            attributes: ``facetrt`` (what made it), ``complete``, ``skipped`` (images and why)
      images/0000012/      a group per image, numbered by its place in the list; attributes: name, SHA-256 of its
                           source, sizes (height, width), grid, patch, stride, and what made it
        key@9              (grid_h, grid_w, C) float32, and so for every facet
        key@9.cls          (C,) float32, its [CLS] row, of models that have one
        key@9.registers    (registers, C) float32, of models that have some
        attention          (grid_h, grid_w) float32, [CLS] attention, not normalised; absent without saliency
        pixels             (height, width, 3) uint8 RGB, the loaded image

A chunk holds whole rows of the grid, up to 16 MiB; an image of usual size is one chunk. Nothing is compressed:
Zstandard takes 8 % off descriptors, and reading then takes twice as long.
:mod:`facetrt.engine.encoding.extraction` writes it.

A store is not trusted: metadata, shapes and the sizes of files are checked before anything is allocated.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.collection import LazySequence
from facetrt.engine.features.features import Features, Float, ImageRecord, Provenance, SaliencyMode
from facetrt.engine.files import FEATURES, is_store
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import MAX_PIXELS, LoadSize
from facetrt.engine.machine import memory
from facetrt.kernels.errors import InputError, MissingDependencyError, MissingFileError, reading, reason
from facetrt.kernels.machine import usable_memory

FORMAT = 1
METADATA = "zarr.json"
IMAGES = "images"
CHUNK_BYTES = 16 << 20
MAX_METADATA_BYTES = 1 << 20
MAX_ROOT_BYTES = 64 << 20  # of the root's metadata, which lists the skipped images
MAX_CHANNELS, MAX_REGISTERS = 1 << 16, 256

FACET = re.compile(r"[a-z_]+@\d{1,3}")
NUMBER = re.compile(r"\d{7,12}")


def import_zarr() -> Any:
    """The zarr module, or an error that names the extras that bring it."""
    try:
        import zarr
    except ImportError as error:
        raise MissingDependencyError(
            "feature stores need zarr, which is not installed: pip install 'facetrt[cpu]' (or 'facetrt[gpu]')"
        ) from error
    return zarr


@dataclass(frozen=True)
class StoreSettings:
    """What made a store. Only the same adds images to it."""

    provenance: Provenance
    facets: list[str]
    load_size: LoadSize
    saliency: SaliencyMode
    stride: int
    fit: Fit = Fit.NONE

    def to_json(self) -> dict[str, Any]:
        """The ``facetrt`` attribute of a store."""
        size = list(self.load_size) if isinstance(self.load_size, tuple) else self.load_size
        rest = {"facets": self.facets, "load_size": size, "saliency": str(self.saliency), "stride": self.stride}
        fit = {} if self.fit is Fit.NONE else {"fit": str(self.fit)}  # older stores do not say it
        return {"format": FORMAT, **asdict(self.provenance), **rest, **fit}

    @staticmethod
    def from_json(data: Any, where: Path) -> StoreSettings:
        """Parse and check the ``facetrt`` attribute."""
        if not isinstance(data, Mapping):
            raise InputError(f"{where} is not a feature store of facetrt: write one with 'facetrt extract'")
        if data.get("format") != FORMAT:
            raise InputError(f"{where} has format {data.get('format')!r:.40}; this version reads format {FORMAT}")
        names = [field.name for field in fields(Provenance)]
        facets, size, stride = data.get("facets"), data.get("load_size"), data.get("stride")
        sides = size if isinstance(size, list) else [size] * 2
        valid = {
            **{name: isinstance(data.get(name), str) for name in names},
            "facets": isinstance(facets, list) and bool(facets) and all(map(_is_facet, facets)),
            "load_size": size is None or (len(sides) == 2 and all(map(_is_count, sides))),
            "saliency": data.get("saliency") in list(SaliencyMode),
            "stride": _is_count(stride),
            "fit": data.get("fit", "none") in list(Fit),
        }
        for name, fits in valid.items():
            if not fits:
                raise InputError(f"{where} is damaged: its {name} is {data.get(name)!r:.60}")
        load_size = (sides[0], sides[1]) if isinstance(size, list) else size
        provenance = Provenance(**{name: data[name] for name in names})
        saliency, fit = SaliencyMode(data["saliency"]), Fit(data.get("fit", "none"))
        return StoreSettings(provenance, facets, load_size, saliency, stride, fit)  # type: ignore[arg-type]

    def difference(self, other: StoreSettings) -> str | None:
        """The first field that differs, in words."""
        mine, theirs = self.to_json(), other.to_json()
        for name in {**mine, **theirs}:
            if theirs.get(name) != mine.get(name):
                return f"{name} is {mine.get(name)!s:.60} there and {theirs.get(name)!s:.60} now"
        return None


class FeatureStore(LazySequence[Features]):
    """The images of a store in order, each read when it is asked for. Open one with :meth:`open`.

    Attributes:
        path: the folder.
        settings: what made it.
        numbers: each image's place in the list that was given; images that were skipped are missing.
        complete: whether all images are done.
        skipped: ``image`` and ``reason`` of each that was left out.
    """

    def __init__(
        self, path: Path, settings: StoreSettings, numbers: list[int], complete: bool, skipped: list[dict[str, str]]
    ) -> None:
        super().__init__(len(numbers), lambda i: read_image(path, numbers[i], settings, settings.facets), self._record)
        self.path, self.settings, self.numbers = path, settings, numbers
        self.complete, self.skipped = complete, skipped

    @staticmethod
    def open(path: Path | str) -> FeatureStore:
        """Open a store written by ``facetrt extract`` or ``Engine.extract``; an unfinished one with a warning.

        Raises:
            MissingFileError: there is nothing.
            InputError: it is no feature store, or a damaged one.
            MissingDependencyError: zarr is not installed.
        """
        store = open_store(Path(path))
        if not store.complete:
            warnings.warn(
                f"{path} is unfinished: it holds {len(store)} images; run the same extraction again to continue",
                stacklevel=2,
            )
        return store

    @property
    def facets(self) -> list[str]:
        """Names of the facets of every image."""
        return self.settings.facets

    def only(self, facets: Sequence[str]) -> LazySequence[Features]:
        """The same images with some of the facets; the others are not read."""
        return LazySequence(
            len(self),
            lambda i: read_image(self.path, self.numbers[i], self.settings, facets),
            self._record,
        )

    def _record(self, index: int) -> ImageRecord:
        return read_image(self.path, self.numbers[index], self.settings, ()).record


def open_store(path: Path) -> FeatureStore:
    """Like :meth:`FeatureStore.open`, without a warning."""
    with reading(path, "a feature store of facetrt"):
        return _open_store(path)


def _open_store(path: Path) -> FeatureStore:
    if not path.exists():
        raise MissingFileError(f"{path} does not exist: expected a feature store written by 'facetrt extract'")
    attributes = read_attributes(path, MAX_ROOT_BYTES)
    settings = StoreSettings.from_json(attributes.get("facetrt"), path)
    skipped = attributes.get("skipped")
    listed = isinstance(skipped, list) and all(
        isinstance(item, dict) and isinstance(item.get("image"), str) and isinstance(item.get("reason"), str)
        for item in skipped
    )
    if not listed or not isinstance(attributes.get("complete"), bool):
        raise InputError(f"{path} is damaged: it does not say whether it is complete")
    return FeatureStore(path, settings, stored_numbers(path), attributes["complete"], skipped)  # type: ignore[arg-type]


def stored_numbers(path: Path) -> list[int]:
    """Numbers of the images that a store holds, ascending."""
    try:
        names = [entry.name for entry in os.scandir(path / IMAGES) if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise InputError(f"{path} is damaged: {IMAGES} cannot be read: {error.strerror or error}") from error
    return sorted(int(name) for name in names if NUMBER.fullmatch(name) and image_key(int(name)) == name)


def image_key(number: int) -> str:
    """Name of an image's group."""
    return f"{number:07}"


def read_attributes(folder: Path, limit: int = MAX_METADATA_BYTES) -> dict[str, Any]:
    """Attributes of a group whose metadata have at most ``limit`` bytes."""
    group = _open_group(folder, limit)
    with reading(folder, "a Zarr group"):
        return dict(group.attrs.asdict())


def read_image(path: Path, number: int, settings: StoreSettings, facets: Sequence[str]) -> Features:
    """One image of a store, with some of its facets.

    Raises:
        InputError: the store does not have them, or is damaged.
    """
    folder = path / IMAGES / image_key(number)
    with reading(folder, "an image of a feature store"):
        return _read_image(folder, settings, facets)


def _read_image(folder: Path, settings: StoreSettings, facets: Sequence[str]) -> Features:
    group = _open_group(folder)
    attributes = dict(group.attrs.asdict())
    name, geometry = attributes.get("name"), _geometry(attributes, settings.stride, folder)
    for key, value in asdict(settings.provenance).items():
        if attributes.get(key) != value:
            raise InputError(f"{folder} is foreign: its {key} is {attributes.get(key)!s:.60}, the store's is {value}")
    if not isinstance(name, str):
        raise InputError(f"{folder} is damaged: it has no name")
    read = _Reader(group, folder)
    grid = geometry.grid
    return Features(
        tokens={facet: _read_tokens(read, folder, facet, grid) for facet in facets},
        attention=read("attention", grid, np.float32) if (folder / "attention").exists() else None,
        saliency_mode=settings.saliency,
        geometry=geometry,
        pixels=read("pixels", (*geometry.image_size, 3), np.uint8),
        name=name,
        provenance=settings.provenance,
        load_size=settings.load_size,
    )


def write_image(folder: Path, features: Features, settings: StoreSettings, source_sha256: str) -> None:
    """A new group with one image, synchronised with the disk.

    Raises:
        OSError: it cannot be written.
    """
    zarr, geometry = import_zarr(), features.geometry
    attributes = {
        "name": features.name,
        "original_size": list(geometry.original_size),
        "image_size": list(geometry.image_size),
        **({} if geometry.resized is None else {"resized": list(geometry.resized)}),
        "grid": list(geometry.grid),
        "patch": geometry.patch,
        "stride": geometry.stride,
        "source_sha256": source_sha256,
        **asdict(features.provenance),
    }
    arrays: dict[str, NDArray[Any]] = {facet: features.map(facet) for facet in settings.facets}
    if features.prefix:
        arrays |= {f"{facet}.cls": features.cls(facet) for facet in settings.facets}
    if features.prefix > 1:
        arrays |= {f"{facet}.registers": features.registers(facet) for facet in settings.facets}
    arrays |= {"pixels": features.pixels}
    if features.attention is not None:
        arrays["attention"] = features.attention
    group = zarr.create_group(zarr.storage.LocalStore(folder), zarr_format=3, attributes=attributes)
    for name, values in arrays.items():
        _write_array(group, name, values)
    synchronise(folder, *folder.rglob("*"))


def write_root(folder: Path, settings: StoreSettings, *, complete: bool, skipped: Iterable[Mapping[str, str]]) -> None:
    """A new store's root group, without images."""
    zarr = import_zarr()
    attributes = {"facetrt": settings.to_json(), "complete": complete, "skipped": [dict(item) for item in skipped]}
    root = zarr.create_group(zarr.storage.LocalStore(folder), zarr_format=3, attributes=attributes)
    root.create_group(IMAGES)
    synchronise(folder, *folder.rglob("*"))


def synchronise(*paths: Path) -> None:
    """Have files and folders on the disk, so that a power loss cannot take them back."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_array(group: Any, name: str, values: NDArray[Any]) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=_chunks(values.shape, values.itemsize),
        compressors=None,
        filters=None,
        config={"write_empty_chunks": True},  # zeros too: on reading, a missing chunk is damage
    )
    array[...] = values


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Whole rows, as many as ``CHUNK_BYTES`` holds; at least one."""
    row = math.prod(shape[1:]) * itemsize
    return (min(shape[0], max(1, CHUNK_BYTES // row)), *shape[1:])


def _open_group(folder: Path, limit: int = MAX_METADATA_BYTES) -> Any:
    zarr = import_zarr()
    _check_metadata(folder, limit)
    with reading(folder, "a Zarr group"):
        return zarr.open_group(zarr.storage.LocalStore(folder, read_only=True), mode="r", zarr_format=3)


def _check_metadata(folder: Path, limit: int = MAX_METADATA_BYTES) -> None:
    path = folder / METADATA
    if not path.is_file():
        hint = f"; {folder / FEATURES} is one: give that" if is_store(folder / FEATURES) else ""
        raise InputError(f"{folder} is not a feature store of facetrt: it has no {METADATA}{hint}")
    size = path.stat().st_size
    if size > limit:
        raise InputError(f"{path} has {size:,} bytes: expected at most {limit:,}")


def _geometry(attributes: Mapping[str, Any], stride: int, folder: Path) -> Geometry:
    sizes = [attributes.get("original_size"), attributes.get("image_size")]
    resized = attributes.get("resized")
    sizes += [] if resized is None else [resized]
    for size in sizes:
        fits = isinstance(size, list) and len(size) == 2 and all(map(_is_count, size))
        if not fits or math.prod(size) > MAX_PIXELS:  # type: ignore[arg-type]
            raise InputError(f"{folder} is damaged: {size!r:.60} is no image size")
    patch = attributes.get("patch")
    if not _is_count(patch) or attributes.get("stride") != stride:
        raise InputError(f"{folder} is damaged: patch {patch!r:.60}, stride {attributes.get('stride')!r:.60}")
    original, loaded, *more = ((size[0], size[1]) for size in sizes)  # type: ignore[index]
    try:
        return Geometry(original, loaded, int(patch), stride, more[0] if more else None)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{folder} is damaged: {error}") from error


class _Reader:
    """Reads arrays of one image's group whose metadata and files are what :func:`write_image` writes."""

    def __init__(self, group: Any, folder: Path) -> None:
        self._group, self._folder = group, folder

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(name).shape)

    def __call__(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        array = self._open(name)
        chunks = _chunks(shape, np.dtype(dtype).itemsize)
        given = (array.shape, array.dtype, array.chunks, array.shards, array.filters, array.compressors)
        expected = (shape, np.dtype(dtype), chunks, None, (), ())
        if given != expected or array.serializer.to_dict()["name"] != "bytes":
            raise InputError(
                f"{self._folder / name} is damaged: it is {array.dtype} {array.shape} in chunks of {array.chunks}; "
                f"expected {np.dtype(dtype)} {shape} in chunks of {chunks}, not compressed"
            )
        nbytes = math.prod(chunks) * np.dtype(dtype).itemsize
        if not memory.fits(nbytes * math.ceil(shape[0] / chunks[0])):
            raise InputError(f"{self._folder / name} of shape {shape} does not fit into memory: {usable_memory()}")
        if array.nchunks_initialized != array.nchunks:  # the library takes a missing chunk for zeros
            raise self._damaged(name, f"{array.nchunks - array.nchunks_initialized} of its chunks are missing")
        try:
            values = np.asarray(array[...])
        except (OSError, ValueError, MemoryError) as error:
            raise self._damaged(name, reason(error)) from error
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise self._damaged(name, "it holds NaN or infinite values")
        return values

    def _open(self, name: str) -> Any:
        _check_metadata(self._folder / name)
        with reading(self._folder / name, "a Zarr array"):
            array = self._group[name]
            array.chunks  # noqa: B018  (a group has none)
            return array

    def _damaged(self, name: str, why: str) -> InputError:
        return InputError(
            f"{self._folder / name} is damaged: {why}; delete {self._folder} and run the extraction again"
        )


def _read_tokens(read: _Reader, folder: Path, facet: str, grid: tuple[int, int]) -> Float:
    """``(prefix + cells, C)``: [CLS] first, then registers, as far as there are any."""
    channels = read.shape(facet)[-1]
    if channels > MAX_CHANNELS:
        raise InputError(f"{facet} has {channels:,} channels: expected at most {MAX_CHANNELS:,}")
    rows = [read(facet, (*grid, channels), np.float32).reshape(-1, channels)]
    if (folder / f"{facet}.registers").exists():
        count = read.shape(f"{facet}.registers")[0]
        if count > MAX_REGISTERS:
            raise InputError(f"{facet} has {count:,} registers: expected at most {MAX_REGISTERS:,}")
        rows.insert(0, read(f"{facet}.registers", (count, channels), np.float32))
    if len(rows) > 1 or (folder / f"{facet}.cls").exists():
        rows.insert(0, read(f"{facet}.cls", (channels,), np.float32)[None])
    return np.concatenate(rows)


def _is_facet(value: Any) -> bool:
    return isinstance(value, str) and FACET.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_PIXELS
