"""How an image is fitted to whole patches."""

from __future__ import annotations

from enum import StrEnum


class Fit(StrEnum):
    """What becomes of an image whose sides are no multiple of the patch size.

    ``none``: the patch convolution leaves out what remains at the bottom and at the right (Amir et al.). ``crop`` cuts
    it off before (Deep Spectral). ``pad`` fills up with the colour that normalisation turns into zero (LOST, TokenCut's
    boxes, FOUND, SelfMask), ``pad_black`` with black. ``resize`` takes the nearest multiple per side (TokenCut's masks,
    MaskCut).
    """

    NONE = "none"
    CROP = "crop"
    PAD = "pad"
    PAD_BLACK = "pad_black"
    RESIZE = "resize"
