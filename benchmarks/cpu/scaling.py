"""How time grows with the size of the image, the stride and the number of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from facetrt.benchmarks.baselines.common import load_pixels
from facetrt.benchmarks.cpu.child import run_job
from facetrt.benchmarks.cpu.task_times import PRECISIONS, facetrt_name
from facetrt.benchmarks.cpu.workbench import Workbench, write_images
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Clock, Contestant, rows_of
from facetrt.engine.bundle.bundle import BUILTIN
from facetrt.engine.images.geometry import grid_size

SIZES, STRIDES, NUMBERS = "scaling: image size", "scaling: stride", "scaling: number of images"


def measure(bench: Workbench) -> list[Row]:
    """All three curves. Each row's details hold the place on its curve."""
    return [*_encoding(bench, SIZES), *_encoding(bench, STRIDES), *_numbers(bench)]


def _encoding(bench: Workbench, section: str) -> list[Row]:
    """Encoding one image, at several sizes or at the strides that the bundle has."""
    patch = bench.spec.patch
    strides = [s for s in (bench.stride, 2 * bench.stride) if patch % s == 0] if section == STRIDES else [bench.stride]
    sides = bench.sizes.sides if section == SIZES else (bench.sizes.side,)
    rows = []
    for side, stride in ((side, stride) for side in sides for stride in strides):
        where = f"stride {stride}" if section == STRIDES else f"{side} px"
        names = {precision: f"{facetrt_name(precision)}, {where}" for precision in PRECISIONS}
        timings = bench.compare(
            section,
            [Contestant(name, _encode(bench, precision, side, stride)) for precision, name in names.items()],
            share=0.015,
            rounds=min(bench.rounds, 3),
        )
        grid = grid_size((side, side), patch, stride)
        place = {"side": side, "stride": stride, "cells": grid[0] * grid[1]}
        rows += rows_of(section, timings, [names["fp32"]], details=_always(place))
    return rows


def _always(details: Mapping[str, Any]) -> Callable[[str, Any], Mapping[str, Any]]:
    return lambda name, result: details


def _encode(bench: Workbench, precision: str, side: int, stride: int) -> Callable[[Clock], object]:
    pixels = load_pixels(bench.paths[0], (side, side))
    return lambda clock: bench.engine(precision).encode([pixels], load_size=None, stride=stride)


def _numbers(bench: Workbench) -> list[Row]:
    """Co-segmentation with the built-in model, whose short encoding leaves time for many images; time per image."""
    paths = write_images(bench.folder / "many", bench.sizes.many)
    counts = (bench.sizes.images, bench.sizes.many)
    memory: dict[str, float] = {}

    def cosegment(count: int) -> Callable[[Clock], object]:
        def run(clock: Clock) -> object:
            result = run_job("cosegment", bundle=BUILTIN, paths=paths[:count], side=bench.sizes.side, precision="fp32")
            memory[images_name(count)] = result["peak_mib"]
            clock.charge(result["seconds"] / count)
            return count

        return run

    contestants = [Contestant(images_name(count), cosegment(count), prepare=lambda: None) for count in counts]
    timings = bench.compare(NUMBERS, contestants, share=0.08, rounds=min(bench.rounds, 3))
    return rows_of(
        NUMBERS,
        timings,
        [images_name(counts[1])],
        details=lambda name, result: {"images": result, "peak MiB": round(memory[name])},
    )


def images_name(count: int) -> str:
    """How the rows call a co-segmentation of so many images."""
    return f"per image, built-in model, {count} images"
