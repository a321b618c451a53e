"""Operations on masks that several methods share."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.engine.images.loading import Pixels
from facetrt.engine.tasks.refinement import Refinement, check_available, grabcut
from facetrt.kernels.bilateral import BilateralGrid
from facetrt.kernels.components import connected_components
from facetrt.kernels.dense_crf import dense_crf
from facetrt.kernels.errors import InputError

Bools = NDArray[np.bool_]


def iou(one: Bools, other: Bools) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 0.0


def fill_holes(mask: Bools) -> Bools:
    """A mask ``(h, w)`` with what it encloses: background that does not reach the edge by steps along axes."""
    padded = np.pad(mask.astype(np.uint8), 1)
    cv2.floodFill(padded, None, (0, 0), 2, flags=4)
    return np.asarray(padded[1:-1, 1:-1] != 2)


def maskcut_crf(pixels: Pixels, mask: Bools) -> Bools:
    """MaskCut's dense CRF on a mask ``(h, w)``, whose pixels it gives a probability of 0.73 only.

    Source: specification, cutler-maskcut step 4.
    """
    shares = np.stack([1 - mask, mask]).astype(np.float32)
    energy = np.log(np.exp(shares).sum(axis=0)) - shares
    marginals = dense_crf(
        np.ascontiguousarray(pixels),
        np.ascontiguousarray(energy, np.float32),
        position_scale=3,
        position_weight=7,
        colour_position_scale=50,
        colour_scale=5,
        colour_weight=10,
    )
    return np.asarray(marginals.argmax(axis=0) == 1)


def spectral_crf(pixels: Pixels, labels: NDArray[np.integer], count: int) -> NDArray[np.int64]:
    """Deep Spectral's dense CRF on labels ``(h, w)`` of 0 to ``count - 1``.

    Probabilities are held within 0.01 and 0.99. Source: specification, common-evaluation §4 and corrections.
    """
    shares = np.where(labels == np.arange(count)[:, None, None], 0.99, 0.01)
    marginals = dense_crf(
        np.ascontiguousarray(pixels),
        np.ascontiguousarray(-np.log(shares), np.float32),
        position_scale=3,
        position_weight=3,
        colour_position_scale=80,
        colour_scale=13,
        colour_weight=10,
        iterations=5,
    )
    return np.asarray(marginals.argmax(axis=0))


def bilateral_mask(pixels: Pixels, mask: Bools) -> tuple[Bools, NDArray[np.float32]]:
    """A mask ``(h, w)`` by the fast bilateral solver: above one half, and the soft map itself.

    Source: specification, common-evaluation §3.
    """
    soft = BilateralGrid.of(np.ascontiguousarray(pixels)).solve(mask)
    return np.asarray(soft > 0.5), soft.clip(0, 1).astype(np.float32)


def largest_beside_background(mask: Bools) -> Bools:
    """The published binary form of a soft map above one half: holes filled, the second most frequent label.

    The background counts as a label. All of a map without a second one is taken.
    """
    filled = fill_holes(mask)
    labels, count = connected_components(filled)
    if not count or filled.all():
        return np.ones_like(mask)
    order = np.argsort(np.bincount(labels.ravel(), minlength=count + 1), kind="stable")
    return np.asarray(labels == order[-2])


def all_but_largest(mask: Bools) -> Bools:
    """FOUND's form for several objects: holes filled, every label but the most frequent; nothing if there is one."""
    filled = fill_holes(mask)
    labels, count = connected_components(filled)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    if (sizes > 0).sum() < 2:
        return np.zeros_like(mask)
    return np.asarray(labels != sizes.argmax())


def refine_objects(pixels: Pixels, labels: NDArray[np.integer], refinement: Refinement) -> NDArray[np.int64]:
    """Labels of objects ``(h, w)``, 0 background, refined on the picture ``(h, w, 3)``: each object as a mask.

    A pixel that several objects claim goes to the one that claims it most, or to the first.

    Raises:
        InputError: labels of another size than the picture, or ``pydensecrf``, which is co-segmentation's.
        MissingDependencyError: ``bilateral`` without SciPy.
    """
    if pixels.shape[:2] != labels.shape:
        raise InputError(f"labels of shape {labels.shape} on a picture of {pixels.shape[:2]}: expected the same size")
    if refinement is Refinement.PYDENSECRF:
        raise InputError("refine 'pydensecrf' is co-segmentation's: use crf, bilateral, grabcut or none here")
    check_available(refinement)
    values = np.unique(labels[labels != 0])
    claims: list[NDArray[Any]]
    if refinement is Refinement.NONE or not len(values):
        return labels.astype(np.int64)
    if refinement is Refinement.BILATERAL:
        grid = BilateralGrid.of(np.ascontiguousarray(pixels))
        claims = [grid.solve(labels == value) for value in values]
    elif refinement is Refinement.CRF:
        claims = [maskcut_crf(pixels, labels == value).astype(np.float64) for value in values]
    else:
        cut = [grabcut(pixels, labels == value) for value in values]
        claims = [(labels == value if found is None else found) for value, found in zip(values, cut, strict=True)]
    strength = np.stack([np.full(labels.shape, 0.5), *claims])
    return np.asarray(np.concatenate([[0], values])[strength.argmax(axis=0)], np.int64)
