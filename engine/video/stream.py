"""A stream of frames in, their features out, in order: decoding, encoding and the consumer's work overlap.

What waits is bounded. ``block`` loses nothing: a thread reads and resizes, one encodes, and each stops while the next
one has no room. ``latest`` is for live sources: at most one frame waits, a newer one takes its place, and it is encoded
when the consumer asks, so that no result is older than need be and nothing is encoded in vain.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import TracebackType
from typing import Annotated, Any, Generic, Self, TypeVar

import numpy as np

from facetrt.engine.encoding.frame_encoder import FrameEncoder
from facetrt.engine.settings import Setting, check
from facetrt.engine.video.sources import Frame, Source, as_frame, open_source
from facetrt.kernels.errors import InputError, SourceError

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")

FRAMES_AHEAD = 2  # that wait for the encoder under ``block``: one less and it waits for a frame that takes longer
RESULTS_AHEAD = 1  # that wait for the consumer under ``block``
STAGES = ("decode", "load", "encode", "head")
LATENCIES = 4096  # the last ones, of which percentiles are taken
JOIN_SECONDS = 2.0  # that closing waits for a thread which is held up outside, in a camera or a caller's iterator


class Policy(StrEnum):
    """What happens to frames that come faster than they are taken.

    ``block``: the source waits; nothing is lost. ``latest``: only the newest waits, older ones are dropped and counted.
    ``auto``: ``latest`` for cameras, network streams and frames that are put, ``block`` for all others.
    """

    AUTO = "auto"
    BLOCK = "block"
    LATEST = "latest"

    def resolve(self, *, live: bool) -> Policy:
        """Without ``auto``."""
        if self is not Policy.AUTO:
            return self
        return Policy.LATEST if live else Policy.BLOCK


PolicyChoice = Annotated[Policy, Setting("For frames that come too fast.")]


@dataclass(frozen=True)
class StreamResult(Generic[Encoded]):
    """One frame and its features.

    Attributes:
        frame: as it was decoded.
        features: as :meth:`Engine.encode` gives them for ``frame.pixels`` alone, bit for bit; or as
            :meth:`Engine.encode_on_device` does.
        dropped: frames dropped since the result before.
        latency: seconds from the frame's arrival (decoded, or put) to its features; if they stay on a device, until it
            was told to compute them.
        found: what each head of :meth:`Stream.attach` made of the features, by name.
    """

    frame: Frame
    features: Encoded
    dropped: int
    latency: float
    found: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class StreamReport:
    """What a stream did until now. Times are in seconds; latencies are 0 before the first result.

    Attributes:
        frames: results handed out.
        dropped: frames that newer ones replaced.
        skipped: frames that could not be decoded.
        late: results over the latency budget.
        seconds: from the start to the end, or until now.
        fps: results per second.
        latency_p50: percentiles are of the last 4096 results, the maximum is of all.
        decode: in all, for reading and decoding frames; ``load`` for resizing them, ``encode`` for encoding, and
            ``head`` for what is attached. They overlap, so that their sum exceeds ``seconds``; the largest one is what
            a stream waits for.
        upload: of these seconds, on a GPU, for the way there; ``download`` for waiting for it and the way back. They
            are those of the whole engine while the stream runs. Frames of :meth:`Engine.stream_on_device` are resized
            in ``encode``, which does not wait for the GPU.
    """

    frames: int
    dropped: int
    skipped: int
    late: int
    seconds: float
    fps: float
    latency_p50: float
    latency_p95: float
    latency_p99: float
    latency_max: float
    decode: float
    load: float
    encode: float
    head: float
    upload: float
    download: float


@dataclass(frozen=True)
class StreamOptions:
    """How frames are taken; ``Engine.stream`` documents the fields."""

    policy: PolicyChoice = Policy.AUTO
    latency_budget: Annotated[
        float | None, Setting("Seconds; frames over it are counted as late.", above=0, maximum=threading.TIMEOUT_MAX)
    ] = None
    stall_timeout: Annotated[
        float, Setting("Seconds without a frame after which it fails.", above=0, maximum=threading.TIMEOUT_MAX)
    ] = 10.0

    def __post_init__(self) -> None:
        check(self)


class Stream(Generic[Encoded]):
    """Iterator of :class:`StreamResult`, in order; a context manager. :meth:`Engine.stream` makes it.

    Without a source, frames are handed over by :meth:`put`, and :meth:`finish` ends them. One thread iterates; another
    one may put, close or ask for the report. Leaving the ``with`` block closes source and threads, whatever happened in
    it; so does an error while iterating. The engine stays open.
    """

    def __init__(self, encoder: FrameEncoder[Any, Encoded], source: Any, options: StreamOptions) -> None:
        self._encoder, self._options = encoder, options
        self._heads: dict[str, Callable[[Encoded], Any]] = {}
        self._run, self._close = self._begin(None if source is None else open_source(source))

    @property
    def source(self) -> Source | None:
        """What frames come from; None if they are put."""
        return self._run.source

    @property
    def policy(self) -> Policy:
        """``block`` or ``latest``."""
        return self._run.policy

    @property
    def report(self) -> StreamReport:
        """Counts and latencies until now."""
        return self._run.report()

    def attach(self, name: str, head: Callable[[Encoded], Any]) -> None:
        """Call ``head`` with each result's features, in the thread that iterates; :attr:`StreamResult.found` has more.

        Several heads share one encode, and work while the next frame is encoded: ``tracker.following(points)``,
        ``propagator.following(mask)``, ``lambda features: engine.apply(model, features)``. An error in one ends the
        stream. They stay attached in :meth:`restart`, and go on from where they were.

        Raises:
            InputError: there is a head of that name.
        """
        if name in self._heads:
            raise InputError(f"a head named {name!r} is attached already: choose another name")
        self._heads[name] = head

    def put(self, pixels: Any, timestamp: float | None = None) -> bool:
        """Hand over the next frame; its memory may be used again at once, unless it is a :class:`Frame`.

        Under ``block`` this waits for room, so another thread must be iterating.

        Args:
            pixels: ``(H, W, 3)`` uint8 RGB array, DLPack object, PIL image, path or frame.
            timestamp: seconds on any clock; since the stream began if None.

        Returns:
            Whether an older frame was dropped for it.

        Raises:
            InputError: the stream has a source or is over, or this is no frame.
            SourceError: ``block``, and nobody took a frame for ``stall_timeout`` seconds.
        """
        return self._run.put(pixels, timestamp)

    def finish(self) -> None:
        """No more frames will be put: iteration ends after those that wait."""
        self._run.finish()

    def close(self) -> None:
        """Stop: an iteration that waits in another thread ends, and what waits is thrown away."""
        self._close()
        self._run.close()  # in a second thread too, this waits until it is done

    def restart(self) -> None:
        """Begin anew with the same source and options, and an empty report.

        Raises:
            InputError: the source is an iterator, which can be read only once.
            MissingFileError, SourceError: it is not there any more, or still held up in giving a frame.
        """
        self.close()
        source = self._run.source
        if source is not None and self._run.held_up:
            raise SourceError(f"{source.name} is still held up in giving a frame: try again later, or open it anew")
        self._run, self._close = self._begin(None if source is None else source.reopen())

    def _begin(self, source: Source | None) -> tuple[_Run[Encoded], Callable[[], object]]:
        """Threads know the run alone, so that a stream that is forgotten ends them."""
        run = _Run(self._encoder, source, self._options)
        return run, weakref.finalize(self, run.close)

    def __iter__(self) -> Iterator[StreamResult[Encoded]]:
        return self

    def __next__(self) -> StreamResult[Encoded]:
        result = self._run.next()
        if result is None:
            raise StopIteration
        if not self._heads:
            return result
        try:
            with self._run.timed("head"):
                found = {name: head(result.features) for name, head in self._heads.items()}
        except BaseException:
            self.close()
            raise
        return replace(result, found=found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Ended(Exception):
    """Nothing comes any more."""


class _Channel(Generic[Item]):
    """Hands items from one thread to another; at most ``room`` wait.

    ``replace``: without room, what waits is dropped; otherwise whoever puts waits.
    """

    def __init__(self, room: int, *, replace: bool = False) -> None:
        self._room, self._replace = room, replace
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._over = False
        self._dropped = 0  # since an item was taken
        self.dropped = 0  # in all

    def put(self, item: Item, timeout: float | None = None) -> bool:
        """Returns whether an item was dropped for it.

        Raises:
            _Ended: nobody takes it any more.
            TimeoutError: there was no room for ``timeout`` seconds.
        """
        with self._changed:
            drops = self._replace and len(self._items) >= self._room
            if drops:
                self._items.popleft()
                self._dropped += 1
                self.dropped += 1
            elif not self._changed.wait_for(lambda: self._over or len(self._items) < self._room, timeout):
                raise TimeoutError
            if self._over:
                raise _Ended
            self._items.append(item)
            self._changed.notify_all()
        return drops

    def get(self, timeout: float | None = None) -> tuple[Item, int]:
        """The oldest item, and how many were dropped since the one before.

        Raises:
            _Ended: there is none any more. Instead, the error that ended them is raised, once.
            TimeoutError: none came for ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._over or self._items, timeout):
                raise TimeoutError
            if self._items:
                self._changed.notify_all()
                dropped, self._dropped = self._dropped, 0
                return self._items.popleft(), dropped
            error, self._error = self._error, None
            raise _Ended if error is None else error

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more is put; ``error`` is raised to the taker after what waits."""
        with self._changed:
            if not self._over:
                self._over, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more is put or taken; whoever waits ends."""
        with self._changed:
            self._over, self._error = True, None
            self._items.clear()
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """Whether nothing more is put."""
        return self._over


