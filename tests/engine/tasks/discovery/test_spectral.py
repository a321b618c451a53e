from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_discovery import make_scene, two_sides
from numpy.typing import NDArray

from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.discovery.discovering import boxes_on_original
from facetrt.engine.tasks.discovery.grid import boxes_of
from facetrt.engine.tasks.discovery.spectral import (
    Spectral,
    background_first,
    colours_of,
    regions_by_gap,
    signed,
)
from facetrt.engine.tasks.masks import spectral_crf
from facetrt.kernels.colour_affinity import colour_affinity
from facetrt.kernels.partition import partition

Golden = dict[str, NDArray[Any]]
GRID = (12, 18)


@pytest.fixture(scope="module")
def scene(objects: Golden) -> Any:
    pixels = objects["image.chelsea"]
    return make_scene(objects["struct.crop.chelsea.features"], GRID, size=(98, 147), pixels=pixels)


@pytest.mark.parametrize("weight", [0, 10])
def test_eigenvectors_and_box_are_the_published_ones(objects: Golden, scene: Any, weight: int) -> None:
    expected = "dss.struct.chelsea." + (f"color{weight}." if weight else "")
    found = Spectral(eigenvectors=6, colour_weight=weight).find(scene)
    vectors = objects[f"{expected}eigenvectors"]
    for own, vector in zip(found.maps["eigenvectors"][1:], vectors[1:], strict=True):
        np.testing.assert_allclose(own.ravel(), vector, atol=1e-4 * np.abs(vector).max())
    np.testing.assert_allclose(found.facts["eigenvalues"], objects[f"{expected}eigenvalues"], atol=1e-6)
    np.testing.assert_array_equal(boxes_on_original(found.boxes, scene.features.geometry)[0], objects[f"{expected}box"])


def test_the_mask_and_its_crf_are_the_published_ones(objects: Golden, scene: Any) -> None:
    found = Spectral(form="segmentation", eigenvectors=6).find(scene)
    np.testing.assert_array_equal(found.cells[0], objects["dss.struct.chelsea.mask_cells"])
    np.testing.assert_array_equal(found.loaded_masks[0], objects["dss.struct.chelsea.mask"])
    smooth = Spectral().smooth(objects["image.chelsea"], found.loaded_masks[0])
    assert (smooth != objects["dss.struct.chelsea.mask_crf"]).mean() < 1e-3


def test_the_crf_of_several_labels_is_the_published_one(objects: Golden) -> None:
    given, expected = (objects[f"dss.struct.chelsea.fixed4.{name}"] for name in ("crf_input", "crf"))
    smooth = spectral_crf(objects["image.chelsea"], given.astype(np.int64), 4)
    assert (smooth != expected).mean() < 2e-3


def test_colours_link_the_published_cells(objects: Golden, scene: Any) -> None:
    colours = colours_of(scene.features, GRID)
    np.testing.assert_array_equal(np.rint(255 * colours), objects["dss.struct.chelsea.color10.color_image"])
    np.testing.assert_array_equal(
        colour_affinity(colours).toarray(), objects["dss.struct.chelsea.color10.color_affinity"]
    )


def test_regions_boxes_and_their_number_are_the_published_ones(objects: Golden) -> None:
    expected = "dss.struct.chelsea.fixed4."
    segments = background_first(objects[f"{expected}clusters"].astype(np.int64))
    np.testing.assert_array_equal(segments, objects[f"{expected}segments"])
    assert regions_by_gap(objects["dss.struct.chelsea.eigenvalues"]) == objects["dss.struct.chelsea.adaptive_k"]
    for erode, dilate in ((1, 1), (2, 3), (2, 5)):
        method, geometry = Spectral(erode=erode, dilate=dilate), Geometry((96, 144), (96, 144), 8, 8)
        boxes, numbers = (objects[f"{expected}boxes_e{erode}_d{dilate}{end}"] for end in ("", "_index"))
        for number, box in zip(numbers, boxes, strict=True):
            own = boxes_of(method._opened(segments == number)[None], geometry)
            np.testing.assert_array_equal(own[0], box)


def test_clusters_are_as_tight_as_the_published_ones(objects: Golden) -> None:
    rows = objects["dss.struct.chelsea.eigenvectors"][1:].T
    labels, spread = partition(rows, 4)
    assert spread <= float(objects["dss.struct.chelsea.fixed4.inertia"]) * (1 + 1e-6)
    assert len(np.unique(labels)) == 4


@pytest.mark.parametrize("form", ["localisation", "segmentation", "regions"])
@pytest.mark.parametrize("factor", [None, 4])
def test_each_form_finds_the_object(form: str, factor: int | None) -> None:
    grid = (12, 14)
    found = Spectral(form=form, factor=factor, regions=2).find(make_scene(two_sides(grid, np.s_[4:9, 4:10]), grid))
    assert found.loaded_masks.shape[1:] == (96, 112)
    inside = np.zeros((96, 112), np.bool_)
    inside[32:72, 32:80] = True
    best = max((mask & inside).sum() / (mask | inside).sum() for mask in found.loaded_masks)
    assert best > 0.6  # clusters of a finer grid follow its interpolation at the border


def test_signs_follow_the_share_of_positive_entries() -> None:
    vectors = np.array([[1.0, 1, 1, -1], [1, 1, -1, -1], [1, 1, 1, 1]]).T
    assert signed(vectors)[:, 0].tolist() == [-1, -1, -1, 1]
    assert signed(vectors)[:, 1:].tolist() == vectors[:, 1:].tolist()


def test_too_few_cells_find_nothing() -> None:
    found = Spectral(eigenvectors=9).find(make_scene(np.ones((9, 4)), (3, 3)))
    assert found.why_empty is not None and "too few cells" in found.why_empty


def test_a_finer_grid_lies_on_what_patches_cover() -> None:
    """Not on the whole image, in whose last columns one more cell would find room."""
    rows = two_sides((12, 14), np.s_[4:9, 4:10])
    found = Spectral(factor=4).find(make_scene(rows, (12, 14), size=(96, 119)))
    assert found.maps["degree"].shape == (24, 28)
    assert found.loaded_masks.shape[1:] == (96, 119)
