"""The smallest generalised eigenvectors of a graph's Laplacian, which cut it into parts that hardly touch.

``(D - W) v = λ D v`` is the symmetric problem ``D^-½ W D^-½ u = (1 - λ) u`` with ``v = D^-½ u``. Its largest
eigenvector is known, and Lanczos' method with restarts finds the next ones from products with W alone.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.affinity import CutGraph, Graph
from facetrt.kernels.errors import InputError
from facetrt.kernels.parallel import one_blas_thread

Vectors = NDArray[np.float64]

FEW = 64  # nodes up to which the matrix is decomposed whole
MAX_DENSE = 4096  # nodes up to which that is done where Lanczos' method does not converge: 0.5 GB
BASIS = 48  # vectors that a restart begins from and ends with, beside those that are wanted
KEPT = 12  # of those, what a restart keeps
MAX_PRODUCTS = 2000
TOLERANCE = 1e-9  # of a vector: its residual in units of the distance to the next eigenvalue
ROUNDING = 1e-13  # a residual below is what float64 leaves


@dataclass(frozen=True)
class Eigenvectors:
    """Solutions of ``(D - W) v = λ D v`` with the smallest λ, that of the constant vector first.

    Attributes:
        values: ``(k,)`` float64, ascending.
        vectors: ``(n, k)`` float64 with ``v' D v = 1``; their signs are arbitrary.
        residual: the largest ``‖D^-½ (D - W) v - λ D^½ v‖``.
        gap: between the last λ and the next; where it is 0 the last vector is one of many.
        solver: ``lanczos`` or ``dense``.
        products: how many products with W that took.
    """

    values: Vectors
    vectors: Vectors
    residual: float
    gap: float
    solver: str
    products: int


class SolvedElsewhere(CutGraph):
    """A graph that something else holds than this process."""

    @abstractmethod
    def solve(self, count: int, start: Vectors | None) -> Eigenvectors:
        """See :func:`smallest_eigenvectors`."""


def smallest_eigenvectors(graph: Graph, count: int, *, start: Vectors | None = None) -> Eigenvectors:
    """The ``count`` smallest eigenvectors of the normalised Laplacian, fewer if there are fewer nodes.

    Args:
        start: ``(n,)``, a vector that may be near the second one.

    Raises:
        InputError: a node without any edge, or no convergence with more than ``MAX_DENSE`` nodes.
    """
    if isinstance(graph, SolvedElsewhere):
        return graph.solve(count, start)
    degree = np.asarray(graph.degree, np.float64)
    if not (degree > 0).all():
        raise InputError(
            f"{int((degree <= 0).sum())} of {len(degree)} nodes have no edges: there is no cut to look for"
        )
    count, scale = min(count, len(degree)), 1 / np.sqrt(degree)
    if len(degree) > max(FEW, count + BASIS):
        found = _lanczos(graph, degree, count, start)
        if found is not None:
            return found
        if len(degree) > MAX_DENSE:
            raise InputError(
                f"the eigenvectors of a graph of {len(degree):,} nodes did not converge: use a smaller image, or a "
                "larger stride"
            )
    return _dense(graph, scale, count)


def sign_of_lapack(graph: Graph, vector: Vectors) -> int:
    """The sign, 1 or -1, that SciPy's ``eigh(D - W, D, subset_by_index=…)`` gives an eigenvector ``(n,)`` of a graph.

    LAPACK reduces the matrix to a tridiagonal one by reflections and makes the largest entry of that one's eigenvector
    positive. The reflections are Lanczos' method from the first node, with signs of their own: a few products tell
    the entries that matter, those of all other reflections being together smaller than the largest.
    """
    degree = np.asarray(graph.degree, np.float64)
    scale, wanted = 1 / np.sqrt(degree), vector * np.sqrt(degree)
    wanted = wanted / np.linalg.norm(wanted)
    reflections: list[tuple[Vectors, float]] = []
    column = np.zeros(len(degree))
    column[0] = 1
    entries = [float(wanted[0])]
    with one_blas_thread:
        for number in range(1, len(degree)):
            if max(np.square(entries)) > 1 - np.square(entries).sum() + ROUNDING:
                break
            image = column - scale * graph.product(scale * column)
            for normal, factor in reflections:
                image -= factor * (normal @ image) * normal
            image[:number] = 0
            length = float(np.copysign(np.linalg.norm(image), image[number]))
            normal = image.copy()
            normal[number] += length
            square = float(normal @ normal)
            reflections.append((normal, 2 / square if np.any(image[number + 1 :]) and square else 0.0))
            column = np.zeros(len(degree))
            column[number] = 1
            for normal, factor in reversed(reflections):
                column -= factor * (normal @ column) * normal
            entries.append(float(wanted @ column))
    return 1 if entries[int(np.abs(entries).argmax())] > 0 else -1


def _dense(graph: Graph, scale: Vectors, count: int) -> Eigenvectors:
    """All eigenvectors, of which the first are kept."""
    matrix = graph.dense() * scale[:, None] * scale
    with one_blas_thread:
        similar, vectors = np.linalg.eigh(matrix)
        rest = matrix @ vectors[:, -count:] - vectors[:, -count:] * similar[-count:]
    order = slice(None, -count - 1, -1)
    gap = float(similar[-count] - similar[-count - 1]) if count < len(scale) else 0.0
    chosen = vectors[:, order] * scale[:, None]
    residual = float(np.linalg.norm(rest, axis=0).max())
    return Eigenvectors(1 - similar[order], np.ascontiguousarray(chosen), residual, gap, "dense", 0)


def _lanczos(graph: Graph, degree: Vectors, count: int, start: Vectors | None) -> Eigenvectors | None:
    """Thick-restarted Lanczos with full orthogonalisation; None if it does not converge.

    The projected matrix is filled from the coefficients of the orthogonalisation, so that a restart needs no formula
    of its own.
    """
    root, scale, wanted = np.sqrt(degree), 1 / np.sqrt(degree), count - 1
    trivial = root / np.linalg.norm(root)
    size = wanted + BASIS
    basis, projected = np.zeros((size + 1, len(degree))), np.zeros((size, size))
    kept, products = 0, 0

    def orthogonal(vector: Vectors, to: int) -> tuple[Vectors, Vectors]:
        coefficients = np.zeros(to)
        for _ in range(2):  # once leaves rounding
            vector = vector - trivial * (trivial @ vector)
            part = basis[:to] @ vector
            vector -= part @ basis[:to]
            coefficients += part
        return vector, coefficients

    with one_blas_thread:
        vector, _ = orthogonal(first_vector(root, start), 0)
        basis[0] = vector / np.linalg.norm(vector)
        while products < MAX_PRODUCTS:
            for number in range(kept, size):
                image = scale * graph.product(scale * basis[number])
                products += 1
                image, coefficients = orthogonal(image, number + 1)
                projected[: number + 1, number] = projected[number, : number + 1] = coefficients
                length = float(np.linalg.norm(image))
                if length < ROUNDING:  # the vectors so far are closed under W: go on from any other
                    length = 0.0
                    image, _ = orthogonal(np.random.RandomState(number + 1).uniform(-1, 1, len(degree)), number + 1)
                    basis[number + 1] = image / np.linalg.norm(image)
                else:
                    basis[number + 1] = image / length
                if number > wanted and (number % 4 == 3 or number == size - 1):
                    similar, shares = np.linalg.eigh(projected[: number + 1, : number + 1])
                    residuals = length * np.abs(shares[-1])
                    if converged(similar, residuals, wanted):
                        ritz = shares[:, : -wanted - 1 : -1].T @ basis[: number + 1]
                        return eigenvectors_of(trivial, ritz, similar, residuals, wanted, scale, products)
            kept = wanted + KEPT
            chosen = shares[:, -kept:]
            last = basis[size].copy()
            basis[:kept] = chosen.T @ basis[:size]
            basis[kept] = last
            projected[:] = 0
            projected[range(kept), range(kept)] = similar[-kept:]
    return None


def first_vector(root: Vectors, start: Vectors | None) -> Vectors:
    """What the search begins with, ``(n,)``, of the roots of the degrees: anything, or near what is expected."""
    first = np.random.RandomState(0).uniform(-1, 1, len(root))  # the same numbers in every version of NumPy
    if start is None or not np.isfinite(start).all() or not np.ptp(start) > 0:
        return first
    return np.asarray(root * start / np.linalg.norm(root * start) + 1e-3 * first / np.linalg.norm(first))


def converged(similar: Vectors, residuals: Vectors, wanted: int) -> bool:
    """Whether each wanted vector is near its true one, as far as its distance to its neighbours tells."""
    if not wanted:
        return True
    gaps = np.abs(np.diff(similar[-wanted - 1 :]))  # between each wanted one and that below it
    apart = np.minimum(gaps, np.append(gaps[1:], 1 - similar[-1]))
    return bool((residuals[-wanted:] <= np.maximum(TOLERANCE * apart, ROUNDING)).all())


def eigenvectors_of(
    trivial: Vectors, ritz: Vectors, similar: Vectors, residuals: Vectors, wanted: int, scale: Vectors, products: int
) -> Eigenvectors:
    """What is known of the ``wanted`` largest ones of the similar problem, ``ritz (wanted, n)``, as a result."""
    values = np.concatenate([[0.0], 1 - similar[: -wanted - 1 : -1]])
    vectors = np.stack([trivial, *ritz], axis=1) * scale[:, None]
    gap = float(similar[-wanted] - similar[-wanted - 1]) if wanted else float(1 - similar[-1])
    residual = float(residuals[-wanted:].max(initial=0)) if wanted else 0.0
    return Eigenvectors(values, vectors, residual, gap, "lanczos", products)
