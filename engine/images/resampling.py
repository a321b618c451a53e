"""Resizing by the rules of the libraries that the references use; nearest neighbours round ties each its own way.

Source: specification, common-evaluation §5.
"""

from __future__ import annotations

from typing import Any

import cv2
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


def opencv_nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """``(h, w)`` to ``(height, width)`` of the same type; OpenCV samples at the cells' upper-left corners as well."""
    resized = cv2.resize(values.astype(np.uint8), (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
    return np.asarray(resized, values.dtype)


def bilinear(values: NDArray[np.floating], size: tuple[int, int], *, corners: bool = False) -> NDArray[np.float32]:
    """``(…, h, w)`` to ``(…, height, width)`` float32, as torch enlarges: between the four cells around a point.

    Args:
        corners: let the outermost cells' centres lie at the corners, torch's ``align_corners``.
    """
    shape = values.shape[:-2]
    rows, columns = (_linear(n_in, n_out, corners) for n_in, n_out in zip(values.shape[-2:], size, strict=True))
    flat = values.reshape(-1, *values.shape[-2:]).astype(np.float64)
    tall = flat[:, rows[0]] * (1 - rows[1])[:, None] + flat[:, rows[0] + rows[2]] * rows[1][:, None]
    wide = tall[:, :, columns[0]] * (1 - columns[1]) + tall[:, :, columns[0] + columns[2]] * columns[1]
    return np.asarray(wide.reshape(*shape, *size), np.float32)


def _linear(n_in: int, n_out: int, corners: bool) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """The cell before each output, the share of the next one, and the step to it."""
    if corners:
        places = np.arange(n_out) * ((n_in - 1) / max(n_out - 1, 1))
    else:
        places = np.maximum((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0)
    before = np.minimum(places.astype(np.int64), n_in - 1)
    return before, np.asarray(places - before, np.float64), (before < n_in - 1).astype(np.int64)
