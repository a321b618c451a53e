"""The runtime: open a bundle, encode images, match and co-segment them. Needs neither torch nor onnx."""

from facetrt.engine.collection import FeatureCollection
from facetrt.engine.cosegmentation import Clustering, Mask, Masks, cluster_elbow
from facetrt.engine.engine import Engine
from facetrt.engine.features import Features, Provenance, SaliencyMode
from facetrt.engine.geometry import Geometry
from facetrt.engine.matching import Matches
from facetrt.engine.models import PartsModel, SegmentationModel, learn_cosegmentation, learn_parts, load_model
from facetrt.engine.parts import PartMap, Parts
from facetrt.engine.pca import Pca, fit_pca
from facetrt.engine.presets import PAPER_COSEGMENT, PAPER_MATCH
from facetrt.engine.propagation import MaskPropagator
from facetrt.engine.refinement import Refinement
from facetrt.engine.self_similarity import self_similarity, self_similarity_blocks
from facetrt.engine.similarity import SimilarityMap, similarity_map
from facetrt.engine.smoothing import Smoother
from facetrt.engine.sources import Frame, Source, open_source
from facetrt.engine.store import FeatureStore
from facetrt.engine.stream import Policy, Stream, StreamReport, StreamResult
from facetrt.engine.tracking import Tracker, Tracks, grid_points
from facetrt.engine.version import installed_version
from facetrt.kernels.errors import (
    BackendError,
    BundleError,
    FacetrtError,
    InputError,
    MissingDependencyError,
    MissingFileError,
    OutputError,
    ParityError,
    SourceError,
)

__version__ = installed_version()

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
    "Frame",
    "Geometry",
    "InputError",
    "Mask",
    "MaskPropagator",
    "Masks",
    "Matches",
    "MissingDependencyError",
    "MissingFileError",
    "OutputError",
    "ParityError",
    "PartMap",
    "Parts",
    "PartsModel",
    "Pca",
    "Policy",
    "Provenance",
    "Refinement",
    "SaliencyMode",
    "SegmentationModel",
    "SimilarityMap",
    "Smoother",
    "Source",
    "SourceError",
    "Stream",
    "StreamReport",
    "StreamResult",
    "Tracker",
    "Tracks",
    "__version__",
    "cluster_elbow",
    "fit_pca",
    "grid_points",
    "learn_cosegmentation",
    "learn_parts",
    "load_model",
    "open_source",
    "self_similarity",
    "self_similarity_blocks",
    "similarity_map",
]
