"""Where a video's frames are compared for points to be followed: in the processor's memory, or on a device.

Both do the same steps, which :class:`Frame` orders, with arrays of their own. Small arrays of positions and shapes go
in, all at once, and come out, all at once: on a device each way is a wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Features
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.video.alignment import Patches, Slopes, align
from facetrt.engine.video.blending import Blend
from facetrt.engine.video.descriptor_maps import DescriptorMap, Positions, Shapes
from facetrt.engine.video.searching import Cells, Window, find

Array = TypeVar("Array")


@dataclass(eq=False)
class View:
    """A frame, and where the points are in it.

    Attributes:
        map: as :class:`Comparer` makes it.
        positions: ``(N, 2)`` float64, in cells.
    """

    map: Any = field(repr=False)
    geometry: Geometry
    positions: Positions
    _patches: Any = field(default=None, init=False, repr=False)

    def patches(self, frame: Frame[Any]) -> Any:
        """The surroundings of all points; a keyframe's are compared with many frames."""
        if self._patches is None:
            self._patches = frame.patches(self.map, self.positions)
        return self._patches


@dataclass(frozen=True)
class Search:
    """Points that are looked for in a new frame.

    Attributes:
        index: ``(n,)`` which ones.
        reference: the frame that they are compared with.
        shapes: ``(n, 2, 2)`` from there to the frame before the new one.
        window: cells of the new frame that take part.
        previous: that frame, if they were visible there; the way back then leads to it, and otherwise to the reference.
    """

    index: Cells
    reference: View
    shapes: Shapes
    window: Window
    previous: View | None = None

    @property
    def target(self) -> View:
        """Where the way back leads to."""
        return self.reference if self.previous is None else self.previous

    @property
    def origin(self) -> Positions:
        """Where it should end, ``(n, 2)``."""
        return self.target.positions[self.index]


@dataclass(frozen=True)
class Points(Generic[Array]):
    """The arrays of a :class:`Search`, where the frames are.

    Attributes:
        rows: ``(n,)`` integers: which points.
        at: ``(n, 2)`` their positions in the reference.
        origin: ``(n, 2)`` where the way back should end.
        shapes: ``(n, 2, 2)`` and their ``inverse``.
        window: ``(n, 4)`` integers: first row and column, last row and column.
        whole: ``(n, 4)`` likewise: all cells of the frame that the way back leads to.
    """

    rows: Array
    at: Array
    origin: Array
    shapes: Array
    inverse: Array
    window: Array
    whole: Array


@dataclass(frozen=True)
class Trace(Generic[Array]):
    """Where points were found.

    Attributes:
        positions: ``(n, 2)``.
        shapes: ``(n, 2, 2)`` from the reference to the new frame.
        similarity: ``(n,)``, cosine of the aligned windows.
        back: ``(n, 2)`` where the way back ends.
    """

    positions: Array
    shapes: Array
    similarity: Array
    back: Array


class Frame(ABC, Generic[Array]):
    """A new frame, while points are looked for in it.

    Attributes:
        seen: its map.
        waits: whether the host waits for every search.
    """

    seen: Any
    waits: bool

    @property
    def grid(self) -> tuple[int, int]:
        """``(grid_h, grid_w)``."""
        found: tuple[int, int] = self.seen.grid
        return found

    @abstractmethod
    def search(self, searches: Sequence[Search]) -> list[Trace[NDArray[np.float64]]] | None:
        """What was found, of each search; None where the frame is the one before it again.

        Raises:
            InputError: the frame has NaN or infinite descriptors.
        """

    def trace(self, search: Search, points: Points[Array]) -> Trace[Array]:
        """The steps of one search."""
        near = search.previous is not None
        wanted = self.binned(search.reference.map, points.at, points.inverse)
        if search.previous is not None:
            wanted = self.binned(search.previous.map, points.origin, mixed_with=wanted)
        start = self.find(self.seen, wanted, points.window, points.origin if near else None)
        positions, shapes, similarity = self.align(search.reference, points.rows, start, points.shapes)
        found = self.binned(self.seen, positions, None if near else shapes)
        back = self.find(search.target.map, found, points.whole, points.origin)
        return Trace(positions, shapes, similarity, back)

    @abstractmethod
    def binned(
        self, seen: Any, positions: Array, shapes: Array | None = None, mixed_with: Array | None = None
    ) -> Array:
        """Unit binned descriptors ``(n, bins, C)``, or their means with another map's, which are written over."""

    @abstractmethod
    def find(self, seen: Any, binned: Array, window: Array, expected: Array | None) -> Array:
        """Where what is most like each of ``binned`` is, ``(n, 2)``; most likely near ``expected``."""

    @abstractmethod
    def align(self, view: View, rows: Array, start: Array, shapes: Array) -> tuple[Array, Array, Array]:
        """Positions, shapes and similarity of windows of ``view`` that are laid best on this frame."""

    @abstractmethod
    def patches(self, seen: Any, positions: Positions) -> Any:
        """Surroundings of points, for :meth:`align`."""


