"""What PyAV decodes, as it is looked at: RGB by the file's own colours, square pixels, turned and mirrored."""

from __future__ import annotations

import warnings
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.images.loading import MAX_PIXELS, Pixels
from facetrt.engine.video.pyav import import_av

UNSPECIFIED = 2  # FFmpeg's number for a colour matrix that is not known
BT709, BT601, BT2020 = 1, 5, 9
HD_HEIGHT, HD_WIDTH = 720, 1280  # from either on players take colours that are not tagged for BT.709
WIDEST = 8  # pixels are at most so many times as wide as high, or as high as wide; other ratios are damage
OBLIQUE = 0.1  # share of a turn that is no quarter: about 6 degrees


def rgb_pixels(decoded: Any, aspect: Fraction | None) -> Pixels | None:
    """``(H, W, 3)`` uint8; None if the frame cannot be RGB, as a damaged header may say.

    Args:
        decoded: PyAV's frame.
        aspect: width of a pixel by its height.
    """
    av = import_av()
    width, height = square_size(decoded.width, decoded.height, aspect)
    stretched = (width, height) != (decoded.width, decoded.height)
    try:
        pixels = decoded.reformat(
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=matrix_of(decoded),
            interpolation="BICUBIC" if stretched else None,
        ).to_ndarray()
    except (av.FFmpegError, ValueError):
        return None
    return np.ascontiguousarray(turned_by(pixels, display_matrix(decoded)))


def square_size(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """``(width, height)`` with square pixels: the shorter of the two grows, so that nothing is lost."""
    if not aspect or not Fraction(1, WIDEST) <= aspect <= WIDEST:
        return width, height
    square = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    return square if square[0] * square[1] <= MAX_PIXELS else (width, height)


def is_hd(width: int, height: int) -> bool:
    """Whether players take a video of this size for HD."""
    return height >= HD_HEIGHT or width >= HD_WIDTH


def matrix_of(decoded: Any) -> int:
    """The colour matrix that the frame is tagged with, or that players assume."""
    known = int(decoded.colorspace)
    if known != UNSPECIFIED:
        return known
    return BT709 if is_hd(decoded.width, decoded.height) else BT601


def display_matrix(decoded: Any) -> NDArray[np.int64] | None:
    """``(2, 2)``: where x and y of a pixel go on the display, or None."""
    for data in decoded.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).astype(np.int64)
            return np.array([[a, c], [b, d]])
    return None


def turned_by(pixels: Pixels, matrix: NDArray[np.int64] | None) -> Pixels:
    """The pixels turned and mirrored by the nearest of the eight ways to lay a picture."""
    if matrix is None or not matrix.any():
        return pixels
    straight, across = np.abs(np.diag(matrix)).sum(), np.abs(np.diag(matrix[::-1])).sum()
    if min(straight, across) > OBLIQUE * max(straight, across):
        warnings.warn("the video is turned by an angle that is no quarter: the nearest is taken", stacklevel=2)
    swapped = across > straight
    if swapped:
        pixels = pixels.transpose(1, 0, 2)
    to_x, to_y = (matrix[0, 1], matrix[1, 0]) if swapped else (matrix[0, 0], matrix[1, 1])
    return pixels[:: -1 if to_y < 0 else 1, :: -1 if to_x < 0 else 1]
