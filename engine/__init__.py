"""The runtime: open a bundle, encode images, match and co-segment them. Needs neither torch nor onnx."""

from facetrt.engine.engine import Engine
from facetrt.engine.features.collection import FeatureCollection
from facetrt.engine.features.features import Features, Provenance, SaliencyMode
from facetrt.engine.features.store import FeatureStore
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.cosegmentation import Clustering, Mask, Masks, cluster_elbow
from facetrt.engine.tasks.matching import Matches
from facetrt.engine.tasks.models import PartsModel, SegmentationModel, learn_cosegmentation, learn_parts, load_model
from facetrt.engine.tasks.parts import PartMap, Parts
from facetrt.engine.tasks.pca import Pca, fit_pca
from facetrt.engine.tasks.presets import PAPER_COSEGMENT, PAPER_MATCH
from facetrt.engine.tasks.refinement import Refinement
from facetrt.engine.tasks.self_similarity import self_similarity, self_similarity_blocks
from facetrt.engine.tasks.similarity import SimilarityMap, similarity_map
from facetrt.engine.tasks.smoothing import Smoother
from facetrt.engine.version import installed_version
from facetrt.engine.video.propagation import MaskPropagator
from facetrt.engine.video.sources import Frame, Source, open_source
from facetrt.engine.video.stream import Policy, Stream, StreamReport, StreamResult
from facetrt.engine.video.tracking import Tracker, Tracks, grid_points
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
