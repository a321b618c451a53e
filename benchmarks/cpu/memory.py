"""Peak memory, each job in a process of its own. Interpreter, libraries and the model count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from facetrt.benchmarks.cpu.child import run_job
from facetrt.benchmarks.cpu.discovery import THRESHOLD
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.benchmarks.results import Row, Spread
from facetrt.engine.bundle.bundle import BUILTIN
from facetrt.kernels.errors import FacetrtError

SECTION = "memory"
DISCOVER, DISCOVER_SIDE = "discover by the built-in model, {} images", 112
LANCZOS, DENSE = "second eigenvector", "second eigenvector, SciPy, dense"


def measure(bench: Workbench) -> list[Row]:
    """A pair matched in fp32 and bf16, best buddies of two large grids alone, and discovery."""
    pair: dict[str, Any] = {"bundle": bench.bundle, "paths": bench.paths[:2], "side": bench.sizes.side}
    grid = bench.sizes.large_grid
    return [
        _row(bench, "match, fp32", "match", **pair, precision="fp32"),
        _row(bench, "match, bf16", "match", **pair, precision="bf16"),
        _row(bench, f"best_buddies, {grid} × {grid} cells", "best_buddies", grid=grid, channels=bench.spec.dim),
        _row(
            bench,
            DISCOVER.format(bench.sizes.collection),
            "discover",
            bundle=BUILTIN,
            paths=bench.paths,
            count=bench.sizes.collection,
            side=DISCOVER_SIDE,
            method="tokencut",
        ),
        *_eigenvector(bench),
    ]


def _eigenvector(bench: Workbench) -> list[Row]:
    """Arrays that a second eigenvector takes beside the graph's bits, ours and by a dense solver."""
    scene: dict[str, Any] = {"grid": bench.sizes.eigenvector, "channels": bench.spec.dim, "threshold": THRESHOLD}
    rows = [
        _row(bench, name, "eigenvector", "array_mib", **scene, dense=dense)
        for name, dense in ((LANCZOS, False), (DENSE, True))
    ]
    ours, plain = (row.value for row in rows)
    if ours is None or plain is None:
        return rows
    return [replace(rows[0], ratios={DENSE: Spread.of([plain.median / ours.median])}), rows[1]]


def _row(bench: Workbench, name: str, job: str, measured: str = "peak_mib", **arguments: Any) -> Row:
    bench.report(f"{SECTION}: {name}")
    try:
        result = run_job(job, **arguments)
    except FacetrtError as error:
        return Row(SECTION, name, None, "MiB", reason=str(error))
    return Row(SECTION, name, Spread.of([result[measured]]), "MiB", details={"seconds": round(result["seconds"], 3)})
