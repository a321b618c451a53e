"""Objects as pictures: masks in colour, boxes, and the maps they came from. ``(H, W, 3)`` uint8 RGB out."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.engine.drawing.overlays import FILL
from facetrt.engine.drawing.results import blend, display_size, heat_map, label_map, palette
from facetrt.engine.images.loading import Pixels
from facetrt.engine.tasks.discovery.objects import Objects
from facetrt.engine.tasks.refinement import enlarge_mask

MAP_HEIGHT = 320  # of a map's picture


def objects_overlay(pixels: Pixels, objects: Objects) -> Pixels:
    """Each object's mask in its colour with an outline, and its box, over a picture of any size of the image."""
    size, original = (pixels.shape[0], pixels.shape[1]), objects.geometry.original_size
    canvas, colours = pixels.copy(), palette(max(len(objects), 1))
    line = max(1, round(min(size) / 200))
    masks = [mask if mask.shape == size else enlarge_mask(mask, size) for mask in objects.masks]
    for mask, colour in zip(masks, colours, strict=False):
        canvas = np.where(mask[..., None], blend(canvas, np.broadcast_to(colour, canvas.shape), FILL), canvas)
    canvas = np.ascontiguousarray(canvas, np.uint8)
    scale = np.array([size[1] / original[1], size[0] / original[0]] * 2)
    for mask, box, colour in zip(masks, objects.boxes * scale, colours, strict=False):
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        left, top, right, bottom = (round(float(side)) for side in box)
        shade = tuple(int(value) for value in colour)
        for thickness, ink in ((line + 2, (255, 255, 255)), (line, shade)):
            cv2.drawContours(canvas, contours, -1, ink, thickness, cv2.LINE_AA)
            cv2.rectangle(canvas, (left, top), (max(right - 1, left), max(bottom - 1, top)), ink, thickness)
    return canvas


def map_picture(values: NDArray[np.generic]) -> Pixels:
    """One map of cells ``(grid_h, grid_w)``: numbers as heat between their extremes, labels in colours, bools grey."""
    size = display_size((values.shape[0], values.shape[1]), MAP_HEIGHT)
    if values.dtype == np.bool_:
        return heat_map(values.astype(np.float32), size)
    if np.issubdtype(values.dtype, np.integer) and values.min() >= 0 and values.max() < 64:
        return label_map(values, size)  # type: ignore[arg-type]
    numbers = values.astype(np.float64)
    low, high = numbers.min(), numbers.max()
    return heat_map(((numbers - low) / max(high - low, np.finfo(np.float64).tiny)).astype(np.float32), size)
