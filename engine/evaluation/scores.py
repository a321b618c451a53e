"""The figures that evaluations report, as functions of arrays. Sources: specification §14.1, §14.2 and §14.4."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError

Mask = NDArray[np.bool_]
Points = NDArray[np.float64]

BOUNDARY_SHARE = 0.008  # of the image's diagonal: how far a boundary pixel may lie from its match


def distances(predicted_xy: Points, annotated_xy: Points) -> NDArray[np.float64]:
    """Euclidean distances ``(n,)`` between two sets of points ``(n, 2)``."""
    return np.asarray(np.linalg.norm(predicted_xy - annotated_xy, axis=1))


def within(distance: NDArray[np.float64], limit: float, *, strict: bool = False) -> Mask:
    """Which distances count as correct: at most ``limit``, or below it if ``strict``."""
    return distance < limit if strict else distance <= limit


def jaccard(predicted: Mask, annotated: Mask) -> float | None:
    """Intersection over union of two masks ``(H, W)``; None where the annotation is empty (co-segmentation, §14.2)."""
    _check_shapes(predicted, annotated)
    if not annotated.any():
        return None
    return float((predicted & annotated).sum() / (predicted | annotated).sum())


def pixel_precision(predicted: Mask, annotated: Mask) -> float:
    """Share of pixels labelled as annotated, foreground and background together: the literature's precision P."""
    _check_shapes(predicted, annotated)
    return float((predicted == annotated).mean())


def region_similarity(predicted: Mask, annotated: Mask) -> float:
    """J of DAVIS: intersection over union of two masks ``(H, W)``, 1 if both are empty."""
    _check_shapes(predicted, annotated)
    union = (predicted | annotated).sum()
    return float((predicted & annotated).sum() / union) if union else 1.0


def boundary_similarity(predicted: Mask, annotated: Mask, share: float = BOUNDARY_SHARE) -> float:
    """F of DAVIS: F-measure of two masks' boundaries, matched within ``ceil(share · diagonal)`` pixels."""
    _check_shapes(predicted, annotated)
    ours, theirs = boundary(predicted), boundary(annotated)
    if not ours.any() or not theirs.any():
        return float(not ours.any() and not theirs.any())
    disk = _disk(math.ceil(share * math.hypot(*predicted.shape)))
    precision = float((ours & _dilate(theirs, disk)).sum() / ours.sum())
    recall = float((theirs & _dilate(ours, disk)).sum() / theirs.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: Mask) -> Mask:
    """Pixels that differ from their right, lower or lower-right neighbour inside the image."""
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def _disk(radius: int) -> NDArray[np.uint8]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(y * y + x * x <= radius * radius, np.uint8)


def _dilate(mask: Mask, disk: NDArray[np.uint8]) -> Mask:
    return np.asarray(cv2.dilate(mask.astype(np.uint8), disk), np.bool_)


def _check_shapes(predicted: Mask, annotated: Mask) -> None:
    if predicted.shape != annotated.shape:
        raise InputError(
            f"the mask is {predicted.shape} and the annotation {annotated.shape} (height, width): expected one size"
        )


def mean_of(values: list[float]) -> float | None:
    """The mean, or None of nothing."""
    return float(np.mean(values)) if values else None
