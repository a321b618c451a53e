from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_discovery import make_scene, two_sides
from numpy.typing import NDArray

from facetrt.engine.images.fitting import Fit
from facetrt.engine.tasks.discovery.discovering import boxes_on_original
from facetrt.engine.tasks.discovery.tokencut import TokenCut
from facetrt.kernels.affinity import threshold_graph
from facetrt.kernels.errors import InputError

Golden = dict[str, NDArray[Any]]


@pytest.mark.parametrize(
    ("net", "patch", "variant", "options"),
    [
        ("struct", 8, "", {}),
        ("struct", 8, "tau05.", {"tau": 0.05}),
        ("struct", 8, "weighted.", {"weighted": True}),
        ("dino_vits16", 16, "", {}),
    ],
)
def test_boxes_are_the_published_ones(
    objects: Golden, net: str, patch: int, variant: str, options: dict[str, Any]
) -> None:
    rows = objects["struct.pad.chelsea.features" if net == "struct" else f"pad.{net}.chelsea.keys"]
    expected = f"tokencut.pad.{net}.chelsea.{variant}"
    vector = objects[f"{expected}eigenvector"]
    scene = make_scene(rows, vector.shape, patch=patch, original=(98, 147), padded=True)
    found = TokenCut(**options).find(scene)
    own = found.maps["eigenvector"]
    np.testing.assert_allclose(own / np.linalg.norm(own), vector / np.linalg.norm(vector), atol=1e-6)
    np.testing.assert_allclose(found.maps["degree"].ravel(), objects[f"{expected}degree"].ravel(), rtol=1e-5)
    np.testing.assert_array_equal(found.maps["bipartition"], objects[f"{expected}bipartition"])
    assert found.facts["seed"] == objects[f"{expected}seed"]
    np.testing.assert_array_equal(found.cells[0], objects[f"{expected}mask"].reshape(vector.shape))
    np.testing.assert_array_equal(boxes_on_original(found.boxes, scene.features.geometry)[0], objects[f"{expected}box"])


def test_edges_are_the_published_ones(objects: Golden) -> None:
    graph = threshold_graph(objects["struct.pad.chelsea.features"], 0.2)
    bits = objects["tokencut.pad.struct.chelsea.affinity_bits"]
    expected = np.unpackbits(bits.ravel())[: len(graph) ** 2].reshape(len(graph), -1)
    np.testing.assert_array_equal(graph.strong(), expected)


def test_masks_reach_the_original_size_by_the_published_rule(objects: Golden) -> None:
    expected = "tokencut.resize.struct.chelsea."
    cells = objects[f"{expected}mask_cells"]
    found = TokenCut(form="mask").find(
        make_scene(objects["struct.resize.chelsea.features"], cells.shape, original=(98, 147))
    )
    np.testing.assert_array_equal(found.maps["bipartition"], cells)
    assert found.masks is not None
    np.testing.assert_array_equal(found.masks[0], objects[f"{expected}mask"])


def test_the_forms_fit_images_as_published() -> None:
    assert (TokenCut().fit, TokenCut(form="mask").fit) == (Fit.PAD, Fit.RESIZE)


@pytest.mark.parametrize("stride", [8, 4])
def test_the_object_is_found_whether_patches_overlap_or_not(stride: int) -> None:
    grid = (12, 14)
    found = TokenCut().find(make_scene(two_sides(grid, np.s_[3:8, 4:10]), grid, stride=stride))
    assert found.cells[0, 3:8, 4:10].all() and found.cells.sum() == 30
    margin = (8 - stride) / 2
    expected = [4 * stride + margin, 3 * stride + margin, 10 * stride + margin, 8 * stride + margin]
    assert found.boxes[0].tolist() == expected
    left, top, right, bottom = (round(side) for side in expected)
    assert found.loaded_masks[0, top:bottom, left:right].all()
    assert found.loaded_masks.sum() == (bottom - top) * (right - left)


@pytest.mark.parametrize("rows", [np.ones((12, 4)), np.eye(12), np.ones((1, 4))])
def test_without_a_cut_nothing_is_found(rows: NDArray[Any]) -> None:
    grid = (3, 4) if len(rows) == 12 else (1, 1)
    found = TokenCut().find(make_scene(rows, grid))
    assert found.why_empty is not None and "nothing to be cut" in found.why_empty
    assert found.cells.shape == (0, *grid)


def test_damaged_descriptors_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        TokenCut().find(make_scene(np.full((12, 4), np.nan), (3, 4)))
    with pytest.raises(InputError, match="tau=2"):
        TokenCut(tau=2)
