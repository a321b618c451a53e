"""From a mask of cells to a mask of pixels."""

from __future__ import annotations

from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.images import Pixels

Mask = NDArray[np.bool_]

GRABCUT_SEED = 0  # OpenCV's generator, seeded per image: results do not depend on what ran before
GRABCUT_ROUNDS = 5
BAND = 7  # side of the erosion box that separates sure from probable pixels


class Refinement(StrEnum):
    """How a mask of cells becomes one of pixels: enlarged only, or enlarged and cut along colour edges."""

    GRABCUT = "grabcut"
    NONE = "none"


def enlarge_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Nearest neighbour to ``(height, width)`` by Pillow's rule, as the reference executes it."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.NEAREST)).astype(np.bool_)


def grabcut(pixels: Pixels, mask: Mask) -> Mask | None:
    """Refine a mask by GrabCut; ``pixels (H, W, 3)`` uint8 RGB, ``mask (H, W)`` bool.

    Returns None where GrabCut has nothing to learn from (no sure background, or no foreground): the reference then
    keeps the mask as it is.
    """
    box = np.ones((BAND, BAND), np.uint8)
    foreground = cv2.erode(mask.astype(np.uint8), box)
    background = cv2.erode((~mask).astype(np.uint8), box)
    labels = np.full(mask.shape, cv2.GC_PR_FGD, np.uint8)
    labels[background > 0] = cv2.GC_BGD
    labels[foreground > 0] = cv2.GC_FGD
    cv2.setRNGSeed(GRABCUT_SEED)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    try:
        cv2.grabCut(np.ascontiguousarray(pixels), labels, (0, 0, 1, 1), *models, GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    except cv2.error:
        return None
    return np.asarray((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))
