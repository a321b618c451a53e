"""Checks that several tasks' options share."""

from __future__ import annotations

import math

from facetrt.kernels.errors import InputError


def check_finite(name: str, value: float) -> None:
    """Raise :class:`InputError` for NaN and infinities."""
    if not math.isfinite(value):
        raise InputError(f"{name}={value}: expected a finite number")


def check_positive(name: str, value: float) -> None:
    """Raise :class:`InputError` unless ``value`` is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name}={value}: expected a positive finite number")


def check_voting(*, elbow: float, saliency_threshold: float, votes_percentage: float, sample_interval: int) -> None:
    """Check what every task does that clusters a set of images and lets saliency vote."""
    if sample_interval < 1:
        raise InputError(f"sample_interval={sample_interval}: expected at least 1")
    if not 0 <= votes_percentage <= 100:
        raise InputError(f"votes_percentage={votes_percentage}: expected 0 to 100")
    check_positive("elbow", elbow)
    check_finite("saliency_threshold", saliency_threshold)
