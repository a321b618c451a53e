"""What follows the encoder of a video on a GPU: heads whose features stay there, and the way over the host."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from facetrt.benchmarks.gpu.encoder import engine_name
from facetrt.benchmarks.gpu.workbench import GpuWorkbench
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Clock, Contestant, rows_of
from facetrt.benchmarks.video_suite import BARE, OBJECT, first_mask, moving_clip
from facetrt.engine.backends.run_options import Kernels
from facetrt.engine.engine import Engine
from facetrt.engine.video.tracking import Tracks

TRACK, MASK, BOTH, ON_HOST = "track", "mask", "track and mask", "track and mask on the host"
POINTS = 5  # a side of the grid of points


def section(backend: str) -> str:
    """The section of the rows for a backend."""
    return f"video heads, {engine_name(backend)}"


def measure(bench: GpuWorkbench) -> list[Row]:
    """Seconds per frame of streams with and without heads; the picture moves, so the truth is known."""
    return [row for backend, device in bench.target.engines for row in _heads(bench, backend, device)]


def _heads(bench: GpuWorkbench, backend: str, device: str) -> list[Row]:
    frames, side = moving_clip(bench.sizes.frames), bench.sizes.side
    y, x = (np.linspace(s.start, s.stop, POINTS + 2)[1:-1] for s in OBJECT)
    points, mask = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2), first_mask()
    stages: dict[str, dict[str, float]] = {}

    def engine() -> Engine:
        return bench.gpu_engine(backend, device)

    def attach(stream: Any, *heads: str) -> None:
        if TRACK in heads:
            stream.attach(TRACK, engine().tracker().following(points))
        if MASK in heads:
            stream.attach(MASK, engine().propagator(facet=_followed(engine())).following(mask))

    def contestant(name: str, *heads: str, host: bool = False) -> Contestant:
        def run(clock: Clock) -> Any:
            stays = engine().kernels == Kernels.DEVICE and not host
            make: Any = engine().stream_on_device if stays else engine().stream
            with make(frames, load_size=side) as stream:
                attach(stream, *heads)
                for result in stream:
                    last = result
                if stays:
                    engine().to_host(last.features)  # the wait
            clock.charge(clock.seconds / len(frames))
            report = stream.report
            ways = {"upload": report.upload, "encode": report.encode, "head": report.head, "download": report.download}
            stages[name] = {f"{stage}, ms": round(1e3 * seconds / len(frames), 2) for stage, seconds in ways.items()}
            return last.found

        return Contestant(name, run)

    contestants = [contestant(BARE), contestant(TRACK, TRACK), contestant(MASK, MASK), contestant(BOTH, TRACK, MASK)]
    contestants.append(contestant(ON_HOST, TRACK, MASK, host=True))
    timings = bench.compare(section(backend), contestants, share=0.05)
    expected = timings[ON_HOST].result
    return rows_of(
        section(backend),
        timings,
        [BARE, ON_HOST],
        quality=partial(_agreement, expected=expected),
        details=lambda name, found: stages.get(name, {}) | {"frames": len(frames)},
    )


def _followed(engine: Engine) -> str:
    """The facet that masks are followed by; that of matching where the bundle was exported without it."""
    manifest = engine.manifest
    chosen = manifest.default_facet("propagate")
    return chosen if chosen in manifest.facets else manifest.default_facet("match")


def _agreement(name: str, found: Any, *, expected: Any) -> dict[str, float]:
    """Shares that agree with what the host finds from features that came down."""
    if name == ON_HOST or not expected or not found:
        return {}
    agreement: dict[str, float] = {}
    if TRACK in found:
        agreement["equal points"] = _equal_points(found[TRACK], expected[TRACK])
    if MASK in found:
        agreement["equal labels"] = float((found[MASK] == expected[MASK]).mean())
    return agreement


def _equal_points(mine: Tracks, theirs: Tracks) -> float:
    near = np.linalg.norm(mine.points_xy - theirs.points_xy, axis=1) < 0.5
    return float((near & (mine.visible == theirs.visible)).mean())
