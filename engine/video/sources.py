"""Frames in: video files, folders of images, cameras, network streams and anything that can be iterated."""

from __future__ import annotations

import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import cv2
import numpy as np

from facetrt.engine.images.finding import IMAGE_SUFFIXES, find_images
from facetrt.engine.images.loading import Pixels, as_array, check_array, is_picture, load_image
from facetrt.engine.video.animation import Animation
from facetrt.engine.video.clock import JUMP, Clock
from facetrt.engine.video.decoded import rgb_pixels
from facetrt.engine.video.pyav import import_av, open_file
from facetrt.engine.video.sound import Sound, jump_of
from facetrt.kernels.errors import InputError, MissingFileError, SourceError, reason

LIVE_SCHEMES = ("rtsp://", "rtsps://")
NETWORK_OPTIONS = {"rtsp_flags": "prefer_tcp"}  # over UDP, frames arrive with holes in them
NETWORK_TIMEOUT = 10.0  # seconds to wait for a network stream, in opening it and for its next packet
MOST_LOST = 1000  # packets of a network stream in a row that give no frame, before that is taken for its end
PATIENCE = 1.0  # seconds that a camera may fail to give a frame before that is taken for its end
STILL_CODECS = ("bmp", "gif", "mjpeg", "png", "webp")  # of previews, where another stream has another codec
TEXT_SUFFIXES = frozenset({".ans", ".art", ".asc", ".diz", ".ice", ".nfo", ".txt", ".vt"})  # FFmpeg would draw them
EXPECTED = (
    "expected a video file, a folder of images, the number of a camera, an rtsp:// address, or an iterable of "
    "(height, width, 3) uint8 RGB arrays, image paths or frames"
)


@dataclass(frozen=True)
class Frame:
    """One picture of a source.

    Attributes:
        pixels: ``(H, W, 3)`` uint8 RGB, contiguous; nothing writes into it after it was handed out.
        index: number in the source, from 0; frames that were dropped or skipped are counted, so the first one that
            arrives need not be number 0.
        timestamp: seconds; of files since their beginning, of cameras since they were opened. It never decreases:
            where a file's time runs backwards or jumps, it goes on by one frame.

    Frames of files are turned and mirrored as the file says, and their pixels are square.
    """

    pixels: Pixels = field(repr=False)
    index: int
    timestamp: float

    def __post_init__(self) -> None:
        check_array(self.pixels, f"frame {self.index}")
        if self.index < 0 or not math.isfinite(self.timestamp):
            raise InputError(f"frame {self.index} at {self.timestamp} s: expected an index from 0 and a finite time")
        if not self.pixels.flags.c_contiguous:
            object.__setattr__(self, "pixels", np.ascontiguousarray(self.pixels))

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)``."""
        return self.pixels.shape[0], self.pixels.shape[1]


class Source(ABC):
    """Iterator of :class:`Frame`, once through; a context manager. Only one thread may use it, save for :meth:`stop`.

    Attributes:
        name: of the file, folder or camera, for messages.
        decoder: what reads it: ``pyav``, ``opencv``, ``pillow`` or ``given``.
        live: whether frames come at their own time, whether anyone takes them or not.
        fps: frames per second, on average, or None if that is not known.
        frame_count: frames in all as the file says, or None if that is not known.
        skipped: corrupt frames so far.
        sound: where it can be copied from, or None.
    """

    decoder: ClassVar[str]
    live: ClassVar[bool] = False
    sound: Sound | None = None

    def __init__(self, given: Any, name: str) -> None:
        self._given = given
        self.name = name
        self.fps: float | None = None
        self.frame_count: int | None = None
        self.skipped = 0
        self._iterator: Generator[Frame] | None = None
        self._closed = False

    def reopen(self) -> Source:
        """The same source from its beginning; this one is closed.

        Raises:
            InputError: an iterator, which can be read only once.
            MissingFileError, SourceError: it is not there any more.
        """
        self.close()
        return open_source(self._given)

    def stop(self) -> None:
        """Ask for the end of the iteration; unlike :meth:`close`, another thread than the one that iterates may."""
        self._closed = True

    def close(self) -> None:
        """Give file or camera back; closing twice is allowed, and iteration is over."""
        self.stop()
        if self._iterator is not None:
            self._iterator.close()
        self._release()

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        if self._closed:
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._frames()
        return next(self._iterator)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _frames(self) -> Generator[Frame]: ...

    @abstractmethod
    def _release(self) -> None:
        """Close what was opened in ``__init__``; may be called twice."""


def open_source(source: Any) -> Source:
    """Open whatever gives frames.

    Args:
        source: path of a video file or of an animated GIF, PNG, WebP or AVIF, folder of images in natural order, number
            of a camera, ``rtsp://`` address (unless a file has this name), or an iterable: of ``(H, W, 3)`` uint8 RGB
            arrays, DLPack objects, PIL images, image paths or :class:`Frame`. Arrays are copied, frames are not.

    Raises:
        MissingFileError: no such file or folder.
        InputError: a file that is no video, an empty one, a folder without images, or nothing of the above.
        SourceError: a camera or address that cannot be opened.
        MissingDependencyError: a video file or an address, and PyAV is not installed.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, (int, np.integer)) and not isinstance(source, bool):
        return CameraSource(int(source))
    if isinstance(source, str) and is_address(source):
        return NetworkSource(source)
    if isinstance(source, (str, os.PathLike)) and source != "":  # which Path takes for the current folder
        return _open_path(Path(source))
    if isinstance(source, Iterable) and not isinstance(source, (str, bytes, Frame)) and getattr(source, "ndim", 4) == 4:
        return IterableSource(source)
    raise InputError(f"{_kind(source)} was given: {EXPECTED}")


