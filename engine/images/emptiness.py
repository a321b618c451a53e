"""Whether there is anything to find in a picture: what every task asks before it answers with confidence."""

from __future__ import annotations

import cv2
import numpy as np

from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import Pixels

MIN_DETAIL = (
    2.0  # grey levels: photographs have 15 to 80, black, constant, dithered and smoothly shaded pictures below 1
)
MIN_PATCHES = 2  # of original pixels along the shorter side


def detail_of(pixels: Pixels, geometry: Geometry) -> float:
    """How much a picture varies from patch to patch beyond a constant slope, in grey levels (0 to 255).

    The root mean square of second differences between the mean colours of neighbouring patches, down columns and along
    rows: a constant picture and a linear gradient have 0, and noise finer than a patch averages out.

    Args:
        pixels: ``(H, W, 3)`` uint8, the loaded image or the original one, without a border that was added: patches are
            those of the loaded image.
    """
    size = tuple(max(3, side // geometry.patch) for side in geometry.picture_size)  # second differences take three
    means = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA).astype(np.float64)
    changes = np.concatenate([np.diff(means, 2, axis=axis).ravel() for axis in (0, 1)])
    return float(np.sqrt(np.mean(changes**2))) if changes.size else 0.0


def why_empty(detail: float | None, geometry: Geometry) -> str | None:
    """Why nothing can be found in a picture, as the end of a sentence that begins with its name; None if something can.

    Args:
        detail: of :func:`detail_of`, or None where the pixels are unknown.
    """
    height, width = geometry.original_size
    if min(height, width) < MIN_PATCHES * geometry.patch:
        return f"is too small ({width}×{height} pixels; {MIN_PATCHES * geometry.patch} of each are the least)"
    if detail is not None and detail < MIN_DETAIL:
        return f"is featureless (patches differ by {detail:.2g} grey levels; {MIN_DETAIL:g} are the least)"
    return None
