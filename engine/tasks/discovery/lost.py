"""LOST (Siméoni et al., BMVC 2021): a seed with few correlations, and what correlates with it.

Source: specification, lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from facetrt.engine.images.fitting import Fit
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.grid import boxes_of, loaded_masks, nothing
from facetrt.engine.tasks.discovery.method import Method, Scene
from facetrt.engine.tasks.discovery.objects import Found
from facetrt.kernels.components import component_at
from facetrt.kernels.correlation import positive_degree


@dataclass(frozen=True)
class Lost(Method):
    """One box per image. Objects take less room than background: a cell that few others correlate with is on one.

    Rows are not normalised, as published. Ties between equal degrees go to the first cell, where the published sort
    is not stable: on 2 of 18 known cases that gives another box.
    """

    name: ClassVar[str] = "lost"

    k_patches: Annotated[int, Setting("So many cells of least degree may belong to the seed.", minimum=1)] = 100

    @property
    def fit(self) -> Fit:
        """See :class:`Method`."""
        return Fit.PAD

    def find(self, scene: Scene) -> Found:
        """See :class:`Method`."""
        rows, geometry = scene.rows.astype(np.float64), scene.features.geometry
        degree = positive_degree(scene.rows)
        order = np.argsort(degree, kind="stable")
        seed, candidates = int(order[0]), order[: self.k_patches]
        correlations = np.einsum("nc,c->n", rows, rows[seed])
        similar = np.sort(candidates[correlations[candidates] > 0])
        expansion = np.einsum("nc,c->n", rows, rows[similar].sum(axis=0))
        grid = geometry.grid
        maps = {
            "degree": degree.reshape(grid),
            "seed": correlations.reshape(grid),
            "expansion": expansion.reshape(grid),
        }
        component = component_at(expansion.reshape(grid) > 0, seed)
        if not component.any():
            return nothing(geometry, "correlates with nothing, not even with itself: its descriptors are zero", **maps)
        cells = component[None]
        facts = {"seed": seed, "similar": len(similar)}
        return Found(cells, boxes_of(cells, geometry), loaded_masks(cells, geometry), maps=maps, facts=facts)
