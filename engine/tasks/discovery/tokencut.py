"""TokenCut (Wang et al., CVPR 2022): a normalised cut of the graph of alike cells.

Source: specification, tokencut.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.resampling import torch_nearest
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.cutting import NO_CUT, cut
from facetrt.engine.tasks.discovery.grid import boxes_of, loaded_masks, nothing
from facetrt.engine.tasks.discovery.method import Method, Scene
from facetrt.engine.tasks.discovery.objects import Found
from facetrt.kernels.affinity import weighted_graph
from facetrt.kernels.components import component_at


class TokenCutForm(StrEnum):
    """What is published twice, with the image prepared in two ways: padded for ``box``, resized for ``mask``."""

    BOX = "box"
    MASK = "mask"


@dataclass(frozen=True)
class TokenCut(Method):
    """One object per image: the side of the cut with the eigenvector's largest entry, in one piece."""

    name: ClassVar[str] = "tokencut"

    form: Annotated[TokenCutForm, Setting("Of the discovery task (padded), or of the saliency task (resized).")] = (
        TokenCutForm.BOX
    )
    tau: Annotated[float, Setting("Cells are alike above this cosine.", minimum=0, maximum=1)] = 0.2
    weak: Annotated[float, Setting("What an edge between other cells weighs.", above=0, maximum=1)] = 1e-5
    weighted: Annotated[bool, Setting("Let edges weigh their cosines, as in the ablation.")] = False

    @property
    def fit(self) -> Fit:
        """See :class:`Method`."""
        return Fit.RESIZE if self.form is TokenCutForm.MASK else Fit.PAD

    def find(self, scene: Scene) -> Found:
        """See :class:`Method`."""
        geometry = scene.features.geometry
        graph = (weighted_graph if self.weighted else scene.graph)(scene.rows, self.tau, self.weak)
        maps: dict[str, Any] = {"degree": graph.degree.reshape(geometry.grid)}
        found = cut(graph)
        if found is None:
            return nothing(geometry, NO_CUT, **maps)
        seed = found.peak
        if not found.side[seed]:
            found = found.inverted()
        side = found.side.reshape(geometry.grid)
        maps |= {"eigenvector": found.vector.reshape(geometry.grid), "bipartition": side}
        cells = component_at(side, seed)[None]
        return Found(
            cells,
            boxes_of(cells, geometry),
            loaded_masks(cells, geometry),
            masks=torch_nearest(cells, geometry.original_size) if self.form is TokenCutForm.MASK else None,
            maps=maps,
            facts={"seed": seed, **found.facts},
        )
