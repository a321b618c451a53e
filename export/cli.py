"""``facetrt export``: parse, export, add, print."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from facetrt.engine.backends.flavours import FLAVOURS, Flavour
from facetrt.engine.backends.run_options import BackendName
from facetrt.engine.bundle.manifest import CLS_ATTENTION, MANIFEST, Fp32Parts, PrecisionRecord, Riders
from facetrt.engine.cli.app import ForceOption, console, errors, progress_bar
from facetrt.engine.cli.parameters import expanded, given
from facetrt.engine.serving.tasks import PANEL, TaskOptions
from facetrt.engine.serving.triton_config import RepositoryOptions
from facetrt.engine.serving.triton_repository import differences, write_repository
from facetrt.engine.settings import Setting, options_of
from facetrt.engine.tasks.agreement import describe
from facetrt.export.additions import add_found_head, add_kernels
from facetrt.export.export_options import GPU, ExportOptions, GraphPrecision, Target
from facetrt.export.models import MODELS, import_export_libraries
from facetrt.export.plans import PlanOptions, build_plan, check_fusible, check_options, check_target
from facetrt.kernels.errors import InputError, MissingFileError, OutputError

SERVING = set(options_of(TaskOptions)) | set(options_of(RepositoryOptions))


@dataclass(frozen=True)
class Request:
    """What is exported or added to, and where it goes."""

    model: Annotated[
        str, typer.Argument(help="dino_vits8, dino_vits16, dino_vitb8, …, 'builtin', or a bundle folder to add to.")
    ]
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write; it appears complete or not at all. Not for a bundle."),
    ] = None
    weights: Annotated[Path | None, Setting("Checkpoint of any layout; the published one by default.")] = None
    dynamic: Annotated[bool, Setting("A bundle for any image size (the default).")] = False
    target: Annotated[
        Target,
        Setting(
            "tensorrt also builds a plan, on this GPU; tensorrt-rtx an engine, anywhere, for --architectures; triton "
            "writes a --repository.",
            panel=GPU,
        ),
    ] = Target.ONNX
    found_head: Annotated[
        Path | None, Setting("FOUND's head, published or of 'facetrt found-head', for the manifest; also to a bundle.")
    ] = None
    force: ForceOption = False
    repository: Annotated[
        Path | None, Setting("Triton's model repository to write, for --target triton.", panel=PANEL)
    ] = None
    check_drift: Annotated[
        bool, Setting("Only list what the repository holds that would not be written now.", panel=PANEL, flag="check")
    ] = False


@expanded
def export(
    context: typer.Context,
    request: Request,
    options: ExportOptions,
    plan: PlanOptions,
    tasks: TaskOptions,
    serving: RepositoryOptions,
) -> None:
    """Turn a checkpoint into a bundle, compared with the torch model before it is written; or add to a bundle.

    --kernels and --target add compiled kernels and a TensorRT plan, to the new bundle or to the folder given instead of
    a model; --target triton writes a repository of models that serve it.
    """
    if request.check_drift:
        _check_repository(request)
        return
    _check_serving(request, given(context))
    flavour = _flavour(request.target, plan, given(context))
    folder = Path(request.model)
    if _is_bundle(request.model):
        _check_additions(given(context), request.model)
        _add_kernels(folder, options.kernels)
    else:
        if flavour is not None and options.precision is not GraphPrecision.AUTO:  # else once it is known
            check_fusible(options.precision, plan, flavour)
        if request.found_head is not None and not request.found_head.is_file():
            raise MissingFileError(f"{request.found_head} does not exist: expected FOUND's head")
        folder = _export_model(request, options)
    if request.found_head is not None:
        head = add_found_head(folder, request.found_head)
        console.print(f"{folder}: a head of {len(head.weight) + 1} numbers for {head.facet}, from {request.found_head}")
    if flavour is not None:
        _add_plan(folder, plan, flavour)
    if request.repository is not None:
        models = write_repository(folder, request.repository, tasks, serving, force=request.force)
        console.print(f"{request.repository}: {', '.join(models)}", soft_wrap=True)


def _check_repository(request: Request) -> None:
    """Raise :class:`OutputError` if the repository is not what would be written now, after listing why."""
    if request.target is not Target.TRITON or request.repository is None:
        raise InputError("--check looks at a repository: add --target triton --repository FOLDER")
    found = differences(request.repository)
    for line in found:
        console.print(line, soft_wrap=True)
    if found:
        raise OutputError(f"{request.repository} has drifted: write it anew with --force")
    console.print(f"{request.repository} is what would be written now", soft_wrap=True)


def _check_serving(request: Request, asked: set[str]) -> None:
    """Options of serving and the target belong together."""
    shaping = sorted(asked & (SERVING | {"repository"}))
    if request.target is not Target.TRITON and shaping:
        raise InputError(f"{_flags(shaping)} shape a model repository: add --target triton")
    if request.target is Target.TRITON and request.repository is None:
        raise InputError("--target triton needs a place: add --repository FOLDER")


def _flavour(target: Target, plan: PlanOptions, asked: set[str]) -> Flavour | None:
    """Which TensorRT is built for, once it is known that it can be; None for none."""
    if target in (Target.ONNX, Target.TRITON):
        if shaping := sorted(asked & set(options_of(PlanOptions))):
            raise InputError(f"{_flags(shaping)} shape a TensorRT plan: add --target tensorrt or tensorrt-rtx")
        return None
    flavour = FLAVOURS[BackendName(target)]
    check_options(plan, flavour)
    check_target(flavour)
    return flavour


def _add_kernels(folder: Path, architectures: tuple[str, ...]) -> None:
    if architectures:
        names = add_kernels(folder, architectures, report=_print_stage)
        console.print(f"{folder}: {len(names)} kernel files for {', '.join(architectures)}")


def _export_model(request: Request, options: ExportOptions) -> Path:
    """The folder that was written."""
    model, out = request.model, request.out
    if out is None:
        raise InputError(f"--out is missing: expected the folder for the bundle of {model}")
    if request.dynamic and options.size is not None:
        raise InputError(f"--size {'x'.join(map(str, options.size))} and --dynamic exclude each other: give one")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns on standard error about missing GPUs
    with errors.status("importing torch"):
        import_export_libraries()
        from facetrt.export.exporting import export_bundle
    with progress_bar(f"exporting {model}") as update:
        manifest = export_bundle(
            model, out, options, weights=request.weights, force=request.force, report=_print_stage, download=update
        )
    worst = max(metrics["relative_frobenius"] for metrics in manifest.parity.outputs.values())
    console.print(
        f"{out}: {', '.join(manifest.outputs)}; worst relative error {worst:.1e} against torch on "
        f"{len(manifest.parity.cases)} images"
    )
    if manifest.riders is not None:
        console.print(_approximation(manifest.riders))
    for candidate in manifest.candidates or []:
        if candidate.taken:
            parts = f" with {candidate.fp32} in fp32" if candidate.fp32 != Fp32Parts() else ""
            console.print(f"auto takes {candidate.precision}{parts}: {candidate.why}")
    for precision, record in manifest.precisions.items():
        if precision != GraphPrecision.FP32:
            console.print(f"{precision}: {_outcome(record)} (measured by {record.measured})")
    return out


def _approximation(riders: Riders) -> str:
    """The worst output, by its cells' mean cosine, and saliency."""
    outputs = {name: figures for name, figures in riders.deviation.outputs.items() if name != CLS_ATTENTION}
    name, figures = min(outputs.items(), key=lambda output: output[1]["mean_cosine"])
    saliency = riders.deviation.outputs.get(CLS_ATTENTION)
    return (
        f"{riders} change it: {name} keeps a mean cosine of {figures['mean_cosine']:.4f} with the full network's, "
        f"1st percentile {figures['p1_cosine']:.4f}"
        + ("" if saliency is None else f"; saliency is off by {saliency['max_abs']:.2f} of its range at most")
    )


