"""Tasks end to end: from image files to result files, models open beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.baselines.common import Cosegmented, Pairs
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Clock, Contestant, rows_of
from facetrt.engine.features.features import Features, SaliencyMode
from facetrt.engine.files import write_png
from facetrt.kernels import log_bin
from facetrt.kernels.errors import BackendError

PRECISIONS = ("fp32", "bf16")
GLUE, RESEARCH = "strong glue", "research style"


def facetrt_name(precision: str) -> str:
    """How the rows call facetrt at a precision."""
    return f"facetrt {precision}"


def measure_match(bench: Workbench) -> list[Row]:
    """Two files in, point pairs out."""
    from facetrt.benchmarks.baselines import research_style, strong_glue

    paths, facet = bench.paths[:2], bench.match_facet

    def facetrt(precision: str) -> Callable[[Clock], Pairs]:
        def run(clock: Clock) -> Pairs:
            matches = bench.engine(precision).match(*paths, load_size=bench.size)
            return _write_pairs(bench.folder, Pairs(matches.cells_a, matches.cells_b, matches.selected))

        return run

    def glue(clock: Clock) -> Pairs:
        return _write_pairs(bench.folder, strong_glue.match(bench.glue(), paths, bench.size, facet))

    def research(clock: Clock) -> Pairs:
        pairs = research_style.match(bench.extractor(), paths, bench.size, facet, clock, log_bin)
        return _write_pairs(bench.folder, pairs)

    timings = bench.compare(
        "match",
        [
            *(Contestant(facetrt_name(precision), facetrt(precision)) for precision in PRECISIONS),
            Contestant(GLUE, glue),
            Contestant(RESEARCH, research, rounds=2, sampling=True, prepare=bench.extractor),
        ],
        share=0.2,
    )
    expected = timings[GLUE].result
    return rows_of(
        "match",
        timings,
        [GLUE, RESEARCH],
        quality=lambda name, result: {} if name == GLUE else pair_agreement(result, expected),
        details=lambda name, result: {"best buddies kept": len(result.cells_a)},
    )


def _write_pairs(folder: Path, pairs: Pairs) -> Pairs:
    selected = pairs.selected
    np.savez(folder / "pairs.npz", cells_a=pairs.cells_a[selected], cells_b=pairs.cells_b[selected])
    return pairs


def pair_agreement(got: Pairs, expected: Pairs) -> dict[str, float]:
    """Kept best buddies and selected points in common, as share of all that either has."""
    kept = [set(zip(p.cells_a.tolist(), p.cells_b.tolist(), strict=True)) for p in (got, expected)]
    points = [set(p.cells_a[p.selected].tolist()) for p in (got, expected)]
    return {
        "equal best buddies": len(kept[0] & kept[1]) / max(len(kept[0] | kept[1]), 1),
        "equal points": len(points[0] & points[1]) / max(len(points[0] | points[1]), 1),
    }


def measure_cosegment(bench: Workbench) -> tuple[list[Row], list[Features]]:
    """Files in, masks out; also facetrt's fp32 features, for the kernels."""
    from facetrt.benchmarks.baselines import research_style, strong_glue

    facet, kept = bench.cosegment_facet, list[Features]()

    def facetrt(precision: str) -> Callable[[Clock], Cosegmented]:
        def run(clock: Clock) -> Cosegmented:
            found, features = cosegment(bench, precision)
            if precision == "fp32":
                kept[:] = features
            return _write_masks(bench.folder, found)

        return run

    def glue(clock: Clock) -> Cosegmented:
        return _write_masks(bench.folder, strong_glue.cosegment(bench.glue(), bench.paths, bench.size, facet))

    def research(clock: Clock) -> Cosegmented:
        known = [(item[str(facet)], item.saliency) for item in kept]
        extractors = bench.extractor(), bench.extractor(8)
        found = research_style.cosegment(*extractors, bench.paths, bench.size, facet, clock, known)
        return _write_masks(bench.folder, found)

    timings = bench.compare(
        "cosegment",
        [
            *(
                Contestant(facetrt_name(precision), facetrt(precision), prepare=_encode_one(bench, precision))
                for precision in PRECISIONS
            ),
            Contestant(GLUE, glue, prepare=bench.glue),
            Contestant(RESEARCH, research, rounds=1, sampling=True, prepare=lambda: bench.extractor(8)),
        ],
        share=0.4,
        rounds=min(bench.rounds, 2),
    )
    if not kept:
        raise BackendError(f"co-segmentation in fp32 cannot run here: {timings[facetrt_name('fp32')].reason}")
    expected = timings[GLUE].result
    rows = rows_of(
        "cosegment",
        timings,
        [GLUE, RESEARCH],
        quality=lambda name, result: {} if name == GLUE else mask_agreement(result, expected),
        details=_describe_masks,
    )
    return rows, kept


