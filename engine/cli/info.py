"""``facetrt info``: what a bundle holds, and how close to fp32 it runs here. Parse, call, print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from facetrt.engine.backends.flavours import FLAVOURS
from facetrt.engine.backends.parity import Metrics, check, compare, worst
from facetrt.engine.backends.run_options import BackendName, Precision, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import CLS_ATTENTION, KERNELS, Candidate, Manifest, PlanRecord, TaskAgreement
from facetrt.engine.cli.app import BUNDLE_VARIABLE, console, no_bundle, progress_bar
from facetrt.engine.cli.opening import open_engine
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features, Float
from facetrt.engine.samples import sample_paths
from facetrt.engine.tasks.agreement import BOUNDS
from facetrt.kernels.errors import InputError, printable

METRICS = ("mean_cosine", "p1_cosine", "cls_cosine", "relative_frobenius", "max_abs")
MEASURED_SIZE = 224  # shorter side of the photographs that a precision is measured on


@expanded
def info(
    bundle: Annotated[
        str,
        typer.Argument(
            help="Bundle folder, or 'builtin'. Required, here or in the variable.",
            envvar=BUNDLE_VARIABLE,
            default_factory=lambda: no_bundle(""),
            show_default=False,
        ),
    ],
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also compare what --backend and --precision run here with fp32 ONNX Runtime."),
    ] = False,
    *,
    running: RunOptions,
) -> None:
    """Check a bundle's files and show what it holds; with --measure also how accurately it runs on this machine."""
    if not measure and running != RunOptions():
        raise InputError("options of the encoder choose what --measure compares: add --measure")
    _print(Bundle.open(bundle))
    if measure:
        _measure(bundle, replace(running, allow_inexact=True))


def _print(opened: Bundle) -> None:
    manifest = opened.manifest
    console.print(_table("bundle", ["field", "value"], _facts(manifest)))
    console.print(_table("files (checked)", ["file", "bytes", "sha256"], _files(opened), long_names=True))
    if manifest.plans:
        plans = [_plan(name, record) for name, record in manifest.plans.items()]
        console.print(_table("TensorRT plans", ["field", "value"], *plans))
    console.print(
        _parity_table(
            f"parity with the torch model, worst of {len(manifest.parity.cases)} images", manifest.parity.outputs
        )
    )
    if manifest.riders is not None:
        deviation = manifest.riders.deviation
        title = f"{manifest.riders} against the full network, worst of {len(deviation.cases)} images"
        console.print(_parity_table(title, deviation.outputs))
    if manifest.precisions:
        columns = ["precision", "contract", "in fp32 beside it", "time / fp32", "measured by"]
        console.print(_table("precisions", columns, _precisions(manifest)))
    if tasks := _tasks(manifest):
        console.print(_table("tasks in half precision against fp32", ["field", "value"], *tasks))
    if manifest.candidates is not None:
        columns = ["precision", "in fp32 beside it", "", "why"]
        console.print(_table("how the precision was chosen", columns, _candidates(manifest.candidates)))


def _files(bundle: Bundle) -> list[list[str]]:
    """Name, bytes and hash of each file, read in full; an architecture's kernels are summed up."""
    rows, kernels = [], Counter[str]()
    for name, entry in bundle.manifest.files.items():
        bundle.read(name)
        if name.startswith(f"{KERNELS}/"):
            kernels[name.rpartition("/")[0]] += entry.bytes
        else:
            rows.append([name, f"{entry.bytes:,}", entry.sha256[:16] + "…"])
    return [*rows, *([f"{folder}/", f"{nbytes:,}", ""] for folder, nbytes in kernels.items())]


def _plan(name: str, record: PlanRecord) -> list[list[str]]:
    smallest, tuned, largest = ("×".join(map(str, shape[:3])) for shape in record.profile["images"])
    errors = [metrics["relative_frobenius"] for metrics in record.parity.outputs.values()]
    return [
        ["file", name],
        ["GPUs", record.architecture],
        ["built by", f"{FLAVOURS[BackendName(record.builder)].title} {record.version}"],
        ["images", f"{smallest} … {largest}, tuned for {tuned}"],
        ["attention", f"{record.fused_attention} of {record.attention} fused"],
        ["scratch memory of a lane", _scratch(record)],
        ["relative error", f"{max(errors):.1e}" if errors else "measured on the GPU that runs it first"],
    ]


def _scratch(record: PlanRecord) -> str:
    """What a lane takes beside weights, images and results."""
    if not record.scratch_bytes:
        return "unknown"
    whole = [f"{nbytes / 1e6:,.1f} MB" for nbytes in record.scratch_bytes]
    return whole[0] if len(whole) == 1 else f"{whole[0]} for one image, {whole[-1]} for {record.max_batch}"


def _precisions(manifest: Manifest) -> list[list[str]]:
    return [
        [
            precision,
            "holds" if record.holds else f"missed: {record.missed}",
            str(record.fp32),
            "" if record.relative_time is None else f"{record.relative_time:.2f}",
            record.measured,
        ]
        for precision, record in manifest.precisions.items()
    ]


def _tasks(manifest: Manifest) -> list[list[list[str]]]:
    """A group of lines per precision: figures with their bounds, then what they mean or why there are none."""
    compared = ((precision, record.tasks) for precision, record in manifest.precisions.items())
    return [_agreement(precision, tasks) for precision, tasks in compared if tasks is not None]


