"""Nearest-neighbour resizing by the rules of the libraries that the reference uses; each rounds ties its own way.

Source: specification, common-evaluation §5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.kernels.nearest import corner_indices


def pillow_nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """``(h, w)`` uint8 or float32 to ``(height, width)``; Pillow samples at cell centres."""
    return np.asarray(Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.NEAREST))


def torch_nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """``(…, h, w)`` to ``(…, height, width)``; torch samples at the cells' upper-left corners."""
    rows, columns = (corner_indices(n_in, n_out) for n_in, n_out in zip(values.shape[-2:], size, strict=True))
    return np.asarray(values[..., rows[:, None], columns])
