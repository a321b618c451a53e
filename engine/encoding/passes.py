"""Which passes of the encoder make descriptors and saliency, wherever images lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from facetrt.engine.backends.base import Shaped
from facetrt.engine.bundle.manifest import CLS_ATTENTION, Manifest
from facetrt.engine.images.geometry import grid_size

LOW_RESOLUTION_STRIDE = 8  # of the second pass, as in the reference; that of other patches comes closest to it


def low_resolution_stride(patch: int) -> int:
    """The stride of the pass for low-resolution saliency: the largest up to 8 that divides the patch."""
    return next(stride for stride in range(LOW_RESOLUTION_STRIDE, 0, -1) if patch % stride == 0)


Array = TypeVar("Array", bound=Shaped)


class Passes(ABC, Generic[Array]):
    """An encoder that runs on arrays of one kind."""

    manifest: Manifest

    def outputs(
        self, images: Sequence[Array], halves: Sequence[Array], stride: int, picture: tuple[int, int] | None = None
    ) -> tuple[dict[str, Array], Array | None]:
        """Each facet's tokens ``(B, prefix + cells, C)``, and [CLS] attention ``(B, cells)`` if there is saliency.

        Args:
            images: of one size, ``(h, w, 3)`` uint8.
            halves: for low-resolution saliency, which takes a second pass at half the image size and stride 8, enlarged
                to the grid; otherwise empty. Without a load size the reference does not halve images, only that grid.
            picture: ``(height, width)`` of the part of the images that is not padding; None where all of it is picture.
        """
        own, patch = self.manifest.stride, self.manifest.architecture.patch
        outputs = self.run(images, stride // own, picture)
        attention = outputs.pop(CLS_ATTENTION, None)
        if attention is None or not halves:
            return outputs, attention
        low = low_resolution_stride(patch)
        small = self.run(halves, low // own)[CLS_ATTENTION]
        small_grid = grid_size(_size(halves), patch, low)
        return outputs, self.enlarge(small, small_grid, grid_size(_size(images), patch, stride))

    @abstractmethod
    def run(self, images: Sequence[Array], step: int, picture: tuple[int, int] | None = None) -> dict[str, Array]:
        """One pass over images of one size; ``step`` keeps every step-th cell of the patch convolution."""

    @abstractmethod
    def enlarge(self, attention: Array, small: tuple[int, int], grid: tuple[int, int]) -> Array:
        """``(B, cells)`` of a ``small`` grid on ``grid``: Pillow's nearest neighbour."""


def _size(images: Sequence[Shaped]) -> tuple[int, int]:
    height, width, _ = images[0].shape
    return height, width