def is_address(source: str) -> bool:
    """Whether it names a place on a network: ``://`` is in it, and no file has this name."""
    return "://" in source and not os.path.exists(source)  # noqa: PTH110  (which takes names that are too long)


def _kind(source: Any) -> str:
    shape = getattr(source, "shape", None)
    return f"a {type(source).__name__}" if shape is None else f"a {type(source).__name__} of shape {tuple(shape)}"


def _open_path(path: Path) -> Source:
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise MissingFileError(f"{path} does not exist: {EXPECTED}")
    if not path.is_file():
        raise InputError(f"{path} is not a plain file: {EXPECTED}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes): expected a video")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _open_animation(path)
    if path.suffix.lower() in TEXT_SUFFIXES:
        raise InputError(f"{path} is not a video but text")
    return FileSource(path)


def _open_animation(path: Path) -> Source:
    source = AnimationSource(path)
    if source.frame_count == 1:
        source.close()
        raise InputError(f"{path} is one image: give the folder of images, or a list of paths")
    return source


class _PyavSource(Source):
    """What PyAV reads: packets that cannot be decoded are skipped and counted.

    Of several streams the film is read, not a cover or a thumbnail.
    """

    decoder = "pyav"

    def __init__(self, given: Any, name: str, container: Any) -> None:
        super().__init__(given, name)
        self._container = container
        film = film_of(container.streams.video)
        if film is None:
            pictures = len(container.streams.video)
            container.close()
            raise InputError(f"{name} has no video in it{' but a cover or what cannot be decoded' if pictures else ''}")
        self._stream = film
        self._aspect = film.sample_aspect_ratio

    def _frames(self) -> Generator[Frame]:
        index = 0
        for decoded in self._decoded():
            pixels = None
            if decoded is not None and not decoded.is_corrupt:
                pixels = rgb_pixels(decoded, self._aspect)
            if pixels is None:
                self.skipped += 1
            else:
                yield Frame(pixels, index, self._seconds(decoded, index))
            index += 1
        self._end(index)

    def _decoded(self) -> Iterator[Any]:
        """Frames, and None for each packet that is corrupt."""
        av, packets = import_av(), self._packets()
        while True:
            try:
                frames = next(packets).decode()
            except (StopIteration, av.EOFError):
                return
            except (av.FFmpegError, IndexError):  # IndexError: of a stream that began in mid-file
                yield None
                continue
            yield from frames

    def _packets(self) -> Iterator[Any]:
        packets: Iterator[Any] = self._container.demux(self._stream)
        return packets

    @abstractmethod
    def _seconds(self, decoded: Any, index: int) -> float:
        """Time of a frame."""

    @abstractmethod
    def _end(self, count: int) -> None:
        """Raise unless a source may end like this, after ``count`` frames, those that were skipped included."""

    def _release(self) -> None:
        self._container.close()


