"""Scenes made of rows by hand: what a method sees, without an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.bundle import builtin_path, read_manifest
from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.features.features import Features, Provenance, SaliencyMode
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.discovery.method import Scene

MANIFEST: Manifest = read_manifest(builtin_path())
NOBODY = Provenance("", "", "", "", "")


def make_features(
    tokens: Mapping[str, NDArray[Any]], geometry: Geometry, pixels: NDArray[np.uint8] | None = None
) -> Features:
    """Features with ``tokens``, [CLS] rows first; grey pixels with some detail if none are given."""
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 255, (*geometry.image_size, 3), np.uint8)
    given = {facet: np.asarray(rows, np.float32) for facet, rows in tokens.items()}
    return Features(given, None, SaliencyMode.FULL, geometry, pixels, "picture", NOBODY)


def make_scene(
    rows: NDArray[Any],
    grid: tuple[int, int],
    *,
    patch: int = 8,
    stride: int | None = None,
    original: tuple[int, int] | None = None,
    pixels: NDArray[np.uint8] | None = None,
    padded: bool = False,
    size: tuple[int, int] | None = None,
) -> Scene:
    """A scene of ``rows (cells, C)``; an ``original`` that is smaller was ``padded``, or the image was resized."""
    stride = stride or patch
    covered = (grid[0] - 1) * stride + patch, (grid[1] - 1) * stride + patch
    size = size or covered
    original = original or size
    geometry = Geometry(original, size, patch, stride, original if padded else None)
    rows = np.ascontiguousarray(rows, np.float32)
    features = make_features({"key@3": np.concatenate([rows[:1] * 0, rows])}, geometry, pixels)
    return Scene(features, [rows], rows, "key@3", MANIFEST)


def two_sides(grid: tuple[int, int], inside: tuple[slice, slice], seed: int = 0) -> NDArray[np.float32]:
    """Rows of two kinds, one of them inside a rectangle of the grid, with noise."""
    random = np.random.default_rng(seed)
    kinds = random.normal(size=(2, 32))
    labels = np.zeros(grid, np.int64)
    labels[inside] = 1
    return (kinds[labels.ravel()] + 0.3 * random.normal(size=(labels.size, 32))).astype(np.float32)
