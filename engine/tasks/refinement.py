"""Turning labels of cells into labels of pixels: the choices of ``--refine``."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.engine.images.loading import Pixels
from facetrt.engine.images.resampling import pillow_nearest, torch_nearest
from facetrt.kernels.bilateral import import_sparse
from facetrt.kernels.dense_crf import dense_crf
from facetrt.kernels.errors import InputError, MissingDependencyError

Mask = NDArray[np.bool_]
Float = NDArray[np.float32]
Progress = Callable[[int, int], None]  # (images refined, images in all)
Refiner = Callable[[Pixels, Float, "Refinement"], NDArray[np.int64]]  # as refine_labels, which is the host's

GRABCUT_SEED = 0  # OpenCV's generator, one per thread, seeded per image: what ran before does not matter
GRABCUT_ROUNDS = 5
BAND = 7  # side of the erosion box that separates sure from probable pixels


class Refinement(StrEnum):
    """How labels of cells become labels of pixels.

    ``none`` enlarges them; ``grabcut`` cuts a mask along colour edges (two labels only); ``crf`` smooths any number of
    labels by facetrt's dense CRF; ``pydensecrf`` does the same with that library (extra ``crf``); ``bilateral`` smooths
    a mask by the fast bilateral solver (two labels only).
    """

    GRABCUT = "grabcut"
    CRF = "crf"
    PYDENSECRF = "pydensecrf"
    BILATERAL = "bilateral"
    NONE = "none"

    @property
    def two_labels(self) -> bool:
        """Whether it tells foreground from background, and no more."""
        return self in (Refinement.GRABCUT, Refinement.BILATERAL)

    @property
    def threads(self) -> int | None:
        """How many images to refine side by side; None for as many as there are processors."""
        return 1 if self is Refinement.PYDENSECRF else None  # that library lets no other thread run


def enlarge_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Nearest neighbour to ``(height, width)`` by Pillow's rule, as the reference executes it."""
    return pillow_nearest(mask.astype(np.uint8), size).astype(np.bool_)


def grabcut(pixels: Pixels, mask: Mask) -> Mask | None:
    """Refine a mask by GrabCut; ``pixels (H, W, 3)`` uint8 RGB, ``mask (H, W)`` bool.

    Returns None where GrabCut has nothing to learn from (no sure background, or no foreground): the reference then
    keeps the mask as it is.
    """
    box = np.ones((BAND, BAND), np.uint8)
    foreground = cv2.erode(mask.astype(np.uint8), box)
    background = cv2.erode((~mask).astype(np.uint8), box)
    labels = np.full(mask.shape, cv2.GC_PR_FGD, np.uint8)
    labels[background > 0] = cv2.GC_BGD
    labels[foreground > 0] = cv2.GC_FGD
    cv2.setRNGSeed(GRABCUT_SEED)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    try:
        cv2.grabCut(np.ascontiguousarray(pixels), labels, (0, 0, 1, 1), *models, GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    except cv2.error:
        return None
    return np.asarray((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))


def refine_labels(pixels: Pixels, energy: Float, refinement: Refinement) -> NDArray[np.int64]:
    """Labels of pixels from energies of cells.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB.
        energy: ``(labels, grid_h, grid_w)`` float32, smaller is better.
        refinement: ``crf``, ``pydensecrf`` or ``none``.

    Returns:
        ``(H, W)`` int64 index of the winning label.

    Raises:
        InputError: ``grabcut`` or ``bilateral``, which know two labels only.
        MissingDependencyError: ``pydensecrf`` without the extra ``crf``.
    """
    size = (pixels.shape[0], pixels.shape[1])
    if refinement is Refinement.NONE:
        return lowest_labels(energy, size)
    large = _enlarge(energy, size)
    if refinement is Refinement.CRF:
        return np.asarray(dense_crf(pixels, large).argmax(axis=0))
    if refinement is Refinement.PYDENSECRF:
        return _pydensecrf(pixels, large)
    raise InputError(f"{refinement} separates foreground from background only: use crf, pydensecrf or none here")


def lowest_labels(energy: Float, size: tuple[int, int]) -> NDArray[np.int64]:
    """:func:`refine_labels` of an image of ``size`` without a refinement, which needs no pixels."""
    return np.asarray(_enlarge(energy, size).argmin(axis=0))


def _enlarge(energy: Float, size: tuple[int, int]) -> Float:
    return np.ascontiguousarray(torch_nearest(energy, size), np.float32)


def check_available(refinement: Refinement) -> None:
    """Raise :class:`MissingDependencyError` now if a library that ``refinement`` needs is absent."""
    if refinement is Refinement.PYDENSECRF:
        _import_pydensecrf()
    if refinement is Refinement.BILATERAL:
        import_sparse()


def _import_pydensecrf() -> object:
    try:
        import pydensecrf.densecrf as densecrf
    except ImportError as error:
        raise MissingDependencyError(
            "refine 'pydensecrf' needs a library that is not installed: pip install 'facetrt[crf]', or use refine 'crf'"
        ) from error
    return densecrf


def _pydensecrf(pixels: Pixels, energy: Float) -> NDArray[np.int64]:
    """The reference's call: position kernel (3 px, weight 50), colour kernel (5 px, 13, weight 15), 10 rounds."""
    densecrf = _import_pydensecrf()
    labels, height, width = energy.shape
    crf = densecrf.DenseCRF2D(width, height, labels)  # type: ignore[attr-defined]
    crf.setUnaryEnergy(np.ascontiguousarray(energy.reshape(labels, -1)))
    crf.addPairwiseGaussian(sxy=(3, 3), compat=50)
    crf.addPairwiseBilateral(sxy=(5, 5), srgb=(13, 13, 13), rgbim=pixels.copy(), compat=15)
    marginals = np.asarray(crf.inference(10))
    return np.asarray(marginals.argmax(axis=0).reshape(height, width))
