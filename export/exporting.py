"""Export: load, cut down, trace, compare, write."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch.export import Dim

from facetrt.engine.backends import parity
from facetrt.engine.backends.choice import make_backend
from facetrt.engine.backends.run_options import BackendName, Precision, RunOptions
from facetrt.engine.backends.widening import widen
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.graph import check_graph
from facetrt.engine.bundle.manifest import (
    ENCODER,
    MANIFEST,
    PADDING,
    POSITIONAL,
    ROTATION,
    SCHEMA,
    SEGMENTER,
    Architecture,
    Checkpoint,
    FileEntry,
    Fp32Parts,
    Manifest,
    Normalisation,
    ParityReport,
    PrecisionRecord,
    Ranges,
    Riders,
    TaskAgreement,
)
from facetrt.engine.bundle.positional import Cells
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder
from facetrt.engine.files import Content, atomic_folder
from facetrt.engine.images.fitting import rounded_colour
from facetrt.engine.images.geometry import grid_size
from facetrt.engine.images.loading import resize
from facetrt.engine.machine.memory import encoding_bytes, fits, too_many, too_much
from facetrt.engine.machine.processor import installed_versions
from facetrt.engine.samples import sample_images, second_view
from facetrt.engine.tasks.agreement import TASKS, FeaturePair, absent_tasks, compare_tasks
from facetrt.engine.tasks.discovery.segmenter import Segmenter
from facetrt.export.additions import compile_into
from facetrt.export.attention import add_body
from facetrt.export.backbones.parts import read_rotation, read_table
from facetrt.export.choosing import HALVES, Measures, choose_precision
from facetrt.export.encoder import RESULTS, ROTATED, Arithmetic, FacetEncoder
from facetrt.export.export_options import ExportOptions, Facet, FacetKind, GraphPrecision
from facetrt.export.mending import file_entry
from facetrt.export.models import ModelSpec, find_model
from facetrt.export.precision import (
    EMULATED,
    EMULATED_ROOM,
    Outputs,
    Sample,
    TorchBackend,
    Trial,
    hold_contract,
    measure,
    measure_on_openvino,
    measure_ranges,
    openvino_runs_bf16,
    relative_time,
    run,
)
from facetrt.export.reference import ReferenceModel
from facetrt.export.segmenter import read_segmenter
from facetrt.export.weights import DownloadProgress, fetch_checkpoint, load_strictly, load_weights
from facetrt.kernels.errors import BackendError, InputError, ParityError

Report = Callable[[str], None]

TASK_SIDE, TASK_PHOTOGRAPHS = 96, 3  # pixels and number: seconds of a large model's time
MAX_GRAPH_BYTES = 2_000_000_000  # protobuf's bound is 2 GiB, names and nodes included
OPSET = 18  # the oldest that every backend here and TensorRT's parsers on embedded boards accept
KINDS = {
    GraphPrecision.FP32: onnx.TensorProto.FLOAT,
    GraphPrecision.FP16: onnx.TensorProto.FLOAT16,
    GraphPrecision.BF16: onnx.TensorProto.BFLOAT16,
}
DTYPES = {GraphPrecision.FP32: torch.float32, GraphPrecision.FP16: torch.float16, GraphPrecision.BF16: torch.bfloat16}


def export_bundle(
    model: str,
    out: Path | str,
    options: ExportOptions | None = None,
    *,
    weights: Path | None = None,
    force: bool = False,
    report: Report = lambda stage: None,
    download: DownloadProgress | None = None,
) -> Manifest:
    """Export a model as a bundle folder.

    The exported graph is run next to the unpruned torch model on photographs and noise before anything is published; a
    graph that misses the parity contract is not written.

    Args:
        model: a name from :data:`facetrt.export.models.MODELS`.
        out: the folder to make; it appears complete or not at all.
        weights: a checkpoint file; the published one, cached or downloaded, if None.
        force: replace a bundle that is already there.
        report: called with the name of each stage.

    Raises:
        InputError: unknown model, facets or heads that it does not have, a checkpoint that does not fit.
        MissingFileError: a checkpoint that is not there and cannot be downloaded.
        OutputError: ``out`` exists or cannot be written.
        ParityError: the graph does not reproduce the model.
    """
    spec = find_model(model)
    options = resolve_options(spec, options or ExportOptions())
    with atomic_folder(out, force=force, content=Content.BUNDLE) as folder:
        report("loading weights")
        vit, checkpoint = load_model(spec, weights, download, report)
        if options.saliency and options.saliency_heads is None:
            report(f"no saliency: it is the attention of [CLS], and {spec.name} has no such token")
        manifest = _manifest(spec, options, checkpoint)
        sample = make_sample(vit, spec, manifest)
        if manifest.riders is not None:
            report("measuring what riders change")
            manifest = replace(manifest, riders=measure_riders(vit, spec, manifest, manifest.riders, sample))
        manifest = replace(manifest, ranges=measure_ranges(_reference(vit, spec, manifest), sample.images))
        if options.precision is GraphPrecision.AUTO:
            report("looking for the shortest precision that does")
            manifest = choose(vit, spec, options, manifest, sample)
            options = replace(options, precision=GraphPrecision(manifest.precision))
        elif options.precision is not GraphPrecision.FP32:
            report(f"looking for what {options.precision} must leave in fp32")
            manifest = with_record(manifest, options.precision, find_parts(vit, spec, options, manifest, sample))
        report("tracing the graph")
        if spec.segmenter:
            (folder / SEGMENTER).write_bytes(load_segmenter(spec, weights, download).to_bytes())
        manifest = write_files(folder, vit, spec, options, manifest)
        report("comparing with the torch model")
        manifest = _compared(folder, manifest, vit, spec, options, sample)
        if options.kernels:
            manifest = replace(manifest, files={**manifest.files, **compile_into(folder, options.kernels, report)})
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def resolve_options(spec: ModelSpec, options: ExportOptions) -> ExportOptions:
    """Fill in the model's defaults and check that the model has what is asked."""
    facets = options.facets or tuple(map(Facet.parse, spec.exported))
    _check_kinds(spec, facets)
    too_deep = [str(facet) for facet in facets if facet.layer >= spec.depth]
    if too_deep:
        raise InputError(f"{', '.join(too_deep)}: {spec.name} has layers 0 to {spec.depth - 1}")
    stride = _stride(spec, options)
    if spec.patch % stride:
        raise InputError(
            f"stride {stride} does not divide the patch size {spec.patch} of {spec.name}: expected "
            f"{', '.join(map(str, spec.strides))}"
        )
    options = replace(options, stride=stride)
    heads = options.saliency_heads
    if heads is not None and not spec.prefix:
        raise InputError(f"saliency is the attention of [CLS], and {spec.name} has no such token: leave the heads out")
    if options.saliency and heads is None and spec.prefix:
        heads = spec.saliency_heads or tuple(range(spec.heads))
    if heads is not None and (not heads or not set(heads) <= set(range(spec.heads))):
        raise InputError(f"saliency heads {','.join(map(str, heads))}: {spec.name} has heads 0 to {spec.heads - 1}")
    if heads is not None and len(set(heads)) < len(heads):
        raise InputError(f"saliency heads {','.join(map(str, heads))}: a head is named twice")
    if options.saliency_heads is not None and not options.saliency:
        raise InputError("saliency heads were given and saliency was switched off: give one")
    if options.size is not None:
        _check_fixed_size(spec, options.size, options)
    options = replace(options, facets=facets, saliency_heads=heads if options.saliency else None)
    _check_riders(spec, options)
    return options


