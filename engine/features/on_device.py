"""Features whose arrays lie in a GPU's memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from facetrt.engine.features.features import ImageRecord
from facetrt.engine.images.geometry import Geometry
from facetrt.kernels.device.runtime.base import Device, DeviceArray


@dataclass(frozen=True)
class DeviceFeatures:
    """One image's descriptors in device memory, for tasks that stay there.

    Attributes:
        rows: ``(cells, C)`` float32 of one facet.
        cls: ``(1, C)`` float32, its [CLS] row.
        saliency: ``(cells,)`` float32 in [0, 1].
        pixels: ``(height, width, 3)`` uint8 at the loaded size, or None for features that came from the host.
        record: what the image is.
        facet: which one.
    """

    rows: DeviceArray = field(repr=False)
    cls: DeviceArray = field(repr=False)
    saliency: DeviceArray = field(repr=False)
    pixels: DeviceArray | None = field(repr=False)
    record: ImageRecord = field(repr=False)
    facet: str

    @property
    def geometry(self) -> Geometry:
        """How the cells lie on the image."""
        return self.record.geometry

    @property
    def map(self) -> DeviceArray:
        """``(grid_h, grid_w, C)``."""
        return self.rows.reshape(*self.geometry.grid, -1)

    def adopt(self, device: Device) -> DeviceFeatures:
        """The same for use on another stream, ordered after everything so far on its own."""
        pixels = None if self.pixels is None else device.adopt(self.pixels)
        return replace(
            self,
            rows=device.adopt(self.rows),
            cls=device.adopt(self.cls),
            saliency=device.adopt(self.saliency),
            pixels=pixels,
        )
