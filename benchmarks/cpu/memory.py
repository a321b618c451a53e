"""Peak memory, each job in a process of its own. Interpreter, libraries and the model count."""

from __future__ import annotations

from typing import Any

from facetrt.benchmarks.cpu.child import run_job
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.benchmarks.results import Row, Spread
from facetrt.kernels.errors import FacetrtError

SECTION = "memory"


def measure(bench: Workbench) -> list[Row]:
    """A pair matched in fp32 and bf16, and the best buddies of two large grids alone."""
    pair = {"bundle": bench.bundle, "paths": bench.paths[:2], "side": bench.sizes.side}
    grid = bench.sizes.large_grid
    return [
        _row(bench, "match, fp32", "match", **pair, precision="fp32"),
        _row(bench, "match, bf16", "match", **pair, precision="bf16"),
        _row(bench, f"best_buddies, {grid} × {grid} cells", "best_buddies", grid=grid, channels=bench.spec.dim),
    ]


def _row(bench: Workbench, name: str, job: str, **arguments: Any) -> Row:
    bench.report(f"{SECTION}: {name}")
    try:
        result = run_job(job, **arguments)
    except FacetrtError as error:
        return Row(SECTION, name, None, "MiB", reason=str(error))
    return Row(SECTION, name, Spread.of([result["peak_mib"]]), "MiB", details={"seconds": round(result["seconds"], 3)})
