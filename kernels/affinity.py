"""Graphs whose nodes are an image's cells and whose edges say how alike they are.

None holds a float for each pair of cells, unless they are few: a threshold leaves one bit, what is linear in the
cosines is multiplied factor by factor, and the rest is made again, in blocks, for every product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError
from facetrt.kernels.parallel import map_threads, one_blas_thread
from facetrt.kernels.products import TIE

Float = NDArray[np.float32]
Bools = NDArray[np.bool_]
Vectors = NDArray[np.float64]

NOT_FINITE = "descriptors hold numbers that are not finite: the encoder, or what it was given, is damaged"
BLOCK_ROWS = 64  # of cosines made at a time: 5 MB of 19,200 cells
HELD_BYTES = 128 << 20  # a float32 matrix up to this size is kept between products: 5,792 cells
PATTERNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float64)  # (256, 8)


class Graph(ABC):
    """A symmetric matrix W of edge weights between ``n`` nodes, which need not be held anywhere."""

    @abstractmethod
    def __len__(self) -> int:
        """``n``."""

    @property
    @abstractmethod
    def degree(self) -> Vectors:
        """The sums of W's rows, ``(n,)``."""

    @abstractmethod
    def product(self, vector: Vectors) -> Vectors:
        """``W @ vector`` for ``(n,)`` float64."""

    def dense(self) -> Vectors:
        """W, ``(n, n)`` float64, for few nodes: it takes n products."""
        return np.stack([self.product(column) for column in np.eye(len(self))], axis=1)


class CutGraph(Graph):
    """A graph that cells can be taken out of, to be cut again."""

    @abstractmethod
    def without(self, cells: Bools) -> CutGraph:
        """The same with only weak edges at ``cells (n,)``: what descriptors of zeros there would give."""


class ThresholdGraph(CutGraph):
    """1 between cells whose cosine exceeds a threshold, ``weak`` between all others.

    A product looks up the sums of eight values of the vector at a time, by the bits of their edges, in float64 and in
    a fixed order.

    Args:
        bits: ``(⌈n/8⌉, n)`` uint8: :func:`numpy.packbits` of the strong edges along their first axis.
    """

    def __init__(self, bits: NDArray[np.uint8], weak: float) -> None:
        self.bits, self.weak = bits, weak

    def __len__(self) -> int:
        return int(self.bits.shape[1])

    def strong(self) -> Bools:
        """The strong edges, ``(n, n)`` bool."""
        return np.unpackbits(self.bits, axis=0, count=len(self)).astype(np.bool_)

    @cached_property
    def strong_degree(self) -> NDArray[np.int64]:
        """How many strong edges each cell has, its own to itself included, ``(n,)``."""
        return np.rint(self._strong_product(np.ones(len(self)))).astype(np.int64)

    @property
    def degree(self) -> Vectors:
        """See :class:`Graph`."""
        return np.asarray(self.strong_degree + self.weak * (len(self) - self.strong_degree), np.float64)

    def product(self, vector: Vectors) -> Vectors:
        """See :class:`Graph`."""
        return np.asarray((1 - self.weak) * self._strong_product(vector) + self.weak * vector.sum())

    def dense(self) -> Vectors:
        """See :class:`Graph`."""
        return np.where(self.strong(), 1.0, self.weak)

    def without(self, cells: Bools) -> ThresholdGraph:
        """See :class:`CutGraph`."""
        kept = ~np.asarray(cells, np.bool_)
        bits = self.bits & np.packbits(kept)[:, None]
        bits[:, ~kept] = 0
        return ThresholdGraph(bits, self.weak)

    def _strong_product(self, vector: Vectors) -> Vectors:
        groups, count = self.bits.shape
        padded = np.zeros(8 * groups)
        padded[:count] = vector
        sums = np.einsum("gb,pb->gp", padded.reshape(groups, 8), PATTERNS)  # (⌈n/8⌉, 256)
        out, found = np.zeros(count), np.empty((count, 1))
        for table, row in zip(sums, self.bits, strict=True):
            out += cv2.LUT(row[:, None], table, found)[:, 0]
        return out


