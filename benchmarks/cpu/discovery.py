"""Discovery against the published algorithms: dense matrices of all pairs of cells, and SciPy's dense solver.

Encoders run at the stride of their patches, as the methods are published: a ViT-S/8 at 240 × 320 pixels has the 1,200
cells of a ViT-S/16 at 480 × 640, and the same network but for the patch convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from facetrt.benchmarks.baselines import cuts
from facetrt.benchmarks.baselines.common import Mask, load_pixels
from facetrt.benchmarks.cpu.scenes import scene_rows
from facetrt.benchmarks.cpu.task_times import PRECISIONS, RESEARCH, facetrt_name
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Clock, Contestant, rows_of
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import LinearHead
from facetrt.engine.features.features import Features, Float, Provenance, SaliencyMode
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.discovery.discovering import Discovery
from facetrt.engine.tasks.discovery.fusing import parse_terms
from facetrt.engine.tasks.discovery.heads import write_head
from facetrt.engine.tasks.discovery.maskcut import MaskCut
from facetrt.kernels import smallest_eigenvectors, threshold_graph

TOKENCUT, MASKCUT, FOUND = "discover: tokencut", "discover: maskcut, three cuts", "discover: found"
EIGENVECTOR = "discover: second eigenvector"
LANCZOS, WITH_GRAPH, DENSE = "smallest_eigenvectors", "smallest_eigenvectors and the graph", "SciPy, dense"
OURS, ENCODER, HEAD = "facetrt", "encoder alone", "encoder and head"
THRESHOLD = 0.2  # of scenes made here, whose rows have no bias
FOUND_IMAGES = 4


def measure(bench: Workbench) -> list[Row]:
    """All four comparisons."""
    return [*_tokencut(bench), *_eigenvector(bench), *_maskcut(bench), *_found(bench)]


def _tokencut(bench: Workbench) -> list[Row]:
    """A file in, the object's cells out. Untrained features are all alike: the threshold is their median cosine."""
    path, facet, size, patch = bench.paths[0], bench.cosegment_facet, _image_size(bench), bench.spec.patch

    def threshold() -> float:
        (features,) = bench.engine("fp32").encode([path], load_size=size, stride=patch)
        unit = features[str(facet)] / np.linalg.norm(features[str(facet)], axis=1, keepdims=True)
        return float(np.median(unit @ unit.T))

    tau = bench.once("discover: threshold", threshold)

    def facetrt(precision: str) -> Callable[[Clock], Mask]:
        def run(clock: Clock) -> Mask:
            engine = bench.engine(precision)
            (found,) = engine.discover([path], "tokencut", facet=str(facet), load_size=size, stride=patch, tau=tau)
            return np.asarray(found.cells.any(axis=0))

        return run

    def research(clock: Clock) -> Mask:
        rows = bench.extractor(patch).descriptors(load_pixels(path, size), facet)
        return cuts.tokencut(rows.numpy(), bench.sizes.discovery, tau)

    timings = bench.compare(
        TOKENCUT,
        [
            *(Contestant(facetrt_name(precision), facetrt(precision)) for precision in PRECISIONS),
            Contestant(RESEARCH, research),
        ],
        share=0.05,
    )
    expected = timings[RESEARCH].result

    def quality(name: str, result: Mask) -> Mapping[str, float]:
        return {} if name == RESEARCH else {"equal cells": float((result == expected).mean())}

    return rows_of(TOKENCUT, timings, [RESEARCH], quality=quality, details=lambda n, result: {"cells": result.size})


