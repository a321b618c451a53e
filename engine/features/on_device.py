"""Features whose arrays lie in a GPU's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from facetrt.engine.features.features import ImageRecord, no_saliency
from facetrt.engine.images.geometry import Geometry
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.errors import InputError


@dataclass(frozen=True)
class FacetRows:
    """Rows of one facet.

    Attributes:
        prefix: ``(prefix, C)`` float32, [CLS] first and then registers, where there are any.
        cells: ``(cells, C)`` float32.
    """

    prefix: DeviceArray
    cells: DeviceArray

    def adopt(self, device: Device) -> FacetRows:
        """See :meth:`DeviceFeatures.adopt`."""
        return FacetRows(device.adopt(self.prefix), device.adopt(self.cells))


@dataclass(frozen=True)
class DeviceFeatures:
    """One image's descriptors in device memory, for tasks that stay there; named as those of :class:`Features` are.

    ``features["key@9"]`` is ``(cells, C)`` float32.

    Attributes:
        facets: rows by the facet's name.
        attention: ``(cells,)`` float32, as in :class:`Features`, or None.
        normalised: ``(cells,)`` float32, the saliency, or None.
        pixels: ``(height, width, 3)`` uint8 at the loaded size, or None for features that came from the host.
        record: what the image is.
    """

    facets: Mapping[str, FacetRows] = field(repr=False)
    attention: DeviceArray | None = field(repr=False)
    normalised: DeviceArray | None = field(repr=False)
    pixels: DeviceArray | None = field(repr=False)
    record: ImageRecord

    def __getitem__(self, facet: str) -> DeviceArray:
        return self._rows(facet).cells

    def prefix(self, facet: str) -> DeviceArray:
        """The facet's rows before the cells, ``(prefix, C)``: [CLS], then registers.

        Raises:
            InputError: the facet is not on the device.
        """
        return self._rows(facet).prefix

    def map(self, facet: str) -> DeviceArray:
        """The facet as ``(grid_h, grid_w, C)``."""
        return self[facet].reshape(*self.geometry.grid, -1)

    def only(self, facets: Iterable[str]) -> DeviceFeatures:
        """The same with these facets alone.

        Raises:
            InputError: one is not on the device.
        """
        return replace(self, facets={facet: self._rows(facet) for facet in facets})

    @property
    def geometry(self) -> Geometry:
        """How the cells lie on the image."""
        return self.record.geometry

    @property
    def saliency(self) -> DeviceArray:
        """``(cells,)`` float32 in [0, 1].

        Raises:
            InputError: the bundle or the model has none.
        """
        if self.normalised is None:
            has_cls = any(len(rows.prefix) for rows in self.facets.values())
            raise InputError(no_saliency(self.record.name, self.record.provenance.model, has_cls=has_cls))
        return self.normalised

    def adopt(self, device: Device) -> DeviceFeatures:
        """The same for use on another stream, ordered after everything so far on its own."""

        def here(array: DeviceArray | None) -> DeviceArray | None:
            return None if array is None else device.adopt(array)

        return replace(
            self,
            facets={name: rows.adopt(device) for name, rows in self.facets.items()},
            attention=here(self.attention),
            normalised=here(self.normalised),
            pixels=here(self.pixels),
        )

    def _rows(self, facet: str) -> FacetRows:
        if facet not in self.facets:
            raise InputError(
                f"{self.record.name} has {', '.join(self.facets)} on the device, and {facet} was asked for: encode it "
                f"with facets={[*self.facets, facet]}"
            )
        return self.facets[facet]
