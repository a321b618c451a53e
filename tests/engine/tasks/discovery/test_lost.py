from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_discovery import make_scene
from numpy.typing import NDArray

from facetrt.engine.tasks.discovery.discovering import boxes_on_original
from facetrt.engine.tasks.discovery.lost import Lost
from facetrt.kernels.correlation import positive_degree

Golden = dict[str, NDArray[Any]]


@pytest.mark.parametrize("k_patches", [100, 20])
@pytest.mark.parametrize(("net", "patch"), [("struct", 8), ("dino_vits16", 16)])
def test_every_step_is_the_published_one(objects: Golden, net: str, patch: int, k_patches: int) -> None:
    kind = "struct.pad.chelsea.features" if net == "struct" else f"pad.{net}.chelsea.keys"
    expected = f"lost.{net}.chelsea." + ("" if k_patches == 100 else f"k_patches{k_patches}.")
    grid = tuple(int(side) for side in objects[f"{expected}grid"])
    scene = make_scene(objects[kind], (grid[0], grid[1]), patch=patch, original=(98, 147), padded=True)
    found = Lost(k_patches=k_patches).find(scene)
    degree = found.maps["degree"].ravel()
    np.testing.assert_array_equal(degree, objects[f"{expected}degree"].ravel())
    np.testing.assert_array_equal(np.argsort(degree, kind="stable"), objects[f"{expected}order"])
    assert found.facts["seed"] == objects[f"{expected}seed"]
    assert found.facts["similar"] == len(objects[f"{expected}similar"])
    np.testing.assert_array_equal(found.maps["expansion"] > 0, objects[f"{expected}map"].reshape(grid) > 0)
    np.testing.assert_array_equal(found.cells[0], objects[f"{expected}component"].reshape(grid))
    np.testing.assert_array_equal(boxes_on_original(found.boxes, scene.features.geometry)[0], objects[f"{expected}box"])


def test_rows_of_zeros_correlate_with_nothing() -> None:
    found = Lost().find(make_scene(np.zeros((12, 4)), (3, 4)))
    assert not len(found.boxes) and found.why_empty is not None and "zero" in found.why_empty


@pytest.mark.parametrize("count", [1, 7, 130])
def test_degrees_count_positive_products(count: int) -> None:
    rows = np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32)
    products = rows.astype(np.float64) @ rows.astype(np.float64).T
    np.fill_diagonal(products, 0)
    np.testing.assert_array_equal(positive_degree(rows), (products > 0).sum(axis=1))
