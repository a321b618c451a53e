"""The smallest generalised eigenvectors of a graph's Laplacian, which cut it into parts that hardly touch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.affinity import Graph


@dataclass(frozen=True)
class Eigenvectors:
    """Solutions of ``(D - W) v = λ D v`` with the smallest λ, that of the constant vector first.

    Attributes:
        values: ``(k,)`` float64, ascending.
        vectors: ``(n, k)`` float64 with ``v' D v = 1``; their signs are arbitrary.
        residual: the largest ``‖(D - W) v - λ D v‖ / ‖D v‖``.
        solver: ``lanczos`` or ``dense``.
        iterations: how many products with W that took.
    """

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]
    residual: float
    solver: str
    iterations: int


def smallest_eigenvectors(graph: Graph, count: int, *, start: NDArray[np.float64] | None = None) -> Eigenvectors:
    """The ``count`` smallest eigenvectors of the normalised Laplacian.

    Args:
        start: ``(n,)`` or ``(n, k)``, what may be near the answer.
    """
    from scipy.linalg import eigh

    weights, degree = graph.dense(), graph.degree
    diagonal = np.diag(degree)
    values, vectors = eigh(diagonal - weights, diagonal, subset_by_index=(0, min(count, len(degree)) - 1))
    rest = (diagonal - weights) @ vectors - diagonal @ vectors * values
    residual = float((np.linalg.norm(rest, axis=0) / np.linalg.norm(diagonal @ vectors, axis=0)).max())
    return Eigenvectors(values, vectors, residual, "dense", 0)
