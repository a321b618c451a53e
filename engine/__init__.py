"""The runtime: open a bundle, encode images, match and co-segment them. Needs neither torch nor onnx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from facetrt.kernels.lazy import show

if TYPE_CHECKING:
    from facetrt.engine.engine import Engine
    from facetrt.engine.features.collection import FeatureCollection
    from facetrt.engine.features.features import Features, Provenance, SaliencyMode
    from facetrt.engine.features.store import FeatureStore
    from facetrt.engine.images.geometry import Geometry
    from facetrt.engine.learning import learn_cosegmentation, learn_parts
    from facetrt.engine.tasks.clustering import Clustering, cluster_elbow
    from facetrt.engine.tasks.cosegmentation import Mask, Masks
    from facetrt.engine.tasks.discovery.discovering import Discovery
    from facetrt.engine.tasks.discovery.objects import Objects
    from facetrt.engine.tasks.matching import Matches
    from facetrt.engine.tasks.models import PartsModel, SegmentationModel, load_model
    from facetrt.engine.tasks.parts import PartMap, Parts
    from facetrt.engine.tasks.pca import Pca, fit_pca
    from facetrt.engine.tasks.presets import PAPER_COSEGMENT, PAPER_MATCH
    from facetrt.engine.tasks.refinement import Refinement
    from facetrt.engine.tasks.self_similarity import self_similarity, self_similarity_blocks
    from facetrt.engine.tasks.similarity import SimilarityMap, similarity_map
    from facetrt.engine.tasks.smoothing import Smoother
    from facetrt.engine.version import __version__
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

show(
    __name__,
    {
        "facetrt.engine.engine": ("Engine",),
        "facetrt.engine.features.collection": ("FeatureCollection",),
        "facetrt.engine.features.features": ("Features", "Provenance", "SaliencyMode"),
        "facetrt.engine.features.store": ("FeatureStore",),
        "facetrt.engine.images.geometry": ("Geometry",),
        "facetrt.engine.tasks.clustering": ("Clustering", "cluster_elbow"),
        "facetrt.engine.tasks.cosegmentation": ("Mask", "Masks"),
        "facetrt.engine.tasks.discovery.discovering": ("Discovery",),
        "facetrt.engine.tasks.discovery.objects": ("Objects",),
        "facetrt.engine.tasks.matching": ("Matches",),
        "facetrt.engine.learning": ("learn_cosegmentation", "learn_parts"),
        "facetrt.engine.tasks.models": ("PartsModel", "SegmentationModel", "load_model"),
        "facetrt.engine.tasks.parts": ("PartMap", "Parts"),
        "facetrt.engine.tasks.pca": ("Pca", "fit_pca"),
        "facetrt.engine.tasks.presets": ("PAPER_COSEGMENT", "PAPER_MATCH"),
        "facetrt.engine.tasks.refinement": ("Refinement",),
        "facetrt.engine.tasks.self_similarity": ("self_similarity", "self_similarity_blocks"),
        "facetrt.engine.tasks.similarity": ("SimilarityMap", "similarity_map"),
        "facetrt.engine.tasks.smoothing": ("Smoother",),
        "facetrt.engine.version": ("__version__",),
        "facetrt.engine.video.propagation": ("MaskPropagator",),
        "facetrt.engine.video.sources": ("Frame", "Source", "open_source"),
        "facetrt.engine.video.stream": ("Policy", "Stream", "StreamReport", "StreamResult"),
        "facetrt.engine.video.tracking": ("Tracker", "Tracks", "grid_points"),
        "facetrt.kernels.errors": (
            "BackendError",
            "BundleError",
            "FacetrtError",
            "InputError",
            "MissingDependencyError",
            "MissingFileError",
            "OutputError",
            "ParityError",
            "SourceError",
        ),
    },
)

__all__ = [
    "PAPER_COSEGMENT",
    "PAPER_MATCH",
    "BackendError",
    "BundleError",
    "Clustering",
    "Discovery",
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
    "Objects",
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
