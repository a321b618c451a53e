"""Features from the processor's memory onto a device, and back."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from facetrt.engine.features.features import Features
from facetrt.engine.features.on_device import DeviceFeatures, FacetRows
from facetrt.engine.images.loading import Pixels
from facetrt.kernels.device.runtime.base import Device, DeviceArray

NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)


def split_tokens(tokens: DeviceArray, prefix: int) -> FacetRows:
    """Rows ``(prefix + cells, C)`` as views of the two kinds."""
    return FacetRows(tokens.rows(0, prefix), tokens.rows(prefix, len(tokens)))


def to_device(device: Device, features: Features, facets: Iterable[str]) -> DeviceFeatures:
    """Some facets of an image, and its saliency if it has any; its pixels stay where they are.

    Raises:
        InputError: a facet is not there.
    """
    rows = {}
    for facet in facets:
        features[facet]  # raises where it is missing
        rows[facet] = split_tokens(device.upload(features.tokens[facet]), features.prefix)
    attention = features.attention
    return DeviceFeatures(
        facets=rows,
        attention=None if attention is None else device.upload(attention.ravel()),
        normalised=None if attention is None else device.upload(features.saliency.ravel()),
        pixels=None,
        record=features.record,
    )


def to_host(device: Device, features: DeviceFeatures) -> Features:
    """All that is there of an image, as if it had been encoded on the host.

    Args:
        device: whose arrays ``features`` are.
    """
    tokens = {
        facet: np.concatenate([device.download(part) for part in (rows.prefix, rows.cells)])
        for facet, rows in features.facets.items()
    }
    attention, pixels = features.attention, features.pixels
    return Features.of(
        features.record,
        tokens,
        None if attention is None else device.download(attention).reshape(features.geometry.grid),
        NO_PIXELS if pixels is None else device.download(pixels),
    )
