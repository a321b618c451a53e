"""Timing two or more functions in turn: on shared, noisy machines only ratios from one run mean something."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from statistics import median
from typing import Any

import cv2
import numpy as np


def compare(functions: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds per call of each function, called A B A B … after one warm-up each."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of ``slow / fast``, each round's pair measured back to back."""
    return median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def summary(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and interquartile range in milliseconds."""
    quartiles = {name: np.percentile(values, (25, 50, 75)) * 1e3 for name, values in seconds.items()}
    return {
        name: {"median_ms": round(float(q[1]), 3), "iqr_ms": round(float(q[2] - q[0]), 3)}
        for name, q in quartiles.items()
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    packages = ("numpy", "onnxruntime", "faiss-cpu", "opencv-python-headless")
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": cv2.getNumberOfCPUs(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
