"""Comparing an encoder's outputs with those of a reference, and the contracts they must keep.

Trained ViTs have massive channels (a few tokens reach thousands in one or two channels, where others stay near one) and
peaky [CLS] attention. A bound on the largest element would refuse correct graphs there, and a norm over all channels
would see nothing but the massive ones. So outputs are judged as they are used: descriptors by the cosine and the norm
of each cell, saliency after its min-max. Where channels are added up, they are *balanced* first: no channel counts for
more than a typical one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.run_options import Precision
from facetrt.engine.bundle.manifest import CLS_ATTENTION
from facetrt.kernels.errors import ParityError

Arrays = Mapping[str, NDArray[np.floating]]
Float64 = NDArray[np.float64]
Metrics = dict[str, float]

LOW = ("mean_cosine", "p1_cosine", "cls_cosine")  # figures that must not be smaller than their bound
HIGH = ("norm_error", "relative_frobenius", "max_abs")  # figures that must not be larger


@dataclass(frozen=True)
class Contract:
    """Bounds on the worst case; an output that lacks a figure is not held to it. Infinity bounds nothing.

    Attributes:
        mean_cosine, p1_cosine: over the cells of a facet, mean and 1st percentile; of saliency as one vector.
        cls_cosine: of a facet's [CLS] row, or of a register that is worse.
        norm_error: relative error of a cell's norm, 99th percentile.
        relative_frobenius: of a facet with balanced channels; of saliency after its min-max.
        max_abs: the largest error of saliency after its min-max.
    """

    mean_cosine: float
    p1_cosine: float
    cls_cosine: float
    norm_error: float
    relative_frobenius: float
    max_abs: float

    def violations(self, metrics: Metrics) -> list[str]:
        """What is out of bounds, in words; NaN always is."""
        found = [
            f"{n} {metrics[n]:.6f} < {getattr(self, n):g}"
            for n in LOW
            if n in metrics and not metrics[n] >= getattr(self, n)
        ]
        return found + [
            f"{n} {metrics[n]:.3g} > {getattr(self, n):g}"
            for n in HIGH
            if n in metrics and not metrics[n] <= getattr(self, n)
        ]

    def excess(self, metrics: Metrics) -> dict[str, float]:
        """Each figure as a multiple of what its bound allows: above 1 it is out of bounds."""
        found = {n: (1 - metrics[n]) / (1 - getattr(self, n)) for n in LOW if n in metrics}
        return found | {n: metrics[n] / getattr(self, n) for n in HIGH if n in metrics}


HALF = Contract(0.999, 0.995, 0.999, norm_error=np.inf, relative_frobenius=0.01, max_abs=np.inf)
CONTRACTS = {
    Precision.FP32: Contract(0.999999, 0.99999, 0.999999, norm_error=1e-3, relative_frobenius=2e-4, max_abs=1e-3),
    Precision.FP16: HALF,
    Precision.BF16: HALF,
}


def compare(got: Arrays, expected: Arrays, prefix: int = 1) -> dict[str, Metrics]:
    """Metrics of each output of one image: facets ``(prefix + cells, C)`` and ``cls_attention (cells,)``.

    Args:
        prefix: rows before the cells: [CLS], if any, then registers.

    Raises:
        ParityError: NaN or infinite values.
    """
    return {
        name: compare_saliency(got[name], reference)
        if name == CLS_ATTENTION
        else compare_output(got[name], reference, prefix)
        for name, reference in expected.items()
    }


def compare_output(got: NDArray[np.floating], expected: NDArray[np.floating], prefix: int = 1) -> Metrics:
    """Metrics of one facet ``(prefix + cells, C)``; where there is nothing else, such rows count as cells, too."""
    a, b = _finite(got), _finite(expected)
    cosine = _cosine(a, b)
    cells = slice(prefix if len(b) > prefix else 0, None)
    norms = np.linalg.norm(b, axis=1)
    norm_error = np.abs(np.linalg.norm(a, axis=1) - norms) / np.maximum(norms, 1e-30)
    scale = balance(b)
    return {
        "mean_cosine": float(cosine[cells].mean()),
        "p1_cosine": float(np.percentile(cosine[cells], 1)),
        "min_cosine": float(cosine.min()),
        **({"cls_cosine": float(cosine[:prefix].min())} if prefix else {}),
        "norm_error": float(np.percentile(norm_error, 99)),
        "relative_frobenius": _relative((a - b) / scale, b / scale),
    }


def compare_saliency(got: NDArray[np.floating], expected: NDArray[np.floating]) -> Metrics:
    """Metrics of [CLS] attention ``(cells,)`` as it is used: after its min-max."""
    a, b = (min_max(np.ravel(_finite(values))) for values in (got, expected))
    cosine = float(_cosine(a[None], b[None])[0])
    return {
        "mean_cosine": cosine,
        "p1_cosine": cosine,
        "max_abs": float(np.abs(a - b).max()),
        "relative_frobenius": _relative(a - b, b),
    }


def _finite(values: NDArray[np.floating]) -> Float64:
    if not np.isfinite(values).all():
        raise ParityError(f"the encoder gives NaN or infinite values in an output of shape {values.shape}")
    return np.asarray(values, np.float64).reshape(-1, values.shape[-1])


def _cosine(a: Float64, b: Float64) -> Float64:
    """The cosine of each pair of rows; 1 where both are zero, 0 where one is."""
    size_a, size_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    sizes = size_a * size_b
    cosine: Float64 = np.where(sizes > 0, (a * b).sum(axis=1) / np.where(sizes > 0, sizes, 1), size_a == size_b)
    return cosine


def _relative(difference: Float64, reference: Float64) -> float:
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference)), 1e-30))


def min_max(values: Float64) -> Float64:
    """Values scaled to [0, 1], as saliency is; a constant becomes zeros."""
    low, high = values.min(), values.max()
    scaled: Float64 = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return scaled


def balance(reference: Float64) -> Float64:
    """What channels are divided by so that none counts for more than the median one, ``(C,)``.

    Two channels of 384 that hold thousands would be all that a norm sees. Channels below the median keep their place:
    dividing by what is nearly zero would make noise of them.
    """
    sizes = np.sqrt((reference**2).mean(axis=0))
    used = sizes[sizes > 1e-6 * sizes.max()] if sizes.max() > 0 else np.ones(1)
    scale: Float64 = np.maximum(sizes, np.median(used))
    return scale


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
    found = violation(outputs, precision)
    if found:
        raise ParityError(f"{precision} misses its contract: {found}")


def violation(outputs: Mapping[str, Metrics], precision: Precision) -> str:
    """The output that misses the contract of ``precision`` most, its figures and bounds; empty if all keep it."""
    contract = CONTRACTS[precision]
    failures = {name: found for name, metrics in outputs.items() if (found := contract.violations(metrics))}
    if not failures:
        return ""
    name = max(failures, key=lambda n: np.nan_to_num(max(contract.excess(outputs[n]).values()), nan=np.inf))
    others = f" (and {len(failures) - 1} more outputs)" if len(failures) > 1 else ""
    return f"{name} has {', '.join(failures[name])}{others}"


# ------------------------------------------------------------------------------------------------ fp32 against float64
@dataclass(frozen=True)
class Allowance:
    """How much further from float64 than torch's own fp32 a figure may be; below ``floor`` it is not judged.

    ``limit`` is where fp32 itself, of whatever program, is too far from float64 to be served.
    """

    factor: float
    floor: float
    limit: float


ROUNDING = {
    "error": Allowance(factor=3, floor=2e-6, limit=1e-3),  # medians over hundreds of cells: they vary by a tenth or two
    "bias": Allowance(factor=4, floor=1e-6, limit=1e-3),
    "p99_error": Allowance(factor=10, floor=2e-5, limit=5e-3),  # few cells decide these: they vary by a factor of four
    "max_error": Allowance(factor=10, floor=2e-4, limit=np.inf),
    "cls_error": Allowance(factor=10, floor=2e-5, limit=5e-3),
    "saliency_error": Allowance(factor=10, floor=2e-4, limit=1e-2),
}


def rounding_errors(got: Arrays, exact: Arrays, prefix: int = 1) -> dict[str, Metrics]:
    """How far outputs in fp32 are from those in float64, one image; channels are divided by their typical spread.

    ``error``, ``p99_error`` and ``max_error`` are the median, 99th percentile and largest of the cells' errors, each
    the root mean square over the balanced channels; ``cls_error`` is the largest of the ``prefix`` rows before them, of
    [CLS] and registers. ``bias`` is what the cells' errors have in common, which rounding hardly has: the median over
    cells of each channel's signed error, then the root mean square. Medians are blind to the few massive cells, whose
    rounding would hide a wrong graph's error in all others. ``saliency_error`` is the largest error after min-max.
    """
    return {
        name: _saliency_error(got[name], values) if name == CLS_ATTENTION else _cell_errors(got[name], values, prefix)
        for name, values in exact.items()
    }


def _saliency_error(got: NDArray[np.floating], exact: NDArray[np.floating]) -> Metrics:
    return {"saliency_error": compare_saliency(got, exact)["max_abs"]}


def _cell_errors(got: NDArray[np.floating], exact: NDArray[np.floating], prefix: int) -> Metrics:
    a, b = _finite(got), _finite(exact)
    difference = (a - b) / spread(b)
    errors = np.sqrt((difference**2).mean(axis=1))
    return {
        "error": float(np.median(errors)),
        "bias": float(np.sqrt((np.median(difference, axis=0) ** 2).mean())),
        "p99_error": float(np.percentile(errors, 99)),
        "max_error": float(errors.max()),
        **({"cls_error": float(errors[:prefix].max())} if prefix else {}),
    }


def spread(reference: Float64) -> Float64:
    """Typical size of each channel around its median, ``(C,)``: the massive values of a few cells do not move it."""
    sizes = 1.4826 * np.median(np.abs(reference - np.median(reference, axis=0)), axis=0)
    used = sizes[sizes > 1e-6 * np.abs(reference).max()]
    typical = float(np.median(used)) if used.size else float(np.abs(reference).max()) or 1.0
    return np.maximum(sizes, 0.1 * typical)  # a channel that hardly varies is not blown up to count as the others do


def check_rounding(ours: Mapping[str, Metrics], torch: Mapping[str, Metrics]) -> None:
    """Raise :class:`ParityError` if an output is further from float64 than rounding explains.

    Args:
        ours: the graph's errors from :func:`rounding_errors`, the worst over all images.
        torch: those of the torch model in fp32.
    """
    _check_serviceable(torch)
    wrong = []
    for name, figures in ours.items():
        for figure, value in figures.items():
            allowed = ROUNDING[figure]
            bound = max(allowed.factor * torch[name][figure], allowed.floor)
            if not value <= bound:
                text = f"{name} has {figure} {value:.2g} against float64, where rounding explains {bound:.2g}"
                wrong.append((value / bound, f"{text} (torch's fp32 has {torch[name][figure]:.2g})"))
    if wrong:
        raise ParityError(f"fp32 misses its contract: {max(wrong)[1]}")


def _check_serviceable(torch: Mapping[str, Metrics]) -> None:
    """Weights may be so ill-conditioned that fp32 itself is wrong."""
    found = [
        (value / ROUNDING[figure].limit, name, figure, value)
        for name, figures in torch.items()
        for figure, value in figures.items()
        if not value <= ROUNDING[figure].limit
    ]
    if found:
        _, name, figure, value = max(found)
        raise ParityError(
            f"float32 of torch is {value:.2%} off float64 ({figure} of {name}, at most {ROUNDING[figure].limit:.2%}): "
            "these weights cannot be served in fp32, nor in anything shorter"
        )