def _stride(spec: ModelSpec, options: ExportOptions) -> int:
    return spec.default_stride if options.stride is None else options.stride


def _check_kinds(spec: ModelSpec, facets: Sequence[Facet]) -> None:
    rotated = [str(facet) for facet in facets if facet.kind in ROTATED]
    if rotated and spec.family.rotation is None:
        raise InputError(f"{', '.join(rotated)}: queries and keys of {spec.name} do not rotate; use key or query")
    normed = [str(facet) for facet in facets if facet.kind is FacetKind.NORMED]
    if normed and not spec.family.final_norm:
        raise InputError(f"{', '.join(normed)}: {spec.name} has no final norm of tokens; use token")


def _check_riders(spec: ModelSpec, options: ExportOptions) -> None:
    """Raise where riders would change nothing: no cell lies between patches, or no output needs such a block."""
    if options.riders is None:
        return
    if options.stride == spec.patch:
        raise InputError(
            f"riders {options.riders}: at stride {options.stride} every cell of {spec.name} is a patch of its own, and "
            "riders change nothing: leave them out, or use a smaller --stride"
        )
    last = _attending(spec, options) - 1
    if options.riders > last:
        expected = f"that of blocks 0 to {last} alone" if last >= 0 else "none of any block: leave riders out"
        raise InputError(f"riders {options.riders}: of attention, the outputs need {expected}")


