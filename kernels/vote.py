"""Saliency voting: which clusters are foreground, by a majority of images. Source: Amir et al., section 4.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError


@dataclass(frozen=True)
class Votes:
    """Outcome of a vote among N images over k clusters.

    ``mean_saliency (N, k)`` float64 is NaN where an image has no cell in a cluster (it then casts no vote); ``counts
    (k,)`` int64 votes; ``needed`` votes that make a cluster salient; ``salient_labels`` int64, ascending.
    """

    mean_saliency: NDArray[np.float64]
    counts: NDArray[np.int64]
    needed: int

    @property
    def salient_labels(self) -> NDArray[np.int64]:
        """Clusters with enough votes."""
        return np.flatnonzero(self.counts >= self.needed)


def vote(
    labels: Sequence[NDArray[np.integer]],
    saliencies: Sequence[NDArray[np.floating]],
    num_clusters: int,
    *,
    threshold: float = 0.065,
    percentage: float = 75,
) -> Votes:
    """Each image votes for the clusters whose mean saliency in it is strictly above ``threshold``.

    Args:
        labels: per image the cluster of each cell, any shape, values in 0..num_clusters-1.
        saliencies: per image the saliency of each cell, same shapes.
        percentage: share of the images, in percent, whose vote a foreground cluster needs (rounded up).

    Raises:
        InputError: no image, shapes that differ, labels out of range, a percentage outside 0..100.
    """
    _check(labels, saliencies, num_clusters, percentage)
    mean_saliency = np.full((len(labels), num_clusters), np.nan)
    for row, image_labels, saliency in zip(mean_saliency, labels, saliencies, strict=True):
        flat = image_labels.ravel()
        cells = np.bincount(flat, minlength=num_clusters)
        sums = np.bincount(flat, weights=saliency.ravel(), minlength=num_clusters)
        np.divide(sums, cells, out=row, where=cells > 0)
    counts = (mean_saliency > threshold).sum(axis=0)
    return Votes(mean_saliency, counts, int(np.ceil(len(labels) * percentage / 100)))


def _check(
    labels: Sequence[NDArray[np.integer]],
    saliencies: Sequence[NDArray[np.floating]],
    num_clusters: int,
    percentage: float,
) -> None:
    if not labels or len(labels) != len(saliencies):
        raise InputError(
            f"{len(labels)} label maps and {len(saliencies)} saliency maps: expected one of each per image"
        )
    if not 0 <= percentage <= 100:
        raise InputError(f"votes percentage {percentage} is out of range: expected 0 to 100")
    for i, (image_labels, saliency) in enumerate(zip(labels, saliencies, strict=True)):
        if image_labels.shape != saliency.shape:
            raise InputError(f"image {i}: labels {image_labels.shape} and saliency {saliency.shape} differ in shape")
        if image_labels.size and (image_labels.min() < 0 or image_labels.max() >= num_clusters):
            raise InputError(f"image {i}: labels are not all in 0..{num_clusters - 1}")


def vote_reference(
    labels: Sequence[NDArray[np.integer]],
    saliencies: Sequence[NDArray[np.floating]],
    num_clusters: int,
    *,
    threshold: float = 0.065,
    percentage: float = 75,
) -> Votes:
    """The definition, cluster by cluster and image by image; the oracle for :func:`vote`."""
    mean_saliency = np.full((len(labels), num_clusters), np.nan)
    counts = np.zeros(num_clusters, np.int64)
    for cluster in range(num_clusters):
        for i, (image_labels, saliency) in enumerate(zip(labels, saliencies, strict=True)):
            members = saliency[image_labels == cluster]
            if members.size:
                mean_saliency[i, cluster] = members.astype(np.float64).mean()
                counts[cluster] += mean_saliency[i, cluster] > threshold
    return Votes(mean_saliency, counts, int(np.ceil(len(labels) * percentage / 100)))
