"""Augmented views for part co-segmentation: random crops of an image and of its mirror.

Source: the reference implementation (specification §10.1); the offsets are seeded here, they are not there.
"""

from __future__ import annotations

import numpy as np

from facetrt.engine.images.loading import Pixels

CROP = 0.95


def augment(pixels: Pixels, crops: int, *, flip: bool, random: np.random.Generator) -> list[Pixels]:
    """Views of one loaded image: the uncropped mirror if ``flip``, then ``crops`` times a crop and a mirrored crop."""
    mirrored = np.ascontiguousarray(pixels[:, ::-1])
    views = [mirrored] if flip else []
    for _ in range(crops):
        views += [_crop(pixels, random), _crop(mirrored, random)]
    return views


def crop_size(size: tuple[int, int]) -> tuple[int, int]:
    """``(height, width)`` of a crop: 95 % of each side, truncated."""
    return int(CROP * size[0]), int(CROP * size[1])


def _crop(pixels: Pixels, random: np.random.Generator) -> Pixels:
    height, width = crop_size((pixels.shape[0], pixels.shape[1]))
    top, left = (int(random.integers(0, n - m + 1)) for n, m in zip(pixels.shape, (height, width), strict=False))
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])
