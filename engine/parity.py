"""Comparing an encoder's outputs with those of a reference, and the contract they must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.options import Precision
from facetrt.kernels.errors import ParityError

Arrays = Mapping[str, NDArray[np.float32]]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Contract:
    """Bounds on the worst case; None does not apply. Source: the design's parity contract for dense descriptors."""

    max_abs: float | None = None
    mean_cosine: float | None = None
    p1_cosine: float | None = None
    relative_frobenius: float | None = None

    def violations(self, metrics: Metrics) -> list[str]:
        """What is out of bounds, in words."""
        above = {"max_abs": self.max_abs, "relative_frobenius": self.relative_frobenius}
        below = {"mean_cosine": self.mean_cosine, "p1_cosine": self.p1_cosine}
        found = [f"{n} {metrics[n]:.3g} > {limit:g}" for n, limit in above.items() if limit and not metrics[n] <= limit]
        found += [
            f"{n} {metrics[n]:.6f} < {limit:g}" for n, limit in below.items() if limit and not metrics[n] >= limit
        ]
        return found


HALF = Contract(mean_cosine=0.999, p1_cosine=0.995, relative_frobenius=0.01)
CONTRACTS = {
    Precision.FP32: Contract(max_abs=1e-4, mean_cosine=0.999999, p1_cosine=0.99999, relative_frobenius=1e-4),
    Precision.FP16: HALF,
    Precision.BF16: HALF,
}


def compare(got: Arrays, expected: Arrays) -> dict[str, Metrics]:
    """Metrics of each output of one image; see :class:`facetrt.engine.bundle.ParityReport`."""
    return {name: compare_output(got[name], reference) for name, reference in expected.items()}


def compare_output(got: NDArray[np.float32], expected: NDArray[np.float32]) -> Metrics:
    """Metrics of one ``(rows, C)`` output; a vector (saliency) counts as a single row."""
    if not np.isfinite(got).all():
        raise ParityError(f"the encoder gives NaN or infinite values in an output of shape {got.shape}")
    a, b = (np.atleast_2d(np.asarray(v, np.float64)) for v in (got, expected))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.where(norms > 0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1), 1.0)
    scale = float(b.std()) or float(np.abs(b).max()) or 1.0  # a constant has no spread: its size, then
    return {
        "max_abs": float(np.abs(a - b).max() / scale),
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "p1_cosine": float(np.percentile(cosine, 1)),
        "relative_frobenius": float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30)),
    }


def worst(reports: list[dict[str, Metrics]]) -> dict[str, Metrics]:
    """The worst of each metric over several images."""
    merged: dict[str, Metrics] = {}
    for report in reports:
        for name, metrics in report.items():
            kept = merged.setdefault(name, dict(metrics))
            for metric, value in metrics.items():
                kept[metric] = float((np.minimum if "cosine" in metric else np.maximum)(kept[metric], value))
    return merged


def check(outputs: Mapping[str, Metrics], precision: Precision) -> None:
    """Raise :class:`ParityError` naming the worst output if any misses the contract of ``precision``."""
    contract = CONTRACTS[precision]
    failures = {name: found for name, metrics in outputs.items() if (found := contract.violations(metrics))}
    if failures:
        name = min(failures, key=lambda n: outputs[n]["mean_cosine"])
        raise ParityError(
            f"{precision} misses its contract: {name} has {', '.join(failures[name])}"
            f"{f' (and {len(failures) - 1} more outputs)' if len(failures) > 1 else ''}"
        )