def _agreement(precision: str, tasks: TaskAgreement) -> list[list[str]]:
    figures = {name: f"{tasks.figures[name]:.3f} (≥ {BOUNDS[name]:g})" for name in BOUNDS if name in tasks.figures}
    absent = [f"{task} not compared: {why}" for task, why in tasks.absent.items()]
    return [
        ["precision", precision],
        *([name, figures.get(name, "absent")] for name in BOUNDS),
        ["tasks", "; ".join([f"differ: {tasks.missed}" if tasks.missed else "agree", *absent])],
        ["measured on", tasks.measured],
    ]


def _candidates(candidates: Sequence[Candidate]) -> list[list[str]]:
    return [
        [candidate.precision, str(candidate.fp32), "taken" if candidate.taken else "not taken", candidate.why]
        for candidate in candidates
    ]


def _measure(bundle: str, running: RunOptions) -> None:
    """Compare on the sample photographs; missing the contract is an error after the table."""
    with open_engine(bundle, running) as engine:
        if engine.backend == BackendName.ONNXRUNTIME:
            raise InputError(
                "nothing to compare: onnxruntime is what others are compared with; add --backend openvino or "
                "--precision bf16"
            )
        outputs = _worst_against_onnxruntime(bundle, engine)
        ran = f"{engine.backend} {engine.precision}"
        precision = Precision(engine.precision)
    console.print(_parity_table(f"{ran} against onnxruntime, worst of {len(sample_paths())} photographs", outputs))
    check(outputs, precision)
    console.print(f"{precision} keeps its contract")


def _worst_against_onnxruntime(bundle: str, engine: Engine) -> dict[str, Metrics]:
    photos = list(sample_paths().values())
    size = engine.manifest.size
    load_size = MEASURED_SIZE if size is None else (size[0], size[1])
    reports = []
    with (
        Engine.open(bundle, backend=BackendName.ONNXRUNTIME) as exact,
        progress_bar("comparing", len(photos)) as update,
    ):
        for done, photo in enumerate(photos, start=1):
            got, expected = (_outputs(each.encode([photo], load_size=load_size)[0]) for each in (engine, exact))
            reports.append(compare(got, expected, engine.manifest.architecture.prefix))
            update(done, len(photos))
    return worst(reports)


def _outputs(features: Features) -> Mapping[str, Float]:
    if features.attention is None:
        return features.tokens
    return {**features.tokens, CLS_ATTENTION: np.ravel(features.attention)}


def _parity_table(title: str, outputs: Mapping[str, Metrics]) -> Table:
    rows = [[output, *(_metric(metrics, name) for name in METRICS)] for output, metrics in outputs.items()]
    return _table(title, ["output", *(name.replace("_", " ") for name in METRICS)], rows)


def _metric(metrics: Metrics, name: str) -> str:
    """Empty where an output does not have it: [CLS] attention has no token of [CLS], for example."""
    value = metrics.get(name, math.nan)
    return "" if math.isnan(value) else f"{value:.{7 if 'cosine' in name else 3}g}"


def _facts(manifest: Manifest) -> list[list[str]]:
    size = "any" if manifest.size is None else f"{manifest.size[0]}×{manifest.size[1]} (height × width)"
    shape = manifest.architecture
    heads = "none" if manifest.saliency_heads is None else ", ".join(map(str, manifest.saliency_heads))
    return [
        ["model", f"{manifest.model}: {manifest.description} (family {manifest.family})"],
        ["checkpoint", f"{manifest.checkpoint.source} (sha256 {manifest.checkpoint.sha256[:16]}…)"],
        ["architecture", f"{shape.depth} blocks, {shape.heads} heads, width {shape.dim}, patch {shape.patch}"],
        ["before cells", _before(shape.prefix)],
        ["positions", _positions(manifest)],
        ["stride", str(manifest.stride)],
        ["approximation", "none" if manifest.riders is None else str(manifest.riders)],
        ["image size", size],
        ["facets", ", ".join(manifest.facets)],
        ["saliency heads", heads],
        ["precision", f"{manifest.precision}, opset {manifest.opset}"],
        ["largest attention logits", ", ".join(f"{value:.3g}" for value in manifest.ranges.logits) or "not measured"],
        ["largest activations", ", ".join(f"{value:.3g}" for value in manifest.ranges.activations) or "not measured"],
        ["task defaults", ", ".join(f"{task}: {facet}" for task, facet in manifest.defaults.items())],
        ["exported with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())],
    ]


def _before(prefix: int) -> str:
    """The tokens that stand before those of cells."""
    if prefix < 2:
        return "[CLS]" if prefix else "nothing"
    return f"[CLS], {prefix - 1} register{'s' * (prefix > 2)}"


def _positions(manifest: Manifest) -> str:
    """How the network is told where cells are."""
    side = manifest.architecture.trained_grid
    table = f"table of {side} × {side}, brought to other grids by rule {manifest.table_rule}" if side else ""
    rotation = "rotation of queries and keys" if manifest.rotation is not None else ""
    return " and ".join(filter(None, (table, rotation)))


def _table(title: str, columns: list[str], *sections: list[list[str]], long_names: bool = False) -> Table:
    """Nothing is cut off in a narrow terminal; names are kept in one line if they aren't long."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0 and not long_names, overflow="fold")
    for rows in sections:
        for row in rows:
            table.add_row(*map(printable, row))  # a manifest may say anything
        table.add_section()
    return table
