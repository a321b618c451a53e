"""Pictures of results. Every function takes and returns ``(H, W, 3)`` uint8 RGB unless it says otherwise."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.matching import Matches

Pixels = NDArray[np.uint8]

TILE = 8  # side of a chessboard square in pixels
GAP = 8  # white pixels between pictures in a row


def palette(count: int) -> NDArray[np.uint8]:
    """``(count, 3)`` distinct colours: hues a golden angle apart, so that any prefix is well spread."""
    hues = [(0.02 + 0.618034 * i) % 1 for i in range(count)]
    colours = [colorsys.hsv_to_rgb(hue, 0.75 + 0.25 * (i % 2), 1.0 - 0.2 * (i % 3 == 2)) for i, hue in enumerate(hues)]
    return (np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def on_chessboard(pixels: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The masked part of an image; the rest is a chessboard that lets a little of the image through."""
    rows, columns = np.indices(mask.shape) // TILE
    board = np.where((rows + columns) % 2, 255, 205)[..., None]
    faded = 0.8 * board + 0.2 * pixels
    return np.where(mask[..., None], pixels, faded).astype(np.uint8)


def heat_map(values: NDArray[np.float32], size: tuple[int, int]) -> Pixels:
    """``(grid_h, grid_w)`` values in [0, 1] as colours at ``(height, width)``, nearest neighbour."""
    grey = (np.clip(values, 0, 1) * 255).astype(np.uint8)
    coloured = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return _enlarge(np.asarray(coloured, np.uint8), size)


def label_map(labels: NDArray[np.integer], size: tuple[int, int]) -> Pixels:
    """``(grid_h, grid_w)`` labels as palette colours at ``(height, width)``; negative labels are grey."""
    colours = np.vstack([palette(int(labels.max(initial=0)) + 1), [[96, 96, 96]]]).astype(np.uint8)
    return _enlarge(colours[np.where(labels < 0, len(colours) - 1, labels)], size)


def part_overlay(pixels: Pixels, labels: NDArray[np.signedinteger]) -> Pixels:
    """Parts ``(H, W)`` as colours over the image; -1 is background and stays, a little paler."""
    colours = palette(int(labels.max(initial=0)) + 1)
    painted = blend(pixels, colours[np.maximum(labels, 0)], 0.55)
    paler = blend(pixels, np.full_like(pixels, 255), 0.35)
    return np.where(labels[..., None] >= 0, painted, paler).astype(np.uint8)


def blend(pixels: Pixels, overlay: Pixels, weight: float = 0.6) -> Pixels:
    """``overlay`` laid over ``pixels`` with the given weight; both of one size."""
    return (pixels * (1 - weight) + overlay * weight).astype(np.uint8)


def draw_matches(pixels_a: Pixels, pixels_b: Pixels, matches: Matches) -> Pixels:
    """The two loaded images side by side, corresponding points in one colour and joined by a line."""
    canvas = side_by_side([pixels_a, pixels_b])
    shift = np.array([pixels_a.shape[1] + GAP, 0])
    radius = max(3, canvas.shape[0] // 60)
    points = zip(matches.loaded_points_a_xy, matches.loaded_points_b_xy + shift, strict=True)
    pairs = [[tuple(int(v) for v in point) for point in pair] for pair in points]
    colours = [tuple(int(v) for v in colour) for colour in palette(len(pairs))]
    for (a, b), colour in zip(pairs, colours, strict=True):
        cv2.line(canvas, a, b, colour, 1, cv2.LINE_AA)
    for pair, colour in zip(pairs, colours, strict=True):
        for point in pair:
            cv2.circle(canvas, point, radius, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(canvas, point, radius - 1, colour, -1, cv2.LINE_AA)
    return canvas


def side_by_side(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures in a row on white, aligned at the top."""
    height = max(p.shape[0] for p in pictures)
    width = sum(p.shape[1] for p in pictures) + GAP * (len(pictures) - 1)
    canvas = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for picture in pictures:
        canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + GAP
    return canvas


def contact_sheet(rows: Sequence[Sequence[Pixels]], height: int = 180) -> Pixels:
    """Rows of pictures, each scaled to one height, on white."""
    drawn = [side_by_side([_scaled(picture, height) for picture in row]) for row in rows]
    width = max(row.shape[1] for row in drawn)
    canvas = np.full((sum(row.shape[0] + GAP for row in drawn) - GAP, width, 3), 255, np.uint8)
    top = 0
    for row in drawn:
        canvas[top : top + row.shape[0], : row.shape[1]] = row
        top += row.shape[0] + GAP
    return canvas


def _scaled(picture: Pixels, height: int) -> Pixels:
    width = max(1, picture.shape[1] * height // picture.shape[0])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def _enlarge(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.NEAREST))
