"""Writing videos that can always be played, whatever ends them."""

from __future__ import annotations

import math
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from facetrt.engine.files import finishing, temporary_sibling
from facetrt.engine.images.loading import Pixels
from facetrt.engine.video.decoded import BT601, BT709, is_hd
from facetrt.engine.video.pyav import import_av, open_file
from facetrt.engine.video.sound import Sound, SoundCopier
from facetrt.kernels.errors import InputError, MissingDependencyError, OutputError, reason

H264 = ("libx264", "libopenh264")  # encoders of FFmpeg, in this order
QUALITY = {"libx264": {"crf": "20", "preset": "veryfast"}, "libopenh264": {}}
VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi")
CLOCK = 90_000  # ticks per second of the time stamps
DEFAULT_FPS = 25.0
FULL_RANGE, VIDEO_RANGE = 2, 1  # FFmpeg's numbers: of RGB, and of what players expect of YUV


@dataclass(frozen=True)
class Colours:
    """How RGB became YUV, in FFmpeg's numbers."""

    matrix: int
    primaries: int
    transfer: int

    def tag(self, encoder: Any) -> None:
        """Say it to PyAV's encoder."""
        encoder.colorspace, encoder.color_range = self.matrix, VIDEO_RANGE
        encoder.color_primaries, encoder.color_trc = self.primaries, self.transfer


HD_COLOURS = Colours(matrix=BT709, primaries=1, transfer=1)
SD_COLOURS = Colours(matrix=BT601, primaries=1, transfer=1)  # pixels of unknown cameras: sRGB's primaries, as in HD


class VideoWriter:
    """A video file in the making; use it in a ``with`` block.

    It is written beside ``path`` and takes its place when the block ends. A block that ends by an exception, Ctrl-C
    included, after at least one frame leaves what was written, playable, with a warning that says so; without a frame
    nothing is left.

    H.264, which wants even sizes: a last odd row or column is repeated. It is tagged with its colours: BT.709 for HD,
    BT.601 below, as players expect.

    Args:
        path: ends in ``.mp4``, ``.mkv`` or ``.avi``; a file that is there is replaced.
        fps: frames per second.
        size: ``(height, width)`` of the frames.
        sound: to copy beside the frames, whose time stamps are on its clock; only where :attr:`keeps_time`.

    Attributes:
        codec: of the video.
        library: that writes it.
        keeps_time: whether the time stamps of frames are kept; otherwise, in AVI, the video runs at ``fps`` throughout.
        frames: written so far.
        kept: whether the file is in its place.

    Raises:
        InputError: another ending, ``fps`` or size that cannot be.
        MissingDependencyError: PyAV is not installed, or has no encoder.
        OutputError: the place cannot be written, or the disk is full.
    """

    codec: ClassVar[str] = "h264"
    library: ClassVar[str] = "pyav"

    def __init__(
        self, path: str | os.PathLike[str], fps: float, size: tuple[int, int], *, sound: Sound | None = None
    ) -> None:
        self.path, self.size = Path(path), size
        check_suffix(self.path)
        if not (math.isfinite(fps) and 0 < fps <= 1000):
            raise InputError(f"fps={fps}: expected more than 0 and at most 1000 frames per second")
        if min(size) < 1:
            raise InputError(f"a video of {size[1]}×{size[0]} (width × height) pixels: expected at least one")
        self.fps, self.frames, self.kept = fps, 0, False
        self._encoder = find_encoder()
        self.keeps_time = self.path.suffix.lower() != ".avi"
        self._sound = sound
        self._file: _File | None = None
        self._stack = ExitStack()

    @property
    def even_size(self) -> tuple[int, int]:
        """``(height, width)`` of the video."""
        return self.size[0] + self.size[0] % 2, self.size[1] + self.size[1] % 2

    def __enter__(self) -> Self:
        folder = self._stack.enter_context(temporary_sibling(self.path.absolute()))
        self._temporary = folder / f"video{self.path.suffix.lower()}"
        try:
            self._file = self._make()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _make(self) -> _File:
        if self._sound is not None and not self.keeps_time:
            warnings.warn(f"{self.path.name} gets no sound: write .mp4 or .mkv", stacklevel=3)
        sound = self._sound if self.keeps_time else None
        return _File(self._temporary, self.fps, self.even_size, self._encoder, keeps_time=self.keeps_time, sound=sound)

    def write(self, pixels: Pixels, timestamp: float | None = None) -> None:
        """Append a frame, ``(H, W, 3)`` uint8 RGB.

        Args:
            timestamp: seconds on the source's clock, where :attr:`keeps_time`; a frame that is not later than the one
                before follows it at once. None: as ``fps`` says.

        Raises:
            InputError: another size or type; outside the ``with`` block.
            OutputError: it could not be written.
        """
        if self._file is None:
            raise InputError(f"{self.path} is not open: write inside the with block")
        expected = (*self.size, 3)
        if pixels.shape != expected or pixels.dtype != np.uint8:
            raise InputError(
                f"frame {self.frames} of {self.path} has shape {pixels.shape} and type {pixels.dtype}: expected "
                f"{expected} uint8, as all frames of a video have one size"
            )
        padding = ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0))
        even = np.ascontiguousarray(np.pad(pixels, padding, mode="edge") if any(map(any, padding)) else pixels)
        self._file.write(even, timestamp)
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        with self._stack:  # removes the temporary folder, whatever happens
            if file is not None:
                with finishing:
                    self._finish(file, error)

    def _finish(self, file: _File, error: BaseException | None) -> None:
        try:
            file.close()
            if not self.frames:
                return
            check_playable(self._temporary)
            self._temporary.replace(self.path)
            self.kept = True
        except OSError as failed:
            if error is not None:
                return  # the error that ended the block, a full disk perhaps, is the one to see
            raise OutputError(f"writing {self.path} failed: {reason(failed)}; nothing was kept") from failed
        if error is not None:
            warnings.warn(f"{self.path} ends early: {self.frames} frames, playable", stacklevel=3)


