from __future__ import annotations

import numpy as np
import pytest

from facetrt.engine import Geometry, InputError
from facetrt.engine.bundle.positional import Cells, positional_table
from facetrt.engine.images.geometry import grid_size


@pytest.mark.parametrize(
    ("size", "stride", "grid"),
    [((224, 224), 4, (55, 55)), ((224, 224), 8, (28, 28)), ((70, 93), 4, (16, 22)), ((228, 8), 4, (56, 1))],
)
def test_grids_of_the_specification(size: tuple[int, int], stride: int, grid: tuple[int, int]) -> None:
    assert grid_size(size, 8, stride) == grid


def test_smaller_than_a_patch() -> None:
    with pytest.raises(InputError, match="smaller than one patch of 8×8"):
        grid_size((7, 100), 8, 4)


def test_points_are_cell_centres() -> None:
    geometry = Geometry((200, 300), (100, 150), 8, 4)
    assert geometry.grid == (24, 36) and geometry.unused_pixels == (0, 2)
    cells = np.array([0, 1, 36, 37])
    np.testing.assert_array_equal(geometry.loaded_points_xy(cells), [[4, 4], [8, 4], [4, 8], [8, 8]])
    np.testing.assert_array_equal(geometry.points_xy(cells), [[8, 8], [16, 8], [8, 16], [16, 16]])


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("size", [(100, 150), (61, 47)])
def test_cells_and_points_are_inverse(stride: int, size: tuple[int, int]) -> None:
    geometry = Geometry((317, 211), size, 8, stride)
    cells = np.arange(geometry.grid[0] * geometry.grid[1])
    np.testing.assert_array_equal(geometry.cells_at(geometry.points_xy(cells)), cells)


def test_points_at_the_border_and_outside() -> None:
    geometry = Geometry((100, 150), (100, 150), 8, 4)
    corners = geometry.cells_at(np.array([[0.0, 0.0], [150.0, 100.0]]))
    np.testing.assert_array_equal(corners, [0, 24 * 36 - 1])
    with pytest.raises(InputError, match=r"point \(151, 3\) lies outside"):
        geometry.cells_at(np.array([[151.0, 3.0]]))


def test_positional_table_equals_torch() -> None:
    import torch

    side = 6
    table = np.random.default_rng(0).standard_normal((side, side, 5)).astype(np.float32)
    square = torch.from_numpy(table).permute(2, 0, 1)[None]
    for grid in [(5, 9), (1, 1), (13, 6), (6, 6)]:
        scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        expected = torch.nn.functional.interpolate(
            square, scale_factor=scale, mode="bicubic", recompute_scale_factor=False
        )[0]
        got = positional_table(table, Cells((8 * grid[0], 8 * grid[1] + 1), 8, 8))
        np.testing.assert_allclose(got, expected.permute(1, 2, 0).numpy(), atol=5e-6)


def test_positional_table_is_untouched_for_a_square_image_with_the_trained_count() -> None:
    table = np.random.default_rng(0).standard_normal((6, 6, 2)).astype(np.float32)
    assert positional_table(table, Cells((48, 48), 8, 8)) is table
    assert not np.allclose(positional_table(table, Cells((48, 50), 8, 8)), table)