@dataclass(frozen=True)
class _Arrived:
    """A frame that waits to be encoded; ``loaded`` is what :meth:`FrameEncoder.load` made, if that was done already."""

    frame: Frame
    at: float  # of perf_counter
    loaded: Any = None


class _Statistics:
    """Counts and the last latencies, in memory that does not grow."""

    def __init__(self, budget: float | None) -> None:
        self._budget = float("inf") if budget is None else budget
        self._lock = threading.Lock()
        self._latencies = np.zeros(LATENCIES)
        self._maximum = 0.0
        self._began: float | None = None
        self._ended: float | None = None
        self._frames = self._late = 0
        self._stages = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time in the block counts as that stage's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._stages[stage] += time.perf_counter() - start

    def begin(self) -> None:
        """Time runs from here."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """Time stands still from here."""
        if self._ended is None:
            self._ended = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning to the end, or until now."""
        if self._began is None:
            return 0.0
        return (time.perf_counter() if self._ended is None else self._ended) - self._began

    def add(self, latency: float) -> None:
        """One more result."""
        with self._lock:
            self._latencies[self._frames % LATENCIES] = latency
            self._maximum = max(self._maximum, latency)
            self._frames += 1
            self._late += latency > self._budget

    def report(self, *, dropped: int, skipped: int, transfers: tuple[float, float] = (0.0, 0.0)) -> StreamReport:
        """The report as it stands."""
        with self._lock:
            known = self._latencies[: self._frames]
            p50, p95, p99 = np.percentile(known, (50, 95, 99)).tolist() if len(known) else (0.0, 0.0, 0.0)
            seconds = self.elapsed
            return StreamReport(
                frames=self._frames,
                dropped=dropped,
                skipped=skipped,
                late=self._late,
                seconds=seconds,
                fps=self._frames / seconds if seconds else 0.0,
                latency_p50=p50,
                latency_p95=p95,
                latency_p99=p99,
                latency_max=self._maximum,
                **self._stages,
                upload=transfers[0],
                download=transfers[1],
            )


