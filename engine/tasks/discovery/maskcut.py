"""MaskCut (Wang et al., CVPR 2023): several objects, each by a cut of what the others left.

Source: specification, cutler-maskcut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from PIL import Image

from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.loading import LoadSize, Pixels
from facetrt.engine.images.resampling import torch_nearest
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.cutting import NO_CUT, Cut, cut, first_largest
from facetrt.engine.tasks.discovery.grid import nothing
from facetrt.engine.tasks.discovery.method import Method, Scene
from facetrt.engine.tasks.discovery.objects import Bools, Found
from facetrt.engine.tasks.masks import fill_holes, iou, maskcut_crf
from facetrt.kernels.components import component_at, extent
from facetrt.kernels.eigenvectors import sign_of_lapack

OVERLAP = 0.5  # a mask that shares more with the one before it is rejected
SMALLEST = 0.01  # of the grid: a mask of no more is rejected
CORNERS = 3  # of four: a side that holds so many is background
AGREEMENT = 0.5  # IoU of a mask with what the CRF made of it, below which it is dropped


@dataclass(frozen=True)
class MaskCut(Method):
    """Up to ``cuts`` objects per image, found one after the other, cells of earlier ones painted over.

    Two things of the published loop are kept unless ``corrected``. A rejected mask counts as the one before the next
    round, which then repeats the cut and accepts the same region; only what no earlier mask covers is left of it. And
    the test of which side of a cut is the object's depends on the eigenvector's sign, which is LAPACK's accident:
    :func:`facetrt.kernels.eigenvectors.sign_of_lapack` finds it out. Corrected, a rejected region is painted over, and
    the side with fewer corners is the object's.
    """

    name: ClassVar[str] = "maskcut"
    load_size: ClassVar[LoadSize] = (480, 480)

    cuts: Annotated[int, Setting("At most this many objects.", minimum=1, maximum=100)] = 3
    tau: Annotated[float, Setting("Cells are alike above this cosine.", minimum=0, maximum=1)] = 0.15
    weak: Annotated[float, Setting("What an edge between other cells weighs.", above=0, maximum=1)] = 1e-5
    corrected: Annotated[bool, Setting("Accept no rejected region later; let no sign choose the object.")] = False
    crf: Annotated[bool, Setting("Smooth masks by the published CRF, and drop those that it does not bear out.")] = True

    @property
    def fit(self) -> Fit:
        """See :class:`Method`."""
        return Fit.RESIZE

    def find(self, scene: Scene) -> Found:
        """See :class:`Method`."""
        geometry, pixels = scene.features.geometry, scene.features.pixels
        rounds = list(self._rounds(scene))
        if not rounds:
            return nothing(geometry, NO_CUT)
        kept = []
        for number, (output, _, _) in enumerate(rounds):
            loaded = self._smoothed(pixels, output)
            final = at_original_size(loaded, geometry.original_size)
            if final.any():
                kept.append((number, loaded, final))
        maps = {"eigenvector": np.stack([found.vector.reshape(geometry.grid) for _, _, found in rounds])}
        facts = {"cuts": len(rounds), "objects": len(kept), "rounds": [found.facts for _, _, found in rounds]}
        if not kept:
            return nothing(geometry, "holds no object that the CRF bears out", **maps)
        masks = np.stack([loaded for _, loaded, _ in kept])
        return Found(
            np.stack([rounds[number][1] for number, _, _ in kept]),
            np.array([extent(mask) for mask in masks], np.float64),
            masks,
            masks=np.stack([final for _, _, final in kept]),
            maps=maps,
            facts=facts,
        )

    def _rounds(self, scene: Scene) -> Iterator[tuple[Bools, Bools, Cut]]:
        """Each round's mask of loaded pixels, its cells, and the cut."""
        geometry = scene.features.geometry
        graph = whole = scene.graph(scene.rows, self.tau, self.weak)
        painted = previous = np.zeros(geometry.grid, np.bool_)
        covered = np.zeros(geometry.image_size, np.bool_)
        found: Cut | None = None
        for number in range(self.cuts):
            if number:
                painted = painted | previous
                if painted.all():
                    return
                graph = whole.without(painted.ravel())
            found = cut(graph, start=None if found is None else np.where(painted.ravel(), 0, found.vector))
            if found is None:
                return
            if not self.corrected and sign_of_lapack(graph, found.vector) < 0:
                found = found.negated()
            found, cells = object_side(found, geometry.grid, signed=not self.corrected)
            if number and (iou(previous, cells) > OVERLAP or cells.mean() <= SMALLEST):
                rejected, cells = cells, np.zeros_like(cells)
                if self.corrected:
                    painted = painted | rejected
            large = torch_nearest(cells, geometry.image_size)
            yield large & ~covered, cells, found
            covered, previous = covered | large, cells

    def _smoothed(self, pixels: Pixels, mask: Bools) -> Bools:
        """The mask after the CRF, its holes filled; empty where the two have little in common."""
        if not self.crf or not mask.any():
            return mask
        smooth = fill_holes(maskcut_crf(pixels, mask))
        return smooth if iou(mask, smooth) >= AGREEMENT else np.zeros_like(mask)


def object_side(found: Cut, grid: tuple[int, int], *, signed: bool) -> tuple[Cut, Bools]:
    """The cut so that its side is the object's, and the piece ``(grid_h, grid_w)`` of it with the largest entry.

    Args:
        signed: as published: the other side's corners are not looked at.
    """
    side = found.side.reshape(grid)
    corners = int(side[0, 0]) + int(side[0, -1]) + int(side[-1, 0]) + int(side[-1, -1])
    few = not signed and corners <= 4 - CORNERS
    if corners >= CORNERS or not (few or found.side[found.peak]):
        found = found.inverted()
    seed = first_largest(found.vector - found.vector.min())
    return found, component_at(found.side.reshape(grid), seed)


def at_original_size(mask: Bools, size: tuple[int, int]) -> Bools:
    """A mask resized to ``(height, width)`` by Pillow's bicubic filter, above half of its largest value."""
    grey: Any = Image.fromarray(mask.astype(np.uint8) * 255).resize((size[1], size[0]))
    values = np.asarray(grey)
    return np.asarray(values > values.max() * 0.5) if values.any() else np.zeros(size, np.bool_)
