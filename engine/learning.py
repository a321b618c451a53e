"""Learning a model from a sample of images or frames, with an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.tasks.cosegmentation import CosegmentOptions
from facetrt.engine.tasks.models import PartsModel, SegmentationModel, parts_model, segmentation_model
from facetrt.engine.tasks.parts import PartsOptions
from facetrt.engine.tasks.refinement import Refinement


def learn_cosegmentation(
    engine: Engine, features: Sequence[Features], *, facet: str | None = None, **options: Any
) -> SegmentationModel:
    """Co-segment a sample of images or frames, and keep what is needed to go on with others.

    Args:
        features: at least two, from :meth:`Engine.encode`, a stream, a collection or a store.
        options: those of :class:`CosegmentOptions` but ``refine``.

    Raises:
        InputError: as :meth:`Engine.cosegment`, or nothing in the images is salient.
    """
    chosen = CosegmentOptions(_facet(engine, facet), refine=Refinement.NONE, **options)
    return segmentation_model(engine.cosegment(features, **asdict(chosen)), features, chosen)


def learn_parts(
    engine: Engine, features: Sequence[Features], *, facet: str | None = None, **options: Any
) -> PartsModel:
    """Like :func:`learn_cosegmentation` for parts, from at least one image; options are of :class:`PartsOptions`."""
    chosen = PartsOptions(_facet(engine, facet), refine=Refinement.NONE, **options)
    return parts_model(engine.segment_parts(features, **asdict(chosen)), features, chosen)


def _facet(engine: Engine, facet: str | None) -> str:
    return engine.manifest.default_facet("cosegment") if facet is None else facet
