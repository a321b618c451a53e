"""A few photographs that ship with facetrt (licences in NOTICE), for the demo and for checking exports."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image


def sample_paths() -> dict[str, Path]:
    """Name → file of each photograph, in alphabetical order."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jpg"))}


def sample_images() -> dict[str, Image.Image]:
    """Name → decoded RGB photograph."""
    return {name: Image.open(path).convert("RGB") for name, path in sample_paths().items()}


def second_view(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The same scene turned by 8°, shrunk to 90 % and a little darker, as a pair whose correspondences are known.

    Returns ``(H, W, 3)`` uint8 and the ``(2, 3)`` matrix that maps (x, y, 1) of the first view to (x, y) of the second.
    """
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), 8, 0.9)
    turned = cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
    return (turned * 0.9).astype(np.uint8), np.asarray(matrix)
