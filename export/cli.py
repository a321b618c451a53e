"""``facetrt export``, and the program's entry point: the outermost layer, so the engine never imports the exporter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from facetrt.benchmarks import command  # noqa: F401  (it registers its command, as those below do)
from facetrt.engine.cli import evaluation, info, inspection, tasks  # noqa: F401  (they register the runtime's commands)
from facetrt.engine.cli.app import ForceOption, OutOption, app, console, errors, parse_size, progress_bar, run
from facetrt.export.models import import_export_libraries
from facetrt.export.options import ExportOptions, Facet, Precision
from facetrt.kernels.errors import InputError


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="dino_vits8, dino_vits16, dino_vitb8, …, or 'builtin'.")],
    out: OutOption,
    weights: Annotated[
        Path | None, typer.Option("--weights", help=".pth, .safetensors or .npz; the published checkpoint by default.")
    ] = None,
    stride: Annotated[
        int, typer.Option("--stride", min=1, help="Of the patch convolution; divides the patch size.")
    ] = 4,
    size: Annotated[str | None, typer.Option("--size", help="HEIGHTxWIDTH for a bundle of one size.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="A bundle for any image size (the default).")] = False,
    facets: Annotated[
        str | None,
        typer.Option("--facets", help="Comma-separated, like key@9,token@11; the model's defaults if not given."),
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision")] = Precision.FP32,
    saliency: Annotated[bool, typer.Option("--saliency/--no-saliency", help="Output [CLS] attention.")] = True,
    saliency_heads: Annotated[
        str | None, typer.Option("--saliency-heads", help="Like 0,2,4,5; the model's own by default.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Turn a checkpoint into a bundle: pruned, stride-modified, compared with the torch model before it is written."""
    options = ExportOptions(
        stride=stride,
        size=_fixed_size(size, dynamic=dynamic),
        facets=None if facets is None else tuple(Facet.parse(name.strip()) for name in facets.split(",")),
        saliency=saliency,
        saliency_heads=None if saliency_heads is None else _integers(saliency_heads),
        precision=precision,
    )
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


def _print_stage(stage: str) -> None:
    errors.print(f"· {stage}")


def _fixed_size(size: str | None, *, dynamic: bool) -> tuple[int, int] | None:
    if size is None:
        return None
    if dynamic:
        raise InputError(f"--size {size} and --dynamic exclude each other: give one")
    parsed = parse_size(size)
    if not isinstance(parsed, tuple):
        raise InputError(f"--size {size}: expected HEIGHTxWIDTH, like 224x336")
    return parsed


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--saliency-heads {text}: expected numbers, like 0,2,4,5") from error


def main() -> None:
    """Entry point of the ``facetrt`` command."""
    run(app)
