"""``facetrt export``: parse, export, add, print."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from facetrt.engine.backends.flavours import FLAVOURS, Flavour
from facetrt.engine.backends.run_options import BackendName
from facetrt.engine.bundle.manifest import MANIFEST, PrecisionRecord
from facetrt.engine.cli.app import ForceOption, console, errors, parse_size, progress_bar
from facetrt.engine.machine.memory import MAX_CELLS
from facetrt.export.additions import add_kernels
from facetrt.export.export_options import ExportOptions, Facet, GraphPrecision, Target
from facetrt.export.models import MODELS, import_export_libraries
from facetrt.export.plans import (
    PlanOptions,
    build_plan,
    check_fusible,
    check_options,
    check_target,
    parse_plan_architectures,
)
from facetrt.kernels.errors import InputError

GPU = "GPU"
PLAN_OPTIONS = {field.name for field in fields(PlanOptions)}


def export(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="dino_vits8, dino_vits16, dino_vitb8, …, 'builtin', or a bundle folder to add to."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write; it appears complete or not at all. Not for a bundle."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Checkpoint of any layout; the published one by default.")
    ] = None,
    stride: Annotated[
        int, typer.Option("--stride", min=1, help="Of the patch convolution; divides the patch size.")
    ] = 4,
    size: Annotated[str | None, typer.Option("--size", help="HEIGHTxWIDTH for a bundle of one size.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="A bundle for any image size (the default).")] = False,
    facets: Annotated[
        str | None,
        typer.Option("--facets", help="KIND@LAYER, comma-separated; the model's defaults if not given."),
    ] = None,
    precision: Annotated[
        GraphPrecision, typer.Option("--precision", help="Of weights and matrix products; bf16 runs on GPUs only.")
    ] = GraphPrecision.FP32,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Of an fp32 bundle: measure bf16 as well.")
    ] = True,
    saliency: Annotated[bool, typer.Option("--saliency/--no-saliency", help="Output [CLS] attention.")] = True,
    saliency_heads: Annotated[
        str | None,
        typer.Option("--saliency-heads", help="Numbers, comma-separated; the model's own by default."),
    ] = None,
    kernels: Annotated[
        str, typer.Option("--kernels", help="Compile for GPUs: none, all, or like sm_80,sm_90.", rich_help_panel=GPU)
    ] = "none",
    max_cells: Annotated[
        int, typer.Option("--max-cells", min=1, help="A --size of more is refused: time grows with their square.")
    ] = MAX_CELLS,
    target: Annotated[
        Target,
        typer.Option(
            "--target",
            help="tensorrt also builds a plan, on this GPU; tensorrt-rtx an engine, anywhere, for --architectures.",
            rich_help_panel=GPU,
        ),
    ] = Target.ONNX,
    architectures: Annotated[
        str | None,
        typer.Option("--architectures", help="Of tensorrt-rtx: like sm75,sm89; all by default.", rich_help_panel=GPU),
    ] = None,
    allow_unfused: Annotated[
        bool,
        typer.Option("--allow-unfused", help="Build although attention holds its t × t matrix.", rich_help_panel=GPU),
    ] = False,
    opt_batch: Annotated[
        int | None, typer.Option("--opt-batch", help="Batch size to tune for.", rich_help_panel=GPU)
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", help="Most images in one run.", rich_help_panel=GPU)
    ] = None,
    min_size: Annotated[
        str | None, typer.Option("--min-size", help="HEIGHTxWIDTH, of a dynamic bundle.", rich_help_panel=GPU)
    ] = None,
    opt_size: Annotated[
        str | None, typer.Option("--opt-size", help="HEIGHTxWIDTH to tune for.", rich_help_panel=GPU)
    ] = None,
    max_size: Annotated[str | None, typer.Option("--max-size", help="HEIGHTxWIDTH.", rich_help_panel=GPU)] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", help="File of measurements, kept for the next build.", rich_help_panel=GPU),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="Also for newer versions of this TensorRT major.", rich_help_panel=GPU
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option("--hardware-compatible", help="Also for other GPUs from sm_80 on; slower.", rich_help_panel=GPU),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Turn a checkpoint into a bundle, compared with the torch model before it is written; or add to a bundle.

    --kernels and --target add compiled kernels and a TensorRT plan, to the new bundle or to the folder given instead of
    a model.
    """
    plan = _plan_options(context)
    kernel_architectures = _kernel_architectures(kernels)
    flavour = None if target is Target.ONNX else FLAVOURS[BackendName(target)]
    if flavour is not None:  # before anything that takes long
        check_options(plan, flavour)
        check_target(flavour)
    if _is_bundle(model):
        _check_additions(context, model)
        folder = Path(model)
        if kernel_architectures:
            names = add_kernels(folder, kernel_architectures, report=_print_stage)
            console.print(f"{folder}: {len(names)} kernel files for {', '.join(kernel_architectures)}")
    else:
        if out is None:
            raise InputError(f"--out is missing: expected the folder for the bundle of {model}")
        if flavour is not None:
            check_fusible(precision, plan, flavour)
        folder = out
        options = ExportOptions(
            stride=stride,
            size=_fixed_size(size, dynamic=dynamic),
            facets=None if facets is None else tuple(Facet.parse(name.strip()) for name in facets.split(",")),
            saliency=saliency,
            saliency_heads=None if saliency_heads is None else _integers(saliency_heads),
            precision=precision,
            measure=measure,
            kernels=kernel_architectures,
            max_cells=max_cells,
        )
        _export_model(model, folder, options, weights, force=force)
    if flavour is not None:
        _add_plan(folder, plan, flavour)


