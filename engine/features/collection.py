"""Features of many images in bounded memory.

A collection keeps features as they are until they exceed a limit, and from then on writes them, uncompressed and exact,
to a temporary folder that is removed when it closes. What it spilled is read again at each use: on a CPU reading is a
thousand times cheaper than encoding again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar, overload

import numpy as np

from facetrt.engine.features.features import Features, ImageRecord
from facetrt.engine.files import scratch_folder
from facetrt.kernels.errors import InputError, OutputError

T = TypeVar("T")

MEMORY_LIMIT = 1 << 30  # bytes of features held in memory before a collection spills


class LazySequence(Sequence[T], Generic[T]):
    """``count`` items, each made by ``make(index)`` whenever it is asked for.

    ``cheap`` says that making is free, as for items that lie in memory. ``record(index)``, where features are made,
    gives what an item's image is without reading its descriptors.
    """

    cheap = False

    def __init__(
        self, count: int, make: Callable[[int], T], record: Callable[[int], ImageRecord] | None = None
    ) -> None:
        self._count, self._make, self.record = count, make, record

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            return LazySequence(len(chosen), lambda i: self._make(chosen[i]), _chosen(self.record, chosen))
        return self._make(range(len(self))[index])


class FeatureCollection(LazySequence[Features]):
    """A sequence of :class:`Features` that holds only ``facets`` of each, in memory or spilled.

    Use as a context manager, or call :meth:`close`: the temporary folder is removed then.
    """

    def __init__(self, facets: Iterable[str], *, memory_limit: int = MEMORY_LIMIT) -> None:
        super().__init__(0, self._load, lambda i: self._items[i])
        self.facets, self.memory_limit = list(facets), memory_limit
        self._items: list[ImageRecord] = []  # features, or records of what was spilled
        self._bytes = 0
        self._folder: Path | None = None
        self._spilled = ExitStack()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def cheap(self) -> bool:  # type: ignore[override]
        """Whether the features lie in memory."""
        return not self.spilled

    @property
    def spilled(self) -> bool:
        """Whether the features lie on disk."""
        return self._folder is not None

    def append(self, features: Features) -> None:
        """Add an image; past the memory limit everything moves to disk.

        Raises:
            InputError: a facet that the features lack.
            OutputError: the temporary folder cannot be written.
        """
        for facet in self.facets:
            features[facet]
        if self._items and features.provenance != self._items[0].provenance:
            raise InputError(
                f"the features of {features.name} come from another bundle or backend than the collection's"
            )
        kept = replace(features, tokens={facet: features.tokens[facet] for facet in self.facets})
        self._bytes += _size(kept)
        self._items.append(kept)
        if self.spilled:
            self._items[-1] = self._spill(len(self._items) - 1, kept)
        elif self._bytes > self.memory_limit:
            self._folder = self._spilled.enter_context(scratch_folder())
            self._items = [self._spill(i, self._load(i)) for i in range(len(self._items))]

    def _spill(self, index: int, item: Features) -> ImageRecord:
        arrays = {"pixels": item.pixels, **{f"tokens.{name}": rows for name, rows in item.tokens.items()}}
        if item.attention is not None:
            arrays["attention"] = item.attention
        try:
            np.savez(self._path(index), **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise OutputError(
                f"features do not fit into the temporary folder {self._folder} ({error.strerror or error}): point "
                "TMPDIR to a larger disk"
            ) from error
        return item.record

    def _load(self, index: int) -> Features:
        item = self._items[index]
        if isinstance(item, Features):
            return item
        if self._folder is None:
            raise InputError("this collection is closed: encode the images again")
        with np.load(self._path(index), allow_pickle=False) as arrays:
            tokens = {facet: arrays[f"tokens.{facet}"] for facet in self.facets}
            return Features.of(item, tokens, arrays.get("attention"), arrays["pixels"])

    def _path(self, index: int) -> Path:
        return Path(str(self._folder)) / f"{index:07}.npz"

    def close(self) -> None:
        """Remove what was spilled. Features that were read stay valid."""
        self._spilled.close()
        self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def records_of(features: Sequence[Features]) -> Sequence[ImageRecord]:
    """What each image is. Descriptors are not read for it."""
    record = features.record if isinstance(features, LazySequence) else None
    return features if record is None else [record(i) for i in range(len(features))]


def reasons_empty(features: Sequence[Features]) -> list[str | None]:
    """Why nothing can be found in each image; None if something can. Descriptors are not read for it."""
    return [item.why_empty for item in records_of(features)]


def map_features(features: Sequence[Features], function: Callable[[Features], T]) -> Sequence[T]:
    """``function`` of each: computed once for features in memory, at each use for lazy ones."""
    if isinstance(features, LazySequence) and not features.cheap:
        return LazySequence(len(features), lambda i: function(features[i]))
    return [function(item) for item in features]


def select(features: Sequence[Features], indices: Sequence[int]) -> Sequence[Features]:
    """Some of the features, without reading them."""
    if isinstance(features, LazySequence) and not features.cheap:
        return LazySequence(len(indices), lambda i: features[indices[i]], _chosen(features.record, indices))
    return [features[i] for i in indices]


def _chosen(record: Callable[[int], ImageRecord] | None, indices: Sequence[int]) -> Callable[[int], ImageRecord] | None:
    return None if record is None else lambda i: record(indices[i])


def join(first: Sequence[Features], second: Sequence[Features]) -> Sequence[Features]:
    """One sequence after the other, without reading them."""
    if not second:
        return first
    if not isinstance(first, LazySequence) or first.cheap:
        return [*first, *second]
    return LazySequence(len(first) + len(second), lambda i: first[i] if i < len(first) else second[i - len(first)])


def _size(features: Features) -> int:
    return features.pixels.nbytes + sum(rows.nbytes for rows in features.tokens.values())
