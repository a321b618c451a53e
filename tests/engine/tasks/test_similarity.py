from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import photo
from numpy.typing import NDArray

from facetrt.engine import Engine, Features, Geometry, InputError, Provenance, SaliencyMode
from facetrt.engine.drawing.inspection import heat, on_pixels, similarity_figure
from facetrt.engine.samples import sample_images
from facetrt.engine.tasks.similarity import SimilarityMap, similarity_map
from facetrt.kernels.best_buddies import cosine_similarity

FACET = "key@1"
NOBODY = Provenance("patches", "", "none", "cpu", "fp32")


@pytest.fixture(scope="module")
def pair(tiny_engine: Engine) -> tuple[Features, Features]:
    a, b = tiny_engine.encode([photo(61, 47, 1), photo(52, 83, 2)], load_size=None)
    return a, b


def patches(pixels: NDArray[np.uint8], scale: float, patch: int = 8, stride: int = 4) -> Features:
    """Features whose descriptors are the patches themselves: what they resemble is known exactly."""
    height, width = pixels.shape[:2]
    geometry = Geometry((round(height * scale), round(width * scale)), (height, width), patch, stride)
    windows = np.lib.stride_tricks.sliding_window_view(pixels.astype(np.float32), (patch, patch), axis=(0, 1))
    rows = windows[::stride, ::stride].reshape(geometry.grid[0] * geometry.grid[1], -1) - 128
    tokens = np.concatenate([rows.mean(axis=0, keepdims=True), rows])
    return Features({FACET: tokens}, None, SaliencyMode.FULL, geometry, pixels, "patches", NOBODY)


@pytest.mark.parametrize("hierarchy", [0, 1, 2])
def test_equals_a_row_of_the_whole_matrix(pair: tuple[Features, Features], hierarchy: int) -> None:
    a, b = pair
    expected = cosine_similarity(a.map(FACET), b.map(FACET), hierarchy)
    for cell in (0, 17, a[FACET].shape[0] - 1):
        x, y = a.geometry.points_xy(np.array([cell]))[0]
        found = similarity_map(a, b, facet=FACET, point_xy=(x, y), hierarchy=hierarchy, top_k=3)
        assert found.cell_a == cell and found.point_a_xy is not None
        np.testing.assert_allclose(found.point_a_xy, (x, y))
        np.testing.assert_allclose(found.values.ravel(), expected[cell], atol=2e-6)
        np.testing.assert_array_equal(found.cells, np.argsort(-found.values.ravel(), kind="stable")[:3])
        np.testing.assert_array_equal(found.similarity, np.sort(found.values.ravel())[::-1][:3])
        np.testing.assert_array_equal(found.points_xy, b.geometry.points_xy(found.cells))


def test_cls_against_all_cells(pair: tuple[Features, Features]) -> None:
    a, b = pair
    found = similarity_map(a, b, facet=FACET, cls=True)
    cls, rows = a.cls(FACET), b[FACET]
    expected = rows @ cls / (np.linalg.norm(rows, axis=1) * np.linalg.norm(cls))
    np.testing.assert_allclose(found.values.ravel(), expected, atol=1e-6)
    assert found.cell_a is None and found.point_a_xy is None and found.values.dtype == np.float32


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("size", [(96, 128), (100, 150), (70, 93), (63, 61)])  # height mod 8 of 0, 4, 6 and 7
def test_a_shifted_image_is_found_where_it_went(size: tuple[int, int], scale: float) -> None:
    scene = np.random.default_rng(0).integers(0, 256, (size[0] + 20, size[1] + 20, 3), np.uint8)
    down, right = 8, 12  # multiples of the stride
    a = patches(scene[: size[0], : size[1]], scale)
    b = patches(scene[down : down + size[0], right : right + size[1]], scale)
    height, width = a.original_size
    for x, y in [(width * 0.5, height * 0.5), (width - 1.0, height - 1.0), ((right + 6) * scale, height * 0.6)]:
        found = similarity_map(a, b, facet=FACET, point_xy=(x, y))
        assert found.point_a_xy is not None
        np.testing.assert_allclose(found.points_xy[0], found.point_a_xy - scale * np.array([right, down]), atol=1e-9)
        assert found.similarity[0] == pytest.approx(1, abs=1e-6)
        within = scale * (2 + 4 + np.array(a.geometry.unused_pixels[::-1]))  # half a stride, half a patch at the border
        assert (np.abs(found.point_a_xy - (x, y)) <= within).all()


