"""COCO's run-length encoding of masks, as its tools write it: columns first, runs of zeros and ones in turn."""

from __future__ import annotations

from typing import Any

import numpy as np

from facetrt.engine.tasks.discovery.objects import Bools


def encode_rle(mask: Bools) -> dict[str, Any]:
    """``size`` [height, width] and ``counts`` of a mask ``(height, width)``, which ``pycocotools`` decodes."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges, [mask.size]]) if len(edges) else np.array([0, mask.size]))
    if len(edges) and edges[-1] == mask.size:
        runs = runs[:-1]  # nothing follows the last run of ones
    return {"size": [int(side) for side in mask.shape], "counts": _packed([int(run) for run in runs])}


def _packed(runs: list[int]) -> str:
    """Runs as text: from the third on less the one before the last, five bits to a character, the lowest first."""
    characters = []
    for number, run in enumerate(runs):
        value = run - runs[number - 2] if number > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            done = value == (-1 if bits & 16 else 0)
            characters.append(chr(48 + (bits if done else bits | 32)))
            if done:
                break
    return "".join(characters)
