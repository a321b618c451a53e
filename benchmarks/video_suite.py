"""The video suite: what a stream adds to the encoder, how steady it stays, and how fast the tasks are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.cpu.child import run_job
from facetrt.benchmarks.cpu.suite import Opening, Report
from facetrt.benchmarks.one_bundle import OneBundle
from facetrt.benchmarks.results import Bar, Row, Spread
from facetrt.benchmarks.timing import Clock, Contestant, Timings, compare, rows_of
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.images.loading import Pixels
from facetrt.engine.learning import learn_cosegmentation
from facetrt.engine.samples import sample_images
from facetrt.engine.tasks.models import SegmentationModel
from facetrt.engine.video.tracking import Tracks
from facetrt.kernels.errors import FacetrtError, InputError

STREAM, LATENCY, WAITING = "stream", "latency", "frames that wait"
MEMORY, HEADS_MEMORY = "memory", "memory with all heads"
HEADS = ("track", "mask", "cosegment")
BARE, STREAMED = "encoder alone", "stream"
P50, P99 = "p50", "p99"
SLOW = "latest, slow consumer"
PACE = 2.0  # frames come so many encodings apart where latency is measured
SHIFT = 2  # pixels that the picture moves from frame to frame
SIZE = (240, 320)  # of the frames
OBJECT = (slice(80, 170), slice(130, 230))  # of the first frame, that is followed


@dataclass(frozen=True)
class VideoSizes:
    """How large everything is; the bars hold for the defaults.

    Attributes:
        side: shorter side, in pixels, where the stream is compared with the encoder and latency is measured.
        frames: of one such round.
        paced: frames whose latency is taken.
        bursts: how often a slow consumer finds only the newest of ``burst`` frames.
        sides: of the tasks.
        task_frames: of one round of a task.
        small: side of the frames of the long run, which has ``many``; memory counts after ``warm``.
        seconds: for the whole suite, roughly.
    """

    side: int = 112
    frames: int = 30
    paced: int = 150
    bursts: int = 5
    burst: int = 50
    sides: tuple[int, ...] = (112, 224)
    task_frames: int = 8
    small: int = 32
    warm: int = 1000
    many: int = 10_000
    seconds: float = 400


QUICK_VIDEO = VideoSizes(
    side=64, frames=6, paced=12, bursts=2, burst=8, sides=(64,), task_frames=4, warm=40, many=240, seconds=0
)


@dataclass
class VideoBench(OneBundle):
    """An engine and a clip with known motion; use as a context manager."""

    bundle: Path | str
    sizes: VideoSizes = field(default_factory=VideoSizes)
    rounds: int = 5
    report: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        manifest = Bundle.open(self.bundle).manifest
        if not manifest.dynamic or manifest.saliency_heads is None:
            raise InputError(
                f"{self.bundle}: the benchmarks need a bundle of any image size, with saliency: export one without "
                "--size and --no-saliency"
            )

    @cached_property
    def clip(self) -> list[Pixels]:
        """A photograph that moves to the left, as decoded frames."""
        return moving_clip(max(self.sizes.frames, self.sizes.task_frames))

    def compare(self, title: str, contestants: Sequence[Contestant], *, share: float, rounds: int) -> Timings:
        """:func:`facetrt.benchmarks.timing.compare` within a share of the suite's time."""
        return compare(
            contestants,
            rounds=min(rounds, self.rounds),
            budget=self.sizes.seconds * share,
            report=lambda text: self.report(f"{title}: {text}"),
        )


def moving_clip(count: int) -> list[Pixels]:
    """A photograph that moves to the left by :data:`SHIFT` pixels a frame, of :data:`SIZE`."""
    wide = np.asarray(sample_images()["chelsea"].resize((SIZE[1] + SHIFT * count, SIZE[0])), np.uint8)
    return [np.ascontiguousarray(wide[:, SHIFT * i : SHIFT * i + SIZE[1]]) for i in range(count)]


def first_mask() -> NDArray[np.bool_]:
    """What is followed in :func:`moving_clip`."""
    mask = np.zeros(SIZE, np.bool_)
    mask[OBJECT] = True
    return mask


def run_video(bench: VideoBench) -> Report:
    """Measure all sections; a row that this machine cannot run says why."""
    opening = Opening()
    rows = [*measure_overhead(bench), *measure_latency(bench), *measure_waiting(bench)]
    rows += [*measure_memory(bench, MEMORY), *measure_memory(bench, HEADS_MEMORY)]
    for side in bench.sizes.sides:
        rows += measure_tasks(bench, side)
    return opening.close("video", bench, rows, bars(bench.sizes), comparable=bench.sizes == VideoSizes(), notes=[NOTE])


NOTE = "Latency and overhead mean something on an idle machine only; the load average is in results.json."


