"""k-means of a few coordinates, all rows taking part, from starts that are fixed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError

RESTARTS, ROUNDS, SEED = 40, 300, 0
MARGIN = 1e-12  # what a later start must better the sum by

Double = NDArray[np.float64]


def partition(rows: NDArray[np.floating], count: int) -> tuple[NDArray[np.int64], float]:
    """Clusters of ``rows (n, d)``, for few dimensions: labels ``(n,)`` and the sum of squared distances.

    The best of forty starts by greedy k-means++, the start of scikit-learn's; the numbers drawn are our own, so that
    clusters agree as partitions where both find the best one. Sums run in float64, in a fixed order.

    Raises:
        InputError: fewer rows than clusters.
    """
    if not 0 < count <= len(rows):
        raise InputError(f"{count} clusters of {len(rows)} rows: expected 1 to {len(rows)}")
    values = np.asarray(rows, np.float64)
    best: tuple[NDArray[np.int64], float] | None = None
    for restart in range(RESTARTS):
        found = _settle(values, _seeds(values, count, np.random.RandomState(SEED + restart)))
        if best is None or found[1] < best[1] * (1 - MARGIN):
            best = found
    return best if best is not None else (np.zeros(len(rows), np.int64), 0.0)


def _squared(values: Double, centres: Double) -> Double:
    """``(n, k)``."""
    return np.asarray(np.square(values[:, None] - centres).sum(axis=2))


def _seeds(values: Double, count: int, random: np.random.RandomState) -> Double:
    """Each seed is the best of a few drawn in proportion to the squared distance from those before."""
    chosen = [values[random.randint(len(values))]]
    nearest = _squared(values, np.stack(chosen))[:, 0]
    for _ in range(count - 1):
        steps = nearest.cumsum()
        drawn = np.searchsorted(steps, random.uniform(size=2 + int(np.log(count))) * steps[-1])
        candidates = np.minimum(drawn, len(values) - 1)
        distances = np.minimum(nearest[:, None], _squared(values, values[candidates]))
        best = int(distances.sum(axis=0).argmin())
        chosen.append(values[candidates[best]])
        nearest = distances[:, best]
    return np.stack(chosen)


def _settle(values: Double, centres: Double) -> tuple[NDArray[np.int64], float]:
    labels = np.full(len(values), -1)
    for _ in range(ROUNDS):
        distances = _squared(values, centres)
        later = distances.argmin(axis=1)
        if (later == labels).all():
            break
        labels = later
        sizes = np.bincount(labels, minlength=len(centres))
        sums = np.stack([np.bincount(labels, weights=column, minlength=len(centres)) for column in values.T], axis=1)
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
    distances = _squared(values, centres)
    return distances.argmin(axis=1), float(distances.min(axis=1).sum())