def _attending(spec: ModelSpec, options: ExportOptions) -> int:
    """How many blocks' attention the outputs need, [CLS] attention aside."""
    needed = [facet.layer + (facet.kind in RESULTS) for facet in options.facets or ()]
    return max(needed if options.saliency_heads is None else [*needed, spec.depth - 1])


def _check_fixed_size(spec: ModelSpec, size: tuple[int, int], options: ExportOptions) -> None:
    """The torch model that the graph is compared with holds its attention in full."""
    stride = _stride(spec, options)
    grid_h, grid_w = grid_size(size, spec.patch, stride)
    cells = grid_h * grid_w
    if options.max_cells is not None and cells > options.max_cells:
        remedy = "use a smaller --size or a larger --stride, or "
        raise InputError(f"size {size[0]}x{size[1]} makes {too_many(cells, options.max_cells, remedy)}")
    needed = encoding_bytes(dim=spec.dim, heads=spec.heads, cells=cells, fused=False)
    if not fits(needed):
        raise InputError(
            f"size {size[0]}x{size[1]} makes {too_much(needed, cells, stride)}: use a smaller --size or a larger "
            "--stride"
        )


def load_model(
    spec: ModelSpec,
    weights: Path | None,
    download: DownloadProgress | None = None,
    report: Report = lambda note: None,
) -> tuple[Any, Checkpoint]:
    """The torch model with its weights, and where they came from."""
    vit = spec.build()
    state, checkpoint = load_weights(spec, weights, download, report)
    load_strictly(vit, state, checkpoint.source)
    return vit, checkpoint


def load_segmenter(spec: ModelSpec, weights: Path | None, download: DownloadProgress | None = None) -> Segmenter:
    """SelfMask's segmenter, which lies in the checkpoint of its backbone."""
    return read_segmenter(fetch_checkpoint(spec, download) if weights is None else weights)


def write_files(folder: Path, vit: Any, spec: ModelSpec, options: ExportOptions, manifest: Manifest) -> Manifest:
    """Trace the encoder into ``folder``; returns the manifest with its files."""
    parts = manifest.fp32_parts(options.precision)
    network = make_encoder(vit, spec, options, manifest, fp32=parts, logits=manifest.ranges.logits)
    if options.size is None:
        positions = position_tables(vit, manifest)
        tables = {POSITIONAL: positions.positional, ROTATION: positions.periods, PADDING: padding_of(network, spec)}
        for name, table in tables.items():
            if table is not None:
                np.save(folder / name, table)
    _check_graph_size(network, spec, options)
    trace(network, folder / ENCODER, options, manifest)
    return replace(manifest, files={p.name: file_entry(p) for p in sorted(folder.iterdir())})


def _check_graph_size(network: FacetEncoder, spec: ModelSpec, options: ExportOptions) -> None:
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in network.parameters())
    if nbytes > MAX_GRAPH_BYTES:
        raise InputError(
            f"the weights that these facets of {spec.name} need take {nbytes / 1e9:.1f} GB in {options.precision}, and "
            f"one ONNX file holds at most {MAX_GRAPH_BYTES / 1e9:.1f}: export with --precision bf16 or fp16, or facets "
            "of earlier layers without saliency"
        )


def padding_of(network: FacetEncoder, spec: ModelSpec) -> NDArray[np.float32]:
    """``(patch, patch, C)``: what a pixel of the mean colour adds to a patch beside one of the nearest bytes."""
    mean = 255 * np.asarray(spec.normalisation[0], np.float64)
    weight = network.patches.weight.detach().double().numpy()  # (C, 3, patch, patch), for bytes
    missing = mean - rounded_colour(spec.normalisation[0])
    return np.ascontiguousarray(np.einsum("ckyx,k->yxc", weight, missing), np.float32)


