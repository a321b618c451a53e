"""One job in a process of its own, so that its peak memory is its own: ``python -m facetrt.benchmarks.child JOB``.

``JOB`` is JSON, ``{"job": "match", …}``; the answer is JSON on standard output: ``peak_mib`` and ``seconds``.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from facetrt.engine.engine import Engine
from facetrt.kernels import best_buddies
from facetrt.kernels.errors import FacetrtError, InputError


def run_job(job: str, **arguments: Any) -> dict[str, Any]:
    """``peak_mib`` of the whole process and ``seconds`` of the job alone.

    Raises:
        FacetrtError: the job cannot run here; with the child's message.
    """
    command = [sys.executable, "-m", "facetrt.benchmarks.child", json.dumps({"job": job, **arguments}, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FacetrtError(_last_line(done.stderr) or f"the process ended with code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def _match(bundle: str, paths: list[str], side: int, precision: str) -> float:
    with Engine.open(bundle, precision=precision) as engine:
        return _seconds(lambda: engine.match(paths[0], paths[1], load_size=(side, side)))


def _cosegment(bundle: str, paths: list[str], side: int, precision: str) -> float:
    with Engine.open(bundle, precision=precision) as engine:
        engine.encode(paths[:2], load_size=(side, side), saliency="low_resolution")  # loads the encoder
        return _seconds(lambda: engine.cosegment(paths, load_size=(side, side)))


def _best_buddies(grid: int, channels: int) -> float:
    a, b = (np.random.default_rng(i).standard_normal((grid, grid, channels), np.float32) for i in range(2))
    return _seconds(lambda: best_buddies(a, b))


JOBS: dict[str, Callable[..., float]] = {"match": _match, "cosegment": _cosegment, "best_buddies": _best_buddies}


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


def main() -> None:
    """Run the job named on the command line."""
    arguments = json.loads(sys.argv[1])
    job = arguments.pop("job")
    if job not in JOBS:
        raise InputError(f"job {job!r}: expected one of {', '.join(JOBS)}")
    seconds = JOBS[job](**arguments)
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    try:
        main()
    except FacetrtError as error:
        sys.exit(str(error))
