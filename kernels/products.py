"""Matrix products that grouping and thread counts cannot change, and how close two numbers are that count as equal.

The bits of an element of a BLAS product depend on its row's and column's place in the product, on the product's shape
and on how the library shares it among threads: equal descriptors may give different products. So

- what users get comes from one product per thing (a pair of maps, an image and a set of centroids), never from one that
  several things share;
- the library runs each on one thread, and the parts that threads of our own take depend on the shape alone;
- what is closer than rounding ties, and the first one wins: :data:`TIE`.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.parallel import MAX_THREADS, map_threads, one_blas_thread

#: Cosines that differ by less are equal, and so are squared distances that differ by less times the squared lengths:
#: 16 units in the last place of 1. Products of equal rows of 64 to 13,056 channels differ by up to 4.
TIE = 16 * float(np.finfo(np.float32).eps)

Real = TypeVar("Real", np.float32, np.float64)
Float = NDArray[np.float32]

BLOCK_ROWS = 1 << 16  # at most so many share a product with centroids
COLUMNS = 4  # widths that are a multiple of this run faster than those just below
SMALLEST_PART = 64  # rows
WORTH_THREADS = 1 << 25  # multiplications


def inner_products(a: NDArray[Real], b: NDArray[Real]) -> NDArray[Real]:
    """``a @ b.T`` of rows ``a (m, C)`` and ``b (n, C)``, ``(m, n)``, whatever else is computed meanwhile.

    Two calls with the same arguments give the same bits on any number of threads. An element's bits may depend on where
    its rows stand in ``a`` and ``b``, and on how many stand beside them.
    """
    with one_blas_thread:
        if len(a) * len(b) * b.shape[1] < WORTH_THREADS:
            return np.asarray(a @ b.T)
        out = np.empty((len(a), len(b)), a.dtype)
        height = max(SMALLEST_PART, -(-len(a) // MAX_THREADS))

        def fill(start: int) -> None:
            rows = slice(start, start + height)
            np.matmul(a[rows], b.T, out=out[rows])

        map_threads(fill, range(0, len(a), height))
    return out


def gram_matrix(rows: NDArray[Real]) -> NDArray[Real]:
    """:func:`inner_products` of ``rows (n, C)`` with themselves, ``(n, n)``; one triangle of blocks is computed."""
    out = np.empty((len(rows), len(rows)), rows.dtype)
    height = max(SMALLEST_PART, -(-len(rows) // MAX_THREADS))

    def fill(start: int) -> None:
        own, rest = slice(start, start + height), slice(start + height, None)
        products = rows[own] @ rows[start:].T
        out[own, start:] = products
        out[rest, own] = products[:, height:].T

    with one_blas_thread:
        if len(rows) ** 2 * rows.shape[1] < WORTH_THREADS:
            return np.asarray(rows @ rows.T)
        map_threads(fill, range(0, len(rows), height))
    return out


def squared_lengths(rows: Float) -> Float:
    """The squared length of each row of ``rows (n, C)``, ``(n,)``."""
    return np.asarray(np.einsum("nc,nc->n", rows, rows))


def squared_distances(rows: Float, centroids: Float, squares: Float | None = None) -> Float:
    """Squared Euclidean distances of ``rows (n, C)`` to ``centroids (k, C)``, at least 0, ``(k, n)``.

    Args:
        squares: the rows' squared lengths, if they are at hand.
    """
    padded = np.zeros((-(-len(centroids) // COLUMNS) * COLUMNS, centroids.shape[1]), np.float32)
    np.multiply(centroids, -2, out=padded[: len(centroids)])
    distances = np.empty((len(centroids), len(rows)), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        distances[:, block] = inner_products(rows[block], padded).T[: len(centroids)]
    distances += squared_lengths(centroids)[:, None]
    distances += squared_lengths(rows) if squares is None else squares
    return np.asarray(np.maximum(distances, 0, out=distances))


def first_largest(values: Float) -> tuple[NDArray[np.int64], Float]:
    """The first cosine of each row of ``values (n, m)`` that ties with the largest, ``(n,)``, and the largest."""
    largest = values.max(axis=1)
    return np.asarray((values >= (largest - np.float32(TIE))[:, None]).argmax(axis=1)), largest


def first_smallest(values: NDArray[Real], margin: NDArray[Real] | float) -> NDArray[np.int64]:
    """The first along axis 0 of ``values (k, …)`` that is within ``margin`` of the smallest."""
    limit, first = values.min(axis=0) + margin, np.zeros(values.shape[1:], np.int64)
    for number in reversed(range(len(values))):  # argmax down the first axis would copy
        np.copyto(first, number, where=values[number] <= limit)
    return first