def position_tables(vit: Any, manifest: Manifest) -> Bundle:
    """A bundle without a graph, that knows where cells are.

    Raises:
        InputError: the network turns otherwise than its family says.
    """
    rotation, periods = read_rotation(vit) or (None, None)
    if rotation != manifest.rotation:
        raise InputError(f"{manifest.model} rotates by {rotation}: expected {manifest.rotation}")
    trained = read_table(vit)
    table = None if trained is None else np.ascontiguousarray(trained.numpy(), np.float32)
    free = replace(manifest, size=None, files={ENCODER: FileEntry(0, "")})
    return Bundle(Path(), free, b"", table, periods=periods)


def make_encoder(
    vit: Any,
    spec: ModelSpec,
    options: ExportOptions,
    manifest: Manifest,
    *,
    fp32: Fp32Parts | None = None,
    logits: Sequence[float] = (),
    emulated: bool = False,
) -> FacetEncoder:
    """The pruned network; its positional and rotary tables are baked in where the size is fixed.

    Args:
        fp32: what stays in fp32 where ``options.precision`` is shorter.
        logits: see :class:`facetrt.export.encoder.FacetEncoder`.
        emulated: with the rounding of that precision in fp32 arithmetic, which runs in torch on any processor.
    """
    baked = {}
    if options.size is not None:
        cells = Cells(options.size, spec.patch, manifest.stride)
        baked = {n: torch.from_numpy(v.copy()) for n, v in position_tables(vit, manifest).positions(cells).items()}
    mean, std = spec.normalisation
    encoder = FacetEncoder(
        vit,
        stride=manifest.stride,
        facets=options.facets or (),
        saliency_heads=options.saliency_heads,
        mean=mean,
        std=std,
        arithmetic=Arithmetic(DTYPES[options.precision], rounded=emulated),
        fp32=fp32,
        logits=logits,
        tables=baked,
        riders=None if manifest.riders is None else manifest.riders.from_block,
    )
    return encoder.eval()


