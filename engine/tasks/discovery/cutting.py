"""The cut that TokenCut and MaskCut share: which side of the second eigenvector a cell is on.

Source: specification, tokencut "Graph cut" and cutler-maskcut step 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.tasks.discovery.objects import Bools
from facetrt.kernels.affinity import Graph, ThresholdGraph
from facetrt.kernels.eigenvectors import Eigenvectors, smallest_eigenvectors

ROUNDING = 1e-9  # entries of an eigenvector that are closer, in units of the largest, are equal, and the first one wins
NO_CUT = "has nothing to be cut from: its cells are all alike, or all unlike"


@dataclass(frozen=True)
class Cut:
    """The second eigenvector of a graph, and the partition at its mean.

    Attributes:
        vector: ``(n,)`` float64.
        side: ``(n,)`` bool, where the vector exceeds its mean.
        solved: how it was found.
    """

    vector: NDArray[np.float64]
    side: Bools
    solved: Eigenvectors = field(repr=False)

    def inverted(self) -> Cut:
        """The other side, the vector negated."""
        return replace(self, vector=-self.vector, side=~self.side)

    def negated(self) -> Cut:
        """The same cut by the negated vector, whose entries at the mean are on neither side."""
        return replace(self, vector=-self.vector, side=-self.vector > -self.vector.mean())

    @property
    def peak(self) -> int:
        """The cell with the largest entry, of either sign."""
        return first_largest(np.abs(self.vector))

    @property
    def facts(self) -> dict[str, Any]:
        """What a result records of the solver."""
        solved = self.solved
        return {
            "eigenvalue": float(solved.values[1]),
            "gap": solved.gap,
            "residual": solved.residual,
            "solver": solved.solver,
        }


def cut(graph: Graph, start: NDArray[np.float64] | None = None) -> Cut | None:
    """Cut a graph in two; None where no cut is better than another: one cell, edges all strong, or all weak.

    Args:
        start: a vector that may be near the answer.
    """
    if len(graph) < 2 or (isinstance(graph, ThresholdGraph) and _uniform(graph)):
        return None
    solved = smallest_eigenvectors(graph, 2, start=start)
    vector = solved.vectors[:, 1]
    return Cut(vector, vector > vector.mean(), solved)


def first_largest(values: NDArray[np.float64]) -> int:
    """The first entry that ties with the largest."""
    return int((values >= values.max() - ROUNDING * np.abs(values).max()).argmax())


def _uniform(graph: ThresholdGraph) -> bool:
    """Whether every cell has a strong edge to all others, or to none but itself."""
    degree = graph.strong_degree
    return bool((degree == len(graph)).all() or (degree <= 1).all())