class _Run(Generic[Encoded]):
    """One run of a stream from start to close. Nothing starts before the first result or frame is asked for or put."""

    def __init__(self, encoder: FrameEncoder[Any, Encoded], source: Source | None, options: StreamOptions) -> None:
        self.source = source
        self._encoder, self._options = encoder, options
        self._live = source is None or source.live
        self.policy = options.policy.resolve(live=self._live)
        latest = self.policy is Policy.LATEST
        self._frames = _Channel[_Arrived](1 if latest else FRAMES_AHEAD, replace=latest)
        self._results = _Channel[StreamResult[Encoded]](RESULTS_AHEAD)
        self._statistics = _Statistics(options.latency_budget)
        self._lock = threading.Lock()  # of starting and closing
        self._put_lock = threading.Lock()
        self._put = 0
        self._threads: list[threading.Thread] = []
        self._started = self._closed = False
        self._before = 0.0, 0.0  # transfers of the engine before the start
        self._ended: tuple[float, float] | None = None  # and since then, at the end

    def next(self) -> StreamResult[Encoded] | None:
        """The next result, or None after the last; errors close the run."""
        try:
            self._start()
            result = self._encode_next() if self.policy is Policy.LATEST else self._results.get()[0]
        except _Ended:
            self.close()
            return None
        except BaseException:
            self.close()
            raise
        self._statistics.add(result.latency)
        return result

    def put(self, pixels: Any, timestamp: float | None) -> bool:
        if self.source is not None:
            raise InputError(f"frames come from {self.source.name}: put them into a stream without a source")
        self._start()
        with self._put_lock:  # the number and the place in the queue agree
            if self._frames.over:
                raise InputError("this stream is finished or closed: no frame can be put any more")
            now = self._statistics.elapsed if timestamp is None else timestamp
            frame = as_frame(pixels, self._put, now)
            try:
                dropped = self._enter(frame, self._options.stall_timeout)
            except _Ended:
                raise InputError("this stream was closed while a frame waited to be put") from None
            except TimeoutError:
                raise SourceError(
                    f"no frame was taken for {self._options.stall_timeout:g} s and no more may wait: iterate in "
                    "another thread than the one that puts, or use policy 'latest'"
                ) from None
            self._put = frame.index + 1
        return dropped

    def finish(self) -> None:
        if self.source is not None:
            raise InputError(f"frames come from {self.source.name}, which ends by itself: use close()")
        self._frames.finish()

    def close(self) -> None:
        with self._lock:
            first, self._closed = not self._closed, True
        self._frames.close()
        self._results.close()
        if first:
            self._statistics.end()
            self._ended = self._transferred()
            self._close_source()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_SECONDS)

    def _close_source(self) -> None:
        """The thread that reads a source closes it, where there is one: decoders must not be closed under a call."""
        if self.source is not None and self._threads:
            self.source.stop()
        elif self.source is not None:
            self.source.close()

    @property
    def held_up(self) -> bool:
        """Whether a thread outlived :meth:`close`."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def timed(self) -> Callable[[str], AbstractContextManager[None]]:
        """See :meth:`_Statistics.timed`."""
        return self._statistics.timed

    def report(self) -> StreamReport:
        skipped = 0 if self.source is None else self.source.skipped
        return self._statistics.report(
            dropped=self._frames.dropped, skipped=skipped, transfers=self._ended or self._transferred()
        )

    def _transferred(self) -> tuple[float, float]:
        """Seconds of ways to the device and back since the start."""
        if not self._started:
            return 0.0, 0.0
        (up, down), (up_before, down_before) = self._encoder.transfers(), self._before
        return up - up_before, down - down_before

    def _start(self) -> None:
        if self._started:
            return
        self._encoder.activate()  # loading the encoder is no frame's latency
        with self._lock:
            if self._started or self._closed:
                return
            self._started, self._before = True, self._encoder.transfers()
            self._statistics.begin()
            if self.source is not None:
                self._thread("facetrt-frames", self._read, self._frames)
            if self.policy is Policy.BLOCK:
                self._thread("facetrt-encoder", self._encode, self._results)

    def _thread(self, name: str, work: Callable[[], None], output: _Channel[Any]) -> None:
        """Start ``work``; however it ends, its output channel is told.

        Threads are daemons: a program that ends with an open stream must not wait for a camera.
        """

        def target() -> None:
            try:
                work()
            except _Ended:
                output.finish()
            except BaseException as error:  # noqa: BLE001  (raised again by whoever takes from the channel)
                output.finish(error)
            else:
                output.finish()

        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self) -> None:
        """Frames of the source into their channel; the source is closed by the thread that uses it."""
        source = self.source
        if source is None:
            return
        with source:
            while True:
                with self.timed("decode"):
                    frame = next(source, None)
                if frame is None:
                    return
                self._enter(frame)

    def _enter(self, frame: Frame, timeout: float | None = None) -> bool:
        """A frame arrives. Under ``block`` it is resized now: this thread would only wait."""
        at = time.perf_counter()
        loaded = self._load(frame) if self.policy is Policy.BLOCK else None
        return self._frames.put(_Arrived(frame, at, loaded), timeout)

    def _encode(self) -> None:
        """Frames into results."""
        while True:
            self._results.put(self._encode_next())

    def _encode_next(self) -> StreamResult[Encoded]:
        try:
            arrived, dropped = self._frames.get(self._options.stall_timeout if self._live else None)
        except TimeoutError:
            raise SourceError(self._stalled()) from None
        loaded = self._load(arrived.frame) if arrived.loaded is None else arrived.loaded
        with self.timed("encode"):
            features = self._encoder.encode(loaded)
        return StreamResult(arrived.frame, features, dropped, time.perf_counter() - arrived.at)

    def _load(self, frame: Frame) -> Any:
        name = f"frame {frame.index}" if self.source is None else f"{self.source.name}, frame {frame.index}"
        with self.timed("load"):
            return self._encoder.load(frame.pixels, name)

    def _stalled(self) -> str:
        what = "put" if self.source is None else f"given by {self.source.name}"
        return f"no frame was {what} for {self._options.stall_timeout:g} s (stall_timeout)"
