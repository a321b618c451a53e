"""Operations on descriptor maps, each with a NumPy reference and a fast implementation behind one signature."""

from facetrt.kernels.best_buddies import BestBuddies, best_buddies, cosine_similarity
from facetrt.kernels.dense_crf import dense_crf
from facetrt.kernels.errors import FacetrtError, InputError
from facetrt.kernels.kmeans import Assignment, KMeans, assign, diverse_clusters, kmeans
from facetrt.kernels.log_bin import log_bin
from facetrt.kernels.propagate import propagate
from facetrt.kernels.vote import Votes, vote

__all__ = [
    "Assignment",
    "BestBuddies",
    "FacetrtError",
    "InputError",
    "KMeans",
    "Votes",
    "assign",
    "best_buddies",
    "cosine_similarity",
    "dense_crf",
    "diverse_clusters",
    "kmeans",
    "log_bin",
    "propagate",
    "vote",
]
