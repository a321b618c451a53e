"""What the engine costs beside its encoder.

    python benchmarks/engine.py --bundle BUNDLE [--load-size 224] [--rounds 5] [--json FILE]

Use a ViT-S/8-sized bundle at stride 4 (weights do not matter for time). Prints: the encoder through the engine against
the bare ONNX Runtime call on the same graph and inputs; the share of ``match`` spent in the encoder; peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from timing import compare, machine, ratio, summary

from facetrt.engine import Engine
from facetrt.engine.backends.base import Tensors
from facetrt.engine.bundle import Bundle
from facetrt.engine.images import load_image
from facetrt.engine.samples import sample_paths


def encoder_overhead(bundle: str, load_size: int, rounds: int) -> dict[str, Any]:
    """``engine.encode`` of a decoded image against ``InferenceSession.run`` on the tensors that it makes."""
    pixels = load_image(sample_paths()["chelsea"], (load_size, load_size)).pixels
    session = onnxruntime.InferenceSession(Bundle.open(bundle).encoder, providers=["CPUExecutionProvider"])
    with Engine.open(bundle) as engine:
        tensors = recorded_inputs(engine, pixels)
        seconds = compare(
            {
                "engine": lambda: engine.encode([pixels], load_size=None),
                "onnxruntime": lambda: session.run(engine.manifest.outputs, tensors),
            },
            rounds,
        )
    return {"ratio": ratio(seconds, "engine", "onnxruntime"), **summary(seconds)}


def recorded_inputs(engine: Engine, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors that one encode hands to the backend."""
    backend, seen = engine._encoder.backend, {}
    original = backend.run

    def record(inputs: Tensors) -> dict[str, np.ndarray]:
        seen.update(inputs)
        return original(inputs)

    backend.run = record  # type: ignore[method-assign]
    engine.encode([pixels], load_size=None)
    backend.run = original  # type: ignore[method-assign]
    return seen


def match_share(bundle: str, load_size: int, rounds: int) -> dict[str, Any]:
    """Share of ``match`` (two files in, points out) that is spent inside the backend."""
    samples = sample_paths()
    shares, totals = [], []
    with Engine.open(bundle) as engine:
        backend = engine._encoder.backend
        original, inside = backend.run, [0.0]

        def timed(inputs: Tensors) -> dict[str, np.ndarray]:
            start = time.perf_counter()
            outputs = original(inputs)
            inside[0] += time.perf_counter() - start
            return outputs

        backend.run = timed  # type: ignore[method-assign]
        for _ in range(rounds + 1):
            inside[0], start = 0.0, time.perf_counter()
            engine.match(samples["chelsea"], samples["cat"], load_size=(load_size, load_size))
            totals.append(time.perf_counter() - start)
            shares.append(inside[0] / totals[-1])
    return {"encoder_share": float(np.median(shares[1:])), "median_ms": float(np.median(totals[1:]) * 1e3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="builtin")
    parser.add_argument("--load-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    match = match_share(options.bundle, options.load_size, options.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    encoder = encoder_overhead(options.bundle, options.load_size, options.rounds)
    results = {"machine": machine(), "match": {**match, "peak_memory_mib": peak}, "encoder": encoder}
    print(f"encoder through the engine / bare onnxruntime: {encoder['ratio']:.3f}  (bar: 1.05)")
    print(f"share of match spent in the encoder:           {match['encoder_share']:.1%}  (bar: 90 %)")
    print(f"peak memory of match:                          {peak:.0f} MiB  (bar: 1500)")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
