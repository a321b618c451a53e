"""Graphs whose nodes are an image's cells and whose edges say how alike they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float64]


class Graph(Protocol):
    """A symmetric matrix W of edge weights, which need not be held anywhere.

    Attributes:
        degree: ``(n,)`` float64, the sums of its rows.
    """

    @property
    def degree(self) -> Vectors: ...

    def product(self, vectors: Vectors) -> Vectors:
        """``W @ vectors`` for ``(n, k)`` float64."""

    def dense(self) -> Vectors:
        """W, ``(n, n)`` float64: for few nodes only."""


@dataclass(frozen=True)
class ThresholdGraph:
    """1 between cells whose cosine exceeds a threshold, ``weak`` between all others.

    Attributes:
        bits: ``(n, ⌈n/8⌉)`` uint8, :func:`numpy.packbits` of the strong edges.
    """

    bits: NDArray[np.uint8]
    weak: float

    def strong(self) -> NDArray[np.bool_]:
        """The strong edges, ``(n, n)`` bool."""
        return np.unpackbits(self.bits, axis=1, count=len(self.bits)).astype(np.bool_)

    @property
    def degree(self) -> Vectors:
        return self.dense().sum(axis=1)

    def dense(self) -> Vectors:
        return np.where(self.strong(), 1.0, self.weak)

    def product(self, vectors: Vectors) -> Vectors:
        return np.asarray(self.dense() @ vectors)


def threshold_graph(rows: NDArray[np.float32], threshold: float, weak: float = 1e-5) -> ThresholdGraph:
    """The graph of cells with descriptors ``rows (n, C)``, of any length; rows of zeros have cosine 0 to all.

    Source: TokenCut and MaskCut.
    """
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return ThresholdGraph(np.packbits(unit @ unit.T > threshold, axis=1), weak)
