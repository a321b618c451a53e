"""A tiny model and pictures for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from facetrt.benchmarks.weights import deterministic_weights as deterministic_weights  # the golden weights, too
from facetrt.engine.backends.choice import installed
from facetrt.export.export_options import ExportOptions, Facet
from facetrt.export.exporting import export_bundle
from facetrt.export.models import MODELS, ModelSpec

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"

GOLDEN_FACETS = "key@0,query@5,key@9,value@9,key@11,query@11,token@11"

TINY = ModelSpec(
    name="tiny", description="untrained, for tests", patch=8, dim=48, heads=3, depth=3, trained_grid=6,
    match_facet="key@1", cosegment_facet="key@2", propagate_facet="normed@2", default_facets=("key@1", "key@2"), url="http://127.0.0.1:9/tiny.pth",
)  # fmt: skip


def require_openvino() -> None:
    """Skip the test, or the module, where openvino is not installed; it is not imported (see ``import_openvino``)."""
    if not installed("openvino"):
        pytest.skip("the extra openvino is not installed", allow_module_level=True)


def facets(text: str) -> tuple[Facet, ...]:
    return tuple(Facet.parse(part) for part in text.split(","))


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth colourful image with a bright disc, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (7, 7, 3), np.uint8)
    image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    y, x = np.indices((height, width))
    disc = (y - height * 0.5) ** 2 + (x - width * 0.5) ** 2 < (0.25 * min(height, width)) ** 2
    image[disc] = (230, 60, 40)
    return image


@contextmanager
def registered(spec: ModelSpec) -> Iterator[ModelSpec]:
    """Let exports find a model by its name; what the name meant before holds again afterwards."""
    before = MODELS.get(spec.name)
    MODELS[spec.name] = spec
    try:
        yield spec
    finally:
        if before is None:
            del MODELS[spec.name]
        else:
            MODELS[spec.name] = before


def export_tiny(weights: Path, out: Path, **options: Any) -> Path:
    export_bundle("tiny", out, ExportOptions(**options), weights=weights)
    return out
