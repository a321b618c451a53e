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
