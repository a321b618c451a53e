"""Learned models on the device: descriptors stay there, and distances to centroids come down."""

from __future__ import annotations

from threading import Lock

import numpy as np

from facetrt.engine.device.cosegmentation import DevicePicture
from facetrt.engine.device.refinement import device_refiner
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.tasks.cosegmentation import Mask
from facetrt.engine.tasks.models import Model, nonfinite
from facetrt.engine.tasks.parts import PartMap
from facetrt.engine.tasks.refinement import Refinement
from facetrt.engine.tasks.smoothing import Smoother
from facetrt.kernels.device.kmeans import unit_distances
from facetrt.kernels.device.log_bin import log_bin
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.errors import InputError


def apply_model(
    device: Device, model: Model, features: DeviceFeatures, refine: Refinement, smoother: Smoother | None
) -> Mask | PartMap:
    """See ``Engine.apply``; labels are the host's but where distances tie to rounding.

    What comes down is ``(k, cells)`` distances, the saliency, and pixels where something is refined by them.

    Args:
        device: whose arrays ``features`` are.

    Raises:
        InputError: features of another facet or width, not finite, or without pixels.
    """
    if features.pixels is None:
        name = features.record.name
        raise InputError(f"{name} has no pixels on the device: encode it with Engine.encode_on_device")
    rows = _rows(device, model, features)
    model.check_width(rows.shape[1])
    found = device.download(unit_distances(device, rows, device.upload(model.every_centroid)))
    if not np.isfinite(found).all():
        raise InputError(nonfinite(features.record.name))
    lock, squares = Lock(), np.ones(found.shape[1], np.float32)
    picture = DevicePicture(features, model.facet, features.pixels, device, lock)
    return model.decide(picture, found, squares, refine, smoother, device_refiner(device, lock))


def _rows(device: Device, model: Model, features: DeviceFeatures) -> DeviceArray:
    """Descriptors of the cells, binned if those of the model are, ``(cells, C)``: not of unit length yet."""
    values = features.map(model.facet)
    binned = log_bin(device, values.reshape(1, *values.shape), model.hierarchy)
    return binned.reshape(*binned.shape[1:])