class FileSource(_PyavSource):
    """A video file."""

    def __init__(self, path: Path) -> None:
        av = import_av()
        try:
            container = open_file(path)
        except (av.FFmpegError, ValueError) as error:
            raise InputError(f"{path} is not a video that can be read ({reason(error)})") from error
        super().__init__(path, str(path), container)
        jump = jump_of(self._container)
        self.fps = _rate(self._stream.average_rate, self._stream.guessed_rate if jump != JUMP else None)
        self.frame_count = self._stream.frames or None
        base = self._stream.time_base
        self._start = float((self._stream.start_time or 0) * base) if base else 0.0
        self.sound = Sound(path, self._start) if self._container.streams.audio else None
        self._by_dts = (
            self._container.format.name == "avi"
        )  # which knows no other time: shown in another order, it lies
        self._origin = None if self._by_dts or self._stream.start_time is None else self._start
        self._clock = Clock(1 / self.fps if self.fps else 1.0, jump)

    def _seconds(self, decoded: Any, index: int) -> float:
        stamp = decoded.dts if self._by_dts else decoded.pts
        if stamp is None or decoded.time_base is None:
            return self._clock.at(index, None)
        base = Fraction(decoded.time_base)
        raw = float(stamp * base)
        if self._origin is None or (index == 0 and raw < self._origin):
            self._origin = raw - index * self._clock.step
        return self._clock.at(index, raw - self._origin, float((decoded.duration or 0) * base))

    def _end(self, count: int) -> None:
        _check_any(self, count)


class NetworkSource(_PyavSource):
    """An ``rtsp://`` address. It ends only by an error."""

    live = True

    def __init__(self, address: str) -> None:
        name = re.sub(r"//[^/]*@", "//", address)  # for messages: without the password
        if not address.startswith(LIVE_SCHEMES):
            raise InputError(f"{name}: expected an address that begins with {' or '.join(LIVE_SCHEMES)}")
        av = import_av()
        try:
            container = av.open(address, options=NETWORK_OPTIONS, timeout=NETWORK_TIMEOUT)
        except (av.FFmpegError, ValueError) as error:
            raise SourceError(
                f"{name} cannot be opened ({reason(error)}): expected a camera that can be reached and answers within "
                f"{NETWORK_TIMEOUT:g} s, and an address with the user name and password that it asks for"
            ) from None  # the library's error says the password
        super().__init__(address, name, container)
        self.fps = _rate(self._stream.average_rate, self._stream.guessed_rate)
        self._opened = time.monotonic()
        self._lost = 0

    def _packets(self) -> Iterator[Any]:
        """Until it was stopped, fails, or cannot be decoded for too long."""
        with suppress(import_av().FFmpegError):
            for packet in super()._packets():
                if self._closed or self._lost == MOST_LOST:
                    return
                self._lost += 1
                yield packet

    def _seconds(self, decoded: Any, index: int) -> float:
        """Seconds of our own clock: cameras differ in what theirs mean."""
        self._lost = 0
        return time.monotonic() - self._opened

    def _end(self, count: int) -> None:
        _check_stopped(self, self._closed, count)


def _rate(average: Fraction | None, guessed: Fraction | None) -> float | None:
    """Frames per second on average; where clocks begin again, an average far from FFmpeg's guess counts a jump."""
    if not average or (guessed and not 0.4 <= average / guessed <= 2.5):
        average = guessed
    return float(average) if average else None


def film_of(streams: Sequence[Any]) -> Any | None:
    """The stream that is a film; None if there are only covers and thumbnails.

    Of several: one of more than a single frame, that is no series of JPEGs beside a film (a camera's preview), that the
    file calls its default, with the most frames, of the largest size, and the first.
    """
    from av.stream import Disposition

    stills = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    films = [s for s in streams if s.codec_context is not None and not s.disposition & stills]

    def rank(stream: Any) -> tuple[bool, bool, bool, int, int, int]:
        context = stream.codec_context
        return (
            stream.frames != 1,
            context.name not in STILL_CODECS,
            bool(stream.disposition & Disposition.default),
            stream.frames,
            (context.width or 0) * (context.height or 0),
            -stream.index,
        )

    return max(films, key=rank, default=None)


class AnimationSource(Source):
    """An animated GIF, PNG, WebP or AVIF; a damaged picture ends it, as all that follow are drawn upon it."""

    decoder = "pillow"

    def __init__(self, path: Path) -> None:
        super().__init__(path, str(path))
        self._animation = Animation(path)
        durations = self._animation.durations()
        self.frame_count = self._animation.count
        self.fps = len(durations) / sum(durations) if durations else None

    def _frames(self) -> Generator[Frame]:
        seconds, index = 0.0, 0
        try:
            for picture in self._animation:
                yield Frame(picture.pixels, index, seconds)
                seconds, index = seconds + picture.duration, index + 1
        except InputError:
            self.skipped += self._animation.count - index
            index = self._animation.count
        _check_any(self, index)

    def _release(self) -> None:
        self._animation.close()