def threshold_graph(rows: Float, threshold: float, weak: float = 1e-5) -> ThresholdGraph:
    """The graph of cells with descriptors ``rows (n, C)``, of any length; rows of zeros have cosine 0 to all.

    Cosines closer to the threshold than rounding are computed again in float64, in a fixed order: which edges are
    strong does not depend on the processor. Source: TokenCut and MaskCut.

    Raises:
        InputError: a descriptor that is not finite.
    """
    unit = unit_length(rows)
    count = len(unit)
    bits = np.empty((-(-count // 8), count), np.uint8)

    def fill(start: int) -> None:
        cosines = unit[start : start + BLOCK_ROWS] @ unit.T
        strong = cosines > threshold
        near = np.nonzero(np.abs(cosines - np.float32(threshold)) <= TIE)
        if len(near[0]):
            pairs = unit[near[0] + start].astype(np.float64), unit[near[1]].astype(np.float64)
            strong[near] = np.einsum("nc,nc->n", *pairs) > threshold
        bits[start // 8 : start // 8 + -(-len(strong) // 8)] = np.packbits(strong, axis=0)

    _in_blocks(fill, count)
    return ThresholdGraph(bits, weak)


class CosineGraph(Graph):
    """Edges that are a function of the cosine, one by one: some weights are the cosine, the others constant.

    Args:
        unit: descriptors of length 1, or 0, ``(n, C)`` float32.
        least: the weight is the cosine where that is at least this,
        weak: and this elsewhere.
        scale: all weights are divided by it.
        more: further weights to be added: a SciPy sparse matrix ``(n, n)``, or None.
    """

    def __init__(self, unit: Float, *, least: float, weak: float, scale: float = 1.0, more: Any = None) -> None:
        self.unit, self.least, self.weak, self.scale, self.more = unit, least, weak, scale, more

    def __len__(self) -> int:
        return len(self.unit)

    @cached_property
    def degree(self) -> Vectors:
        """See :class:`Graph`."""
        return self.product(np.ones(len(self)))

    def product(self, vector: Vectors) -> Vectors:
        """See :class:`Graph`."""
        out = np.empty(len(self))

        def fill(start: int) -> None:
            part = slice(start, start + BLOCK_ROWS)
            weights = self._weights(part) if self._held is None else self._held[part]
            out[part] = weights.astype(np.float64) @ vector

        _in_blocks(fill, len(self))
        return out if self.more is None else np.asarray(out + self.more @ vector)

    def dense(self) -> Vectors:
        """See :class:`Graph`."""
        weights = self._weights(slice(None)).astype(np.float64)
        return weights if self.more is None else np.asarray(weights + self.more.toarray())

    def _weights(self, part: slice) -> Float:
        cosines = self.unit[part] @ self.unit.T
        return np.asarray(np.where(cosines >= self.least, cosines, self.weak) / self.scale, np.float32)

    @cached_property
    def _held(self) -> Float | None:
        if 4 * len(self) ** 2 > HELD_BYTES:
            return None
        held = np.empty((len(self), len(self)), np.float32)

        def fill(start: int) -> None:
            held[start : start + BLOCK_ROWS] = self._weights(slice(start, start + BLOCK_ROWS))

        _in_blocks(fill, len(self))
        return held


def weighted_graph(rows: Float, threshold: float, weak: float = 1e-5) -> CosineGraph:
    """TokenCut's ablation: the cosine where that is at least ``threshold``, ``weak`` elsewhere."""
    return CosineGraph(unit_length(rows), least=threshold, weak=weak)


def spectral_graph(rows: Float, colours: Any = None, *, unit: bool = False) -> CosineGraph:
    """Deep Spectral's: the positive cosines over the largest one, and weights of ``colours`` (sparse) if given.

    Args:
        unit: take products of the rows as they are: they were of length 1 before they were resampled.
    """
    given = rows if unit else unit_length(rows)
    largest = max(float(np.einsum("nc,nc->n", given, given).max(initial=0)), float(np.finfo(np.float32).tiny))
    return CosineGraph(given, least=0.0, weak=0.0, scale=largest, more=colours)


class StretchedGraph(Graph):
    """Cosines shifted and scaled to [0, 1] as a whole matrix, SelfMask's graph; two thin products are one with it."""

    def __init__(self, rows: Float) -> None:
        self.unit = unit_length(rows)
        self.low, high = _range(self.unit)
        self.spread = max(high - self.low, float(np.finfo(np.float32).tiny))

    def __len__(self) -> int:
        return len(self.unit)

    @cached_property
    def degree(self) -> Vectors:
        """See :class:`Graph`."""
        return self.product(np.ones(len(self)))

    def product(self, vector: Vectors) -> Vectors:
        """See :class:`Graph`."""
        inner = np.einsum("nc,n->c", self.unit, vector)
        return np.asarray((np.einsum("nc,c->n", self.unit, inner) - self.low * vector.sum()) / self.spread)

    def dense(self) -> Vectors:
        """See :class:`Graph`."""
        unit = self.unit.astype(np.float64)
        return np.asarray((unit @ unit.T - self.low) / self.spread)


def unit_length(rows: Float) -> Float:
    """``rows (n, C)`` divided by their lengths, which are computed in float64; rows of zeros stay.

    Raises:
        InputError: a number that is not finite, or no row.
    """
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"descriptors of shape {rows.shape}: expected (cells, channels) of at least one cell")
    squares = np.einsum("nc,nc->n", rows, rows, dtype=np.float64)
    if not np.isfinite(squares).all():
        raise InputError(NOT_FINITE)
    return np.asarray(rows / np.maximum(np.sqrt(squares), 1e-12)[:, None], np.float32)


def _range(unit: Float) -> tuple[float, float]:
    """The smallest and the largest cosine."""
    lows, highs = np.empty(len(unit)), np.empty(len(unit))

    def fill(start: int) -> None:
        part = slice(start, start + BLOCK_ROWS)
        cosines = unit[part] @ unit.T
        lows[part], highs[part] = cosines.min(axis=1), cosines.max(axis=1)

    _in_blocks(fill, len(unit))
    return float(lows.min()), float(highs.max())


def _in_blocks(fill: Any, count: int) -> None:
    with one_blas_thread:
        map_threads(fill, range(0, count, BLOCK_ROWS))
