"""Trails of followed points, drawn on a frame."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.engine.drawing.results import Pixels, palette
from facetrt.kernels.errors import InputError

FRACTION_BITS = 4  # OpenCV draws to a sixteenth of a pixel


def draw_trails(
    pixels: Pixels, history: Sequence[NDArray[np.floating]] | NDArray[np.floating], visible: NDArray[np.bool_]
) -> Pixels:
    """Where points came from, as lines that grow brighter towards where they are now; a point keeps its colour.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB; a copy is drawn on.
        history: ``(T, N, 2)``, the points' (x, y) in pixels of this picture, oldest first.
        visible: ``(T, N)``, or ``(N,)`` for the last frame alone. Points that are not visible in it have no mark, and
            lines join only positions where the point was visible.

    Raises:
        InputError: shapes that do not fit together.
    """
    points = np.asarray(history, np.float64)
    shown = np.asarray(visible, np.bool_)
    if shown.ndim == 1 and points.ndim == 3:
        shown = np.broadcast_to(shown, points.shape[:2])
    if points.ndim != 3 or points.shape[2] != 2 or points.shape[0] == 0 or shown.shape != points.shape[:2]:
        raise InputError(
            f"history has shape {points.shape} and visible {np.shape(visible)}: expected (T, N, 2), and (T, N) or (N,)"
        )
    canvas = pixels.copy()
    for trail, seen, colour in zip(np.swapaxes(points, 0, 1), shown.T, palette(points.shape[1]), strict=True):
        _draw_trail(canvas, trail, seen, colour.astype(np.float64))
    return canvas


def _draw_trail(
    canvas: Pixels, trail: NDArray[np.float64], seen: NDArray[np.bool_], colour: NDArray[np.float64]
) -> None:
    """One point's line and mark; ``trail (T, 2)``, ``seen (T,)``."""
    fixed = [tuple(map(int, point)) for point in np.rint((trail - 0.5) * (1 << FRACTION_BITS))]  # pixel centres
    radius, thickness = max(2, canvas.shape[0] // 150), max(1, canvas.shape[0] // 300)
    for i in np.flatnonzero(seen[:-1] & seen[1:]):
        shade = tuple(0.35 * colour + 0.65 * colour * (i + 2) / len(trail))
        cv2.line(canvas, fixed[i], fixed[i + 1], shade, thickness, cv2.LINE_AA, FRACTION_BITS)
    if seen[-1]:
        for size, shade in ((radius + 1, (255.0, 255.0, 255.0)), (radius, tuple(colour))):
            cv2.circle(canvas, fixed[-1], size << FRACTION_BITS, shade, cv2.FILLED, cv2.LINE_AA, FRACTION_BITS)
