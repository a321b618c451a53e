"""The fast bilateral solver, step by step as published."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.engine.tasks.masks import bilateral_mask, largest_beside_background
from facetrt.kernels.bilateral import BilateralGrid, Scales, luma_chroma
from facetrt.kernels.errors import InputError

Golden = dict[str, NDArray[Any]]
EXPECTED = "tokencut.resize.struct.chelsea."


@pytest.fixture(scope="module")
def grid(objects: Golden) -> BilateralGrid:
    return BilateralGrid.of(objects["image.chelsea"])


def test_vertices_and_their_balance_are_the_published_ones(objects: Golden, grid: BilateralGrid) -> None:
    np.testing.assert_array_equal(grid.vertices, objects[f"{EXPECTED}bs.pixel_vertex"].ravel())
    np.testing.assert_allclose(grid.scale, objects[f"{EXPECTED}bs.n"], rtol=1e-5)
    np.testing.assert_allclose(grid.mass, objects[f"{EXPECTED}bs.m"], rtol=1e-5)


def test_the_soft_and_the_binary_result_are_the_published_ones(objects: Golden, grid: BilateralGrid) -> None:
    soft = grid.solve(objects[f"{EXPECTED}mask"])
    np.testing.assert_allclose(soft, objects[f"{EXPECTED}bs.soft"], atol=1e-6)
    np.testing.assert_array_equal(largest_beside_background(soft > 0.5), objects[f"{EXPECTED}bs.binary"])


def test_colours_are_rounded_once() -> None:
    """Against sums of whole numbers, which are exact: what a fused multiply-add gives."""
    from fractions import Fraction

    weights = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3), np.uint8)
    found = luma_chroma(pixels)
    for pixel, colours in zip(pixels.tolist(), found, strict=True):
        for (r, g, b), offset, colour in zip(weights, (0, 128, 128), colours, strict=True):
            total = float(pixel[0] * r)
            for level, weight in ((pixel[1], g), (pixel[2], b)):
                total = float(level * Fraction(weight) + Fraction(total))
            assert colour == total + offset


def test_a_mask_moves_to_the_edge_of_its_colour() -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[16:32, 20:44] = 200
    mask = np.zeros((48, 64), np.bool_)
    mask[18:30, 24:48] = True
    refined, soft = bilateral_mask(pixels, mask)
    assert refined[20, 40] and not refined[20, 46]
    assert soft.min() >= 0 and soft.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (5, 9)])
def test_pictures_of_one_colour_keep_the_mean(size: tuple[int, int]) -> None:
    mask = np.zeros(size, np.bool_)
    mask[0, 0] = True
    soft = BilateralGrid.of(np.full((*size, 3), 90, np.uint8)).solve(mask)
    np.testing.assert_allclose(soft, mask.mean(), atol=1e-9)


def test_what_does_not_fit_is_refused(grid: BilateralGrid) -> None:
    with pytest.raises(InputError, match=r"expected finite numbers of shape \(98, 147\)"):
        grid.solve(np.zeros((3, 3)))
    with pytest.raises(InputError, match="expected finite numbers"):
        grid.solve(np.full((98, 147), np.nan))
    with pytest.raises(InputError, match="colour=0"):
        Scales(colour=0)
    with pytest.raises(InputError, match="uint8"):
        BilateralGrid.of(np.zeros((4, 4, 3)))  # type: ignore[arg-type]
