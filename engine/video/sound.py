"""The sound of a video, copied beside the frames that are written anew."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facetrt.engine.video.clock import JUMP, JUMP_OF_BROADCAST, Clock
from facetrt.engine.video.pyav import import_av, open_file
from facetrt.kernels.errors import reason

LENGTH = 0.02  # seconds of a packet that does not say it


@dataclass(frozen=True)
class Sound:
    """Where sound is: in the file at ``path``, whose clock shows ``origin`` seconds when the first frame is due."""

    path: Path
    origin: float


def jump_of(container: Any) -> float:
    """What :class:`Clock` takes for a fault in this container."""
    return JUMP_OF_BROADCAST if "mpegts" in container.format.name or container.format.name == "mpeg" else JUMP


class SoundCopier:
    """Copies packets of sound into an output container, up to a time that is given; use :meth:`close` at the end.

    Tracks whose codec the container cannot hold are left out, with a warning; so is the rest of a damaged one.

    Args:
        sound: where it is.
        output: PyAV's container, to which no packet was written.
        suffix: of the file that is written.
    """

    def __init__(self, sound: Sound, output: Any, suffix: str) -> None:
        self._sound, self._output = sound, output
        self._input = open_file(sound.path)
        self._jump = jump_of(self._input)
        self._tracks = self._add_tracks(suffix)
        self._clocks = {index: Clock(LENGTH, self._jump) for index in self._tracks}
        self._counts = dict.fromkeys(self._tracks, 0)
        self._packets = self._read()
        self._next: tuple[float, Any] | None = None

    def _add_tracks(self, suffix: str) -> dict[int, Any]:
        tracks = {}
        for stream in self._input.streams.audio:
            if can_hold(suffix, stream):
                tracks[stream.index] = self._output.add_stream_from_template(stream)
            else:
                name = getattr(stream.codec_context, "name", "an unknown codec")
                warnings.warn(
                    f"{self._sound.path.name}: {suffix} cannot hold its sound ({name}), which is left out", stacklevel=2
                )
        return tracks

    def _read(self) -> Iterator[tuple[float, Any]]:
        """Packets and their seconds since the first frame."""
        av = import_av()
        streams = [self._input.streams[index] for index in self._tracks]
        packets = self._input.demux(streams) if streams else iter(())
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.EOFError):
                return
            except av.FFmpegError as error:
                warnings.warn(f"the sound of {self._sound.path} ends early: {reason(error)}", stacklevel=2)
                return
            if packet.size and packet.pts is not None:
                yield self._seconds(packet), packet

    def _seconds(self, packet: Any) -> float:
        index, base = packet.stream.index, packet.time_base
        self._counts[index] += 1
        raw = float(packet.pts * base) - self._sound.origin
        return self._clocks[index].at(self._counts[index], raw, float((packet.duration or 0) * base))

    def copy(self, start: float, end: float) -> None:
        """Everything before ``end``, where ``start`` becomes 0; both in seconds since the first frame."""
        while (self._next or self._advance()) and self._next is not None and self._next[0] < end:
            (seconds, packet), self._next = self._next, None
            if seconds >= start:
                self._put(packet, seconds - start)

    def _advance(self) -> bool:
        self._next = next(self._packets, None)
        return self._next is not None

    def _put(self, packet: Any, seconds: float) -> None:
        track = self._tracks[packet.stream.index]
        packet.pts = packet.dts = round(seconds / packet.time_base)
        packet.stream = track
        self._output.mux(packet)

    def close(self) -> None:
        """Give the input back."""
        self._input.close()


def can_hold(suffix: str, stream: Any) -> bool:
    """Whether a container takes a stream as it is; found out by beginning a file in memory."""
    av = import_av()
    try:
        with av.open(io.BytesIO(), "w", format={".mp4": "mp4", ".mkv": "matroska"}[suffix]) as trial:
            trial.add_stream_from_template(stream)
            trial.start_encoding()
    except (av.FFmpegError, ValueError, KeyError, AttributeError):
        return False
    return True