def trace(encoder: FacetEncoder, path: Path, options: ExportOptions, manifest: Manifest) -> None:
    """Write the encoder as a single-file ONNX graph.

    In a dynamic graph the symbols are the batch, the grid of the patch convolution and the grid of cells taken from it:
    stating pixel sizes as multiples of the convolution's grid is what lets the tracer prove all shapes.
    """
    inputs, shapes = _example(manifest, options.size)
    with _quiet():
        program = torch.onnx.export(
            encoder,
            kwargs=inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=manifest.outputs,
            dynamic_shapes=shapes,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise BackendError("torch could not export the encoder to ONNX")
    add_body(program.model, OPSET, KINDS[options.precision])
    program.save(path, external_data=False)


def _example(
    manifest: Manifest, size: tuple[int, int] | None
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]]]:
    """Example inputs, and which of their dimensions are symbols."""
    batch = Dim("batch", min=1, max=1024)
    if size is not None:
        return {"images": torch.zeros(2, *size, 3, dtype=torch.uint8)}, {"images": {0: batch}}
    conv_h, conv_w, grid_h, grid_w = (Dim(n, min=2, max=4096) for n in ("conv_h", "conv_w", "grid_h", "grid_w"))
    model, stride = manifest.architecture, manifest.stride
    margin = model.patch - stride
    height, width = (stride * cells + margin if margin else stride * cells for cells in (conv_h, conv_w))
    inputs: dict[str, tuple[torch.Tensor, dict[int, Any]]] = {
        "images": (
            torch.zeros(2, stride * 9 + margin, stride * 11 + margin, 3, dtype=torch.uint8),
            {0: batch, 1: height, 2: width},
        ),
        "positional": (torch.zeros(1, 5, 6, model.dim), {1: grid_h, 2: grid_w}),
        "rows": (torch.arange(5) * 2, {0: grid_h}),
        "cols": (torch.arange(6) * 2, {0: grid_w}),
    }
    if manifest.rotation is not None:
        inputs["rotation"] = (torch.zeros(2, 5, 6, model.head_dim // 2), {1: grid_h, 2: grid_w})
    if manifest.riders is not None:
        inputs["carriers"] = (torch.arange(9), {0: Dim("carriers", min=2, max=1 << 24)})
    return {n: value for n, (value, _) in inputs.items()}, {n: shape for n, (_, shape) in inputs.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's deprecation and progress notes off the terminal; its errors are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------- measurements
def make_sample(vit: Any, spec: ModelSpec, manifest: Manifest) -> Sample:
    """The images that everything is measured on, and what the torch model gives for them in float64."""
    images = list(dict(_parity_images(manifest)).values())
    return Sample(images, reference_outputs(vit, spec, manifest, images, torch.float64), spec.prefix)


def measure_riders(vit: Any, spec: ModelSpec, manifest: Manifest, riders: Riders, sample: Sample) -> Riders:
    """How far the outputs of a network with riders are from those of the full one, both in float64."""
    full = reference_outputs(vit, spec, replace(manifest, riders=None), sample.images, torch.float64)
    deviation = replace(sample, exact=full).figures(sample.exact)
    return replace(riders, deviation=ParityReport(list(dict(_parity_images(manifest))), deviation))


def reference_outputs(
    vit: Any, spec: ModelSpec, manifest: Manifest, images: Iterable[NDArray[np.uint8]], dtype: torch.dtype
) -> list[Outputs]:
    """What the unpruned torch model gives for each image, in arithmetic of ``dtype``."""
    model = _reference(vit, spec, manifest, dtype)
    facets = [Facet.parse(name) for name in manifest.facets]
    return [model.run(pixels, facets) for pixels in images]


def _reference(vit: Any, spec: ModelSpec, manifest: Manifest, dtype: torch.dtype = torch.float32) -> ReferenceModel:
    riders = None if manifest.riders is None else manifest.riders.from_block
    heads = manifest.saliency_heads
    return ReferenceModel(vit, spec, stride=manifest.stride, saliency_heads=heads, dtype=dtype, riders=riders)


def with_record(manifest: Manifest, precision: str, record: PrecisionRecord) -> Manifest:
    """The manifest with what was measured of one precision."""
    return replace(manifest, precisions={**manifest.precisions, str(precision): record})


def choose(vit: Any, spec: ModelSpec, options: ExportOptions, manifest: Manifest, sample: Sample) -> Manifest:
    """The manifest with the precision that measurements allow, its record and why it was taken."""
    tasks = task_trial(vit, spec, options, manifest)

    def measures(precision: GraphPrecision) -> Measures:
        half = replace(options, precision=precision)
        trial, emulate = (emulation(vit, spec, half, manifest, each) for each in (sample, sample.first))
        return Measures(trial, emulate, partial(tasks, precision))

    ranges = measure_ranges(_reference(vit, spec, manifest), sample.images, residual=False)
    choice = choose_precision(manifest, ranges, {each: measures(GraphPrecision(each)) for each in HALVES})
    manifest = replace(manifest, precision=choice.taken.precision, candidates=choice.candidates)
    return manifest if choice.record is None else with_record(manifest, manifest.precision, choice.record)


def find_parts(
    vit: Any, spec: ModelSpec, options: ExportOptions, manifest: Manifest, sample: Sample
) -> PrecisionRecord:
    """What ``options.precision`` must leave in fp32, found by emulated rounding.

    Raises:
        ParityError: the contract does not hold whatever stays in fp32.
    """
    precision = Precision(options.precision)
    trial = emulation(vit, spec, options, manifest, sample)
    first = emulation(vit, spec, options, manifest, sample.first)
    record = hold_contract(precision, manifest, trial, first, room=EMULATED_ROOM)
    if not record.holds:
        raise ParityError(
            f"{precision} misses its contract with these weights: {record.missed}, and fp32 for [CLS] attention and "
            "the blocks that do most harm does not help; no bundle was written: export with --precision fp32"
        )
    return replace(record, tasks=task_trial(vit, spec, options, manifest)(options.precision, record.fp32))


def task_trial(
    vit: Any, spec: ModelSpec, options: ExportOptions, manifest: Manifest
) -> Callable[[GraphPrecision, Fp32Parts], TaskAgreement]:
    """Measures what tasks make of a half precision, on small photographs, by emulated rounding, against fp32."""
    positions, side = position_tables(vit, manifest), task_side(spec.patch)
    pairs = task_pairs(side)
    measured = f"{len(pairs)} photographs of {side} pixels and second views of them, {EMULATED}"
    free = replace(options, size=None)  # whatever the bundle's size, the photographs stay small

    def encode(precision: GraphPrecision, parts: Fp32Parts) -> list[FeaturePair]:
        chosen = replace(free, precision=precision)
        emulated = precision is not GraphPrecision.FP32
        logits = manifest.ranges.logits
        network = make_encoder(vit, spec, chosen, manifest, fp32=parts, logits=logits, emulated=emulated)
        encoder = Encoder(positions, TorchBackend(positions, network), max_cells=None)
        found = encoder.encode([view for pair in pairs for view in pair], EncodeOptions())
        return list(zip(found, found, strict=True))

    exact = cache(partial(encode, GraphPrecision.FP32, Fp32Parts()))

    def trial(precision: GraphPrecision, parts: Fp32Parts) -> TaskAgreement:
        absent = absent_tasks(manifest)
        if len(absent) == len(TASKS):  # nothing to encode for
            return TaskAgreement(measured, {}, absent, "")
        return compare_tasks(exact(), encode(precision, parts), manifest, measured)

    return trial


def emulation(vit: Any, spec: ModelSpec, options: ExportOptions, manifest: Manifest, sample: Sample) -> Trial:
    """Measures ``options.precision`` by rounding as hardware would, in torch, without tracing a graph."""
    bundle = position_tables(vit, manifest)
    if not manifest.dynamic:
        bundle = replace(bundle, manifest=replace(bundle.manifest, size=manifest.size))

    def trial(parts: Fp32Parts) -> PrecisionRecord:
        logits = manifest.ranges.logits
        network = make_encoder(vit, spec, options, manifest, fp32=parts, logits=logits, emulated=True)
        backend = TorchBackend(bundle, network)
        return measure(Precision(options.precision), parts, sample, backend, bundle, EMULATED)

    return trial


def _compared(
    folder: Path, manifest: Manifest, vit: Any, spec: ModelSpec, options: ExportOptions, sample: Sample
) -> Manifest:
    """The manifest with what the graph's own precision gives and, of an fp32 bundle, what bf16 does."""
    report = verify(folder, manifest, vit, spec, sample)
    measured = f"onnxruntime {manifest.tools.get('onnxruntime', '')}"
    found = manifest.precisions.get(manifest.precision)
    tasks = None if found is None else found.tasks
    own = PrecisionRecord("", measured, manifest.fp32_parts(manifest.precision), report.outputs, None, tasks)
    manifest = with_record(replace(manifest, parity=report), manifest.precision, own)
    if options.precision is not GraphPrecision.FP32 or not options.measure:
        return manifest
    return with_record(manifest, GraphPrecision.BF16, measure_bf16(folder, manifest, vit, spec, options, sample))


def measure_bf16(
    folder: Path, manifest: Manifest, vit: Any, spec: ModelSpec, options: ExportOptions, sample: Sample
) -> PrecisionRecord:
    """How an fp32 bundle does in bf16, by OpenVINO where it can run that here, else by emulated rounding."""
    half = replace(options, precision=GraphPrecision.BF16)
    trial = emulation(vit, spec, half, manifest, sample)
    bundle, here = _opened(folder, manifest), openvino_runs_bf16()
    if here:
        trial = measure_on_openvino(sample, bundle)
    record = hold_contract(Precision.BF16, manifest, trial, emulation(vit, spec, half, manifest, sample.first))
    if record.holds:
        record = replace(record, tasks=task_trial(vit, spec, half, manifest)(GraphPrecision.BF16, record.fp32))
    if not here or not record.holds:
        return record
    return replace(record, relative_time=relative_time(sample.images[0], bundle, record.fp32))


def verify(folder: Path, manifest: Manifest, vit: Any, spec: ModelSpec, sample: Sample | None = None) -> ParityReport:
    """Run the exported graph through the engine and hold it to the contract of its precision, against float64.

    In fp32 it is also held to what torch's own fp32 loses: that tells rounding from a wrong graph.
    """
    sample = sample or make_sample(vit, spec, manifest)
    bundle = _runnable(_opened(folder, manifest))
    try:
        got = _outputs(bundle, sample.images)
        outputs = sample.figures(got)
        if manifest.precision == GraphPrecision.FP32:
            single = reference_outputs(vit, spec, manifest, sample.images, torch.float32)
            outputs = _with_rounding(outputs, got, single, sample)
        parity.check(outputs, Precision(manifest.precision))
    except ParityError as error:
        raise ParityError(f"the exported graph does not reproduce the model: {error}; no bundle was written") from None
    return ParityReport(list(dict(_parity_images(manifest))), outputs)


def _opened(folder: Path, manifest: Manifest) -> Bundle:
    encoder = (folder / ENCODER).read_bytes()
    check_graph(encoder, manifest)  # as opening will: what is written can be opened
    positional, periods = (
        np.load(folder / name) if (folder / name).exists() else None for name in (POSITIONAL, ROTATION)
    )
    return Bundle(folder, manifest, encoder, positional, periods=periods)


def _outputs(bundle: Bundle, images: Iterable[NDArray[np.uint8]]) -> list[Outputs]:
    backend = make_backend(bundle, RunOptions(BackendName.ONNXRUNTIME))
    try:
        encoder = Encoder(bundle, backend, max_cells=None)
        return [run(encoder, pixels) for pixels in images]
    finally:
        backend.close()


def _with_rounding(
    outputs: dict[str, parity.Metrics], got: Sequence[Outputs], single: Sequence[Outputs], sample: Sample
) -> dict[str, parity.Metrics]:
    """The outputs' metrics, and beside them what the graph and torch's fp32 lose to rounding, once that is checked."""
    ours, torchs = (
        parity.worst([parity.rounding_errors(*pair, sample.prefix) for pair in zip(each, sample.exact, strict=True)])
        for each in (got, single)
    )
    parity.check_rounding(ours, torchs)
    return {
        name: metrics | ours[name] | {f"torch_{figure}": value for figure, value in torchs[name].items()}
        for name, metrics in outputs.items()
    }


def _runnable(bundle: Bundle) -> Bundle:
    """The bundle as a CPU can run it: bf16, which no CPU backend runs, in fp32 with every step rounded to bf16."""
    if bundle.manifest.precision != GraphPrecision.BF16:
        return bundle
    rounded = widen(onnx.load_from_string(bundle.encoder), rounding=True).SerializeToString()
    return replace(bundle, manifest=replace(bundle.manifest, precision=GraphPrecision.FP32), encoder=rounded)


def _parity_images(manifest: Manifest) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Photographs and noise; a dynamic bundle sees square, oblong and non-divisible sizes."""
    patch = manifest.architecture.patch
    sizes = [(12 * patch, 12 * patch), (9 * patch + 3, 14 * patch + 5)]
    if manifest.size is not None:
        sizes = [(manifest.size[0], manifest.size[1])]
    for name, image in list(sample_images().items())[:2]:
        for height, width in sizes:
            yield f"{name} {height}×{width}", resize(image, (height, width))
    for height, width in sizes[:1]:
        yield f"noise {height}×{width}", np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def task_side(patch: int) -> int:
    """Pixels of the photographs that tasks are compared on: whole patches, about as small as tasks make sense on."""
    return patch * -(-TASK_SIDE // patch)


def task_pairs(side: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Square photographs, and the same scene seen again."""
    photographs = [resize(image, (side, side)) for image in list(sample_images().values())[:TASK_PHOTOGRAPHS]]
    return [(pixels, second_view(pixels)[0]) for pixels in photographs]


def _manifest(spec: ModelSpec, options: ExportOptions, checkpoint: Checkpoint) -> Manifest:
    facets = [str(facet) for facet in options.facets or ()]
    mean, std = spec.normalisation
    return Manifest(
        schema=SCHEMA,
        family=spec.family.name,
        model=spec.name,
        description=spec.description,
        checkpoint=checkpoint,
        architecture=Architecture(spec.dim, spec.depth, spec.heads, spec.patch, spec.trained_grid, spec.prefix),
        stride=_stride(spec, options),
        facets=facets,
        saliency_heads=None if options.saliency_heads is None else list(options.saliency_heads),
        normalisation=Normalisation(list(mean), list(std)),
        size=None if options.size is None else list(options.size),
        precision=GraphPrecision.FP32 if options.precision is GraphPrecision.AUTO else options.precision,
        opset=OPSET,
        defaults=spec.defaults,
        parity=ParityReport([], {}),
        precisions={},
        ranges=Ranges([], []),
        tools=_tools(),
        positional_rule=str(spec.table_rule) if spec.trained_grid else None,
        rotation=spec.family.rotation,
        riders=None if options.riders is None else Riders(options.riders, ParityReport([], {})),
    )


def _tools() -> dict[str, str]:
    return installed_versions(("facetrt", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow"))