def test_a_shifted_photograph_through_the_built_in_model() -> None:
    """End to end, at a height where the reference's rule drifts."""
    scene = np.asarray(sample_images()["chelsea"].resize((172, 116)))
    with Engine.open("builtin", threads=1) as engine:
        a, b = engine.encode([scene[:100, :148], scene[16:, 24:]], load_size=None)
    for point in [(90.0, 60.0), (60.0, 40.0), (130.0, 80.0), (41.0, 87.0)]:
        found = similarity_map(a, b, facet="key@3", point_xy=point, hierarchy=2)
        assert found.point_a_xy is not None
        np.testing.assert_array_equal(found.points_xy[0], found.point_a_xy - (24, 16))


def test_top_k_is_at_most_all_and_ties_keep_their_order(pair: tuple[Features, Features]) -> None:
    a, b = pair
    empty = replace(b, tokens={FACET: np.zeros_like(b.tokens[FACET])})
    found = similarity_map(a, empty, facet=FACET, cls=True, top_k=10_000)
    np.testing.assert_array_equal(found.cells, np.arange(b[FACET].shape[0]))
    assert not found.values.any() and heat(empty, found, 40).shape[0] == 40


def test_bad_input(pair: tuple[Features, Features]) -> None:
    a, b = pair
    with pytest.raises(InputError, match=r"image 0: point \(48, 3\) lies outside the image of 47×61"):
        similarity_map(a, b, facet=FACET, point_xy=(48, 3))
    with pytest.raises(InputError, match="expected finite pixel coordinates"):
        similarity_map(a, b, facet=FACET, point_xy=(float("nan"), 3))
    with pytest.raises(InputError, match=r"\[CLS\] has no neighbours to bin: use hierarchy 0"):
        similarity_map(a, b, facet=FACET, cls=True, hierarchy=2)
    for both in ({}, {"cls": True, "point_xy": (1.0, 1.0)}):
        with pytest.raises(InputError, match=r"either a point of the first image or its \[CLS\]"):
            similarity_map(a, b, facet=FACET, **both)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_k=0"):
        similarity_map(a, b, facet=FACET, cls=True, top_k=0)
    with pytest.raises(InputError, match=r"hierarchy=7: expected 0 \(no binning\) to 6"):
        similarity_map(a, b, facet=FACET, point_xy=(1, 1), hierarchy=7)
    with pytest.raises(InputError, match="value@9 was not exported"):
        similarity_map(a, b, facet="value@9", cls=True)
    narrow = replace(b, tokens={FACET: b.tokens[FACET][:, :10]})
    with pytest.raises(InputError, match="10 channels and the query 48"):
        similarity_map(a, narrow, facet=FACET, cls=True)
    broken = replace(b, tokens={FACET: np.full_like(b.tokens[FACET], np.inf)})
    with pytest.raises(InputError, match="NaN or infinite"):
        similarity_map(a, broken, facet=FACET, cls=True)
    with pytest.raises(InputError, match="expected the grid"):
        SimilarityMap(np.zeros((2, 2), np.float32), np.zeros(1, np.int64), 0, a.geometry, b.geometry, FACET, 0)


def test_colours_lie_at_the_cells_centres() -> None:
    geometry = Geometry((100, 150), (100, 150), 8, 4)
    for axis, used in ((0, 96), (1, 148)):  # pixels between the first and the last cell's centre, at 3.5 and beyond
        ramp = np.ascontiguousarray(np.moveaxis(np.broadcast_to(np.arange(36.0), (36, 36)), 1, axis), np.float32)
        ramp = ramp[: geometry.grid[0], : geometry.grid[1]]
        drawn = np.moveaxis(on_pixels(ramp, geometry, (100, 150)), axis, 0)[4 : used - 4]
        np.testing.assert_allclose(
            drawn, np.broadcast_to((np.arange(4, used - 4) - 3.5)[:, None] / 4, drawn.shape), atol=0.04
        )


def test_figure(pair: tuple[Features, Features]) -> None:
    a, b = pair
    for found in (
        similarity_map(a, b, facet=FACET, point_xy=(20, 30), hierarchy=2, top_k=5),
        similarity_map(a, b, facet=FACET, cls=True),
    ):
        figure = similarity_figure(a, b, found)
        assert figure.dtype == np.uint8 and figure.shape[2] == 3 and figure.shape[0] > 400
