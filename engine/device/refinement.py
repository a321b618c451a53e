"""The CRF of ``--refine`` on the device; GrabCut's graph cuts are sequential and stay the host's."""

from __future__ import annotations

from threading import Lock

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.images.loading import Pixels
from facetrt.engine.tasks.refinement import Float, Refinement, Refiner, refine_labels
from facetrt.kernels.device import refine
from facetrt.kernels.device.runtime.base import Device


def device_refiner(device: Device, lock: Lock) -> Refiner:
    """Refine as :func:`~facetrt.engine.tasks.refinement.refine_labels`, with our CRF on ``device`` under ``lock``."""

    def refiner(pixels: Pixels, energy: Float, refinement: Refinement) -> NDArray[np.int64]:
        if refinement is not Refinement.CRF:
            return refine_labels(pixels, energy, refinement)
        with lock:
            cells = device.upload(np.ascontiguousarray(energy, np.float32))
            return device.download(refine.refine_labels(device, pixels, cells)).astype(np.int64)

    return refiner
