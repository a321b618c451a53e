"""Images whose pixels are labels: masks and annotations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from facetrt.kernels.errors import InputError, MissingFileError

Labels = NDArray[np.int64]

VOID = 255


def read_labels(path: Path) -> Labels:
    """The label of each pixel, ``(H, W)``: palette indices, or grey values."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1", "I", "I;16"):
                return np.asarray(image.convert("L")).astype(np.int64)  # masks are often stored as RGB
            return np.asarray(image).astype(np.int64)
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing: an annotation belongs there") from error
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an annotation image: {error}") from error
