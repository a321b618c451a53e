from __future__ import annotations

import numpy as np
import pytest

from facetrt.kernels import InputError, log_bin
from facetrt.kernels.log_bin import bin_offsets, log_bin_reference

GRIDS = [(1, 1), (1, 7), (7, 1), (2, 2), (5, 11), (13, 7), (3, 3)]


def maps(grid: tuple[int, int], channels: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*grid, channels)).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("hierarchy", [0, 1, 2, 3])
def test_equals_the_definition(grid: tuple[int, int], hierarchy: int) -> None:
    values = maps(grid)
    np.testing.assert_allclose(log_bin(values, hierarchy), log_bin_reference(values, hierarchy), atol=1e-6)


def test_order_of_bins() -> None:
    offsets = bin_offsets(2)
    assert len(offsets) == 17
    assert (
        offsets[0] == (0, -1, -1) and offsets[4] == (0, 0, 0) and offsets[9] == (1, -3, -3) and offsets[16] == (1, 3, 3)
    )
    values = maps((9, 9))
    binned = log_bin(values).reshape(9, 9, 17, 5)
    np.testing.assert_array_equal(binned[:, :, 4], values)
    np.testing.assert_allclose(binned[4, 4, 9], values[0:3, 0:3].mean(axis=(0, 1)), atol=1e-6)


def test_chosen_cells_are_rows_of_all() -> None:
    values, cells = maps((6, 8)), np.array([47, 0, 13, 13])
    np.testing.assert_array_equal(log_bin(values, cells=cells), log_bin(values)[cells])


def test_half_precision_is_computed_in_single() -> None:
    values = maps((5, 6)).astype(np.float16)
    binned = log_bin(values)
    assert binned.dtype == np.float32
    np.testing.assert_array_equal(binned, log_bin(values.astype(np.float32)))


def test_empty_grid_and_many_elements() -> None:
    assert log_bin(np.zeros((0, 4, 3), np.float32)).shape == (0, 51)
    values = maps((300, 221), channels=1)  # 66,300 cells: indices beyond half precision
    binned = log_bin(values)
    np.testing.assert_array_equal(binned[65_600, 4], values.ravel()[65_600])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.zeros((3, 4), np.float32), {}, r"shape \(3, 4\)"),
        (np.zeros((3, 4, 2), np.int64), {}, "int64"),
        (np.zeros((3, 4, 2), np.float32), {"hierarchy": 9}, "hierarchy 9"),
        (np.zeros((3, 4, 2), np.float32), {"cells": np.array([12])}, r"0\.\.11"),
    ],
)
def test_bad_input(values: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        log_bin(values, **options)
