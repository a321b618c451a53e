"""The encoder on a GPU, from pixels in its memory to descriptors in its memory, beside torch and the GPU's limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.baselines.common import load_pixels
from facetrt.benchmarks.cpu.encoder import agreement, encoder_flops
from facetrt.benchmarks.gpu.workbench import GpuWorkbench, Pass
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Contestant, Latencies, Timings, queued, rows_of
from facetrt.engine.bundle.manifest import CLS_ATTENTION

EAGER, COMPILED = "torch eager", "strong glue"
CEILING = "matrix product"

Tokens = Mapping[str, NDArray[np.float32]]
Make = Callable[[], Pass]


def section(batch: int) -> str:
    """The section of the rows for a batch."""
    return f"encoder, batch {batch}"


def engine_name(backend: str) -> str:
    """How the rows call facetrt on a backend."""
    return f"facetrt {backend}"


def measure(bench: GpuWorkbench) -> list[Row]:
    """One image, each pass waited for; then batches, queued one behind the other."""
    return [*_latency(bench), *_throughput(bench)]


def _latency(bench: GpuWorkbench) -> list[Row]:
    images = _images(bench, 1)
    passes = {name: _Lazy(make) for name, make in _passes(bench, images).items()}
    latencies = {name: Latencies(lazy.queue, lazy.synchronize, bench.sizes.calls) for name, lazy in passes.items()}
    contestants = [latency.contestant(name) for name, latency in latencies.items()]
    timings = bench.compare(section(1), contestants, share=0.25)
    return [
        *_rows(bench, timings, passes, images),
        *(row for name, latency in latencies.items() for row in latency.row(section(1), name)),
    ]


def _throughput(bench: GpuWorkbench) -> list[Row]:
    images = _images(bench, bench.sizes.batch)
    passes = {name: _Lazy(make) for name, make in _passes(bench, images).items()}

    def contestant(name: str, lazy: _Lazy) -> Contestant:
        return Contestant(
            name,
            lambda clock: queued(clock, lazy.queue, lazy.synchronize, seconds=bench.sizes.window),
            prepare=lazy.queue,
        )

    contestants = [contestant(name, lazy) for name, lazy in passes.items()]
    timings = bench.compare(section(len(images)), [*contestants, product(bench)], share=0.25)
    return _rows(bench, timings, passes, images)


def product(bench: GpuWorkbench) -> Contestant:
    """A square matrix product in the precision of the torch baselines: the ceiling of everything that multiplies."""
    torch, target = bench.torch, bench.target
    dtype = torch.float16 if target.half else torch.float32

    def run(clock: Any) -> None:
        matrix = bench.once("matrix", lambda: torch.ones((bench.sizes.product,) * 2, dtype=dtype, device=target.torch))
        queued(clock, lambda: matrix @ matrix, bench.wait, seconds=bench.sizes.window)

    return Contestant(CEILING, bench.guarded(run))


class _Lazy:
    """A pass that is made by its first call: what cannot be made costs its own row only."""

    def __init__(self, make: Make) -> None:
        self._make = make

    @cached_property
    def made(self) -> Pass:
        return self._make()

    def queue(self) -> Any:
        return self.made.queue()

    def synchronize(self) -> None:
        self.made.synchronize()


def _images(bench: GpuWorkbench, count: int) -> NDArray[np.uint8]:
    return np.stack([load_pixels(bench.paths[i % len(bench.paths)], bench.size) for i in range(count)])


def _passes(bench: GpuWorkbench, images: NDArray[np.uint8]) -> dict[str, Make]:
    engines = {engine_name(b): partial(bench.encoder_pass, b, d, images) for b, d in bench.target.engines}
    return {
        **engines,
        EAGER: partial(torch_pass, bench, images, compiled=False),
        COMPILED: partial(torch_pass, bench, images, compiled=bench.target.compiled),
    }


def torch_pass(bench: GpuWorkbench, images: NDArray[np.uint8], *, compiled: bool, half: bool | None = None) -> Pass:
    """The strong glue's network, compiled or eager."""
    glue = bench.glue_gpu(compiled=compiled, half=half)
    batch = glue.upload(list(images))
    names = [*map(str, bench.facets), CLS_ATTENTION]

    def fetch(outputs: Any) -> Tokens:
        return {name: values.float().cpu().numpy() for name, values in zip(names, outputs, strict=True)}

    return Pass(bench.guarded(lambda: glue.encode(batch, bench.facets, bench.stride)), bench.wait, fetch)


def _apart(bench: GpuWorkbench, tokens: Tokens) -> list[Tokens]:
    """The facets of each image."""
    facets = [str(facet) for facet in bench.facets]
    return [{facet: tokens[facet][i] for facet in facets} for i in range(len(tokens[facets[0]]))]


def _rows(bench: GpuWorkbench, timings: Timings, passes: Mapping[str, _Lazy], images: NDArray[np.uint8]) -> list[Row]:
    """Quality is against the same network in fp32, by torch; rates count what facetrt and the strong glue compute."""
    exact = torch_pass(bench, images, compiled=False, half=False)
    expected = exact.fetch(exact.queue())
    flops = len(images) * encoder_flops(bench.spec, bench.stride, bench.size, bench.facets)

    def quality(name: str, result: Any) -> Mapping[str, float]:
        if name == CEILING:
            return {}
        found = passes[name].made.fetch(result)
        images_apart = zip(_apart(bench, found), _apart(bench, expected), strict=True)
        agreements = [agreement(got, wanted) for got, wanted in images_apart]
        return {key: min(one[key] for one in agreements) for key in agreements[0]}

    def details(name: str, result: Any) -> Mapping[str, Any]:
        spread = timings[name].spread
        if spread is None:
            return {}
        if name == CEILING:
            return {"TFLOP/s": round(2.0 * bench.sizes.product**3 / spread.median / 1e12, 3)}
        rates = {"images/s": round(len(images) / spread.median, 1), "TFLOP/s": round(flops / spread.median / 1e12, 3)}
        if CEILING in timings and timings[CEILING].seconds:
            best = 2.0 * bench.sizes.product**3 / min(timings[CEILING].seconds)
            rates["of the fastest product"] = round(flops / spread.median / best, 3)
        return rates

    return rows_of(section(len(images)), timings, [EAGER, COMPILED], quality=quality, details=details)
