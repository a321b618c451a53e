"""Each kernel against the obvious vectorised implementation, at the size of a 224-pixel pair at stride 4.

python benchmarks/kernels.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from timing import compare, machine, ratio, summary

from facetrt.kernels import best_buddies, log_bin
from facetrt.kernels.log_bin import log_bin_reference

GRID, CHANNELS = (55, 55), 384


def feature_map(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*GRID, CHANNELS)).astype(np.float32)


def direct_buddies(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Binned descriptors in full, normalised, one wide product, two arg-maxima."""
    wide = [log_bin(values) for values in (a, b)]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in wide]
    similarity = unit[0] @ unit[1].T
    return similarity.argmax(axis=1), similarity.argmax(axis=0)


def measure_best_buddies(rounds: int) -> dict[str, Any]:
    a, b = feature_map(0), feature_map(1)
    seconds = compare({"best_buddies": lambda: best_buddies(a, b), "direct": lambda: direct_buddies(a, b)}, rounds)
    agree = float((best_buddies(a, b).nn_ab == direct_buddies(a, b)[0]).mean())
    return {"speedup": ratio(seconds, "direct", "best_buddies"), "equal_neighbours": agree, **summary(seconds)}


def measure_log_bin(rounds: int) -> dict[str, Any]:
    values, small = feature_map(0), feature_map(0)[:11, :11]
    seconds = compare(
        {"log_bin": lambda: log_bin(values), "per cell, 1/25 of the cells": lambda: log_bin_reference(small)}, rounds
    )
    speedup = 25 * ratio(seconds, "per cell, 1/25 of the cells", "log_bin")
    return {"speedup": speedup, "extrapolated": "the per-cell loop is timed on 1/25 of the cells", **summary(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {"best_buddies": measure_best_buddies(options.rounds), "log_bin": measure_log_bin(options.rounds)}
    for name, row in results.items():
        print(f"{name:14} {row['speedup']:8.1f} × faster  ({row[name]['median_ms']:.1f} ms)")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
