"""Overlays for videos: objects, masks, parts and principal components. ``(H, W, 3)`` uint8 RGB in and out."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.engine.drawing.inspection import on_pixels
from facetrt.engine.drawing.results import blend, palette
from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import Pixels
from facetrt.engine.tasks.pca import Pca
from facetrt.kernels.errors import InputError

Labels = NDArray[np.signedinteger]

FILL = 0.45  # weight of a colour over the frame
OUTSIDE = 0.35  # weight of grey over what is background in a co-segmentation
COLOURS = 256  # before objects' colours come again
TAILS = (1.0, 99.0)  # percentiles of a component that take the darkest and brightest colour


def object_overlay(pixels: Pixels, labels: Labels) -> Pixels:
    """Labels ``(H, W)`` as colours over the frame, each with an outline; 0 is background and stays.

    A label's colour depends on its number alone, so that objects keep theirs through a video.
    """
    _check_size(pixels, labels)
    colours = palette(COLOURS)
    painted = blend(pixels, colours[(labels - 1) % COLOURS], FILL)
    canvas = np.ascontiguousarray(np.where((labels > 0)[..., None], painted, pixels), np.uint8)
    for label in np.unique(labels[labels > 0]):
        _outline(canvas, labels == label, colours[(label - 1) % COLOURS])
    return canvas


def mask_overlay(pixels: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The foreground ``(H, W)`` as it is, with an outline; the rest darker and without colour."""
    _check_size(pixels, mask)
    grey = np.repeat(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    canvas = np.ascontiguousarray(np.where(mask[..., None], pixels, (grey * OUTSIDE).astype(np.uint8)), np.uint8)
    _outline(canvas, mask, palette(1)[0])
    return canvas


def parts_overlay(pixels: Pixels, labels: Labels) -> Pixels:
    """Parts ``(H, W)`` as colours over the frame; -1 is background, darker and without colour."""
    _check_size(pixels, labels)
    grey = np.repeat(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    colours = palette(int(labels.max(initial=0)) + 1)
    painted = blend(pixels, colours[np.maximum(labels, 0)], FILL + 0.1)
    return np.where(labels[..., None] >= 0, painted, (grey * OUTSIDE).astype(np.uint8)).astype(np.uint8)


def cells_on_pixels(labels: Labels, geometry: Geometry) -> Labels:
    """Labels of cells ``(grid_h, grid_w)`` at the frame's original size ``(H, W)``, with smooth borders.

    Each label's share is interpolated linearly between the cells' centres, and the largest wins.
    """
    values = np.unique(labels)
    best = np.full(geometry.original_size, values[0], labels.dtype)
    highest = np.full(geometry.original_size, -1, np.float32)
    for value in values:
        share = on_pixels((labels == value).astype(np.float32), geometry, geometry.original_size)
        wins = share > highest
        best[wins], highest[wins] = value, share[wins]
    return best


@dataclass(frozen=True)
class PcaColours:
    """Three principal components as red, green and blue; what maps to which colour stays the same over a video.

    Attributes:
        low, high: ``(3,)`` coordinates on the components that take the darkest and the brightest colour.
    """

    pca: Pca
    low: Float = field(repr=False)
    high: Float = field(repr=False)

    @classmethod
    def fitted(cls, pca: Pca, features: list[Features]) -> PcaColours:
        """Ranges from the frames that the components were fitted on."""
        if len(pca.components) < 3:
            raise InputError(f"{len(pca.components)} components cannot make colours: expected 3")
        rows = np.concatenate([pca.project(item)[..., :3].reshape(-1, 3) for item in features])
        low, high = np.percentile(rows, TAILS, axis=0).astype(np.float32)
        return cls(pca, low, np.where(high > low, high, low + 1))

    def picture(self, projected: Float, geometry: Geometry) -> Pixels:
        """Coordinates ``(grid_h, grid_w, c)`` as colours at the frame's original size."""
        scaled = np.clip((projected[..., :3] - self.low) / (self.high - self.low), 0, 1)
        channels = [on_pixels(np.ascontiguousarray(scaled[..., i]), geometry, geometry.original_size) for i in range(3)]
        return np.asarray(np.stack(channels, axis=-1) * 255, np.float32).astype(np.uint8)


def _outline(canvas: Pixels, mask: NDArray[np.bool_], colour: NDArray[np.uint8]) -> None:
    """Around ``mask``: a light line below one in ``colour``, so that it shows on any frame."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(min(canvas.shape[:2]) / 240))
    for thickness, shade in ((width + 2, (255, 255, 255)), (width, tuple(int(v) for v in colour))):
        cv2.drawContours(canvas, contours, -1, shade, thickness, cv2.LINE_AA)


def _check_size(pixels: Pixels, labels: NDArray[np.generic]) -> None:
    if labels.shape != pixels.shape[:2]:
        raise InputError(f"labels of shape {labels.shape} for a frame of {pixels.shape[:2]}: expected one for a pixel")