def _outcome(record: PrecisionRecord) -> str:
    if not record.holds:
        return f"misses its contract, and runs with --allow-inexact only: {record.missed}"
    cost = "" if record.relative_time is None else f", {record.relative_time:.2f} of the time of fp32"
    tasks = "" if record.tasks is None else f"; {describe(record.tasks)}"
    return f"keeps its contract with {record.fp32} in fp32{cost}{tasks}"


def _add_plan(folder: Path, options: PlanOptions, flavour: Flavour) -> None:
    name, record = build_plan(folder, options, flavour=flavour, report=_print_stage)
    if record.parity.cases:
        worst = max(metrics["relative_frobenius"] for metrics in record.parity.outputs.values())
        compared = f"worst relative error {worst:.1e} against fp32 on {len(record.parity.cases)} batches"
    else:
        compared = "compared with fp32 on the GPU that runs it first"
    console.print(
        f"{folder / name}: for {record.architecture}; {record.layers} layers, {record.fused_attention} of "
        f"{record.attention} attentions fused, {max(record.scratch_bytes) / 1e6:,.0f} MB of scratch memory; {compared}"
    )


def _is_bundle(model: str) -> bool:
    return model not in MODELS and (Path(model) / MANIFEST).is_file()


def _check_additions(asked: set[str], model: str) -> None:
    """A bundle is added to as it is: what shapes the graph was chosen when it was exported."""
    added = {"model", "kernels", "target", "found_head", "repository", "force"} | SERVING
    foreign = sorted(asked - set(options_of(PlanOptions)) - added)
    if foreign:
        raise InputError(
            f"{_flags(foreign)} cannot change the bundle {model}: export the model anew, to another folder"
        )
    if not asked & {"kernels", "target", "found_head"}:
        raise InputError(f"{model} is a bundle already: add --target, --kernels or --found-head to add to it")


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _print_stage(stage: str) -> None:
    errors.print(f"· {stage}")
