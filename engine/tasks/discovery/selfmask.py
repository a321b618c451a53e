"""SelfMask (Shin et al., CVPRW 2022): candidates that vote for each other, and the segmenter trained on the winners.

Source: specification, selfmask.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.features.features import Float
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.resampling import bilinear, torch_nearest
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.grid import nothing
from facetrt.engine.tasks.discovery.method import Method, Scene
from facetrt.engine.tasks.discovery.objects import Bools, Found
from facetrt.engine.tasks.discovery.segmenter import Segmenter
from facetrt.kernels.affinity import StretchedGraph
from facetrt.kernels.components import extent
from facetrt.kernels.eigenvectors import smallest_eigenvectors
from facetrt.kernels.errors import InputError
from facetrt.kernels.parallel import one_blas_thread
from facetrt.kernels.partition import partition

CLUSTERS = (2, 3, 4)
FINER = 2  # cells per side that a cell is enlarged to
EPSILON = 1e-7  # in the union of candidates


class Generator(StrEnum):
    """Who makes the mask; ``auto``: the segmenter, where the bundle holds one."""

    AUTO = "auto"
    VOTING = "voting"
    SEGMENTER = "segmenter"


@dataclass(frozen=True)
class SelfMask(Method):
    """One mask per image: the cluster that the others agree with most, or the segmenter's likeliest object.

    Published candidates come from three networks; here they come from each facet that is named. Eigenvectors are exact,
    where the published solver stops at single precision from a random start.
    """

    name: ClassVar[str] = "selfmask"
    uses_segmenter: ClassVar[bool] = True

    generator: Annotated[Generator, Setting("Who makes the mask.")] = Generator.AUTO

    @property
    def fit(self) -> Fit:
        """See :class:`Method`."""
        return Fit.PAD

    def facet(self, manifest: Manifest) -> str:
        """The last block's normed tokens, as published, where they were exported."""
        tokens = _tokens(manifest)
        return tokens if tokens in manifest.facets else super().facet(manifest)

    def find(self, scene: Scene) -> Found:
        """See :class:`Method`."""
        if self.generator is Generator.SEGMENTER and scene.segmenter is None:
            raise InputError(
                "this bundle holds no segmenter: export selfmask_nq20 or selfmask_nq10, or use generator=voting"
            )
        if self.generator is not Generator.VOTING and scene.segmenter is not None:
            return _segmented(scene, scene.segmenter)
        return _voted(scene)


def _tokens(manifest: Manifest) -> str:
    return f"normed@{manifest.architecture.depth - 1}"


def _segmented(scene: Scene, segmenter: Segmenter) -> Found:
    """The query that is likeliest an object, and its mask."""
    geometry, tokens = scene.features.geometry, scene.features[_tokens(scene.manifest)]
    if tokens.shape[1] != segmenter.width:
        raise InputError(f"the segmenter takes {segmenter.width} channels: tokens have {tokens.shape[1]}")
    decoded = segmenter.decode(tokens)
    best = int(decoded.objectness.argmax())
    logits = np.einsum("nc,c->n", tokens.astype(np.float64), decoded.queries[best]).reshape(geometry.grid)
    large = bilinear(logits, (FINER * geometry.grid[0], FINER * geometry.grid[1]))
    shares = 1 / (1 + np.exp(-large.astype(np.float64)))
    soft = bilinear(shares, geometry.image_size)
    mask = soft > 0.5
    maps = {"logits": logits}
    facts = {"generator": "segmenter", "query": best, "objectness": decoded.objectness.tolist()}
    if not geometry.on_picture(mask).any():
        return nothing(geometry, "holds nothing that the segmenter takes for an object", **maps)
    scores = np.array([decoded.objectness[best]], np.float64)
    box = np.array([extent(geometry.on_picture(mask))], np.float64)
    return Found((logits > 0)[None], box, mask[None], soft[None], scores=scores, maps=maps, facts=facts)


def _voted(scene: Scene) -> Found:
    geometry = scene.features.geometry
    labels = [found for rows in scene.parts for found in _clusterings(rows, geometry)]
    if not labels:
        return nothing(geometry, "has too few cells to be clustered")
    candidates, cells = [], []
    for each in labels:
        for number in range(each.max() + 1):
            candidates.append(torch_nearest(each == number, geometry.image_size))
            cells.append((each == number)[::FINER, ::FINER])
    kept, scores = vote(np.stack([geometry.on_picture(mask) for mask in candidates]))
    winner = kept[int(scores.argmax())]
    maps: dict[str, Any] = {"clusters": np.stack([each[::FINER, ::FINER] for each in labels])}
    facts = {"generator": "voting", "candidates": len(candidates), "kept": len(kept), "winner": int(winner)}
    mask = candidates[winner]
    box = extent(geometry.on_picture(mask))
    if box is None:
        return nothing(geometry, "gives only empty candidates", **maps)
    agreement = np.array([scores.max() / len(kept)], np.float64)
    return Found(cells[winner][None], np.array([box], np.float64), mask[None], scores=agreement, maps=maps, facts=facts)


def _clusterings(rows: Float, geometry: Geometry) -> list[NDArray[np.int64]]:
    """Clusters of the enlarged map, ``(2 grid_h, 2 grid_w)`` each, for each number of them."""
    grid_h, grid_w = geometry.grid
    size = FINER * grid_h, FINER * grid_w
    if size[0] * size[1] <= max(CLUSTERS):
        return []
    large = bilinear(rows.reshape(grid_h, grid_w, -1).transpose(2, 0, 1), size, corners=True)
    graph = StretchedGraph(np.ascontiguousarray(large.reshape(len(large), -1).T))
    vectors = smallest_eigenvectors(graph, max(CLUSTERS)).vectors
    return [partition(vectors[:, :count], count)[0].reshape(size) for count in CLUSTERS]


def vote(candidates: Bools) -> tuple[NDArray[np.int64], Float]:
    """Which of ``candidates (N, height, width)`` may stand, and how much each overlaps with all of those.

    A mask that is empty, or spans the whole height or width, may not; if none is left all may. An overlap is
    intersection over union. Source: specification, selfmask A.5 and A.6.
    """
    extents = [extent(mask) for mask in candidates]
    height, width = candidates.shape[1:]
    kept = [
        number
        for number, box in enumerate(extents)
        if box is not None and box[2] - box[0] < width and box[3] - box[1] < height
    ]
    chosen = np.array(kept if kept else range(len(candidates)), np.int64)
    flat = candidates[chosen].reshape(len(chosen), -1).astype(np.float32)
    with one_blas_thread:  # whole numbers below 2²⁴ are exact in any order
        shared = (flat @ flat.T).astype(np.float64)
    sizes = flat.sum(axis=1, dtype=np.float64)
    overlaps = shared / (sizes[:, None] + sizes - shared + EPSILON)
    return chosen, np.asarray(overlaps.sum(axis=1), np.float32)
