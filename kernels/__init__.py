"""Operations on descriptor maps, each with a NumPy reference and a fast implementation behind one signature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from facetrt.kernels.lazy import show

if TYPE_CHECKING:
    from facetrt.kernels.affinity import spectral_graph, threshold_graph, weighted_graph
    from facetrt.kernels.best_buddies import BestBuddies, best_buddies, cosine_similarity
    from facetrt.kernels.bilateral import BilateralGrid, Scales
    from facetrt.kernels.colour_affinity import colour_affinity
    from facetrt.kernels.components import connected_components
    from facetrt.kernels.dense_crf import dense_crf
    from facetrt.kernels.eigenvectors import Eigenvectors, smallest_eigenvectors
    from facetrt.kernels.errors import FacetrtError, InputError
    from facetrt.kernels.kmeans import Assignment, KMeans, assign, diverse_clusters, kmeans
    from facetrt.kernels.log_bin import log_bin
    from facetrt.kernels.propagate import propagate
    from facetrt.kernels.vote import Votes, vote

show(
    __name__,
    {
        "facetrt.kernels.affinity": ("spectral_graph", "threshold_graph", "weighted_graph"),
        "facetrt.kernels.best_buddies": ("BestBuddies", "best_buddies", "cosine_similarity"),
        "facetrt.kernels.bilateral": ("BilateralGrid", "Scales"),
        "facetrt.kernels.colour_affinity": ("colour_affinity",),
        "facetrt.kernels.components": ("connected_components",),
        "facetrt.kernels.dense_crf": ("dense_crf",),
        "facetrt.kernels.eigenvectors": ("Eigenvectors", "smallest_eigenvectors"),
        "facetrt.kernels.errors": ("FacetrtError", "InputError"),
        "facetrt.kernels.kmeans": ("Assignment", "KMeans", "assign", "diverse_clusters", "kmeans"),
        "facetrt.kernels.log_bin": ("log_bin",),
        "facetrt.kernels.propagate": ("propagate",),
        "facetrt.kernels.vote": ("Votes", "vote"),
    },
)

__all__ = [
    "Assignment",
    "BestBuddies",
    "BilateralGrid",
    "Eigenvectors",
    "FacetrtError",
    "InputError",
    "KMeans",
    "Scales",
    "Votes",
    "assign",
    "best_buddies",
    "colour_affinity",
    "connected_components",
    "cosine_similarity",
    "dense_crf",
    "diverse_clusters",
    "kmeans",
    "log_bin",
    "propagate",
    "smallest_eigenvectors",
    "spectral_graph",
    "threshold_graph",
    "vote",
    "weighted_graph",
]
