"""Steps of the method that both baselines do alike, with the libraries that the published implementation uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.benchmarks.missing import import_library
from facetrt.export.export_options import FacetKind

Float = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Source = Path | str | Pixels  # of an image: a file, or decoded

THIRDS = {FacetKind.QUERY: 0, FacetKind.KEY: 1, FacetKind.VALUE: 2}  # of the fused projection


@dataclass(frozen=True)
class Pairs:
    """Kept best buddies as cells of A and B, and which of them were selected."""

    cells_a: NDArray[np.int64]
    cells_b: NDArray[np.int64]
    selected: NDArray[np.int64]


@dataclass(frozen=True)
class Sweep:
    """An elbow sweep: the numbers of clusters tried, and the cluster of each cell of each image."""

    tried_k: list[int]
    objectives: list[float]
    labels: list[NDArray[np.int64]]


@dataclass(frozen=True)
class Cosegmented:
    """Masks at the loaded size, and the cluster of each cell ``(cells,)``, of each image."""

    masks: list[Mask]
    labels: list[NDArray[np.int64]]


def load_pixels(source: Source, size: tuple[int, int]) -> Pixels:
    """``(height, width, 3)`` uint8 RGB, resized by Lanczos, of a file or of a decoded image."""
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source).convert("RGB")
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS))


def min_max(values: Float) -> Float:
    """Scaled to [0, 1]."""
    return np.asarray((values - values.min()) / (values.max() - values.min()), np.float32)


def enlarge(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Nearest neighbour by Pillow's rule."""
    return np.asarray(Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.NEAREST))


def keep_salient(
    nn_ab: NDArray[np.int64], nn_ba: NDArray[np.int64], saliency_a: Float, saliency_b: Float, threshold: float = 0.05
) -> NDArray[np.int64]:
    """Cells of A that are salient best buddies and the neighbour of some salient cell of B."""
    mutual = nn_ba[nn_ab] == np.arange(len(nn_ab))
    reached = np.zeros(len(nn_ab), np.bool_)
    reached[nn_ba[saliency_b > threshold]] = True
    return np.flatnonzero(mutual & (saliency_a > threshold) & reached)


def pick_diverse(joined: Float, rank: Float, num_pairs: int) -> NDArray[np.int64]:
    """The best-ranked row of each of ``num_pairs`` clusters; scikit-learn's k-means with 10 restarts."""
    count = min(num_pairs, len(joined))
    if count == 0:
        return np.empty(0, np.int64)
    unit = joined / np.linalg.norm(joined, axis=1, keepdims=True)
    cluster = import_library("sklearn.cluster")
    clusters = cluster.KMeans(n_clusters=count, random_state=0, n_init=10).fit(unit).labels_
    members = [np.flatnonzero(clusters == k) for k in range(count)]
    return np.array([rows[rank[rows].argmax()] for rows in members if rows.size], np.int64)


def elbow_sweep(
    descriptors: Sequence[Float],
    *,
    all_rounds: bool,
    elbow: float = 0.975,
    sample_interval: int = 100,
    max_clusters: int = 14,
) -> Sweep:
    """FAISS k-means with 300 rounds and 10 restarts for k = 1, 2, … until the error stops falling.

    Args:
        all_rounds: whether all 300 run, as with the FAISS of the published implementation; today's stops a restart
            whose error no longer falls.
    """
    faiss = import_library("faiss")
    stops_early = hasattr(faiss.ClusteringParameters(), "early_stop_threshold")
    options = {"early_stop_threshold": -1.0} if all_rounds and stops_early else {}
    rows = np.concatenate(descriptors)
    samples = np.ascontiguousarray(np.concatenate([d[::sample_interval] for d in descriptors]))
    faiss.normalize_L2(rows)
    faiss.normalize_L2(samples)
    tried: list[int] = []
    objectives: list[float] = []
    for k in range(1, max_clusters + 1):
        trainer = faiss.Kmeans(rows.shape[1], k, niter=300, nredo=10, min_points_per_centroid=1, **options)
        trainer.train(samples)
        squared, nearest = trainer.index.search(rows, 1)
        tried.append(k)
        objectives.append(float(squared.sum(dtype=np.float64) / len(rows)))
        if k > 1 and objectives[-1] > elbow * objectives[-2]:
            break
    ends = np.cumsum([len(d) for d in descriptors])[:-1]
    return Sweep(tried, objectives, np.split(nearest[:, 0], ends))


def salient_clusters(
    sweep: Sweep, saliency: Sequence[Float], threshold: float = 0.065, percentage: float = 75
) -> NDArray[np.int64]:
    """Clusters that enough images vote for; an image votes by its mean saliency in the cluster."""
    votes = np.zeros(sweep.tried_k[-1], np.int64)
    for labels, values in zip(sweep.labels, saliency, strict=True):
        for k in range(len(votes)):
            inside = values[labels == k]
            votes[k] += inside.size > 0 and inside.mean() > threshold
    return np.flatnonzero(votes >= np.ceil(len(saliency) * percentage / 100))


def fill(pixels: Pixels, cells: Mask) -> Mask:
    """A mask of cells enlarged to the image, without refinement."""
    return enlarge(cells.astype(np.uint8), (pixels.shape[0], pixels.shape[1])) > 0


def cut(pixels: Pixels, cells: Mask) -> Mask:
    """A mask of cells enlarged and refined by GrabCut; as it is where GrabCut has nothing to learn from."""
    mask = enlarge(cells.astype(np.uint8), (pixels.shape[0], pixels.shape[1]))
    box = np.ones((7, 7), np.uint8)
    labels = np.full(mask.shape, cv2.GC_PR_FGD, np.uint8)
    labels[cv2.erode(1 - mask, box) > 0] = cv2.GC_BGD
    labels[cv2.erode(mask, box) > 0] = cv2.GC_FGD
    cv2.setRNGSeed(0)
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    try:
        cv2.grabCut(pixels, labels, (0, 0, 1, 1), background, foreground, 5, cv2.GC_INIT_WITH_MASK)
    except cv2.error:
        return mask > 0
    return np.asarray((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))
