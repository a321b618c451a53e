"""``facetrt bench``: parse, measure, write, print."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from facetrt.engine.cli.app import ForceOption, OutOption, console, errors
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.files import atomic_folder, check_replaceable, scratch_folder
from facetrt.engine.settings import Setting, check
from facetrt.export.models import import_export_libraries
from facetrt.kernels.errors import InputError

if TYPE_CHECKING:
    from facetrt.benchmarks.cpu.suite import Report

PICTURES = ("matplotlib", "jsonschema")  # and the report: what every suite ends with
LIBRARIES = (*PICTURES, "sklearn", "faiss")


class Suite(StrEnum):
    """Which suite to run."""

    CPU = "cpu"
    GPU = "gpu"
    VIDEO = "video"
    SERVE = "serve"


@dataclass(frozen=True)
class Request:
    """What is measured, apart from where the report goes."""

    suite: Annotated[Suite, Setting("What to measure.")] = Suite.CPU
    bundle: Annotated[
        str | None,
        typer.Option(
            "--bundle",
            "-b",
            help="Bundle folder; by default an untrained ViT-S/8, or for video and serve the built-in model.",
        ),
    ] = None
    weights: Annotated[Path | None, Setting("The checkpoint that --bundle was made of, for the baselines.")] = None
    rounds: Annotated[int, Setting("At most so many; fewer where time runs out.", minimum=1)] = 5
    quick: Annotated[bool, Setting("Small images and few of them: shows that all runs, not how fast.")] = False
    against: Annotated[
        Path | None,
        Setting("Checkout of the original research code to time as well. Runs code from there!"),
    ] = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def untrained(self) -> bool:
        """Whether no weights were given, of the model or of its checkpoint."""
        return self.bundle is None and self.weights is None


@expanded
def bench(request: Request, out: OutOption, force: ForceOption = False) -> None:
    """Measure everything beside baselines in the same run, and hold it against the bars; takes up to ten minutes.

    The GPU suite needs an NVIDIA GPU and takes longer: torch compiles its baseline first. The video suite runs the
    built-in model unless --bundle names another, and needs no torch; nor does the serve suite, which needs Triton.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns on standard error about missing GPUs
    check_replaceable(out, force=force)
    run = {Suite.CPU: _run_cpu, Suite.GPU: _run_gpu, Suite.VIDEO: _run_video, Suite.SERVE: _run_serve}
    report = run[request.suite](request)
    with atomic_folder(out, force=force) as target:
        from facetrt.benchmarks.plots import draw
        from facetrt.benchmarks.report import bar_table, write_report

        write_report(target, report)
        draw(target, report)
    console.print(bar_table(report))
    for note in report.notes:
        console.print(note)
    console.print(f"{len(report.rows)} rows in {report.facts['seconds']:.0f} s: {out}")


def _run_cpu(asked: Request) -> Report:
    with errors.status("importing libraries") as status:
        _import_all()
        from facetrt.benchmarks.cpu.against import check_checkout
        from facetrt.benchmarks.cpu.suite import run_cpu
        from facetrt.benchmarks.cpu.workbench import QUICK, UNTRAINED, Sizes, Workbench, prepare

        if asked.against is not None:
            check_checkout(asked.against)
        with scratch_folder() as folder:
            status.update("preparing the model")
            opened, spec, state = prepare(asked.bundle, asked.weights, folder)
            with Workbench(
                opened,
                spec,
                state,
                folder / "work",
                sizes=QUICK if asked.quick else Sizes(),
                rounds=asked.rounds,
                report=status.update,
            ) as workbench:
                return run_cpu(workbench, against=asked.against, notes=[UNTRAINED] if asked.untrained else [])


def _run_gpu(asked: Request) -> Report:
    from facetrt.benchmarks.gpu.facts import find_gpu

    if asked.against is not None:
        raise InputError("--against is timed by the CPU suite: leave it out, or use --suite cpu")
    gpu = find_gpu()
    with errors.status("importing libraries") as status:
        _import_all()
        from facetrt.benchmarks.cpu.workbench import UNTRAINED
        from facetrt.benchmarks.gpu.suite import run_gpu
        from facetrt.benchmarks.gpu.workbench import QUICK_GPU, GpuSizes, GpuWorkbench, prepare_gpu

        with scratch_folder() as folder:
            opened, spec, state = prepare_gpu(asked.bundle, asked.weights, folder, gpu["arch"], status.update)
            with GpuWorkbench(
                opened,
                spec,
                state,
                folder / "work",
                sizes=QUICK_GPU if asked.quick else GpuSizes(),
                rounds=asked.rounds,
                report=status.update,
            ) as workbench:
                return run_gpu(workbench, gpu, notes=[UNTRAINED] if asked.untrained else [])


def _run_video(asked: Request) -> Report:
    _check_without_baselines(asked)
    with errors.status("importing libraries") as status:
        from facetrt.benchmarks.video_suite import QUICK_VIDEO, VideoBench, VideoSizes, run_video
        from facetrt.engine.bundle.bundle import BUILTIN

        _import(PICTURES)
        sizes = QUICK_VIDEO if asked.quick else VideoSizes()
        with VideoBench(asked.bundle or BUILTIN, sizes, asked.rounds, status.update) as bench:
            return run_video(bench)


def _run_serve(asked: Request) -> Report:
    _check_without_baselines(asked)
    with errors.status("importing libraries") as status:
        from facetrt.benchmarks.serve_suite import QUICK_SERVE, ServeBench, ServeSizes, run_serve
        from facetrt.engine.bundle.bundle import BUILTIN

        _import(PICTURES)
        sizes = QUICK_SERVE if asked.quick else ServeSizes()
        with (
            scratch_folder() as folder,
            ServeBench(asked.bundle or BUILTIN, folder, sizes, asked.rounds, status.update) as bench,
        ):
            return run_serve(bench)


def _check_without_baselines(asked: Request) -> None:
    if asked.against is not None or asked.weights is not None:
        raise InputError(
            f"--against and --weights are for baselines that the {asked.suite} suite does not have: leave them out"
        )


def _import_all() -> None:
    import_export_libraries()
    _import(LIBRARIES)


def _import(libraries: Sequence[str]) -> None:
    """Fail before anything is measured if a library is missing."""
    from facetrt.benchmarks.missing import import_library

    for name in libraries:
        import_library(name)
