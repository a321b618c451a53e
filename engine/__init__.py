"""The runtime: open a bundle, encode images, match and co-segment them. Needs neither torch nor onnx."""

from facetrt.engine.collection import FeatureCollection
from facetrt.engine.cosegmentation import Clustering, Mask, Masks, cluster_elbow
from facetrt.engine.engine import Engine
from facetrt.engine.features import Features, Provenance, SaliencyMode
from facetrt.engine.geometry import Geometry
from facetrt.engine.matching import Matches
from facetrt.engine.parts import PartMap, Parts
from facetrt.engine.pca import Pca, fit_pca
from facetrt.engine.presets import PAPER_COSEGMENT, PAPER_MATCH
from facetrt.engine.refinement import Refinement
from facetrt.engine.self_similarity import self_similarity, self_similarity_blocks
from facetrt.engine.similarity import SimilarityMap, similarity_map
from facetrt.engine.store import FeatureStore
from facetrt.kernels.errors import (
    BackendError,
    BundleError,
    FacetrtError,
    InputError,
    MissingDependencyError,
    MissingFileError,
    OutputError,
    ParityError,
)

__all__ = [
    "PAPER_COSEGMENT",
    "PAPER_MATCH",
    "BackendError",
    "BundleError",
    "Clustering",
    "Engine",
    "FacetrtError",
    "FeatureCollection",
    "FeatureStore",
    "Features",
    "Geometry",
    "InputError",
    "Mask",
    "Masks",
    "Matches",
    "MissingDependencyError",
    "MissingFileError",
    "OutputError",
    "ParityError",
    "PartMap",
    "Parts",
    "Pca",
    "Provenance",
    "Refinement",
    "SaliencyMode",
    "SimilarityMap",
    "cluster_elbow",
    "fit_pca",
    "self_similarity",
    "self_similarity_blocks",
    "similarity_map",
]
