"""Objects as pictures: masks in colour, boxes, and the maps they came from. ``(H, W, 3)`` uint8 RGB out."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.engine.drawing.overlays import FILL
from facetrt.engine.drawing.results import blend, heat_map, label_map, palette, scaled
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import Pixels
from facetrt.engine.images.resampling import pillow_nearest
from facetrt.engine.tasks.discovery.objects import Objects
from facetrt.engine.tasks.refinement import enlarge_mask

MAP_HEIGHT = 320  # of a map's picture
FADED = 0.3  # how much darker is what belongs to no object
DARK, BRIGHT = (26, 26, 46), (245, 205, 80)  # of a map of no and yes
BELOW, ZERO, ABOVE = (33, 84, 160), (247, 247, 247), (178, 24, 43)  # of one with both signs
MOST_LABELS = 64  # whole numbers that have a colour each


def objects_overlay(pixels: Pixels, objects: Objects) -> Pixels:
    """Each object's mask in its colour with an outline, and its box, over a picture of any size of the image.

    What belongs to no object is darker. Where objects overlap, the first, which is the most certain, lies on top.
    """
    if not len(objects):
        return pixels.copy()
    size, original = (pixels.shape[0], pixels.shape[1]), objects.geometry.original_size
    line = max(1, round(min(size) / 200))
    scale = np.array([size[1] / original[1], size[0] / original[0]] * 2)
    masks = [mask if mask.shape == size else enlarge_mask(mask, size) for mask in objects.masks]
    canvas = np.ascontiguousarray(blend(pixels, np.zeros_like(pixels), FADED))
    drawn = list(zip(masks, objects.boxes * scale, palette(len(objects)), strict=True))
    for mask, _, colour in reversed(drawn):
        canvas[mask] = blend(pixels[mask], np.broadcast_to(colour, pixels[mask].shape), FILL)
    for mask, box, colour in reversed(drawn):
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        left, top, right, bottom = (round(float(side)) for side in box)
        shade = tuple(int(value) for value in colour)
        for thickness, ink in ((line + 2, (255, 255, 255)), (line, shade)):
            cv2.drawContours(canvas, contours, -1, ink, thickness, cv2.LINE_AA)
            cv2.rectangle(canvas, (left, top), (max(right - 1, left), max(bottom - 1, top)), ink, thickness)
    return canvas


def map_picture(values: NDArray[Any], geometry: Geometry, height: int = MAP_HEIGHT) -> Pixels:
    """One map of cells ``(grid_h, grid_w)`` as it lies on the image, without a border that was added.

    A map of yes and no has two colours, one of a few whole numbers a colour for each; one with both signs is white at
    zero, red above and blue below; any other is dark where it is least and bright where it is most.
    """
    large = _coloured(values, geometry.image_size).transpose(2, 0, 1)
    shown = np.ascontiguousarray(geometry.on_picture(large).transpose(1, 2, 0))
    return scaled(pillow_nearest(shown, geometry.original_size), height)


def _coloured(values: NDArray[Any], size: tuple[int, int]) -> Pixels:
    if values.dtype == np.bool_:
        return pillow_nearest(np.where(values[..., None], BRIGHT, DARK).astype(np.uint8), size)
    if np.issubdtype(values.dtype, np.integer) and values.min() >= 0 and values.max() < MOST_LABELS:
        return label_map(values, size)
    numbers = values.astype(np.float64)
    low, high = float(numbers.min()), float(numbers.max())
    if low < 0 < high:
        return pillow_nearest(_signed(numbers / max(-low, high)), size)
    return heat_map(((numbers - low) / (high - low if high > low else 1)).astype(np.float32), size)


def _signed(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values in [-1, 1] as colours, ``(…, 3)``."""
    channels = [np.interp(values, (-1, 0, 1), colours) for colours in zip(BELOW, ZERO, ABOVE, strict=True)]
    return np.asarray(np.stack(channels, axis=-1).astype(np.uint8))
