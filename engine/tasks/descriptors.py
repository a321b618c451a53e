"""Unit descriptors of an image's cells, plain or log-binned, as clusterings take them.

Binned descriptors are 17 times as long as plain ones (two levels), 79 MB of an image of 55 × 55 cells and 384 channels:
they are made in blocks whenever they are read, and never of a whole image at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.collection import LazySequence, map_features
from facetrt.engine.features.features import Features, Float
from facetrt.kernels.kmeans import Assignment, assign_each
from facetrt.kernels.log_bin import bin_offsets, log_bin
from facetrt.kernels.products import squared_distances, squared_lengths

BLOCK_CELLS = 1024  # binned descriptors made at a time: 27 MB of 384 channels at two levels


def normalise(rows: Float) -> Float:
    """Rows divided by their length; zero rows stay zero, as in FAISS."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1), np.float32)


class BinnedRows:
    """Log-binned unit descriptors ``(cells, bins·C)`` of some cells of an image, made where they are indexed."""

    def __init__(self, features: Features, facet: str, hierarchy: int, cells: NDArray[np.int64] | None = None) -> None:
        self._map, self._hierarchy = features.map(facet), hierarchy
        self._cells = np.arange(len(features[facet])) if cells is None else cells
        self.shape = (len(self._cells), len(bin_offsets(hierarchy)) * self._map.shape[2])

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: slice | NDArray[Any]) -> Float:
        return normalise(log_bin(self._map, self._hierarchy, cells=self._cells[index]))

    def only(self, mask: NDArray[np.bool_]) -> BinnedRows:
        """Those of the cells where ``mask (cells,)`` is set."""
        chosen = object.__new__(BinnedRows)
        chosen._map, chosen._hierarchy, chosen._cells = self._map, self._hierarchy, self._cells[mask]
        chosen.shape = (len(chosen._cells), self.shape[1])
        return chosen


Rows = Float | BinnedRows


def unit_rows(features: Features, facet: str, hierarchy: int) -> Rows:
    """Unit descriptors of all cells; ``hierarchy`` levels of log-binning, 0 for none."""
    return BinnedRows(features, facet, hierarchy) if hierarchy else normalise(features[facet])


def descriptors_of(features: Sequence[Features], facet: str, hierarchy: int) -> Sequence[Rows]:
    """Unit descriptors of each image; binned ones, which would fill memory, are made again at each use."""
    if hierarchy:
        return LazySequence(len(features), lambda i: unit_rows(features[i], facet, hierarchy))
    return map_features(features, lambda item: normalise(item[facet]))


def only(rows: Rows, mask: NDArray[np.bool_]) -> Rows:
    """Rows where ``mask (cells,)`` is set."""
    return rows.only(mask) if isinstance(rows, BinnedRows) else rows[mask]


def blocks(rows: Rows) -> Iterator[Float]:
    """All rows: plain ones at once, binned ones a block at a time."""
    if not isinstance(rows, BinnedRows):
        yield rows
        return
    for start in range(0, len(rows), BLOCK_CELLS):
        yield rows[start : start + BLOCK_CELLS]


def assign_rows(rows: Rows, centroid_sets: Sequence[Float]) -> list[Assignment]:
    """:func:`facetrt.kernels.kmeans.assign_each` of rows of either kind."""
    if not len(rows):
        return assign_each(np.empty(rows.shape, np.float32), centroid_sets)
    parts = zip(*(assign_each(block, centroid_sets) for block in blocks(rows)), strict=True)
    return [
        Assignment(
            np.concatenate([part.labels for part in found]), np.concatenate([part.squared_distances for part in found])
        )
        for found in parts
    ]


def distances_to(rows: Rows, centroids: Float) -> tuple[Float, Float]:
    """Squared distances to each centroid, ``(k, cells)``, and the rows' squared lengths, ``(cells,)``."""
    found = [(squared_distances(block, centroids), squared_lengths(block)) for block in blocks(rows)]
    return np.concatenate([distances for distances, _ in found], axis=1), np.concatenate([own for _, own in found])
