"""What result files record of an image."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from facetrt.engine.features import Features


def describe(features: Features) -> dict[str, Any]:
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
