"""What is found in one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Float
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.refinement import Refinement

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """What a method finds, in cells and in pixels of the loaded image (which the encoder saw, padding included).

    Attributes:
        cells: ``(N, grid_h, grid_w)`` bool, one map per object, the most certain first.
        boxes: ``(N, 4)`` float64 ``xmin, ymin, xmax, ymax`` in loaded pixels, ends excluded.
        loaded_masks: ``(N, height, width)`` bool.
        soft: ``(N, height, width)`` float32 in [0, 1], where the method says how sure it is of each pixel.
        masks: ``(N, height, width)`` bool at the original size, where the method's own rule leads there directly.
        whole: ``(height, width)`` bool: what refinement begins from, and makes one object of, where that is not each of
            the masks.
        scores: ``(N,)`` float64, where the method scores its objects.
        maps: what the method made on the way, by name: ``(grid_h, grid_w)`` or ``(K, grid_h, grid_w)`` arrays.
        facts: numbers worth recording: thresholds chosen, residuals, seeds.
        why_empty: why there is no object, to be read after the image's name; None if there is one.
    """

    cells: Bools
    boxes: NDArray[np.float64]
    loaded_masks: Bools
    soft: Float | None = None
    masks: Bools | None = None
    whole: Bools | None = None
    scores: NDArray[np.float64] | None = None
    maps: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    why_empty: str | None = None


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        method: name of the method.
        facet: whose rows it was given.
        boxes: ``(N, 4)`` float64 ``xmin, ymin, xmax, ymax`` in pixels of the original image, ends excluded.
        masks: ``(N, height, width)`` bool at the original size.
        soft: ``(N, height, width)`` float32 at the original size, or None.
        cells: ``(N, grid_h, grid_w)`` bool.
        scores: ``(N,)`` float64, or None where the method has none.
        maps, facts: see :class:`Found`.
        refinement: what was made of the method's masks.
        geometry: how the cells lie on the image.
        name: path of the image, or how messages call it.
        why_empty: why nothing was found, to be read after the name, or None.
    """

    method: str
    facet: str
    boxes: NDArray[np.float64]
    masks: Bools
    soft: Float | None
    cells: Bools
    scores: NDArray[np.float64] | None
    maps: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]
    refinement: Refinement
    geometry: Geometry
    name: str
    why_empty: str | None

    def __len__(self) -> int:
        return len(self.boxes)