def _eigenvector(bench: Workbench) -> list[Row]:
    """The solver alone on both sides, of given weights, and ours with the graph."""
    grid = bench.sizes.eigenvector
    rows = scene_rows(grid, bench.spec.dim)
    graph = threshold_graph(rows, THRESHOLD)
    weights = graph.dense()

    timings = bench.compare(
        EIGENVECTOR,
        [
            Contestant(LANCZOS, lambda clock: smallest_eigenvectors(graph, 2).vectors[:, 1]),
            Contestant(
                WITH_GRAPH, lambda clock: smallest_eigenvectors(threshold_graph(rows, THRESHOLD), 2).vectors[:, 1]
            ),
            Contestant(DENSE, lambda clock: cuts.solve(weights), rounds=2, prepare=lambda: None),
        ],
        share=0.1,
    )
    expected = timings[DENSE].result

    def quality(name: str, result: Any) -> Mapping[str, float]:
        if name == DENSE:
            return {}
        return {"cosine": float(abs(result @ expected) / (np.linalg.norm(result) * np.linalg.norm(expected)))}

    return rows_of(EIGENVECTOR, timings, [DENSE], quality=quality, details=lambda n, result: {"cells": len(result)})


def _maskcut(bench: Workbench) -> list[Row]:
    """Three cuts of given descriptors, without the CRF."""
    grid, patch = bench.sizes.maskcut, bench.spec.patch
    rows = scene_rows(grid, bench.spec.dim)
    facet, size = str(bench.cosegment_facet), (grid[0] * patch, grid[1] * patch)
    method = MaskCut(crf=False)
    discovery = Discovery(method, parse_terms(facet), Bundle.open(bench.bundle).manifest)
    features = _features(facet, rows, Geometry(size, size, patch, patch))

    def ours(clock: Clock) -> list[Mask]:
        return list(discovery.find(features).cells)

    timings = bench.compare(
        MASKCUT,
        [
            Contestant(OURS, ours),
            Contestant(
                RESEARCH,
                lambda clock: cuts.maskcut(rows, grid, method.tau, method.cuts),
                rounds=2,
                prepare=lambda: None,
            ),
        ],
        share=0.1,
    )
    expected = timings[RESEARCH].result

    def quality(name: str, result: list[Mask]) -> Mapping[str, float]:
        if name == RESEARCH:
            return {}
        same = len(result) == len(expected)
        return {"equal cells": float((np.array(result) == np.array(expected)).mean()) if same else 0.0}

    def details(name: str, result: list[Mask]) -> Mapping[str, Any]:
        return {"cells": len(rows), "objects": len(result)}

    return rows_of(MASKCUT, timings, [RESEARCH], quality=quality, details=details)


def _found(bench: Workbench) -> list[Row]:
    """What the head, its mask and its box cost beside the encoder; files in. Any weights cost the same."""
    paths, size, patch = bench.paths[:FOUND_IMAGES], _image_size(bench), bench.spec.patch
    weight = np.random.default_rng(0).normal(size=bench.spec.dim).tolist()
    head = bench.folder / "head.json"
    write_head(LinearHead(str(bench.cosegment_facet), weight, 0.0, "benchmark"), head)

    def encoder(clock: Clock) -> int:
        return len(bench.engine("fp32").encode(paths, load_size=size, stride=patch, fit="pad"))

    def found(clock: Clock) -> int:
        return len(bench.engine("fp32").discover(paths, "found", load_size=size, stride=patch, head=head))

    timings = bench.compare(FOUND, [Contestant(ENCODER, encoder), Contestant(HEAD, found)], share=0.05)
    return rows_of(FOUND, timings, [ENCODER, HEAD], details=lambda name, result: {"images": result})


def _image_size(bench: Workbench) -> tuple[int, int]:
    """``(height, width)`` that gives the bench's cells."""
    height, width = bench.sizes.discovery
    return height * bench.spec.patch, width * bench.spec.patch


def _features(facet: str, rows: Float, geometry: Geometry) -> Features:
    """Features of rows ``(cells, C)`` that no encoder made, on noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (*geometry.image_size, 3), np.uint8)
    tokens = {facet: np.concatenate([np.zeros_like(rows[:1]), rows])}
    return Features(tokens, None, SaliencyMode.FULL, geometry, pixels, "scene", Provenance("", "", "", "", ""))
