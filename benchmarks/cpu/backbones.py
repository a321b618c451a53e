"""Today's backbones at their own stride: the publisher's normalised tokens, beside timm's forward with torch's SDPA.

Weights are timm's own initialisation, with LayerScales that let blocks matter: for time they don't. One model also runs
without its rotation, which tells what RoPE costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.baselines.common import load_pixels
from facetrt.benchmarks.cpu.encoder import check_bf16
from facetrt.benchmarks.cpu.workbench import Sizes, Workbench
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Clock, Contestant, rows_of
from facetrt.engine.backends.parity import compare_output
from facetrt.engine.bundle.manifest import MANIFEST, Checkpoint
from facetrt.engine.engine import Engine
from facetrt.export.backbones.model_spec import ModelSpec
from facetrt.export.export_options import ExportOptions, Facet
from facetrt.export.models import find_model

ROTATING, ROTATION = "dinov3_vits16", "rotation"
TIMM, TIMM_BF16 = "timm SDPA fp32", "timm SDPA bf16"
FP32, BF16, STILL = "facetrt fp32", "facetrt bf16", "facetrt fp32, nothing rotated"

Tokens = NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """A model with weights that nobody trained, as a bundle and as timm's network."""

    spec: ModelSpec
    vit: Any
    bundle: Path


def section(name: str, side: int) -> str:
    """How the rows of a model are called."""
    return f"backbone: {name} at {side}"


def measure(bench: Workbench) -> list[Row]:
    """Every model at every size."""
    rows = []
    for name in bench.sizes.models:
        subject = _subject(bench, name)
        for side in sides(bench.sizes, subject.spec):
            rows += _measure(bench, subject, side)
        if name == ROTATING:
            rows += _rotation(bench, subject)
    return rows


def _rotation(bench: Workbench, subject: Subject) -> list[Row]:
    """The same network with and without its rotation: a few per cent, so many rounds."""
    still, rows = _subject(bench, subject.spec.name, still=True), []
    for side in sides(bench.sizes, subject.spec):
        pixels, title = load_pixels(bench.paths[0], (side, side)), section(ROTATION, side)
        contestants = [
            Contestant(FP32, _facetrt(bench, subject, pixels, "fp32")),
            Contestant(STILL, _facetrt(bench, still, pixels, "fp32")),
        ]
        timings = bench.compare(title, contestants, share=0.02, rounds=5 * bench.rounds)
        rows += rows_of(title, timings, [STILL], details=lambda row, result: {"tokens": len(result)})
    return rows


def sides(sizes: Sizes, spec: ModelSpec) -> list[int]:
    """Whole patches, the nearest below each of the suite's sizes."""
    return [side // spec.patch * spec.patch for side in sizes.backbones]


def _subject(bench: Workbench, name: str, *, still: bool = False) -> Subject:
    from facetrt.export import exporting

    spec = find_model(name)
    bench.torch.manual_seed(0)
    vit = spec.build()
    for key, tensor in vit.state_dict().items():
        if "gamma" in key:
            tensor.fill_(0.5)
    if still:
        spec, vit.rope = replace(spec, family=replace(spec.family, rotation=None)), None
    folder = bench.folder / f"{name}{'-still' if still else ''}"
    folder.mkdir(parents=True)
    chosen = ExportOptions(stride=spec.patch, facets=(Facet.parse(f"normed@{spec.depth - 1}"),), saliency=False)
    options = exporting.resolve_options(spec, chosen)
    manifest = exporting._manifest(spec, options, Checkpoint("untrained", ""))
    manifest = exporting.write_files(folder, vit, spec, options, manifest)
    (folder / MANIFEST).write_text(manifest.to_json())
    return Subject(spec, vit, folder)


def _measure(bench: Workbench, subject: Subject, side: int) -> list[Row]:
    spec, name = subject.spec, section(subject.spec.name, side)
    pixels = load_pixels(bench.paths[0], (side, side))
    contestants = [
        Contestant(FP32, _facetrt(bench, subject, pixels, "fp32")),
        Contestant(BF16, _facetrt(bench, subject, pixels, "bf16")),
        Contestant(TIMM, _timm(bench, subject, pixels, bf16=False)),
        Contestant(TIMM_BF16, _timm(bench, subject, pixels, bf16=True)),
    ]
    timings = bench.compare(name, contestants, share=0.02)
    expected = timings[TIMM].result

    def quality(row: str, result: Tokens) -> Mapping[str, float]:
        if row == TIMM:
            return {}
        found = compare_output(result, expected, spec.prefix)
        return {metric: found[metric] for metric in ("mean_cosine", "p1_cosine")}

    return rows_of(name, timings, [TIMM], quality=quality, details=lambda row, result: {"tokens": len(result)})


def _facetrt(
    bench: Workbench, subject: Subject, pixels: NDArray[np.uint8], precision: str
) -> Callable[[Clock], Tokens]:
    def run(clock: Clock) -> Tokens:
        engine: Engine = bench.open(subject.bundle, precision)
        return engine.encode([pixels], load_size=None)[0].tokens[f"normed@{subject.spec.depth - 1}"]

    return run


def _timm(bench: Workbench, subject: Subject, pixels: NDArray[np.uint8], *, bf16: bool) -> Callable[[Clock], Tokens]:
    torch = bench.torch
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in subject.spec.normalisation)
    vit = subject.vit
    for block in vit.blocks:
        block.attn.fused_attn = True

    def run(clock: Clock) -> Tokens:
        check_bf16(bf16)
        images = ((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std)[None]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return np.asarray(vit.forward_features(images)[0].float().numpy())

    return run