def _export_model(model: str, out: Path, options: ExportOptions, weights: Path | None, *, force: bool) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns on standard error about missing GPUs
    with errors.status("importing torch"):
        import_export_libraries()
        from facetrt.export.exporting import export_bundle
    with progress_bar(f"exporting {model}") as update:
        manifest = export_bundle(
            model, out, options, weights=weights, force=force, report=_print_stage, download=update
        )
    worst = max(metrics["relative_frobenius"] for metrics in manifest.parity.outputs.values())
    console.print(
        f"{out}: {', '.join(manifest.outputs)}; worst relative error {worst:.1e} against torch on "
        f"{len(manifest.parity.cases)} images"
    )
    for precision, record in manifest.precisions.items():
        if precision != GraphPrecision.FP32:
            console.print(f"{precision}: {_outcome(record)} (measured by {record.measured})")


def _outcome(record: PrecisionRecord) -> str:
    if not record.holds:
        return f"misses its contract, and runs with --allow-inexact only: {record.missed}"
    cost = "" if record.relative_time is None else f", {record.relative_time:.2f} of the time of fp32"
    return f"keeps its contract with {record.fp32} in fp32{cost}"


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


def _check_additions(context: typer.Context, model: str) -> None:
    """A bundle is added to as it is: what shapes the graph was chosen when it was exported."""
    given = _given(context)
    foreign = sorted(given - PLAN_OPTIONS - {"model", "kernels", "target"})
    if foreign:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise InputError(f"{names} cannot change the bundle {model}: export the model anew, to another folder")
    if not given & {"kernels", "target"}:
        raise InputError(f"{model} is a bundle already: add --target or --kernels to add to it")


def _plan_options(context: typer.Context) -> PlanOptions:
    """The plan's options among those that were given; those for a plan need --target tensorrt."""
    given = {name: context.params[name] for name in PLAN_OPTIONS & _given(context)}
    if given and context.params["target"] is Target.ONNX:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise InputError(f"{names} shape a TensorRT plan: add --target tensorrt or tensorrt-rtx")
    for name in given:
        if name.endswith("_size"):
            given[name] = _exact_size(f"--{name.replace('_', '-')}", given[name])
    if "architectures" in given:
        given["architectures"] = parse_plan_architectures(given["architectures"])
    if "max_batch" in given:
        given.setdefault("opt_batch", given["max_batch"])
    elif "opt_batch" in given:
        given["max_batch"] = given["opt_batch"]
    return PlanOptions(**given)


def _given(context: typer.Context) -> set[str]:
    """Names of the parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _kernel_architectures(kernels: str) -> tuple[str, ...]:
    if kernels.strip().lower() == "none":
        return ()
    from facetrt.export.kernels import parse_architectures

    return tuple(parse_architectures(kernels))


def _print_stage(stage: str) -> None:
    errors.print(f"· {stage}")


def _fixed_size(size: str | None, *, dynamic: bool) -> tuple[int, int] | None:
    if size is None:
        return None
    if dynamic:
        raise InputError(f"--size {size} and --dynamic exclude each other: give one")
    return _exact_size("--size", size)


def _exact_size(option: str, text: str) -> tuple[int, int]:
    parsed = parse_size(text)
    if not isinstance(parsed, tuple):
        raise InputError(f"{option} {text}: expected HEIGHTxWIDTH, like 224x336")
    return parsed


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--saliency-heads {text}: expected numbers of heads, comma-separated") from error