class Comparer(ABC):
    """What frames of one video are compared by: their facets, less the first frame's means."""

    @abstractmethod
    def begin(self, features: Any) -> Any:
        """The map of the first frame, to which everything is fitted.

        Raises:
            InputError: the facet was not exported, NaN or infinite descriptors.
        """

    @abstractmethod
    def frame(self, features: Any, before: Any | None) -> AbstractContextManager[Frame[Any]]:
        """The next frame; ``before`` is the map of the last one, if it is of the same size.

        Raises:
            InputError: the facet is not there, NaN or infinite descriptors.
        """

    @abstractmethod
    def on_host(self, features: Any) -> Features:
        """A frame's features in the processor's memory."""


def points_of(search: Search) -> Points[NDArray[Any]]:
    """The arrays of a search in the processor's memory."""
    whole = Window.whole(len(search.index), search.target.map.grid)
    return Points(
        rows=search.index,
        at=search.reference.positions[search.index],
        origin=search.origin,
        shapes=search.shapes,
        inverse=np.asarray(np.linalg.inv(search.shapes), np.float64),
        window=search.window.corners,
        whole=whole.corners,
    )


class HostFrame(Frame[NDArray[Any]]):
    """A frame in the processor's memory."""

    waits = False

    def __init__(self, seen: DescriptorMap, before: DescriptorMap | None) -> None:
        self.seen, self._before = seen, before

    def search(self, searches: Sequence[Search]) -> list[Trace[NDArray[np.float64]]] | None:
        if self._before is not None and self.seen.equals(self._before):
            return None
        return [self.trace(search, points_of(search)) for search in searches]

    @cached_property
    def _slopes(self) -> Slopes:
        return Slopes.of(self.seen)

    def binned(
        self,
        seen: DescriptorMap,
        positions: NDArray[Any],
        shapes: NDArray[Any] | None = None,
        mixed_with: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        found = seen.binned(positions, shapes)
        if mixed_with is None:
            return found
        found += mixed_with
        return found / np.float32(2)

    def find(
        self, seen: DescriptorMap, binned: NDArray[Any], window: NDArray[Any], expected: NDArray[Any] | None
    ) -> NDArray[Any]:
        return find(seen, binned, Window(window[:, :2], window[:, 2:]), expected)

    def align(
        self, view: View, rows: NDArray[Any], start: NDArray[Any], shapes: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        patches: Patches = view.patches(self)
        found = align(patches.only(rows), self._slopes, start, shapes)
        return found.positions, found.shapes, found.similarity

    def patches(self, seen: DescriptorMap, positions: Positions) -> Patches:
        return Patches.around(seen, positions)


class HostComparer(Comparer):
    """Compares frames in the processor's memory, as :class:`Features` have them."""

    def __init__(self, facet: str) -> None:
        self._facet = facet

    def begin(self, features: Features) -> DescriptorMap:
        self._blend = Blend.fit(self._facet, features)
        return DescriptorMap.of(self._blend.map(features))

    @contextmanager
    def frame(self, features: Features, before: DescriptorMap | None) -> Iterator[HostFrame]:
        yield HostFrame(DescriptorMap.of(self._blend.map(features)), before)

    def on_host(self, features: Features) -> Features:
        return features
