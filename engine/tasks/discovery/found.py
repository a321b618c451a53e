"""FOUND (Siméoni et al., CVPR 2023): the background is discovered, or one linear layer tells foreground by the keys.

Source: specification, found.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import LinearHead, Manifest
from facetrt.engine.features.features import Float
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import Pixels
from facetrt.engine.images.resampling import bilinear
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.attention import attention_facets, cls_attention, per_head
from facetrt.engine.tasks.discovery.grid import boxes_of, loaded_masks, nothing
from facetrt.engine.tasks.discovery.heads import read_head
from facetrt.engine.tasks.discovery.method import Method, Scene
from facetrt.engine.tasks.discovery.objects import Bools, Found
from facetrt.engine.tasks.masks import all_but_largest, bilateral_mask, iou, largest_beside_background
from facetrt.kernels.affinity import unit_length
from facetrt.kernels.components import connected_components, extent, largest_component
from facetrt.kernels.errors import InputError

LIKE_BACKGROUND = 0.3  # cosine to the seed above which a cell is background
AGREEMENT = 0.5  # IoU of a solved mask with the one before, below which that is kept
SPARSE = 1e-10  # added to the share of cells that a head looks at


class Form(StrEnum):
    """What tells foreground; ``auto``: the head where there is one, and otherwise the background."""

    AUTO = "auto"
    HEAD = "head"
    BACKGROUND = "background"


class Extent(StrEnum):
    """What counts as an object: the largest piece of foreground, all of it together, or each piece."""

    SINGLE = "single"
    MULTI = "multi"
    EACH = "each"


@dataclass(frozen=True)
class FoundMethod(Method):
    """Foreground by a head that a bundle may hold, or what is unlike the cell that [CLS] looks at least."""

    name: ClassVar[str] = "found"

    form: Annotated[Form, Setting("What tells foreground from background.")] = Form.AUTO
    extent: Annotated[Extent, Setting("Which foreground is an object.")] = Extent.SINGLE
    head: Annotated[Path | None, Setting("A head of 'facetrt found-head'; the bundle's own by default.")] = None
    weighted: Annotated[bool, Setting("Let heads weigh more that look at fewer cells, for the background.")] = True

    def solve(self, pixels: Pixels, mask: Bools) -> tuple[Bools, Float | None]:
        """See :class:`Method`; the result is kept if it overlaps with the mask by more than half."""
        taken = largest_beside_background if self.extent is Extent.SINGLE else all_but_largest
        solved = taken(bilateral_mask(pixels, mask)[0])
        return (solved if iou(solved, mask) > AGREEMENT else mask), None

    @property
    def fit(self) -> Fit:
        """See :class:`Method`."""
        return Fit.PAD

    def chosen_head(self, manifest: Manifest) -> LinearHead | None:
        """The head that is used; None for the background.

        Raises:
            InputError: one is asked for, and there is none.
        """
        if self.form is Form.BACKGROUND:
            return None
        head = self._own_head or manifest.found_head
        if head is None and self.form is Form.HEAD:
            raise InputError(
                "this bundle holds no head of FOUND: train one with 'facetrt found-head', add the published one with "
                "'facetrt export BUNDLE --found-head decoder_weights.pt', or use form=background"
            )
        return head

    @cached_property
    def _own_head(self) -> LinearHead | None:
        """The head in the file that was named, which is read once."""
        return None if self.head is None else read_head(self.head)

    def facet(self, manifest: Manifest) -> str:
        """The head's, or the bundle's own."""
        head = self.chosen_head(manifest)
        return super().facet(manifest) if head is None else head.facet

    def facets(self, manifest: Manifest) -> list[str]:
        """See :class:`Method`."""
        return attention_facets(manifest) if self.chosen_head(manifest) is None else []

    def find(self, scene: Scene) -> Found:
        """See :class:`Method`."""
        head, geometry = self.chosen_head(scene.manifest), scene.features.geometry
        if head is None:
            attention = cls_attention(scene.features, scene.manifest)[:, scene.features.prefix :]
            stage = background_of(per_head(scene.rows, scene.manifest), attention, weighted=self.weighted)
            cells = ~stage.background.reshape(geometry.grid)
            maps: dict[str, Any] = {name: values.reshape(geometry.grid) for name, values in stage.maps.items()}
            facts = {"form": "background", "seed": stage.seed, "head_weights": stage.weights.tolist()}
            return self._objects(geometry, cells, loaded_masks(cells[None], geometry)[0], None, maps, facts)
        logits = apply_head(scene.rows, head).reshape(geometry.grid)
        whole = geometry.stride == geometry.patch  # overlapping patches' cells are spread over all of the image
        large = bilinear(logits, geometry.covered_size if whole else geometry.image_size)
        soft = np.zeros(geometry.image_size, np.float32)
        soft[: large.shape[0], : large.shape[1]] = 1 / (1 + np.exp(-large.astype(np.float64)))
        facts = {"form": "head", "head": head.source}
        return self._objects(geometry, logits > 0, soft > 0.5, soft, {"logits": logits}, facts)

    def _objects(
        self,
        geometry: Geometry,
        cells: Bools,
        mask: Bools,
        soft: Float | None,
        maps: dict[str, Any],
        facts: dict[str, Any],
    ) -> Found:
        """Pieces of foreground. Boxes are those of the cells, as published; masks those of the pixels."""
        seen = geometry.on_picture(mask)
        if not seen.any() and not cells.any():
            return nothing(geometry, "is background everywhere", **maps)
        masks = _back(pieces(seen, self.extent), geometry)
        if cells.any():
            parts = pieces(cells, self.extent)
            boxes = boxes_of(parts, geometry)
        else:
            parts, boxes = np.zeros((1, *geometry.grid), np.bool_), np.array([extent(masks[0])], np.float64)
        count = min(len(parts), len(masks))
        if not seen.any():
            masks, count = np.zeros((1, *geometry.image_size), np.bool_), 1
        softs = None if soft is None else np.repeat(soft[None], count, axis=0)
        if softs is not None and self.extent is not Extent.MULTI:
            softs = np.where(masks[:count], softs, np.minimum(softs, 0.5)).astype(np.float32)
        whole = _back(seen[None], geometry)[0] if self.extent is not Extent.EACH else None
        return Found(parts[:count], boxes[:count], masks[:count], softs, whole=whole, maps=maps, facts=facts)


@dataclass(frozen=True)
class Background:
    """FOUND's first stage.

    Attributes:
        background: ``(cells,)`` bool, what is like the seed.
        seed: the cell that is looked at least.
        weights: ``(heads,)`` float64, more for heads that look at fewer cells.
        maps: the weighted attention, and each cell's cosine to the seed, ``(cells,)`` each.
    """

    background: Bools
    seed: int
    weights: NDArray[np.float64]
    maps: dict[str, NDArray[Any]]


def background_of(keys: Float, attention: Float, *, weighted: bool = True) -> Background:
    """The cells that are like the one that [CLS] looks at least.

    Args:
        keys: ``(cells, heads, d)``.
        attention: ``(heads, cells)``.
        weighted: whether heads count by how few cells they look at.
    """
    shares = (attention > attention.mean(dtype=np.float64)).mean(axis=1)
    weights = np.log((shares + SPARSE).sum() / (shares + SPARSE)) if weighted else np.ones(len(attention))
    looked_at = np.einsum("h,hn->n", weights, attention.astype(np.float64))
    seed = int(looked_at.argmin())
    scaled = (keys * weights[:, None]).reshape(len(keys), -1)
    unit = unit_length(scaled.astype(np.float32)).astype(np.float64)
    cosine = np.einsum("nc,c->n", unit, unit[seed])
    return Background(cosine > LIKE_BACKGROUND, seed, weights, {"attention": looked_at, "seed_cosine": cosine})


def apply_head(rows: Float, head: LinearHead) -> Float:
    """Logits ``(cells,)`` float32 of foreground.

    Raises:
        InputError: a head for descriptors of another width.
    """
    weight = np.asarray(head.weight, np.float64)
    if rows.shape[1] != len(weight):
        raise InputError(
            f"the head takes {len(weight)} channels of {head.facet}: these descriptors have {rows.shape[1]}; use the "
            "bundle that it was trained with, or train another with 'facetrt found-head'"
        )
    return np.asarray(np.einsum("nc,c->n", rows.astype(np.float64), weight) + head.bias, np.float32)


def pieces(mask: Bools, extent_: Extent) -> Bools:
    """``(N, h, w)``: the largest 4-connected piece of a mask, all of it, or each piece, the largest first."""
    if extent_ is Extent.MULTI:
        return mask[None]
    if extent_ is Extent.SINGLE:
        return largest_component(mask)[None]
    labels, count = connected_components(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = 1 + np.argsort(-sizes, kind="stable")
    return np.asarray(labels == order[:, None, None])


def _back(masks: Bools, geometry: Geometry) -> Bools:
    """Masks of the picture on the loaded image, whose border is empty."""
    height, width = geometry.image_size
    missing = (0, height - masks.shape[1]), (0, width - masks.shape[2])
    return np.pad(masks, ((0, 0), *missing)) if any(side for _, side in missing) else masks
