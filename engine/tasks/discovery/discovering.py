"""Objects in one image after the other: fuse facets, let a method look, bring what it finds to the original pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import Pixels
from facetrt.engine.tasks.discovery.fusing import Term, fuse
from facetrt.engine.tasks.discovery.grid import nothing
from facetrt.engine.tasks.discovery.method import GraphMaker, Method, Scene
from facetrt.engine.tasks.discovery.objects import Bools, Found, Objects
from facetrt.engine.tasks.discovery.segmenter import Segmenter
from facetrt.engine.tasks.refinement import Refinement, check_available, enlarge_mask, grabcut
from facetrt.kernels.affinity import threshold_graph
from facetrt.kernels.components import extent
from facetrt.kernels.errors import InputError

EMPTY = "holds no object that can be told apart"


@dataclass(frozen=True)
class Discovery:
    """A method, what it is given and what becomes of its masks.

    Attributes:
        terms: whose rows the method works on.
        refine: how masks are refined on the picture.
        segmenter: SelfMask's, of bundles that hold one.
    """

    method: Method
    terms: tuple[Term, ...]
    manifest: Manifest
    refine: Refinement = Refinement.NONE
    segmenter: Segmenter | None = None

    def __post_init__(self) -> None:
        for facet in (*(term.facet for term in self.terms), *self.method.facets(self.manifest)):
            if facet not in self.manifest.facets:
                raise InputError(self.manifest.missing_facet(facet))
        if self.refine is Refinement.PYDENSECRF:
            raise InputError("refine 'pydensecrf' is co-segmentation's: use crf, bilateral, grabcut or none here")
        check_available(self.refine)

    @property
    def name(self) -> str:
        """What the rows are called."""
        return "+".join(map(str, self.terms))

    def find(
        self,
        features: Features,
        original: Callable[[], Pixels] | None = None,
        graph: GraphMaker = threshold_graph,
    ) -> Objects:
        """The objects of one image.

        Args:
            original: gives the picture at its original size, for refinement; without it the loaded one is refined on.
            graph: see :class:`Scene`.

        Raises:
            InputError: descriptors that are not finite, or of a width that the method cannot take.
        """
        if features.why_empty is not None:
            found = nothing(features.geometry, features.why_empty)
        else:
            try:
                parts = [term.rows(features) for term in self.terms]
                rows = fuse(self.terms, parts)
                found = self.method.find(Scene(features, parts, rows, self.name, self.manifest, self.segmenter, graph))
            except InputError as error:
                raise InputError(f"{features.name}: {error}") from error
        objects = self._objects(features, found)
        return objects if self.refine is Refinement.NONE else self._refined(objects, found.whole, features, original)

    def _objects(self, features: Features, found: Found) -> Objects:
        geometry = features.geometry
        masks = found.masks if found.masks is not None else _enlarged(geometry.on_picture(found.loaded_masks), geometry)
        soft = None if found.soft is None else _enlarged_soft(geometry.on_picture(found.soft), geometry.original_size)
        return Objects(
            method=self.method.name,
            facet=self.name,
            boxes=boxes_on_original(found.boxes, geometry),
            masks=masks,
            soft=soft,
            cells=found.cells,
            scores=found.scores,
            maps=found.maps,
            facts=found.facts,
            refinement=Refinement.NONE,
            geometry=geometry,
            name=features.name,
            why_empty=found.why_empty if found.why_empty or len(found.boxes) else EMPTY,
        )

    def _refined(
        self, objects: Objects, whole: Bools | None, features: Features, original: Callable[[], Pixels] | None
    ) -> Objects:
        """Masks refined on the picture, and boxes around them; masks of which nothing is left are dropped."""
        if not len(objects):
            return replace(objects, refinement=self.refine)
        height, width = objects.geometry.original_size
        pixels = original() if original is not None else _picture(features)
        masks, soft = [], []
        given = objects.masks
        if whole is not None:
            given = _enlarged(objects.geometry.on_picture(whole[None]), objects.geometry)
        for mask in given:
            small = _resized(mask, (pixels.shape[0], pixels.shape[1]))
            refined, confidence = self._refine(pixels, small)
            masks.append(_resized(refined, (height, width)))
            if confidence is not None:
                soft.append(_enlarged_soft(confidence[None], (height, width))[0])
        kept = [number for number, mask in enumerate(masks) if mask.any()]
        return replace(
            objects,
            masks=np.stack(masks)[kept],
            soft=np.stack(soft)[kept] if soft else None,
            boxes=np.array([extent(masks[number]) for number in kept], np.float64).reshape(-1, 4),
            cells=objects.cells[kept],
            scores=None if objects.scores is None else objects.scores[kept],
            refinement=self.refine,
            why_empty=None if kept else "holds no object of which refinement leaves anything",
        )

    def _refine(self, pixels: Pixels, mask: Bools) -> tuple[Bools, Float | None]:
        """A mask as the method's publication refines it, and how sure that is where it is soft."""
        if self.refine is Refinement.BILATERAL:
            return self.method.solve(pixels, mask)
        if self.refine is Refinement.CRF:
            return self.method.smooth(pixels, mask), None
        refined = grabcut(pixels, mask)
        return (mask if refined is None else refined), None


def boxes_on_original(boxes: NDArray[np.float64], geometry: Geometry) -> NDArray[np.float64]:
    """Boxes ``(N, 4)`` of loaded pixels in original ones, cut where the picture ends."""
    height, width = geometry.original_size
    scaled = boxes * np.tile(geometry.scale_xy, 2)
    return np.asarray(np.clip(scaled, 0, [width, height, width, height]), np.float64)


def _enlarged(masks: Bools, geometry: Geometry) -> Bools:
    size = geometry.original_size
    if masks.shape[1:] == size:
        return masks
    return np.stack([enlarge_mask(mask, size) for mask in masks]) if len(masks) else np.zeros((0, *size), np.bool_)


def _enlarged_soft(maps: Float, size: tuple[int, int]) -> Float:
    if maps.shape[1:] == size:
        return maps
    resized = [cv2.resize(each, (size[1], size[0]), interpolation=cv2.INTER_LINEAR) for each in maps]
    return np.asarray(resized, np.float32).reshape(-1, *size)


def _resized(mask: Bools, size: tuple[int, int]) -> Bools:
    return mask if mask.shape == size else enlarge_mask(mask, size)


def _picture(features: Features) -> Pixels:
    """The loaded picture without a border that was added."""
    return np.ascontiguousarray(features.geometry.on_picture(features.pixels.transpose(2, 0, 1)).transpose(1, 2, 0))
