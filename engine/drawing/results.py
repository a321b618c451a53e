"""Pictures of results. Every function takes and returns ``(H, W, 3)`` uint8 RGB unless it says otherwise."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from facetrt.engine.tasks.matching import Matches

Pixels = NDArray[np.uint8]

TILE = 8  # side of a chessboard square in pixels
GAP = 8  # white pixels between pictures in a row
PICTURE_SIDE = 1600  # longer side, in pixels, of an image that is drawn at its original size
RIMMED = 50  # pairs that are drawn with rims
RIM = (20, 20, 20)
CELL = 150  # height of the pictures of a table
COMPARED = 240  # height of pictures that are compared
TEXT = 15  # height of letters
STRIP = 24  # height of a line of text with its margins
INK = (40, 40, 40)


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


def draw_matches(pictures: Sequence[Pixels], matches: Matches) -> Pixels:
    """The two images side by side, corresponding points in one colour and joined by a line.

    Lines are bright inside a dark rim, so that they stand out from light and dark pictures alike; many of them are
    drawn thin and bare, or nothing else could be seen.

    Args:
        pictures: of images A and B at any size, for example from :func:`capped`.
    """
    canvas = side_by_side(pictures)
    geometries = (matches.geometry_a, matches.geometry_b)
    scales = [np.array(p.shape[1::-1]) / g.original_size[::-1] for p, g in zip(pictures, geometries, strict=True)]
    points_a, points_b = matches.points_a_xy * scales[0], matches.points_b_xy * scales[1]
    points_b[:, 0] += pictures[0].shape[1] + GAP
    unit = max(1, round(max(canvas.shape) / 900))  # of line width
    rimmed = len(matches) <= RIMMED
    colours = [tuple(int(v) for v in colour) for colour in spread_hues(len(matches))]
    pairs = [[tuple(int(v) for v in p) for p in pair] for pair in zip(points_a, points_b, strict=True)]
    for (a, b), colour in zip(pairs, colours, strict=True):
        if rimmed:
            cv2.line(canvas, a, b, RIM, 2 * unit + 2 * max(2, unit), cv2.LINE_AA)
        cv2.line(canvas, a, b, colour, 2 * unit if rimmed else 1, cv2.LINE_AA)
    for pair, colour in zip(pairs, colours, strict=True):
        for point in pair:
            if rimmed:
                draw_point(canvas, point, 6 * unit, colour)
            else:
                cv2.circle(canvas, point, 2 * unit, colour, -1, cv2.LINE_AA)
    return canvas


def draw_point(canvas: Pixels, point: tuple[int, ...], radius: int, colour: tuple[int, ...]) -> None:
    """A disc in a white and a dark ring, onto ``canvas``."""
    rim = max(1, radius // 4)
    for grown, shade in ((2 * rim, RIM), (rim, (255, 255, 255)), (0, colour)):
        cv2.circle(canvas, point, radius + grown, shade, -1, cv2.LINE_AA)


def capped(pixels: Pixels, side: int = PICTURE_SIDE) -> Pixels:
    """A picture as it is, or scaled down until its longer side has ``side`` pixels."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def spread_hues(count: int) -> NDArray[np.uint8]:
    """``(count, 3)`` bright, saturated colours as far apart as they can be, neighbours unlike."""
    hues = [(0.02 + (i / count if count <= 12 else 0.618034 * i)) % 1 for i in range(count)]
    colours = [colorsys.hsv_to_rgb(hue, 1.0 - 0.35 * (i % 2), 1.0) for i, hue in enumerate(hues)]
    return (np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


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


def captioned(picture: Pixels, text: str) -> Pixels:
    """A picture below a line of text, which is cut to the picture's width."""
    strip = Image.fromarray(np.full((STRIP, picture.shape[1], 3), 255, np.uint8))
    write_line(strip, (0, STRIP // 2), text, picture.shape[1])
    return np.vstack([np.asarray(strip), picture])


def compared(pictures: Mapping[str, Pixels], height: int = COMPARED) -> Pixels:
    """Pictures by title side by side, at most ``height`` high, each below its title."""
    return side_by_side([captioned(scaled(picture, height), title) for title, picture in pictures.items()])


def table(
    rows: Sequence[Sequence[Pixels]], titles: Sequence[str], labels: Sequence[str], gaps: Sequence[int] | None = None
) -> Pixels:
    """Pictures of at most ``CELL`` height in aligned columns on white.

    Args:
        titles: one above each column; ``labels`` one left of each row. Both are cut where they do not fit.
        gaps: white pixels between the rows; ``GAP`` if None.
    """
    gaps = [GAP] * (len(rows) - 1) if gaps is None else gaps
    widths = [max(row[i].shape[1] for row in rows) for i in range(len(titles))]
    margin = GAP + min(CELL, round(max(map(text_width, labels))))
    lefts = [margin + GAP + sum(widths[:i]) + GAP * i for i in range(len(widths))]
    tops = [STRIP + CELL * i + sum(gaps[:i]) for i in range(len(rows))]
    canvas = np.full((tops[-1] + CELL + GAP, lefts[-1] + widths[-1] + GAP, 3), 255, np.uint8)
    for top, row in zip(tops, rows, strict=True):
        for left, picture in zip(lefts, row, strict=True):
            canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    drawn = Image.fromarray(canvas)
    for left, width, title in zip(lefts, widths, titles, strict=True):
        write_line(drawn, (left, STRIP // 2), title, width)
    for top, label in zip(tops, labels, strict=True):
        write_line(drawn, (GAP, top + CELL // 2), label, margin - GAP)
    return np.asarray(drawn)


def display_size(image_size: tuple[int, int], height: int) -> tuple[int, int]:
    """``(height, width)`` of an image drawn at ``height``, or lower if it is more than four times as wide as high."""
    image_h, image_w = image_size
    scale = min(height / image_h, 4 * height / image_w)
    return max(1, round(image_h * scale)), max(1, round(image_w * scale))


def scaled(picture: Pixels, height: int) -> Pixels:
    """A picture at its :func:`display_size`."""
    size = display_size(picture.shape[:2], height)
    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS))


def write_line(
    image: Image.Image, left_middle: tuple[int, int], text: str, width: int, ink: tuple[int, int, int] = INK
) -> None:
    """One line of text, shortened until it fits ``width``."""
    font, shown = _font(), text
    while len(shown) > 4 and font.getlength(shown) > width:
        shown = shown[:-4] + "..."
    ImageDraw.Draw(image).text(left_middle, shown, fill=ink, font=font, anchor="lm")


def text_width(text: str) -> float:
    """The width of one line, in pixels."""
    return float(_font().getlength(text))


def _font() -> Any:
    return ImageFont.load_default(TEXT)


def _enlarge(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.NEAREST))
