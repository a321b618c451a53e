"""Connected parts of a mask."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]


def connected_components(mask: Bools, connectivity: int = 4) -> tuple[NDArray[np.int32], int]:
    """Labels ``(h, w)`` of the connected parts of ``mask (h, w)``, 0 outside it, and how many parts there are.

    Parts are numbered from 1 in the order in which a raster scan meets them.

    Args:
        connectivity: 4, or 8 to join parts that touch at corners.
    """
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=connectivity, ltype=cv2.CV_32S)
    first = np.full(count, labels.size)
    np.minimum.at(first, labels.ravel().astype(np.int64), np.arange(labels.size))
    first[0] = -1
    order = np.empty(count, np.int32)
    order[np.argsort(first, kind="stable")] = np.arange(count)
    return order[labels], count - 1


def component_at(mask: Bools, cell: int, connectivity: int = 4) -> Bools:
    """The connected part of ``mask (h, w)`` that holds a row-major cell; empty if the mask does not."""
    labels, _ = connected_components(mask, connectivity)
    label = labels.ravel()[cell]
    return np.asarray((labels == label) & (label > 0))


def largest_component(mask: Bools, connectivity: int = 4) -> Bools:
    """The connected part of ``mask (h, w)`` with the most cells, the first in raster order if several have."""
    labels, count = connected_components(mask, connectivity)
    if not count:
        return np.zeros_like(mask)
    return np.asarray(labels == 1 + np.bincount(labels.ravel(), minlength=count + 1)[1:].argmax())


def extent(mask: Bools) -> tuple[int, int, int, int] | None:
    """``xmin, ymin, xmax, ymax`` of a mask, ends excluded; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
