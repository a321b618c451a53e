"""Pictures for people: a photograph, what was annotated and what was predicted, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.drawing.results import Pixels, compared
from facetrt.engine.images.resampling import pillow_nearest
from facetrt.kernels.errors import OutputError

COMPARED = "compared"  # folder beside those of predictions, which scorers read
QUALITY = 90


def write_comparison(predictions: Path, stem: str, photograph: Pixels, truth: Pixels, prediction: Pixels) -> None:
    """``compared/SET/STEM.jpg`` beside the folder ``predictions`` of a set: the three pictures with titles.

    Raises:
        OutputError: it cannot be written.
    """
    folder = predictions.parent / COMPARED / predictions.name
    picture = compared({"photograph": photograph, "annotation": truth, "prediction": prediction})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{stem}.jpg", quality=QUALITY)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error


def resize_labels(labels: NDArray[Any], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Labels ``(H, W)`` of at most 255 kinds, or a mask, at ``(height, width)`` by nearest neighbour."""
    return np.asarray(pillow_nearest(labels.astype(np.uint8), (size[0], size[1])))
