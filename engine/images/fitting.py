"""How an image is fitted to whole patches."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.settings import Setting


class Fit(StrEnum):
    """What becomes of an image whose sides are no multiple of the patch size.

    ``none``: the patch convolution leaves out what remains at the bottom and at the right (Amir et al.). ``crop`` cuts
    it off before, which only matters to the positional table of a square (Deep Spectral). ``pad`` fills up with the
    colour that normalisation turns into zero (LOST, TokenCut's boxes, FOUND, SelfMask), ``pad_black`` with black.
    ``resize`` takes the nearest multiple per side (TokenCut's masks, MaskCut).
    """

    NONE = "none"
    CROP = "crop"
    PAD = "pad"
    PAD_BLACK = "pad_black"
    RESIZE = "resize"

    @property
    def pads(self) -> bool:
        """Whether pixels are added."""
        return self in (Fit.PAD, Fit.PAD_BLACK)

    def resized(self, size: tuple[int, int], patch: int) -> tuple[int, int]:
        """``(height, width)`` that an image is resized to which would be loaded at ``size``; halves to even."""
        if self is not Fit.RESIZE:
            return size
        height, width = (max(1, round(side / patch)) * patch for side in size)
        return height, width

    def fitted(self, size: tuple[int, int], patch: int) -> tuple[int, int]:
        """``(height, width)`` of the loaded image, with the border that is added to one resized to ``size``."""
        if not self.pads:
            return size
        height, width = (-(-side // patch) * patch for side in size)
        return height, width

    def seen(self, pixels: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
        """What the encoder is given of ``pixels (height, width, 3)`` that were loaded."""
        if self is not Fit.CROP:
            return pixels
        height, width = (max(side // patch, 1) * patch for side in pixels.shape[:2])
        return pixels[:height, :width]

    def apply(self, pixels: NDArray[np.uint8], patch: int, colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """``pixels (height, width, 3)``, with a border of ``colour (3,)`` where one is added."""
        height, width = self.fitted((pixels.shape[0], pixels.shape[1]), patch)
        if self.pads and (height, width) != pixels.shape[:2]:
            fitted = np.empty((height, width, 3), np.uint8)
            fitted[:] = colour if self is Fit.PAD else 0
            fitted[: pixels.shape[0], : pixels.shape[1]] = pixels
            return fitted
        return pixels


FitChoice = Annotated[Fit, Setting("How sides that are no multiple of the patch are fitted: none leaves the rest out.")]


def rounded_colour(mean: Any) -> NDArray[np.uint8]:
    """The colour nearest to the one that normalisation by ``mean (3,)`` of RGB in [0, 1] turns into zero."""
    return np.rint(255 * np.asarray(mean, np.float64)).clip(0, 255).astype(np.uint8)
