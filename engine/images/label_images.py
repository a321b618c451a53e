"""Images whose pixels are labels: masks and annotations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.images.loading import check_pixels, decoding, open_image, orientation, turned
from facetrt.kernels.errors import MissingFileError

Labels = NDArray[np.int64]

VOID = 255
CODE = np.array([1 << 16, 1 << 8, 1])
GREY_MODES = ("L", "1", "I", "I;16", "I;16B", "I;16L", "I;16N")


def read_labels(path: Path) -> Labels:
    """The label of each pixel, ``(H, W)``: palette indices or grey values; of colours those of
    :func:`palette_indices`, or else :func:`colour_codes`.

    Raises:
        MissingFileError, InputError: no such file, or no image that can be read.
    """
    return labels_of(open_label_image(path))


def open_label_image(path: Path) -> Image.Image:
    """Decoded, and turned as its EXIF says.

    Raises:
        MissingFileError, InputError: no such file, or no image that can be read.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} is missing: an annotation belongs there")
    with decoding(str(path)), open_image(path) as image:
        check_pixels(image, str(path))
        image.load()
        shown = turned(image, orientation(image))
        shown.format = image.format
        return shown


def labels_of(image: Image.Image) -> Labels:
    """See :func:`read_labels`."""
    if image.mode == "P" or image.mode in GREY_MODES:
        return np.asarray(image).astype(np.int64)
    colours = np.asarray(image.convert("RGB"))
    if (colours == colours[..., :1]).all():
        return colours[..., 0].astype(np.int64)
    indices = palette_indices(colours)
    return colour_codes(colours) if indices is None else indices


def colour_codes(colours: NDArray[np.uint8]) -> Labels:
    """0xRRGGBB of ``(H, W, 3)`` colours."""
    codes: Labels = colours.astype(np.int64) @ CODE
    return codes


def palette_indices(colours: NDArray[np.uint8]) -> Labels | None:
    """Indices in the palette of VOC and DAVIS, or None if some of the ``(H, W, 3)`` colours are not in it."""
    codes, palette = colour_codes(colours), voc_palette() @ CODE
    order = np.argsort(palette)
    indices = order[np.searchsorted(palette, codes, sorter=order).clip(max=VOID)]
    return indices if np.array_equal(palette[indices], codes) else None


def voc_palette() -> NDArray[np.int64]:
    """``(256, 3)``: the bits of an index, spread over the three colours from the highest bit down."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.int64)
    for bit in range(8):
        palette |= ((index[:, None] >> (3 * bit + np.arange(3))) & 1) << (7 - bit)
    return palette
