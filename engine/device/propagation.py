"""The memory of :class:`facetrt.engine.video.propagation.MaskPropagator` on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from facetrt.engine.features.features import Float
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.video.propagation import Memory, PropagateOptions, arithmetic, nonfinite
from facetrt.kernels.device.propagate import propagate
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.errors import InputError


class DeviceMemory(Memory):
    """Descriptors and soft labels of the first frame and the last few, in buffers that stay.

    The first frame has the first place of each, and the others take turns in those after it. Of a frame the soft labels
    come down, and nothing else; NaN among its descriptors shows in them.

    Args:
        stream: takes one of the device's streams for a while.
    """

    def __init__(self, stream: Callable[[], AbstractContextManager[Device]], options: PropagateOptions) -> None:
        self._stream, self._options = stream, options
        self._followed = 0

    def begin(self, features: DeviceFeatures, soft: Float) -> None:
        """See :meth:`Memory.begin`; the facet must be the one that was encoded."""
        with self._stream() as device:
            values = device.adopt(features.map(self._options.facet))
            places = 1 + self._options.queue
            self._context = device.empty((places, *values.shape), np.float32)
            self._labels = device.empty((places, *soft.shape), np.float32)
            device.copy(values, self._context.rows(0, 1))
            device.copy(device.upload(soft), self._labels.rows(0, 1))
        self._followed = 0

    def follow(self, features: DeviceFeatures) -> Float:
        """See :meth:`Memory.follow`."""
        with self._stream() as device:
            context, labels = device.adopt(self._context), device.adopt(self._labels)
            target = device.adopt(features.map(self._options.facet))
            known = 1 + min(self._followed, self._options.queue)
            options = arithmetic(self._options, features.geometry.grid)
            found = propagate(device, target, context.rows(0, known), labels.rows(0, known), **options)
            soft: Float = device.download(found)  # the one wait
            if not np.isfinite(soft).all():
                raise InputError(nonfinite(features.record.name))
            self._context, self._labels = context, labels
            self._keep(device, target, found)
        return soft

    def _keep(self, device: Device, target: DeviceArray, soft: DeviceArray) -> None:
        if self._options.queue:
            place = 1 + self._followed % self._options.queue
            device.copy(target, self._context.rows(place, place + 1))
            device.copy(soft, self._labels.rows(place, place + 1))
        self._followed += 1
