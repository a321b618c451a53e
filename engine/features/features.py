"""Dense descriptors of one image, with the geometry they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.images.emptiness import detail_of, why_empty
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import LoadSize, Pixels
from facetrt.kernels.errors import InputError

Float = NDArray[np.float32]


class SaliencyMode(StrEnum):
    """Where a saliency map comes from.

    ``full``: the same pass as the descriptors. ``low_resolution``: a second pass at half the image size and stride 8
    (7 for patches of 14), enlarged by nearest neighbour; the reference's default for co-segmentation.
    """

    FULL = "full"
    LOW_RESOLUTION = "low_resolution"


@dataclass(frozen=True)
class Provenance:
    """What made a result; recorded in every output file."""

    model: str
    encoder_sha256: str
    backend: str
    device: str
    precision: str


@dataclass(frozen=True)
class ImageRecord:
    """What an image is, wherever its descriptors live.

    Attributes:
        saliency_mode: which pass its saliency comes from.
        geometry: how the cells lie on the image.
        name: path of the image, or how messages call it.
        load_size: how it was loaded.
        detail: how much neighbouring patches of the image differ, in grey levels; see
            :func:`facetrt.engine.images.emptiness.detail_of`. None where the pixels are unknown.
    """

    saliency_mode: SaliencyMode
    geometry: Geometry
    name: str
    provenance: Provenance
    load_size: LoadSize = None
    detail: float | None = None

    @property
    def why_empty(self) -> str | None:
        """Why nothing can be found in this image, to be read after its name; None if something can."""
        return why_empty(self.detail, self.geometry)

    @property
    def grid(self) -> tuple[int, int]:
        """``(grid_h, grid_w)``."""
        return self.geometry.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` of the loaded image."""
        return self.geometry.image_size

    @property
    def original_size(self) -> tuple[int, int]:
        """``(height, width)`` before loading."""
        return self.geometry.original_size

    @property
    def stride(self) -> int:
        """Pixels of the loaded image between neighbouring cells."""
        return self.geometry.stride

    @property
    def patch(self) -> int:
        """Side of a cell's patch in pixels of the loaded image."""
        return self.geometry.patch


@dataclass(frozen=True, init=False)
class Features(ImageRecord):
    """Descriptors of one image. ``features["key@9"]`` is ``(cells, C)`` float32, cells row-major, heads head-major.

    Attributes:
        tokens: each facet as ``(prefix + cells, C)`` float32: [CLS] first, then registers, where there are any.
        attention: mean [CLS] attention of the saliency heads, ``(grid_h, grid_w)`` float32 and not normalised, or None.
        pixels: the loaded image, ``(height, width, 3)`` uint8 RGB.
    """

    tokens: Mapping[str, Float] = field(repr=False, kw_only=True)
    attention: Float | None = field(repr=False, kw_only=True)
    pixels: Pixels = field(repr=False, kw_only=True)

    def __init__(
        self,
        tokens: Mapping[str, Float],
        attention: Float | None,
        saliency_mode: SaliencyMode,
        geometry: Geometry,
        pixels: Pixels,
        name: str,
        provenance: Provenance,
        load_size: LoadSize = None,
        detail: float | None = None,
    ) -> None:
        if detail is None and pixels.size:
            height, width = geometry.picture_size
            detail = detail_of(pixels[:height, :width], geometry)  # an added border is no detail
        super().__init__(saliency_mode, geometry, name, provenance, load_size, detail)
        for array, value in (("tokens", tokens), ("attention", attention), ("pixels", pixels)):
            object.__setattr__(self, array, value)
        grid_h, grid_w = self.grid
        cells = grid_h * grid_w
        for facet, rows in tokens.items():
            if rows.ndim != 2 or len(rows) < cells or len(rows) != len(next(iter(tokens.values()))):
                raise InputError(
                    f"{facet} has shape {rows.shape}: expected {1 + cells} rows, [CLS] first, or more with "
                    "registers, and equally many in every facet"
                )
        if attention is not None and attention.shape != self.grid:
            raise InputError(f"attention has shape {attention.shape}: expected {self.grid}")

    @staticmethod
    def of(record: ImageRecord, tokens: Mapping[str, Float], attention: Float | None, pixels: Pixels) -> Features:
        """An image with its arrays."""
        return Features(tokens=tokens, attention=attention, pixels=pixels, **_plain(record))

    @property
    def record(self) -> ImageRecord:
        """The image without its arrays."""
        return ImageRecord(**_plain(self))

    def __getitem__(self, facet: str) -> Float:
        return self._rows(facet)[self.prefix :]

    @property
    def prefix(self) -> int:
        """How many rows of :attr:`tokens` stand before the cells: [CLS], then registers; 0 without [CLS]."""
        return len(next(iter(self.tokens.values()))) - self.grid[0] * self.grid[1] if self.tokens else 1

    def cls(self, facet: str) -> Float:
        """The facet's [CLS] row, ``(C,)``.

        Raises:
            InputError: the facet was not exported, or the model has no [CLS].
        """
        rows = self._rows(facet)
        if not self.prefix:
            raise InputError(f"{self.provenance.model} has no [CLS] token: use cells, or a model that has one")
        first: Float = rows[0]
        return first

    def registers(self, facet: str) -> Float:
        """The facet's rows of registers, ``(registers, C)``; none where the model has none."""
        return self._rows(facet)[1 : self.prefix]

    def map(self, facet: str) -> Float:
        """The facet as ``(grid_h, grid_w, C)``."""
        return self[facet].reshape(*self.grid, -1)

    @property
    def facets(self) -> list[str]:
        """Names of the facets at hand."""
        return list(self.tokens)

    @property
    def saliency(self) -> Float:
        """[CLS] attention min–max normalised within the image, ``(grid_h, grid_w)`` in [0, 1]; zeros if it is flat."""
        if self.attention is None:
            raise InputError(no_saliency(self.name, self.provenance.model, has_cls=self.prefix > 0))
        low, high = self.attention.min(), self.attention.max()
        if high <= low:
            return np.zeros_like(self.attention)
        return np.asarray((self.attention - low) / (high - low), np.float32)

    def _rows(self, facet: str) -> Float:
        if facet not in self.tokens:
            raise InputError(not_exported(facet, self.facets))
        return self.tokens[facet]


def _plain(record: ImageRecord) -> dict[str, Any]:
    """The fields of a record, or of features' record."""
    return {each.name: getattr(record, each.name) for each in fields(ImageRecord)}


def no_saliency(what: str, model: str, *, has_cls: bool) -> str:
    """The message where saliency is needed and there is none."""
    if has_cls:
        return f"{what} has no saliency: export the bundle with saliency (it is on by default)"
    return f"{what} has no saliency, which is the attention of [CLS]: {model} has no such token; use another model"


def not_exported(facet: str, there: Sequence[str]) -> str:
    """The message where a facet is asked for that is not ``there``."""
    return (
        f"{facet} was not exported: this bundle has {', '.join(there)}; further ones that its model has are added by "
        "'facetrt export … --facets'"
    )
