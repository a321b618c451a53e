"""Normalised cuts as TokenCut and MaskCut publish them: all pairs of cells in float64, a dense solver, cell by cell.

Source: specification, tokencut and cutler-maskcut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.baselines.common import Float, Mask
from facetrt.benchmarks.missing import import_library

WEAK = 1e-5  # what an edge between cells weighs that are not alike
OVERLAP, SMALLEST, CORNERS = 0.5, 0.01, 3  # MaskCut's rules


def second_eigenvector(rows: Float, threshold: float) -> NDArray[np.float64]:
    """The graph of ``rows (cells, C)`` and the vector ``(cells,)`` that cuts it."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return solve(np.where(unit @ unit.T > threshold, 1.0, WEAK))


def solve(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The second eigenvector ``(cells,)`` of a graph's weights ``(cells, cells)``."""
    degrees = np.diag(weights.sum(axis=1))
    _, vectors = import_library("scipy.linalg").eigh(degrees - weights, degrees, subset_by_index=[1, 2])
    return np.asarray(vectors[:, 0], np.float64)


def tokencut(rows: Float, grid: tuple[int, int], threshold: float) -> Mask:
    """The object's cells ``(grid_h, grid_w)``."""
    vector = second_eigenvector(rows, threshold)
    side, seed = vector > vector.mean(), int(np.abs(vector).argmax())
    return _piece(side if side[seed] else ~side, grid, seed)


def maskcut(rows: Float, grid: tuple[int, int], threshold: float, cuts: int) -> list[Mask]:
    """The cells of up to ``cuts`` objects, before the CRF; only what no earlier object covers of each."""
    painted = previous = np.zeros(grid, np.bool_)
    covered, objects = painted, []
    for number in range(cuts):
        painted = painted | previous
        vector = second_eigenvector(np.where(painted.reshape(-1, 1), 0, rows).astype(np.float32), threshold)
        side = (vector > vector.mean()).reshape(grid)
        corners = int(side[0, 0]) + int(side[0, -1]) + int(side[-1, 0]) + int(side[-1, -1])
        if corners >= CORNERS or not side.ravel()[np.abs(vector).argmax()]:
            side, vector = ~side, -vector
        found = _piece(side, grid, int(vector.argmax()))
        shared = (found & previous).sum() / max((found | previous).sum(), 1)
        if number and (shared > OVERLAP or found.mean() <= SMALLEST):
            found = np.zeros(grid, np.bool_)
        if (found & ~covered).any():
            objects.append(found)
        covered, previous = covered | found, found
    return objects


def _piece(side: Mask, grid: tuple[int, int], seed: int) -> Mask:
    """The 4-connected piece of a side that holds the seed."""
    labels: Any = import_library("scipy.ndimage").label(side.reshape(grid))[0]
    return np.asarray(labels == labels.flat[seed])
