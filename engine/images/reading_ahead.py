"""Reading ahead: files are decoded and resized by a thread while the encoder works on the images before them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, Protocol, TypeVar

from facetrt.engine.images.loading import ImageLike
from facetrt.kernels.errors import FacetrtError

READ_AHEAD = 32  # files asked for ahead of the encoder
READ_AHEAD_BYTES = 64 << 20  # decoded pixels waiting for it; the file that exceeds this is the last one


class Decoded(Protocol):
    """What loading an image gives."""

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels held."""
        ...


Loaded = TypeVar("Loaded", bound=Decoded)
Load = Callable[[int, ImageLike], Loaded]


@dataclass(frozen=True)
class Item(Generic[Loaded]):
    """One image of a stream: ``loaded``, or the error why it could not be."""

    number: int
    image: ImageLike
    loaded: Loaded | FacetrtError

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels held."""
        return 0 if isinstance(self.loaded, FacetrtError) else self.loaded.nbytes


def read_ahead(images: Iterable[tuple[int, ImageLike]], load: Load[Loaded]) -> Generator[Item[Loaded]]:
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


@dataclass(frozen=True, eq=False)
class _Pending(Generic[Loaded]):
    """An image of the stream that was not handed out; ``result`` is there once it is loaded."""

    number: int
    image: ImageLike
    result: Future[Item[Loaded]] = field(default_factory=Future)

    @property
    def is_file(self) -> bool:
        return isinstance(self.image, (str, os.PathLike))


class _Reader(Generic[Loaded]):
    """One thread decodes: its queue needs no order of its own, and more would take processors from the encoder.

    The thread never waits, or a script that ends with an unfinished iterator would wait for it: without room it stops
    reading, and ``next`` lets it go on.
    """

    def __init__(self, images: Iterator[tuple[int, ImageLike]], load: Load[Loaded]) -> None:
        self._images, self._load = images, load
        self._waiting: deque[_Pending[Loaded]] = deque()
        self._files: deque[_Pending[Loaded]] = deque()  # those that the thread has not begun
        self._ended: Exception | None = None  # what ended ``images``
        self._lock = Lock()  # of the next two
        self._held = 0  # bytes read from files and not handed out
        self._reading = False
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "facetrt-reader")  # starts with the first file

    def next(self) -> Item[Loaded] | None:
        """The next image, or None after the last."""
        self._fill()
        if self._waiting:
            first = self._waiting.popleft()
            item = first.result.result()
            if first.is_file:
                self._hold(-item.nbytes)
                self._go_on()
            return item
        if self._ended is not None and not isinstance(self._ended, StopIteration):
            raise self._ended
        return None

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        while self._ended is None and len(self._waiting) < READ_AHEAD:
            if self._waiting and not self._waiting[-1].is_file:
                return  # an array: there is nothing to overlap
            try:
                pending = _Pending[Loaded](*next(self._images))
            except Exception as error:  # noqa: BLE001  (raised again by ``next``, in its turn)
                self._ended = error
                return
            self._waiting.append(pending)
            if pending.is_file:
                self._files.append(pending)
                self._go_on()
            else:
                self._read(pending)

    def _go_on(self) -> None:
        """Let the thread read files, unless it does or has no room."""
        with self._lock:
            if self._reading or not self._may_read():
                return
            self._reading = True
        self._thread.submit(self._read_files)

    def _read_files(self) -> None:
        while True:
            with self._lock:
                self._reading = self._may_read()
                if not self._reading:
                    return
                pending = self._files.popleft()
            self._read(pending)

    def _may_read(self) -> bool:
        return bool(self._files) and self._held < READ_AHEAD_BYTES and not self._closed

    def _read(self, pending: _Pending[Loaded]) -> None:
        """Load one image; whatever that raises is kept for its turn."""
        number, image = pending.number, pending.image
        try:
            item = Item[Loaded](number, image, self._load(number, image))
        except FacetrtError as error:
            item = Item(number, image, error)
        except Exception as error:  # noqa: BLE001  (raised again by ``next``, in its turn)
            pending.result.set_exception(error)
            return
        if pending.is_file:
            self._hold(item.nbytes)
        pending.result.set_result(item)

    def _hold(self, nbytes: int) -> None:
        with self._lock:
            self._held += nbytes
