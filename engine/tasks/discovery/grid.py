"""What parts of a grid are in pixels of the loaded image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.discovery.objects import Bools, Found
from facetrt.kernels.components import extent


def boxes_of(cells: Bools, geometry: Geometry) -> NDArray[np.float64]:
    """``(N, 4)`` ``xmin, ymin, xmax, ymax`` in loaded pixels of maps ``cells (N, grid_h, grid_w)``; none may be empty.

    Where patches do not overlap, a cell is its patch. Where they do, it is the ``stride`` × ``stride`` pixels around
    its centre, and the outermost cells reach to the edge.
    """
    sides = zip(geometry.grid, geometry.covered_size, strict=True)
    rows, columns = (_edges(count, covered, geometry) for count, covered in sides)
    boxes = []
    for each in cells:
        left, top, right, bottom = extent(each) or (0, 0, 0, 0)
        boxes.append((columns[left], rows[top], columns[right], rows[bottom]))
    return np.array(boxes, np.float64).reshape(-1, 4)


def loaded_masks(cells: Bools, geometry: Geometry) -> Bools:
    """Maps of cells ``(…, grid_h, grid_w)`` as ``(…, height, width)`` of the loaded image: each pixel its cell's.

    Pixels at the right and at the bottom that no cell covers take the nearest one's.
    """
    rows, columns = (
        _cell_of_pixel(n, side, geometry) for n, side in zip(geometry.grid, geometry.image_size, strict=True)
    )
    return np.asarray(cells[..., rows[:, None], columns])


def nothing(geometry: Geometry, why: str, **maps: NDArray[Any]) -> Found:
    """The result where there is no object; ``why`` is read after the image's name."""
    empty, size = np.zeros((0, *geometry.grid), np.bool_), geometry.image_size
    return Found(empty, np.zeros((0, 4)), np.zeros((0, *size), np.bool_), maps=maps, why_empty=why)


def _edges(cells: int, covered: int, geometry: Geometry) -> NDArray[np.float64]:
    """Where cells begin along an axis, and where the last one ends, ``(cells + 1,)``."""
    margin = (geometry.patch - geometry.stride) / 2
    edges = np.arange(cells + 1) * float(geometry.stride) + margin
    edges[0], edges[-1] = 0, covered
    return np.asarray(edges, np.float64)


def _cell_of_pixel(cells: int, side: int, geometry: Geometry) -> NDArray[np.int64]:
    centres = np.arange(side) + 0.5
    found = np.floor((centres - (geometry.patch - geometry.stride) / 2) / geometry.stride).astype(np.int64)
    return np.clip(found, 0, cells - 1)
