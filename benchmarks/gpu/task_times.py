"""Tasks end to end on a GPU: pairs from decoded frames and from files, collections from decoded images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from facetrt.benchmarks.baselines.common import Cosegmented, Pairs, Source, fill
from facetrt.benchmarks.cpu.task_times import GLUE, RESEARCH, mask_agreement, pair_agreement
from facetrt.benchmarks.gpu.encoder import engine_name
from facetrt.benchmarks.gpu.workbench import GpuWorkbench
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Clock, Contestant, Latencies, rows_of
from facetrt.kernels import log_bin

FRAMES, FILES, COSEGMENT = "match from decoded frames", "match from files", "cosegment"


def measure(bench: GpuWorkbench) -> list[Row]:
    """Models are open beforehand; results end in host memory."""
    paths = list(bench.paths[:2])
    frames = [decode(path) for path in paths]
    return [
        *_match(bench, FRAMES, frames, share=0.15),
        *_match(bench, FILES, paths, share=0.1),
        *_cosegment(bench),
    ]


def decode(path: Source) -> Any:
    """``(H, W, 3)`` uint8 RGB at the original size."""
    return np.asarray(Image.open(path).convert("RGB"))  # type: ignore[arg-type]


def _match(bench: GpuWorkbench, section: str, sources: Sequence[Source], *, share: float) -> list[Row]:
    from facetrt.benchmarks.baselines import research_style, strong_glue_gpu

    size, facet = bench.size, bench.match_facet

    def facetrt(backend: str, device: str) -> Callable[[], Pairs]:
        def run() -> Pairs:
            found = bench.gpu_engine(backend, device).match(sources[0], sources[1], load_size=size)
            return Pairs(found.cells_a, found.cells_b, found.selected)

        return run

    def glue() -> Pairs:
        return strong_glue_gpu.match(bench.glue_gpu(), sources, size, facet, bench.stride)

    def research(clock: Clock) -> Pairs:
        return research_style.match(bench.extractor_gpu(), sources, size, facet, clock, log_bin)

    def latencies(work: Callable[[], Pairs], calls: int) -> Latencies:
        return Latencies(work, bench.wait, calls)

    calls = bench.sizes.calls
    engines = {engine_name(b): latencies(facetrt(b, d), calls) for b, d in bench.target.engines}
    timings = bench.compare(
        section,
        [
            *(latency.contestant(name) for name, latency in engines.items()),
            latencies(bench.guarded(glue), max(1, calls // 20)).contestant(GLUE),
            Contestant(RESEARCH, bench.guarded(research), rounds=2, prepare=bench.guarded(bench.extractor_gpu)),
        ],
        share=share,
    )
    expected = timings[GLUE].result

    def quality(name: str, result: Pairs) -> dict[str, float]:
        return {} if name == GLUE or expected is None else pair_agreement(result, expected)

    rows = rows_of(
        section,
        timings,
        [GLUE, RESEARCH],
        quality=quality,
        details=lambda name, result: {"best buddies kept": len(result.cells_a)},
    )
    return rows + [row for name, latency in engines.items() for row in latency.row(section, name)]


def _cosegment(bench: GpuWorkbench) -> list[Row]:
    """Without refinement, which is the same host code for all."""
    from facetrt.benchmarks.baselines import research_style, strong_glue_gpu

    images, size, facet = [decode(path) for path in bench.paths], bench.size, bench.cosegment_facet

    def facetrt(backend: str, device: str) -> Callable[[Clock], Cosegmented]:
        def run(clock: Clock) -> Cosegmented:
            masks = bench.gpu_engine(backend, device).cosegment(images, load_size=size, refine="none")
            return Cosegmented([mask.loaded_mask for mask in masks], [mask.labels.ravel() for mask in masks])

        return run

    def glue(clock: Clock) -> Cosegmented:
        return strong_glue_gpu.cosegment(bench.glue_gpu(), images, size, facet, bench.stride, bench.sizes.batch)

    def research(clock: Clock) -> Cosegmented:
        extractors = bench.extractor_gpu(), bench.extractor_gpu(8)
        return research_style.cosegment(*extractors, images, size, facet, clock, finish=fill)

    contestants = [
        *(Contestant(engine_name(b), facetrt(b, d)) for b, d in bench.target.engines),
        Contestant(GLUE, bench.guarded(glue)),
        Contestant(RESEARCH, bench.guarded(research), rounds=1, prepare=bench.guarded(lambda: bench.extractor_gpu(8))),
    ]
    timings = bench.compare(COSEGMENT, contestants, share=0.1)
    expected = timings[GLUE].result

    def details(name: str, found: Cosegmented) -> dict[str, Any]:
        spread = timings[name].spread
        rate = {} if spread is None else {"images/s": round(len(images) / spread.median, 1)}
        return {"images": len(images), "k": int(max(labels.max() for labels in found.labels)) + 1, **rate}

    def quality(name: str, result: Cosegmented) -> dict[str, float]:
        return {} if name == GLUE or expected is None else mask_agreement(result, expected)

    return rows_of(COSEGMENT, timings, [GLUE, RESEARCH], quality=quality, details=details)
