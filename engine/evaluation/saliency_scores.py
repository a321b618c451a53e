"""Scores of saliency maps, in the four variants of the methods that are compared. They are on different scales.

Source: specification, common-evaluation §2 and corrections.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError

Double = NDArray[np.float64]

EPSILON = 1e-7
THRESHOLDS = (np.arange(255) * (1 / 255)).astype(np.float32)


class Variant(StrEnum):
    """Whose protocol: what is foreground in the annotation, and how F-measures are made."""

    TOKENCUT = "tokencut"
    SELFMASK = "selfmask"
    FOUND = "found"
    DEEP_SPECTRAL = "deep-spectral"

    def foreground(self, grey: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """The annotation's foreground: FOUND takes 255 alone, SelfMask everything but 0."""
        if self is Variant.FOUND:
            return np.asarray(grey == 255)
        return np.asarray(grey > (127 if self is Variant.DEEP_SPECTRAL else 0))

    @property
    def metrics(self) -> list[str]:
        """What is reported."""
        if self is Variant.DEEP_SPECTRAL:
            return ["IoU", "acc"]
        if self is Variant.TOKENCUT:
            return ["maxF", "IoU", "acc"]
        return ["acc", "IoU", "maxF", "meanF", "F", "S", "MAE"]

    @property
    def beta_squared(self) -> float:
        """Weight of precision; SelfMask and FOUND square 0.3 again."""
        return 0.3 if self in (Variant.TOKENCUT, Variant.DEEP_SPECTRAL) else 0.09

    def score(self, soft: NDArray[np.float32], grey: NDArray[np.uint8]) -> dict[str, float | list[float]]:
        """Figures of one image; ``curve`` has F for each threshold, where the maximum is taken over means.

        Args:
            soft: ``(height, width)`` float32 in [0, 1].
            grey: the annotation, ``(height, width)`` uint8.

        Raises:
            InputError: sizes that differ.
        """
        if soft.shape != grey.shape:
            raise InputError(f"a map of {soft.shape} for an annotation of {grey.shape}: expected one size")
        true, mask = self.foreground(grey), soft > 0.5
        found: dict[str, float | list[float]] = {"acc": float((mask == true).mean()), "IoU": self._overlap(mask, true)}
        if self is Variant.DEEP_SPECTRAL:
            return found
        if self is Variant.TOKENCUT:
            return found | {"curve": [float(value) for value in self.curve(soft, true)]}
        adaptive = soft > 2 * soft.mean(dtype=np.float64)
        return found | {
            "maxF": float(self.curve(soft, true).max()),
            "meanF": self._f_measure(adaptive, true),
            "F": self._f_measure(mask, true),
            "S": structure_measure(soft, true),
            "MAE": float(np.abs((mask if self is Variant.FOUND else soft) - true.astype(np.float64)).mean()),
        }

    def _overlap(self, mask: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
        union = float((mask | true).sum())
        if self in (Variant.TOKENCUT, Variant.DEEP_SPECTRAL):
            return float((mask & true).sum()) / union if union else 0.0  # theirs is NaN there, and spoils the mean
        return float((mask & true).sum()) / (union + EPSILON)

    def curve(self, soft: NDArray[np.float32], true: NDArray[np.bool_]) -> Double:
        """F-measure of the map above each threshold, ``(255,)``: counts come from one histogram."""
        places = np.searchsorted(THRESHOLDS, soft.ravel().astype(np.float32), side="left")  # thresholds below
        every, hits = (
            np.bincount(places[chosen], minlength=len(THRESHOLDS) + 1)[::-1].cumsum()[::-1][1:].astype(np.float64)
            for chosen in (slice(None), true.ravel())
        )
        return self._f(hits, every, float(true.sum()))

    def _f_measure(self, mask: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
        hits, every = np.array([float((mask & true).sum())]), np.array([float(mask.sum())])
        return float(self._f(hits, every, float(true.sum()))[0])

    def _f(self, hits: Double, every: Double, annotated: float) -> Double:
        beta = self.beta_squared
        if self is Variant.TOKENCUT:
            precision = np.where(every > 0, hits / np.maximum(every, 1), 1.0)
            recall = hits / annotated if annotated else np.ones_like(hits)
            below = beta * precision + recall
            return np.asarray(np.where(below > 0, (1 + beta) * precision * recall / np.where(below > 0, below, 1), 0.0))
        precision, recall = hits / (every + EPSILON), hits / (annotated + EPSILON)
        return np.asarray((1 + beta) * precision * recall / (beta * precision + recall + EPSILON))


def structure_measure(soft: NDArray[np.floating], true: NDArray[np.bool_]) -> float:
    """How alike the structures of a map and an annotation are; at least 0. Source: Fan et al., ICCV 2017."""
    values, share = soft.astype(np.float64), float(true.mean())
    if share == 0:
        return 1 - float(values.mean())
    if share == 1:
        return float(values.mean())
    objects = share * _object_score(values[true]) + (1 - share) * _object_score(1 - values[~true])
    return max(0.0, 0.5 * objects + 0.5 * _region_score(values, true))


def _object_score(values: Double) -> float:
    mean, spread = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return 2 * mean / (mean * mean + 1 + spread + 1e-20)


def _region_score(values: Double, true: NDArray[np.bool_]) -> float:
    """The four quarters around the annotation's centre, weighted by their areas."""
    rows, columns = np.nonzero(true)
    top, left = int(np.rint(rows.mean())), int(np.rint(columns.mean()))
    total = 0.0
    for part in (np.s_[:top, :left], np.s_[:top, left:], np.s_[top:, :left], np.s_[top:, left:]):
        if values[part].size:
            total += values[part].size / values.size * _likeness(values[part], true[part].astype(np.float64))
    return total


def _likeness(values: Double, true: Double) -> float:
    x, y, count = values.mean(), true.mean(), values.size - 1 + 1e-20
    spread_x, spread_y = ((values - x) ** 2).sum() / count, ((true - y) ** 2).sum() / count
    shared = ((values - x) * (true - y)).sum() / count
    above, below = 4 * x * y * shared, (x * x + y * y) * (spread_x + spread_y)
    if above:
        return float(above / (below + 1e-20))
    return float(not below)
