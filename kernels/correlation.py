"""How many cells each cell of an image correlates with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.affinity import BLOCK_ROWS
from facetrt.kernels.errors import InputError
from facetrt.kernels.parallel import map_threads, one_blas_thread
from facetrt.kernels.products import TIE


def positive_degree(rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """The number of other rows with a positive inner product, for each of ``rows (n, C)``: ``(n,)``.

    Products closer to 0 than rounding are computed again in float64, in a fixed order, so that no processor counts
    otherwise. Only blocks of the products are held. Source: specification, lost step 1.

    Raises:
        InputError: a number that is not finite.
    """
    lengths = np.sqrt(np.einsum("nc,nc->n", rows, rows, dtype=np.float64))
    if not np.isfinite(lengths).all():
        raise InputError("descriptors hold numbers that are not finite: the encoder, or what it was given, is damaged")
    degree, bounds = np.empty(len(rows), np.int64), (TIE * lengths).astype(np.float32)

    def count(start: int) -> None:
        part = slice(start, start + BLOCK_ROWS)
        products = rows[part] @ rows.T
        near = np.nonzero(np.abs(products) <= bounds[part, None] * lengths.astype(np.float32))
        positive = products > 0
        pairs = rows[near[0] + start].astype(np.float64), rows[near[1]].astype(np.float64)
        positive[near] = np.einsum("nc,nc->n", *pairs) > 0
        positive[np.arange(len(positive)), np.arange(start, start + len(positive))] = False
        degree[part] = positive.sum(axis=1)

    with one_blas_thread:
        map_threads(count, range(0, len(rows), BLOCK_ROWS))
    return degree
