"""DINO-seg, LOST's baseline: where one head of [CLS] looks most.

Source: specification, lost "Visual by-products" and corrections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.images.fitting import Fit
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.attention import attention_facets, cls_attention
from facetrt.engine.tasks.discovery.grid import boxes_of, loaded_masks, nothing
from facetrt.engine.tasks.discovery.method import Method, Scene
from facetrt.engine.tasks.discovery.objects import Bools, Found
from facetrt.kernels.components import connected_components, largest_component
from facetrt.kernels.errors import InputError


@dataclass(frozen=True)
class DinoSeg(Method):
    """One box per image: the largest piece of the cells that hold most of a head's attention.

    The published code overlooks the last piece in raster order, and takes the background where there is but one.
    """

    name: ClassVar[str] = "dino-seg"

    head: Annotated[int, Setting("Of the last block; the first is 0.", minimum=0)] = 4
    mass: Annotated[float, Setting("Share of the attention that is kept.", above=0, maximum=1)] = 0.6
    published: Annotated[bool, Setting("Overlook the last piece, as the published code does.")] = False

    @property
    def fit(self) -> Fit:
        """See :class:`Method`."""
        return Fit.PAD

    def facets(self, manifest: Manifest) -> list[str]:
        """See :class:`Method`."""
        if self.head >= manifest.architecture.heads:
            raise InputError(f"head={self.head}: this bundle has heads 0 to {manifest.architecture.heads - 1}")
        return attention_facets(manifest)

    def find(self, scene: Scene) -> Found:
        """See :class:`Method`."""
        geometry = scene.features.geometry
        attention = cls_attention(scene.features, scene.manifest)[:, scene.features.prefix :]
        attention = attention.reshape(-1, *geometry.grid)
        kept = heaviest(attention[self.head], self.mass)
        component = (_published_component if self.published else largest_component)(kept)
        maps = {"attention": attention, "kept": kept}
        if not component.any():
            return nothing(geometry, "is looked at by this head nowhere", **maps)
        cells = component[None]
        return Found(cells, boxes_of(cells, geometry), loaded_masks(cells, geometry), maps=maps)


def heaviest(attention: NDArray[np.float32], mass: float) -> Bools:
    """The largest values of a map that together make up ``mass`` of its sum."""
    order = np.argsort(attention.ravel(), kind="stable")
    shares = np.cumsum(attention.ravel()[order] / attention.sum(), dtype=np.float32)
    kept = np.empty(attention.size, np.bool_)
    kept[order] = shares > 1 - mass
    return kept.reshape(attention.shape)


def _published_component(mask: Bools) -> Bools:
    """The largest of all pieces but the last; with one piece alone, what lies outside it."""
    labels, count = connected_components(mask)
    if count < 2:
        return np.asarray(labels == 0)
    return np.asarray(labels == 1 + np.bincount(labels.ravel(), minlength=count + 1)[1:count].argmax())
