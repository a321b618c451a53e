"""Reading ahead: files are decoded and resized by a thread while the encoder works on the images before them."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition

from facetrt.engine.images import ImageLike, LoadedImage
from facetrt.kernels.errors import FacetrtError

READ_AHEAD = 32  # files asked for ahead of the encoder
READ_AHEAD_BYTES = 64 << 20  # decoded pixels waiting for it; the file that exceeds this is the last one

Load = Callable[[int, ImageLike], LoadedImage]


@dataclass(frozen=True)
class Item:
    """One image of a stream: ``loaded``, or the error why it could not be."""

    number: int
    image: ImageLike
    loaded: LoadedImage | FacetrtError

    @property
    def nbytes(self) -> int:
        """Of the pixels held."""
        if isinstance(self.loaded, FacetrtError):
            return 0
        return self.loaded.pixels.nbytes + (0 if self.loaded.half is None else self.loaded.half.nbytes)


def read_ahead(images: Iterable[tuple[int, ImageLike]], load: Load) -> Generator[Item]:
    """Every numbered image loaded, in order. What ``images`` raises comes after everything before it.

    ``images`` is advanced by the caller's thread. Arrays and PIL images are loaded there, before the next one is asked
    for: whoever yields them may use their memory again. Closing the iterator ends the thread.
    """
    reader = _Reader(iter(images), load)
    try:
        while (item := reader.next()) is not None:
            yield item
    finally:
        reader.close()


class _Reader:
    """One thread decodes: its queue needs no order of its own, and more would take processors from the encoder."""

    def __init__(self, images: Iterator[tuple[int, ImageLike]], load: Load) -> None:
        self._images, self._load = images, load
        self._waiting: deque[Item | Future[Item]] = deque()
        self._ended: Exception | None = None  # what ended ``images``
        self._room = _Room(READ_AHEAD_BYTES)
        self._thread = ThreadPoolExecutor(1, "facetrt-reader")  # starts with the first file

    def next(self) -> Item | None:
        """The next image, or None after the last."""
        self._fill()
        if self._waiting:
            first = self._waiting.popleft()
            item = first if isinstance(first, Item) else first.result()
            self._room.take(-item.nbytes)
            return item
        if self._ended is not None and not isinstance(self._ended, StopIteration):
            raise self._ended
        return None

    def close(self) -> None:
        self._room.open()
        self._thread.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        while self._ended is None and len(self._waiting) < READ_AHEAD:
            if self._waiting and isinstance(self._waiting[-1], Item):
                return  # an array: there is nothing to overlap
            try:
                number, image = next(self._images)
            except Exception as error:  # noqa: BLE001  (raised again by ``next``, in its turn)
                self._ended = error
                return
            if isinstance(image, (str, os.PathLike)):
                self._waiting.append(self._thread.submit(self._read, number, image))
            else:
                self._waiting.append(self._read(number, image, wait=False))

    def _read(self, number: int, image: ImageLike, *, wait: bool = True) -> Item:
        if wait:
            self._room.wait()
        try:
            item = Item(number, image, self._load(number, image))
        except FacetrtError as error:
            item = Item(number, image, error)
        self._room.take(item.nbytes)
        return item


class _Room:
    """Lets the reader wait while it holds ``limit`` bytes that nobody took."""

    def __init__(self, limit: float) -> None:
        self._limit, self._held, self._changed = limit, 0, Condition()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._held < self._limit)

    def take(self, nbytes: int) -> None:
        with self._changed:
            self._held += nbytes
            self._changed.notify_all()

    def open(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._limit = math.inf
            self._changed.notify_all()
