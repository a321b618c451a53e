"""A stand-in for the engine: descriptors are the mean colours around each cell, saliency is brightness."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facetrt.engine.bundle.manifest import (
    Architecture,
    Checkpoint,
    FileEntry,
    Manifest,
    Normalisation,
    ParityReport,
    Ranges,
)
from facetrt.engine.features.features import Features, Provenance, SaliencyMode
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import load_image
from facetrt.engine.tasks.cosegmentation import CosegmentOptions, HostImages, Masks, cosegment_images
from facetrt.engine.tasks.parts import Parts, PartsOptions, segment_parts_features
from facetrt.engine.tasks.refinement import Refinement

PATCH, STRIDE = 8, 4


class StubEngine:
    """What evaluations use of an engine, without a model. ``fail_after`` images, encoding is interrupted."""

    backend, precision = "stub", "fp32"

    def __init__(self, model: str = "stub", fail_after: int | None = None) -> None:
        self.manifest = Manifest(
            schema=1,
            model=model,
            description="mean colours",
            checkpoint=Checkpoint("none", "0" * 64),
            architecture=Architecture(dim=7, depth=12, heads=1, patch=PATCH, trained_grid=1),
            stride=STRIDE,
            facets=["key@9", "token@9"],
            saliency_heads=[0],
            normalisation=Normalisation([0.0] * 3, [1.0] * 3),
            size=None,
            precision="fp32",
            opset=18,
            defaults={"match": "key@9", "cosegment": "key@9", "propagate": "key@9"},
            parity=ParityReport([], {}),
            precisions={},
            ranges=Ranges([], []),
            tools={},
            files={"encoder.onnx": FileEntry(1, model)},
        )
        self.encoded: list[str] = []
        self.strides: list[int | None] = []
        self.fail_after = fail_after

    def __enter__(self) -> StubEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def encode(self, images: Any, **options: Any) -> list[Features]:
        return list(self.encode_iter(images, **options))

    def encode_iter(
        self, images: Any, *, load_size: Any = 224, saliency: str = "full", stride: int | None = None
    ) -> Iterator[Features]:
        self.strides.append(stride)
        for image in images:
            if self.fail_after is not None and len(self.encoded) >= self.fail_after:
                raise KeyboardInterrupt
            loaded = load_image(image, load_size)
            self.encoded.append(loaded.name)
            yield self._features(loaded, SaliencyMode(saliency), stride or STRIDE)

    def cosegment(self, features: list[Features], *, facet: str, refine: str, **options: Any) -> Masks:
        chosen = CosegmentOptions(facet=facet, refine=Refinement(refine), **options)
        return cosegment_images(HostImages(features, facet, chosen.hierarchy), chosen)

    def segment_parts(self, features: list[Features], *, facet: str, refine: str, **options: Any) -> Parts:
        return segment_parts_features(features, PartsOptions(facet=facet, refine=Refinement(refine), **options))

    def _features(self, loaded: Any, mode: SaliencyMode, stride: int) -> Features:
        geometry = Geometry(loaded.original_size, loaded.image_size, PATCH, stride)
        colours = cell_colours(loaded.pixels / 255, geometry.grid, stride)
        rows = np.concatenate([np.zeros((1, 4)), colours.reshape(-1, 4)]).astype(np.float32)
        return Features(
            tokens={"key@9": rows, "token@9": rows},
            attention=colours[..., :3].mean(axis=2).astype(np.float32),
            saliency_mode=mode,
            geometry=geometry,
            pixels=loaded.pixels,
            name=loaded.name,
            provenance=Provenance(self.manifest.model, self.manifest.model, "stub", "cpu", "fp32"),
        )


def cell_colours(pixels: np.ndarray, grid: tuple[int, int], stride: int = STRIDE) -> np.ndarray:
    """Mean colour of each cell's patch and a constant, ``(grid_h, grid_w, 4)``."""
    cells = np.ones((*grid, 4))
    for y in range(grid[0]):
        for x in range(grid[1]):
            cells[y, x, :3] = pixels[stride * y :, stride * x :][:PATCH, :PATCH].mean(axis=(0, 1)) - 0.5
    return cells


def save_picture(path: Path, pixels: np.ndarray) -> Path:
    """A uint8 array as a picture file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def make_engine() -> type[StubEngine]:
    return StubEngine


@pytest.fixture
def save() -> Any:
    return save_picture


@pytest.fixture
def shared_eval() -> Path:
    """The data subsets that lie beside the repository; absent elsewhere."""
    folder = Path(__file__).parents[3].parent / "shared" / "eval"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the trivial baselines on real data are not checked")
    return folder


@pytest.fixture(autouse=True)
def one_faiss_thread() -> Iterator[None]:
    """Clusterings here are tiny: several threads only wait for each other, for seconds on a busy machine."""
    faiss = pytest.importorskip("faiss", reason="co-segmentation needs the extra 'cpu' or 'gpu'")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)
