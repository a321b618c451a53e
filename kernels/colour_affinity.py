"""Deep Spectral's second graph: cells are near where colours are, and a little where they lie.

Source: specification, deep-spectral §2.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import MissingDependencyError

NEIGHBOURS = ((20, 2.0), (10, 0.1))  # how many, and how much places weigh beside colours


def colour_affinity(colours: NDArray[np.floating]) -> Any:
    """How often cells are among each other's nearest neighbours, a SciPy sparse ``(n, n)`` float64 matrix.

    In two graphs, each link adds 1 in both directions; a cell is its own neighbour, so that the diagonal is 4.

    Args:
        colours: ``(grid_h, grid_w, 3)`` in [0, 1].

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.sparse import csr_array
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise MissingDependencyError(
            "colour affinities need scipy, which is not installed: pip install scipy"
        ) from error
    grid_h, grid_w = colours.shape[:2]
    count = grid_h * grid_w
    rows, columns = np.meshgrid(np.linspace(0, 1, grid_h), np.linspace(0, 1, grid_w), indexing="ij")
    total = csr_array((count, count), dtype=np.float64)
    for neighbours, weight in NEIGHBOURS:
        places = np.stack([columns, rows], axis=-1) * weight
        points = np.concatenate([colours, places], axis=-1).reshape(count, 5).astype(np.float64)
        found = cKDTree(points).query(points, k=range(1, min(neighbours, count) + 1))[1]
        links = csr_array(
            (np.ones(found.size), (np.repeat(np.arange(count), found.shape[1]), found.ravel())), total.shape
        )
        total = total + links + links.T
    return total.tocsr()
