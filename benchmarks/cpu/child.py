"""One job in a process of its own, so that its peak memory is its own: ``python -m facetrt.benchmarks.cpu.child JOB``.

``JOB`` is JSON, ``{"job": "match", …}``; the answer is JSON on standard output: ``peak_mib``, ``seconds``, and what the
job itself found.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.baselines.cuts import solve
from facetrt.benchmarks.cpu.scenes import scene_rows
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.tasks.pca import Pca, fit_pca
from facetrt.engine.video.heads import first_then
from facetrt.engine.video.stream import Stream
from facetrt.kernels import best_buddies, smallest_eigenvectors, threshold_graph
from facetrt.kernels.affinity import ThresholdGraph
from facetrt.kernels.errors import FacetrtError, InputError


def run_job(job: str, **arguments: Any) -> dict[str, Any]:
    """``peak_mib`` of the whole process, ``seconds`` of the job alone, and what the job itself found.

    Raises:
        FacetrtError: the job cannot run here; with the child's message.
    """
    command = [sys.executable, "-m", "facetrt.benchmarks.cpu.child", json.dumps({"job": job, **arguments}, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FacetrtError(_last_line(done.stderr) or f"the process ended with code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def _match(bundle: str, paths: list[str], side: int, precision: str) -> float:
    with Engine.open(bundle, precision=precision, allow_inexact=True) as engine:
        return _seconds(lambda: engine.match(paths[0], paths[1], load_size=(side, side)))


def _cosegment(bundle: str, paths: list[str], side: int, precision: str) -> float:
    with Engine.open(bundle, precision=precision, allow_inexact=True) as engine:
        engine.encode(paths[:2], load_size=(side, side), saliency="low_resolution")  # loads the encoder
        return _seconds(lambda: engine.cosegment(paths, load_size=(side, side)))


def _best_buddies(grid: int, channels: int) -> float:
    a, b = (np.random.default_rng(i).standard_normal((grid, grid, channels), np.float32) for i in range(2))
    return _seconds(lambda: best_buddies(a, b))


def _discover(bundle: str, paths: list[str], count: int, side: int, method: str) -> float:
    """``count`` images, of which ``paths`` are repeated; each is forgotten when it is done, as the command does."""
    many = itertools.islice(itertools.cycle(paths), count)
    with Engine.open(bundle) as engine:
        return _seconds(lambda: deque(engine.discover_iter(many, method, load_size=side), maxlen=0))


def _eigenvector(grid: tuple[int, int], channels: int, threshold: float, dense: bool) -> dict[str, float]:
    """The second eigenvector of a scene's graph; ``array_mib`` is the peak of what that allocates."""
    small, large = (
        threshold_graph(scene_rows((side[0], side[1]), channels), threshold) for side in ((9, 9), tuple(grid))
    )

    def run(graph: ThresholdGraph) -> object:
        return solve(graph.dense()) if dense else smallest_eigenvectors(graph, 2)

    run(small)  # loads libraries
    tracemalloc.start()  # NumPy's and SciPy's arrays: the process's own peak hides what memory freed before can hold
    return {"seconds": _seconds(lambda: run(large)), "array_mib": tracemalloc.get_traced_memory()[1] / 2**20}


def _stream(bundle: str, side: int, warm: int, frames: int, heads: bool = False) -> dict[str, float]:
    """One stream over many small frames, with what follows points, a mask and components if ``heads``.

    Resident memory is the median of samples over ``warm`` frames, which begins after the first ``warm``; over as many
    at the end again.
    """
    samples: list[float] = []
    every = max(1, warm // 50)

    def run() -> None:
        with Engine.open(bundle) as engine, engine.stream(_small_frames(side, frames), load_size=side) as stream:
            if heads:
                _attach_heads(engine, stream, side)
            for number, _ in enumerate(stream):
                if number % every == 0:
                    samples.append(resident_mib())

    seconds, count = _seconds(run), max(1, warm // every)
    warmed, end = np.median(samples[count : 2 * count]), np.median(samples[-count:])
    return {"seconds": seconds, "frames": frames, "warm_mib": float(warmed), "end_mib": float(end)}


def _attach_heads(engine: Engine, stream: Stream[Features], side: int) -> None:
    """A tracker, a propagator and a projection on components, begun with the first features of frames of ``side``."""
    mask = np.zeros((side, side), np.int64)
    mask[: side // 2] = 1
    stream.attach("track", engine.tracker().following([[side / 2, side / 2], [side / 3, side / 3]]))
    stream.attach("mask", engine.propagator().following(mask))
    fitted: list[Pca] = []
    stream.attach(
        "pca",
        first_then(
            lambda features: fitted.append(fit_pca([features], features.facets[0], 3)),
            lambda features: fitted[0].project(features),
        ),
    )


def _small_frames(side: int, count: int) -> Iterator[NDArray[np.uint8]]:
    """Noise that differs from frame to frame, ``(side, side, 3)``."""
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return (np.roll(noise, i, axis=1) for i in range(count))


JOBS: dict[str, Callable[..., float | dict[str, float]]] = {
    "match": _match,
    "cosegment": _cosegment,
    "best_buddies": _best_buddies,
    "discover": _discover,
    "eigenvector": _eigenvector,
    "stream": _stream,
}


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_mib() -> float:
    """Peak resident memory of this process.

    On Linux from ``/proc``: ``ru_maxrss`` also counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(found[0].split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def resident_mib() -> float:
    """Memory that this process holds now.

    Raises:
        FacetrtError: the system has no ``/proc`` to read it from.
    """
    status = Path("/proc/self/statm")
    if not status.is_file():
        raise FacetrtError("memory is read from /proc/self/statm, which this system does not have")
    return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    """Run the job named on the command line."""
    arguments = json.loads(sys.argv[1])
    job = arguments.pop("job")
    if job not in JOBS:
        raise InputError(f"job {job!r}: expected one of {', '.join(JOBS)}")
    found = JOBS[job](**arguments)
    result = found if isinstance(found, dict) else {"seconds": found}
    print(json.dumps(result | {"peak_mib": peak_mib()}))


if __name__ == "__main__":
    try:
        main()
    except FacetrtError as error:
        sys.exit(str(error))