def cosegment(bench: Workbench, precision: str) -> tuple[Cosegmented, list[Features]]:
    """Co-segment as the command line does: collect the features, then co-segment them."""
    engine = bench.engine(precision)
    with engine.collect(
        bench.paths,
        facets=[str(bench.cosegment_facet)],
        load_size=bench.size,
        saliency=SaliencyMode.LOW_RESOLUTION,
    ) as features:
        masks = engine.cosegment(features)
        found = Cosegmented([mask.loaded_mask for mask in masks], [mask.labels.ravel() for mask in masks])
        return found, list(features)


def _encode_one(bench: Workbench, precision: str) -> Callable[[], object]:
    """Warms up: opens the engine and runs it once."""
    return lambda: bench.engine(precision).encode(bench.paths[:1], load_size=bench.size, saliency="low_resolution")


def _write_masks(folder: Path, found: Cosegmented) -> Cosegmented:
    for number, mask in enumerate(found.masks):
        write_png(folder / f"mask{number}.png", mask)
    return found


def mask_agreement(got: Cosegmented, expected: Cosegmented) -> dict[str, float]:
    shares = [float((a == b).mean()) for a, b in zip(got.labels, expected.labels, strict=True)]
    return {"mask IoU": mean_iou(got.masks, expected.masks), "equal clusters": float(np.mean(shares))}


def _describe_masks(name: str, found: Cosegmented) -> dict[str, Any]:
    return {"images": len(found.masks), "foreground": round(float(np.mean([m.mean() for m in found.masks])), 3)}


def mean_iou(got: Sequence[NDArray[np.bool_]], expected: Sequence[NDArray[np.bool_]]) -> float:
    """Mean over the images; two empty masks agree."""
    scores = [
        float((a & b).sum() / union) if (union := (a | b).sum()) else 1.0 for a, b in zip(got, expected, strict=True)
    ]
    return float(np.mean(scores))


def measure_parts(bench: Workbench) -> list[Row]:
    """Files in, label maps out; fp32 is the baseline of bf16."""
    paths = bench.paths[: bench.sizes.parts]

    def facetrt(precision: str) -> Callable[[Clock], list[NDArray[Any]]]:
        def run(clock: Clock) -> list[NDArray[Any]]:
            found = bench.engine(precision).segment_parts(paths, load_size=bench.size, sample_interval=10)
            for number, part in enumerate(found):
                write_png(bench.folder / f"parts{number}.png", (part.loaded_labels + 1).astype(np.uint8))
            return [part.loaded_labels for part in found]

        return run

    contestants = [
        Contestant(facetrt_name(precision), facetrt(precision), prepare=_encode_one(bench, precision))
        for precision in PRECISIONS
    ]
    timings = bench.compare("parts", contestants, share=0.05, rounds=min(bench.rounds, 3))
    expected = timings[contestants[0].name].result

    def quality(name: str, result: Any) -> Mapping[str, float]:
        if name == contestants[0].name:
            return {}
        return {"equal labels": float(np.mean([(a == b).mean() for a, b in zip(result, expected, strict=True)]))}

    return rows_of(
        "parts", timings, [contestants[0].name], quality=quality, details=lambda n, r: {"images": len(paths)}
    )