def bars(sizes: VideoSizes) -> list[Bar]:
    """What is wanted of a stream, on any machine that is idle."""
    return [
        Bar("time per frame, stream vs the encoder alone", STREAM, BARE, STREAMED, 1.05, at_most=True),
        Bar("latency, p99 vs p50, idle machine", LATENCY, P50, P99, 1.5, at_most=True),
        Bar("frames that wait under 'latest'", WAITING, SLOW, None, 1, at_most=True, unit="frames"),
        *(
            Bar(
                f"{section}, {sizes.many:,} frames vs {sizes.warm:,}",
                section,
                frames_name(sizes.warm),
                frames_name(sizes.many),
                1.01,
                at_most=True,
            )
            for section in (MEMORY, HEADS_MEMORY)
        ),
        *(
            Bar(
                f"time per frame, {head} vs the encoder alone",
                tasks_name(max(sizes.sides)),
                BARE,
                head,
                1.1,
                at_most=True,
            )
            for head in HEADS
        ),
    ]


def measure_overhead(bench: VideoBench) -> list[Row]:
    """Seconds per frame of a stream and of the encoder in a plain loop, in turn on the same decoded frames."""
    engine, frames, side = bench.engine, bench.clip[: bench.sizes.frames], bench.sizes.side

    def bare(clock: Clock) -> Features:
        for pixels in frames:
            last = engine.encode([pixels], load_size=side)[0]
        clock.charge(clock.seconds / len(frames))
        return last

    def streamed(clock: Clock) -> Features:
        with engine.stream(frames, load_size=side) as stream:
            for result in stream:
                last = result.features
        clock.charge(clock.seconds / len(frames))
        return last

    timings = bench.compare(STREAM, [Contestant(BARE, bare), Contestant(STREAMED, streamed)], share=0.2, rounds=9)
    return rows_of(
        STREAM,
        timings,
        [BARE, STREAMED],
        quality=lambda name, found: {} if name == BARE else {"equal features": _equal(found, timings[BARE].result)},
        details=lambda name, found: _rate(timings, name) | {"side": side},
    )


def _equal(found: Features, expected: Features) -> float:
    """Share of facets that are equal bit for bit."""
    return float(np.mean([np.array_equal(found[facet], expected[facet]) for facet in expected.facets]))


def _rate(timings: Timings, name: str) -> dict[str, Any]:
    spread = timings[name].spread
    return {} if spread is None else {"frames/s": round(1 / spread.median, 1)}


def measure_latency(bench: VideoBench) -> list[Row]:
    """Time from a frame's arrival to its features, where frames come slower than they are encoded."""
    engine, side, count = bench.engine, bench.sizes.side, bench.sizes.paced
    bench.report(LATENCY)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        engine.encode(bench.clip[:1], load_size=side)
        seconds.append(time.perf_counter() - start)
    interval = PACE * float(np.median(seconds[1:]))  # the first one warms up
    with engine.stream(_paced(bench.clip, count, interval), load_size=side, policy="latest") as stream:
        for result in stream:
            last = result
        found = stream.report
    ratio = Spread.of([found.latency_p99 / found.latency_p50])
    details = {"frames": found.frames, "dropped": found.dropped, "ms between frames": round(1e3 * interval, 1)}
    expected = engine.encode([last.frame.pixels], load_size=side)[0]
    return [
        Row(
            LATENCY,
            P50,
            Spread.of([found.latency_p50]),
            ratios={P99: ratio},
            quality={"equal features": _equal(last.features, expected)},
            details=details,
        ),
        Row(LATENCY, P99, Spread.of([found.latency_p99])),
        Row(LATENCY, "maximum", Spread.of([found.latency_max])),
    ]


def _paced(frames: Sequence[Pixels], count: int, interval: float) -> Iterator[Pixels]:
    start = time.perf_counter()
    for i in range(count):
        time.sleep(max(0, start + i * interval - time.perf_counter()))
        yield frames[i % len(frames)]


def measure_waiting(bench: VideoBench) -> list[Row]:
    """A consumer that comes back after a burst of frames finds the newest one, and nothing else waiting."""
    sizes, frames = bench.sizes, bench.clip
    bench.report(WAITING)
    waiting, newest = 0, []
    with bench.engine.stream(load_size=sizes.side, policy="latest") as stream:
        for burst in range(1, 1 + sizes.bursts):
            for i in range(sizes.burst):
                stream.put(frames[i % len(frames)])
            report = stream.report
            waiting = max(waiting, burst * sizes.burst - report.dropped - report.frames)
            newest.append(next(stream).frame.index == burst * sizes.burst - 1)
        stream.finish()
        left = sum(1 for _ in stream)
    details = {"frames put": sizes.bursts * sizes.burst, "dropped": stream.report.dropped, "left over": left}
    quality = {"results that are of the newest frame": float(np.mean(newest))}
    return [Row(WAITING, SLOW, Spread.of([float(waiting)]), "frames", quality=quality, details=details)]


