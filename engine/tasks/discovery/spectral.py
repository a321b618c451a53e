"""Deep Spectral Methods (Melas-Kyriazi et al., CVPR 2022): the eigenvectors of a graph of cells, read in three ways.

Source: specification, deep-spectral.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import Pixels
from facetrt.engine.images.resampling import bilinear, opencv_nearest
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.grid import boxes_of, loaded_masks, nothing
from facetrt.engine.tasks.discovery.method import Method, Scene
from facetrt.engine.tasks.discovery.objects import Bools, Found
from facetrt.engine.tasks.masks import spectral_crf
from facetrt.kernels.affinity import spectral_graph, unit_length
from facetrt.kernels.colour_affinity import colour_affinity
from facetrt.kernels.components import largest_component
from facetrt.kernels.eigenvectors import smallest_eigenvectors
from facetrt.kernels.partition import partition

CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
TOO_FEW = "has too few cells for so many eigenvectors"
Labels = NDArray[np.int64]


class SpectralForm(StrEnum):
    """What is read from the eigenvectors: one box, one mask, or regions."""

    LOCALISATION = "localisation"
    SEGMENTATION = "segmentation"
    REGIONS = "regions"


@dataclass(frozen=True)
class Spectral(Method):
    """Eigenvectors of the positive cosines, with a colour term if asked: by their signs, or clustered into regions."""

    name: ClassVar[str] = "spectral"

    form: Annotated[SpectralForm, Setting("One box, one mask, or all regions but the background.")] = (
        SpectralForm.LOCALISATION
    )
    eigenvectors: Annotated[int, Setting("How many, the constant one among them.", minimum=2, maximum=100)] = 5
    colour_weight: Annotated[
        float, Setting("Of the colour term: 0 in the published commands, 10 in the paper.", minimum=0)
    ] = 0.0
    factor: Annotated[
        int | None, Setting("Pixels per cell of a finer grid that descriptors are resampled to.", minimum=1)
    ] = None
    regions: Annotated[int | None, Setting("How many to form; none for as many as the eigengap tells.", minimum=2)] = 4
    erode: Annotated[int, Setting("Steps that regions are eroded by before their boxes are taken.", minimum=0)] = 2
    dilate: Annotated[int, Setting("Steps that they are dilated by after that.", minimum=0)] = 3

    @property
    def fit(self) -> Fit:
        """See :class:`Method`."""
        return Fit.CROP

    def smooth(self, pixels: Pixels, mask: Bools) -> Bools:
        """See :class:`Method`."""
        return np.asarray(spectral_crf(pixels, mask.astype(np.int64), 2) == 1)

    def find(self, scene: Scene) -> Found:
        """See :class:`Method`."""
        geometry = scene.features.geometry
        if self.factor is not None:
            covered = geometry.covered_size
            geometry = Geometry(covered, covered, self.factor, self.factor)
        read = self._decompose(scene, geometry)
        if read is None:
            return nothing(scene.features.geometry, TOO_FEW)
        if self.form is SpectralForm.LOCALISATION:
            return _localised(read)
        if self.form is SpectralForm.SEGMENTATION:
            return _segmented(read)
        return self._regions(read)

    def _decompose(self, scene: Scene, geometry: Geometry) -> _Read | None:
        """The eigenvectors, if there are as many cells."""
        unit = unit_length(scene.rows)
        if self.factor is not None:
            map_ = unit.reshape(*scene.features.grid, -1)
            unit = bilinear(map_.transpose(2, 0, 1), geometry.grid).transpose(1, 2, 0).reshape(-1, unit.shape[1])
        if len(unit) <= self.eigenvectors:
            return None
        colours = None
        if self.colour_weight:
            colours = self.colour_weight * colour_affinity(colours_of(scene.features, geometry.grid))
        graph = spectral_graph(unit, colours, unit=True)
        solved = smallest_eigenvectors(graph, self.eigenvectors)
        vectors = signed(solved.vectors).T.reshape(-1, *geometry.grid)
        facts = {"eigenvalues": solved.values.tolist(), "residual": solved.residual, "solver": solved.solver}
        maps = {"eigenvectors": vectors, "degree": graph.degree.reshape(geometry.grid)}
        return _Read(vectors, solved.values, geometry, scene.features.image_size, maps, facts)

    def _regions(self, read: _Read) -> Found:
        count = self.regions or regions_by_gap(read.values)
        values = read.vectors[1:].reshape(len(read.vectors) - 1, -1).T
        labels, spread = partition(values, min(count, len(values)))
        segments = background_first(labels.reshape(read.geometry.grid))
        numbers = [number for number in range(1, segments.max() + 1) if (segments == number).any()]
        maps, facts = {**read.maps, "segments": segments}, {**read.facts, "regions": count, "inertia": spread}
        if not numbers:
            return nothing(read.geometry, "is one region with its border", **maps)
        cells = np.stack([segments == number for number in numbers])
        boxed = np.stack([self._opened(mask) for mask in cells])
        return read.found(cells, boxes_of(boxed, read.geometry), maps=maps, facts=facts)

    def _opened(self, mask: Bools) -> Bools:
        """A region eroded and dilated; a step that would leave nothing is skipped."""
        values = mask.astype(np.uint8)
        eroded = _morphed(cv2.erode, values, self.erode, border=1)
        return np.asarray(_morphed(cv2.dilate, eroded, self.dilate, border=0) > 0)


@dataclass(frozen=True)
class _Read:
    """Eigenvectors ``(K, grid_h, grid_w)`` on a grid, ``geometry``, of an image of ``image_size``."""

    vectors: NDArray[np.float64]
    values: NDArray[np.float64]
    geometry: Geometry
    image_size: tuple[int, int]
    maps: dict[str, Any] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)

    def found(self, cells: Bools, boxes: NDArray[np.float64], **more: Any) -> Found:
        """A result with masks at the original size by the published rule."""
        grid = self.geometry
        if grid.stride == grid.patch:
            masks = enlarged(cells, grid.covered_size, self.image_size)
        else:
            masks = loaded_masks(cells, grid)
        return Found(cells, boxes, masks, **({"maps": self.maps, "facts": self.facts} | more))


def _localised(read: _Read) -> Found:
    mask = read.vectors[1] > 0
    if 0.5 < mask.mean() < 1:
        mask = ~mask
    if not mask.any():
        mask = np.ones_like(mask)
    cells = largest_component(mask, connectivity=8)[None]
    return read.found(cells, boxes_of(cells, read.geometry))


def _segmented(read: _Read) -> Found:
    cells = (read.vectors[1] > 0)[None]
    if not cells.any():
        return nothing(read.geometry, "has an eigenvector without positive entries", **read.maps)
    return read.found(cells, boxes_of(cells, read.geometry))


def enlarged(cells: Bools, covered: tuple[int, int], size: tuple[int, int]) -> Bools:
    """Maps ``(N, grid_h, grid_w)`` at ``size (height, width)``: nearest to what patches cover.

    What they do not cover comes from an enlargement straight to the whole.
    """
    masks = np.stack([opencv_nearest(each, size) for each in cells])
    masks[:, : covered[0], : covered[1]] = np.stack([opencv_nearest(each, covered) for each in cells])
    return masks


def signed(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eigenvectors ``(n, K)``, those with more positive entries than others negated."""
    share = (vectors > 0).mean(axis=0)
    return np.where((share > 0.5) & (share < 1), -vectors, vectors)


def colours_of(features: Features, grid: tuple[int, int]) -> Float:
    """The picture's colours on a grid, ``(grid_h, grid_w, 3)`` float32 in [0, 1]: Pillow's bilinear."""
    small = Image.fromarray(np.ascontiguousarray(features.pixels)).resize((grid[1], grid[0]), Image.Resampling.BILINEAR)
    return np.asarray(np.asarray(small, np.float32) / 255, np.float32)


def regions_by_gap(values: NDArray[np.float64]) -> int:
    """One more than the place of the largest gap between eigenvalues, that behind the first left aside."""
    gaps = np.diff(values)
    return 2 + int(gaps[1:].argmax()) if len(gaps) > 1 else 2


def background_first(labels: Labels) -> Labels:
    """Labels of regions, that with the most cells at the border swapped with 0; corners count twice."""
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    background = int(np.bincount(border).argmax())
    swapped = labels.copy()
    swapped[labels == background], swapped[labels == 0] = 0, background
    return swapped


def _morphed(step: Any, mask: NDArray[np.uint8], count: int, *, border: int) -> NDArray[np.uint8]:
    for _ in range(count):
        moved = step(mask, CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=border)
        if not moved.any():
            break
        mask = moved
    return mask
