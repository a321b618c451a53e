"""``facetrt bench``: parse, measure, write, print."""

from __future__ import annotations

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from facetrt.engine.cli.app import ForceOption, OutOption, app, console, errors
from facetrt.engine.files import atomic_folder, check_replaceable
from facetrt.export.models import import_export_libraries

LIBRARIES = ("matplotlib", "jsonschema", "sklearn", "faiss")


class Suite(StrEnum):
    """Which suite to run."""

    CPU = "cpu"


@app.command()
def bench(
    out: OutOption,
    suite: Annotated[Suite, typer.Option("--suite", help="What to measure.")] = Suite.CPU,
    bundle: Annotated[
        str | None,
        typer.Option("--bundle", "-b", help="Bundle folder; by default a ViT-S/8 with untrained weights is exported."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="The checkpoint that --bundle was made of, for the baselines.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="At most so many; fewer where time runs out.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small images and few of them: shows that all runs, not how fast.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Checkout of the original research code to time as well. Runs code from there!"),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Measure everything beside baselines in the same run, and hold it against the bars; takes up to ten minutes."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns on standard error about missing GPUs
    check_replaceable(out, force=force)
    with errors.status("importing libraries") as status:
        _import_all()
        from facetrt.benchmarks.against import check_checkout
        from facetrt.benchmarks.plots import draw
        from facetrt.benchmarks.report import bar_table, write_report
        from facetrt.benchmarks.suite import run_cpu
        from facetrt.benchmarks.workbench import QUICK, UNTRAINED, Sizes, Workbench, prepare

        if against is not None:
            check_checkout(against)
        with tempfile.TemporaryDirectory(prefix="facetrt-bench-") as scratch:
            folder = Path(scratch)
            status.update("preparing the model")
            opened, spec, state = prepare(bundle, weights, folder)
            notes = [UNTRAINED] if bundle is None and weights is None else []
            with Workbench(
                opened,
                spec,
                state,
                folder / "work",
                sizes=QUICK if quick else Sizes(),
                rounds=rounds,
                report=status.update,
            ) as workbench:
                report = run_cpu(workbench, against=against, notes=notes)
    with atomic_folder(out, force=force) as target:
        write_report(target, report)
        draw(target, report)
    console.print(bar_table(report))
    for note in report.notes:
        console.print(note)
    console.print(f"{len(report.rows)} rows in {report.facts['seconds']:.0f} s: {out}")


def _import_all() -> None:
    """Fail before anything is measured if a library is missing."""
    from facetrt.benchmarks.missing import import_library

    import_export_libraries()
    for name in LIBRARIES:
        import_library(name)
