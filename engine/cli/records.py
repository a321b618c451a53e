"""What result files record of an image."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from facetrt.engine.drawing import results as draw
from facetrt.engine.features.features import Features, ImageRecord
from facetrt.engine.images.loading import Pixels


def describe(features: ImageRecord) -> dict[str, Any]:
    """What every output records of an image. Sizes are (height, width)."""
    geometry = features.geometry
    return {
        "image": features.name,
        "original_size": geometry.original_size,
        "loaded_size": geometry.image_size,
        "grid": geometry.grid,
        "unused_pixels": geometry.unused_pixels,
        "stride": geometry.stride,
        "saliency_mode": features.saliency_mode,
        **asdict(features.provenance),
    }


def saliency_picture(features: Features) -> Pixels:
    """The saliency map as a picture of the loaded size; the image itself where there is none."""
    if features.attention is None:
        return features.pixels
    return draw.heat_map(features.saliency, features.image_size)