def check_suffix(path: Path) -> None:
    """Raise :class:`InputError` unless ``path`` ends as a video does."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(f"{path} does not end in {', '.join(VIDEO_SUFFIXES)}: expected a video file to write")


def check_playable(path: Path) -> None:
    """Raise :class:`OutputError` unless the file can be opened as a video and its first frame be read.

    Libraries do not report every failed write, but a file that lacks its end is found here.
    """
    av = import_av()
    try:
        with open_file(path) as container:
            next(container.decode(video=0))
    except (av.FFmpegError, StopIteration, IndexError, ValueError) as error:
        raise OutputError("what was written cannot be read back; is the disk full?") from error


def find_encoder() -> str:
    """Name of an H.264 encoder that PyAV has; raises :class:`MissingDependencyError` if there is none."""
    av = import_av()
    for name in H264:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name
    raise MissingDependencyError(
        f"this PyAV was built without an H.264 encoder ({' or '.join(H264)}): pip install --force-reinstall av"
    )


class _File:
    """An open video file of an even size; both methods raise :class:`OutputError` where writing fails."""

    def __init__(
        self, path: Path, fps: float, size: tuple[int, int], encoder: str, *, keeps_time: bool, sound: Sound | None
    ) -> None:
        av = import_av()
        self._av, self._path, self._fps, self._keeps_time = av, path, fps, keeps_time
        rate = Fraction(fps).limit_denominator(1001)
        self._last = -1
        self._origin: float | None = None
        try:
            self._container = av.open(str(path), "w")
        except av.FFmpegError as error:
            raise self._failed(error) from error
        options = QUALITY[encoder] | ({} if keeps_time else {"bf": "0"})
        self._stream = self._container.add_stream(encoder, rate=rate, options=options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        self._tick = Fraction(1, CLOCK) if keeps_time else 1 / rate
        self._stream.codec_context.time_base = self._tick
        self._colours = HD_COLOURS if is_hd(size[1], size[0]) else SD_COLOURS
        self._colours.tag(self._stream.codec_context)
        self._sound = self._open_sound(sound)

    def _open_sound(self, sound: Sound | None) -> SoundCopier | None:
        """None if there is none that can be read any more: the frames are what was asked for."""
        if sound is None:
            return None
        try:
            return SoundCopier(sound, self._container, self._path.suffix)
        except (self._av.FFmpegError, OSError) as error:
            warnings.warn(f"the sound of {sound.path} cannot be copied: {reason(error)}", stacklevel=5)
            return None

    def write(self, pixels: Pixels, timestamp: float | None) -> None:
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=self._colours.matrix,
            src_color_range=FULL_RANGE,
            dst_color_range=VIDEO_RANGE,
        )
        frame.colorspace, frame.color_range = self._colours.matrix, VIDEO_RANGE
        frame.pts, frame.time_base = self._next_time(timestamp), self._tick
        self._put(frame)
        self._copy_sound(frame.pts)

    def _next_time(self, timestamp: float | None) -> int:
        ticks = 0 if self._last < 0 else self._last + self._step
        if self._keeps_time and timestamp is not None:
            self._origin = timestamp if self._origin is None else self._origin
            ticks = max(round((timestamp - self._origin) / self._tick), self._last + 1)
        self._last = ticks
        return ticks

    @property
    def _step(self) -> int:
        return round(1 / (self._fps * self._tick))

    def _put(self, frame: Any) -> None:
        """None: what the encoder holds back."""
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except self._av.FFmpegError as error:
            raise self._failed(error) from error

    def _copy_sound(self, ticks: int) -> None:
        """Until ``ticks``. Only frames with time stamps say where in the sound they are."""
        if self._sound is None or self._origin is None:
            return
        try:
            self._sound.copy(self._origin, self._origin + float(ticks * self._tick))
        except self._av.FFmpegError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        try:
            if self._last >= 0:
                self._put(None)
                self._copy_sound(self._last + self._step)
        finally:
            if self._sound is not None:
                self._sound.close()
            try:
                self._container.close()
            except self._av.FFmpegError as error:
                raise self._failed(error) from error

    def _failed(self, error: Exception) -> OutputError:
        return OutputError(f"the video cannot be written: {reason(error)}")