def measure_memory(bench: VideoBench, section: str) -> list[Row]:
    """Resident memory of a process that runs one stream for many small frames: after warming up, and at the end."""
    sizes, heads = bench.sizes, section == HEADS_MEMORY
    names = [frames_name(sizes.warm), frames_name(sizes.many)]
    bench.report(f"{section}: {sizes.many:,} frames")
    small = {"side": sizes.small, "warm": sizes.warm, "frames": sizes.many}
    try:
        found = run_job("stream", bundle=bench.bundle, **small, heads=heads)
    except FacetrtError as error:
        return [Row(section, name, None, "MiB", reason=str(error)) for name in names]
    warm, end = found["warm_mib"], found["end_mib"]
    details = {"side": sizes.small, "frames": found["frames"], "seconds": round(found["seconds"], 1)}
    return [
        Row(section, names[0], Spread.of([warm]), "MiB", ratios={names[1]: Spread.of([end / warm])}, details=details),
        Row(section, names[1], Spread.of([end]), "MiB", details={"growth, %": round(100 * (end / warm - 1), 3)}),
    ]


def frames_name(count: int) -> str:
    """How the rows call the memory after so many frames."""
    return f"after {count:,} frames"


def tasks_name(side: int) -> str:
    """How the rows call the tasks at a load size."""
    return f"tasks, {side} px"


def measure_tasks(bench: VideoBench, side: int) -> list[Row]:
    """Seconds per frame of a stream with what a task does to each frame; the picture moves, so the truth is known."""
    engine, frames = bench.engine, bench.clip[: bench.sizes.task_frames]
    section = tasks_name(side)
    points = _grid(engine, frames[0], side)
    model = _model(engine, frames, side)
    mask = first_mask()

    def timed(make: Callable[[], Callable[[Features], Any]]) -> Callable[[Clock], Any]:
        def run(clock: Clock) -> Any:
            head = make()
            with engine.stream(frames, load_size=side) as stream:
                for result in stream:
                    last = head(result.features)
            clock.charge(clock.seconds / len(frames))
            return last

        return run

    contestants = [Contestant(BARE, timed(lambda: lambda features: None))]
    contestants.append(Contestant("track", timed(lambda: engine.tracker().following(points))))
    contestants.append(Contestant("mask", timed(lambda: engine.propagator().following(mask))))
    if model is not None:
        contestants.append(Contestant("cosegment", timed(lambda: lambda features: engine.apply(model, features))))
    timings = bench.compare(section, contestants, share=0.25, rounds=3)
    moved = SHIFT * (len(frames) - 1)

    def quality(name: str, found: Any) -> dict[str, float]:
        if isinstance(found, Tracks):
            return _track_quality(found, points, moved, half_stride=bench.stride * SIZE[0] / side / 2)
        if name == "mask":
            return {"J": _overlap(found == 1, np.roll(mask, -moved, axis=1))}
        return {}

    return rows_of(
        section,
        timings,
        [BARE, *HEADS],
        quality=quality,
        details=lambda name, found: _rate(timings, name) | {"side": side, "frames": len(frames)},
    )


def _grid(engine: Engine, pixels: Pixels, side: int) -> NDArray[np.float64]:
    """Twenty points in the part of the first frame that stays in view."""
    features = engine.encode([pixels], load_size=side)[0]
    cells = np.arange(features.grid[0] * features.grid[1])
    points = features.geometry.points_xy(cells)
    inside = ((points > 0.25 * np.array(SIZE[::-1])) & (points < 0.75 * np.array(SIZE[::-1]))).all(axis=1)
    chosen = points[inside]
    return np.asarray(chosen[:: max(1, len(chosen) // 20)][:20])


def _model(engine: Engine, frames: Sequence[Pixels], side: int) -> SegmentationModel | None:
    """Learned from the clip; None where nothing in it is salient to this bundle."""
    features = engine.encode(frames[:4], load_size=side, saliency="low_resolution")
    try:
        return learn_cosegmentation(engine, features, sample_interval=10)
    except InputError:
        return None


def _track_quality(found: Tracks, points: NDArray[np.float64], moved: float, half_stride: float) -> dict[str, float]:
    """Shares of points that are visible, and of those that are where the picture took them."""
    off = np.linalg.norm(found.points_xy - (points - [moved, 0]), axis=1)[found.visible]
    near = float((off <= half_stride).mean()) if len(off) else 0.0
    return {"within half a stride": near, "visible": float(found.visible.mean())}


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))
