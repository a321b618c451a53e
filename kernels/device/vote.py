"""Saliency voting on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError

BLOCK = 1024

MEAN_SALIENCY = Program(
    "vote_mean_saliency",
    "vote:mean_saliency",
    (("labels", "*u8"), ("saliency", "*fp32"), ("offsets", "*i64"), ("means", "*fp64")),
    {"BLOCK": BLOCK},
)
COUNT_VOTES = Program(
    "vote_count_votes",
    "vote:count_votes",
    (
        ("means", "*fp64"),
        ("threshold", "*fp64"),
        ("counts", "*i32"),
        ("salient", "*u8"),
        ("images", "i32"),
        ("needed", "i32"),
    ),
    {"BLOCK": 128},
)
SALIENT_CELLS = Program(
    "vote_salient_cells",
    "vote:salient_cells",
    (("labels", "*u8"), ("salient", "*u8"), ("cells", "*u8"), ("size", "i64")),
    {"BLOCK": BLOCK},
)
PROGRAMS = (MEAN_SALIENCY, COUNT_VOTES, SALIENT_CELLS)


@dataclass(frozen=True)
class DeviceVotes:
    """Outcome of a vote among N images over k clusters.

    ``mean_saliency (N, k)`` float64 is NaN where an image has no cell in a cluster; ``counts (k,)`` int32 votes;
    ``salient (k,)`` uint8, 1 for clusters with at least ``needed`` votes. Where no vote is needed, clusters without
    any cell are salient, too.
    """

    mean_saliency: DeviceArray
    counts: DeviceArray
    salient: DeviceArray
    needed: int


def vote(
    device: Device,
    labels: DeviceArray,
    saliency: DeviceArray,
    offsets: Sequence[int],
    num_clusters: int,
    *,
    threshold: float = 0.065,
    percentage: float = 75,
) -> DeviceVotes:
    """Each image votes for the clusters whose mean saliency in it is strictly above ``threshold``.

    Args:
        labels: ``(n,)`` uint8, the clusters of all images' cells in a row, below ``num_clusters``.
        saliency: ``(n,)`` float32.
        offsets: where each image begins, and the end of the last.
        percentage: share of the images, in percent, whose vote a foreground cluster needs (rounded up).

    Raises:
        InputError: no image, offsets that do not fit, a percentage outside 0..100, or more than 255 clusters.
    """
    _check(labels, saliency, offsets, num_clusters, percentage)
    images = len(offsets) - 1
    needed = int(np.ceil(images * percentage / 100))
    means = device.empty((images, num_clusters), "float64")
    counts, salient = device.empty((num_clusters,), "int32"), device.empty((num_clusters,), "uint8")
    starts = device.upload(np.array(offsets, np.int64))
    device.launch(MEAN_SALIENCY, (images, num_clusters), labels, saliency, starts, means)
    least = device.upload(np.array([threshold], np.float64))  # as an array: scalars are float32
    device.launch(COUNT_VOTES, (num_clusters,), means, least, counts, salient, images, needed)
    return DeviceVotes(means, counts, salient, needed)


def _check(
    labels: DeviceArray, saliency: DeviceArray, offsets: Sequence[int], num_clusters: int, percentage: float
) -> None:
    if not 0 <= percentage <= 100:
        raise InputError(f"votes percentage {percentage} is out of range: expected 0 to 100")
    if labels.size != saliency.size:
        raise InputError(f"labels {labels.shape} and saliency {saliency.shape} differ in size")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != labels.size or (np.diff(offsets) < 0).any():
        raise InputError(
            f"offsets {list(offsets)}: expected rising numbers from 0 to {labels.size}, one more than images"
        )
    if not 1 <= num_clusters <= 255:
        raise InputError(f"a vote on {num_clusters} clusters: expected 1 to 255")


def salient_cells(device: Device, labels: DeviceArray, salient: DeviceArray) -> DeviceArray:
    """1 where a cell's cluster is salient, ``(n,)`` uint8, of ``labels (n,)`` and ``salient (k,)`` uint8."""
    cells = device.empty(labels.shape, "uint8")
    if labels.size:
        device.launch(SALIENT_CELLS, (-(-labels.size // BLOCK),), labels, salient, cells, labels.size)
    return cells
