"""The encoder on one image, by every backend and precision, beside torch and the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.baselines.common import load_pixels
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.benchmarks.machine import has_bf16
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Clock, Contestant, rows_of
from facetrt.engine.backends.parity import compare_output
from facetrt.engine.images.geometry import grid_size
from facetrt.export.export_options import Facet
from facetrt.export.models import ModelSpec
from facetrt.kernels.errors import BackendError

SECTION = "encoder"
ENGINES = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
TORCH, TORCH_BF16, RESEARCH = "torch SDPA fp32", "torch SDPA bf16", "research style"
CEILING, CEILING_BF16 = "matrix product fp32", "matrix product bf16"
LONG = {"whole keys": "none", "keys in chunks": "auto"}  # specialisation by name

Tokens = Mapping[str, NDArray[np.float32]]


def measure(bench: Workbench) -> list[Row]:
    """Image in memory → both facets and saliency. The quality column compares with torch in fp32."""
    pixels = load_pixels(bench.paths[0], bench.size)
    timings = bench.compare(SECTION, [*_engines(bench, pixels), *_torch(bench, pixels)], share=0.12)
    expected = timings[TORCH].result
    flops = encoder_flops(bench.spec, bench.stride, bench.size, bench.facets)
    product = 2.0 * bench.sizes.product**3

    def quality(name: str, result: Any) -> dict[str, float]:
        return {} if name in (CEILING, CEILING_BF16, TORCH) else agreement(result, expected)

    def details(name: str, result: Any) -> dict[str, Any]:
        spread, is_product = timings[name].spread, name in (CEILING, CEILING_BF16)
        if spread is None or name == RESEARCH:
            return {}
        rate = (product if is_product else flops) / spread.median / 1e9
        ceiling = timings[CEILING_BF16 if "bf16" in name else CEILING].seconds
        if is_product or not ceiling:
            return {"GFLOP/s": round(rate, 1)}
        return {"GFLOP/s": round(rate, 1), "of the fastest product": round(rate * 1e9 * min(ceiling) / product, 3)}

    return rows_of(SECTION, timings, [TORCH, RESEARCH], quality=quality, details=details)


def measure_long(bench: Workbench) -> list[Row]:
    """One large image in bf16, with whole keys and in chunks. The quality column compares with fp32."""
    section, side = f"encoder: {bench.sizes.long} px, bf16", (bench.sizes.long,) * 2
    pixels = load_pixels(bench.paths[0], side)

    def encode(precision: str, specialisation: str) -> Tokens:
        return bench.engine(precision, "openvino", specialisation).encode([pixels], load_size=None)[0].tokens

    def run(specialisation: str) -> Callable[[Clock], Tokens]:
        return lambda clock: encode("bf16", specialisation)

    timings = bench.compare(
        section,
        [Contestant(name, run(specialisation)) for name, specialisation in LONG.items()],
        share=0.06,
        rounds=min(bench.rounds, 3),
    )
    if any(timing.spread is None for timing in timings.values()):
        return rows_of(section, timings, list(LONG)[:1])
    exact = encode("fp32", "none")
    return rows_of(section, timings, list(LONG)[:1], quality=lambda name, found: agreement(found, exact))


def engine_name(backend: str, precision: str) -> str:
    """How the rows call an engine."""
    return f"facetrt {backend} {precision}"


def _engines(bench: Workbench, pixels: NDArray[np.uint8]) -> list[Contestant]:
    def run(backend: str, precision: str) -> Callable[[Clock], Tokens]:
        return lambda clock: bench.engine(precision, backend).encode([pixels], load_size=None)[0].tokens

    return [Contestant(engine_name(*chosen), run(*chosen)) for chosen in ENGINES]


def _torch(bench: Workbench, pixels: NDArray[np.uint8]) -> list[Contestant]:
    torch, names = bench.torch, [str(facet) for facet in bench.facets]

    def glue(clock: Clock, *, bf16: bool = False) -> Tokens:
        check_bf16(bf16)
        tokens, _ = bench.glue(bf16=bf16).encode(pixels, bench.facets, saliency=True)
        return {name: np.asarray(tokens[name]) for name in names}

    def research(clock: Clock) -> Tokens:
        extractor = bench.extractor()
        extractor.saliency(pixels)
        return {str(facet): extractor.descriptors(pixels, facet).numpy() for facet in bench.facets}

    def product(*, bf16: bool) -> Callable[[Clock], Any]:
        matrix = torch.ones((bench.sizes.product,) * 2, dtype=torch.bfloat16 if bf16 else torch.float32)

        def run(clock: Clock) -> Any:
            check_bf16(bf16)
            return matrix @ matrix

        return run

    return [
        Contestant(TORCH, glue),
        Contestant(TORCH_BF16, lambda clock: glue(clock, bf16=True)),
        Contestant(RESEARCH, research, rounds=2, prepare=bench.extractor),
        Contestant(CEILING, product(bf16=False)),
        Contestant(CEILING_BF16, product(bf16=True)),
    ]


def check_bf16(bf16: bool) -> None:
    """torch would also compute in bf16 without the instructions, but many times slower than in fp32."""
    if bf16 and not has_bf16():
        raise BackendError("this processor has no bf16 instructions")


def agreement(tokens: Tokens, expected: Tokens) -> dict[str, float]:
    """The worst facet's mean and first-percentile cosine; rows are counted from the last, as some have no [CLS]."""
    metrics = []
    for name, rows in expected.items():
        count = min(len(rows), len(tokens[name]))
        metrics.append(compare_output(tokens[name][-count:], rows[-count:]))
    return {name: min(found[name] for found in metrics) for name in ("mean_cosine", "p1_cosine")}


def encoder_flops(spec: ModelSpec, stride: int, size: tuple[int, int], facets: Sequence[Facet]) -> float:
    """Multiplications and additions that both facets and saliency need: what facetrt and the strong glue compute.

    The last block is left out but for the keys of its attention; a facet of the block before costs nothing extra.
    """
    grid_h, grid_w = grid_size(size, spec.patch, stride)
    tokens, dim = grid_h * grid_w + 1, spec.dim
    block = (4 + 2 * spec.mlp_ratio) * dim**2 * tokens + 2 * tokens**2 * dim
    thirds = {facet.kind for facet in facets if facet.layer == spec.depth - 1} | {"key"}
    last = len(thirds) * dim**2 * tokens
    patches = 3 * spec.patch**2 * dim * (tokens - 1)
    return 2 * ((spec.depth - 1) * block + last + patches)