class CameraSource(Source):
    """A camera by its number, read by OpenCV. It ends only by an error; failures count once frames follow them."""

    decoder = "opencv"
    live = True

    def __init__(self, number: int) -> None:
        super().__init__(number, f"camera {number}")
        if number < 0:
            raise InputError(f"{self.name}: expected a number from 0")
        self._capture = cv2.VideoCapture(number)
        if not self._capture.isOpened():
            raise SourceError(
                f"{self.name} cannot be opened: expected one that is connected, may be read, and is used by no other "
                "program"
            )
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # where the driver knows it: less to be late by
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if fps > 0 else None
        self._opened = self._last = time.monotonic()

    def _frames(self) -> Generator[Frame]:
        index = failed = 0
        while (read := self._read()) or self._goes_on():
            if read is None:
                failed += 1
                continue
            index, self.skipped, failed = index + failed, self.skipped + failed, 0
            yield Frame(read[0], index, read[1])
            index += 1
        _check_stopped(self, self._closed, index)

    def _read(self) -> tuple[Pixels, float] | None:
        """The next frame and its time, or None if it cannot be read."""
        if not self._capture.grab():
            return None
        self._last = time.monotonic()
        fine, pixels = self._capture.retrieve()
        if not fine or pixels is None or not pixels.size:  # OpenCV calls some damaged frames fine
            return None
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8), self._last - self._opened

    def _goes_on(self) -> bool:
        """Whether frames may follow one that could not be read: what is lost on the way is not the end."""
        time.sleep(0.01)  # a camera that was unplugged fails at once, again and again
        return time.monotonic() - self._last < PATIENCE and not self._closed

    def _release(self) -> None:
        self._capture.release()


class FolderSource(Source):
    """The images of a folder in natural order (2 before 10); a frame's time is its index. Damaged ones are skipped."""

    decoder = "pillow"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, str(folder))
        self._paths = find_images([folder])
        self.frame_count = len(self._paths)

    def _frames(self) -> Generator[Frame]:
        for index, path in enumerate(self._paths):
            try:
                pixels = load_image(path).pixels
            except InputError:
                self.skipped += 1
                continue
            yield Frame(pixels, index, float(index))
        _check_any(self, len(self._paths))

    def _release(self) -> None:
        pass  # no file stays open between frames


class IterableSource(Source):
    """What an iterable gives; a frame's time is its index, unless it is a :class:`Frame` and says both."""

    decoder = "given"

    def __init__(self, items: Iterable[Any]) -> None:
        super().__init__(items, f"the given {type(items).__name__}")
        self._iterable = items
        self.frame_count = len(items) if isinstance(items, Sized) else None

    def reopen(self) -> Source:
        if iter(self._iterable) is self._iterable:
            self.close()
            raise InputError(f"{self.name} can be read only once: give a list, or open a new stream")
        return super().reopen()

    def _frames(self) -> Generator[Frame]:
        index = 0
        for item in self._iterable:
            frame = as_frame(item, index)
            yield frame
            index = frame.index + 1

    def _release(self) -> None:
        pass  # the iterable is the caller's


def as_frame(item: Any, index: int, timestamp: float | None = None) -> Frame:
    """One picture that a program hands over, as a frame that shares no memory with it; frames pass as they are.

    Args:
        item: ``(H, W, 3)`` uint8 RGB array, DLPack object (also on a GPU, if it can copy itself to the processor as
            those of PyTorch and CuPy do), PIL image, path, bytes or file object of an image, or frame.
        index: its number.
        timestamp: seconds; the index if None.

    Raises:
        InputError, MissingFileError: none of these, another shape or type, or an image that cannot be read.
    """
    if isinstance(item, Frame):
        return item
    name = f"frame {index}"
    if is_picture(item):
        pixels = load_image(item, name=name).pixels
    else:
        given = as_array(item, name)
        check_array(given, name)
        pixels = np.array(given, order="C")  # whoever gave it may use its memory again
    return Frame(pixels, index, float(index) if timestamp is None else float(timestamp))


def _check_stopped(source: Source, stopped: bool, count: int) -> None:
    """Called at the end of what is live, after ``count`` frames."""
    if not stopped:
        raise SourceError(f"{source.name} gives no frames any more, after {count}: was it unplugged or switched off?")


def _check_any(source: Source, count: int) -> None:
    """Called at the end, after ``count`` frames, those that were skipped included."""
    if source.skipped == count:
        raise InputError(f"{source.name} holds no frame that can be decoded")
