from __future__ import annotations

import importlib
import tracemalloc

import numpy as np
import pytest

from facetrt.kernels import InputError, best_buddies, cosine_similarity, log_bin
from facetrt.kernels.best_buddies import best_buddies_reference

module = importlib.import_module("facetrt.kernels.best_buddies")

PAIRS = [((1, 1), (1, 1)), ((1, 1), (4, 3)), ((7, 5), (3, 11)), ((5, 5), (5, 5)), ((2, 13), (7, 2)), ((20, 2), (3, 20))]


def maps(grid: tuple[int, int], channels: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*grid, channels)).astype(np.float32)


@pytest.mark.parametrize(("grid_a", "grid_b"), PAIRS)
@pytest.mark.parametrize("hierarchy", [0, 1, 2, 3])
@pytest.mark.parametrize("tile_bytes", [1, 1000, 1 << 26])
def test_equals_the_definition(
    monkeypatch: pytest.MonkeyPatch, grid_a: tuple[int, int], grid_b: tuple[int, int], hierarchy: int, tile_bytes: int
) -> None:
    monkeypatch.setattr(module, "TILE_BYTES", tile_bytes)
    a, b = maps(grid_a, seed=1), maps(grid_b, seed=2)
    got, expected = best_buddies(a, b, hierarchy), best_buddies_reference(a, b, hierarchy)
    np.testing.assert_array_equal(got.nn_ab, expected.nn_ab)
    np.testing.assert_array_equal(got.nn_ba, expected.nn_ba)
    np.testing.assert_array_equal(got.mutual, expected.mutual)
    np.testing.assert_allclose(got.sim_ab, expected.sim_ab, atol=1e-6)
    np.testing.assert_allclose(got.sim_ba, expected.sim_ba, atol=1e-6)


@pytest.mark.parametrize("hierarchy", [0, 1, 2, 3])
def test_equals_the_cosine_of_binned_descriptors(hierarchy: int) -> None:
    """Descriptors with a common part and outliers, as encoders make them; the second map is wider than every bin."""
    a, b = maps((9, 12), 64, 3) + 3, maps((21, 19), 64, 4) + 3
    a[4, 5], b[7, 2] = 50 * a[4, 5], 50 * b[7, 2]
    long_a, long_b = (log_bin(values, hierarchy).astype(np.float64) for values in (a, b))
    direct = long_a @ long_b.T / np.linalg.norm(long_a, axis=1)[:, None] / np.linalg.norm(long_b, axis=1)
    np.testing.assert_allclose(cosine_similarity(a, b, hierarchy), direct, rtol=0, atol=1e-6)


def test_first_maximum_wins_and_zero_rows_are_harmless() -> None:
    a = np.zeros((2, 2, 3), np.float32)
    got = best_buddies(a, a, 0)
    np.testing.assert_array_equal(got.nn_ab, np.zeros(4))
    np.testing.assert_array_equal(got.sim_ab, np.zeros(4, np.float32))
    np.testing.assert_array_equal(got.mutual, [True, False, False, False])
    same = np.ones((3, 3, 2), np.float32)
    assert best_buddies(same, same, 0).nn_ba.max() == 0


@pytest.mark.parametrize("grid", [(1, 6), (2, 5), (9, 10), (13, 17)])
@pytest.mark.parametrize("channels", [3, 64, 768, 1000])
def test_equal_cells_tie_at_borders_too(grid: tuple[int, int], channels: int) -> None:
    """Even where their products differ in the last bits, by where they stand in the product."""
    same = np.broadcast_to(maps((1, 1), channels), (*grid, channels))
    got = best_buddies(same, same)
    np.testing.assert_array_equal(got.nn_ab, np.zeros(grid[0] * grid[1]))
    np.testing.assert_array_equal(got.nn_ba, np.zeros(grid[0] * grid[1]))


def test_memory_grows_with_a_grid_row_not_with_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_BYTES", 1 << 16)
    a, b = maps((256, 8), 2), maps((256, 8), 2, 1)
    matrix = 4 * 2048 * 2048
    tracemalloc.start()
    best_buddies(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < matrix / 4, f"{peak >> 10} KiB at once, the whole matrix has {matrix >> 10}"


def test_a_map_is_its_own_best_buddy() -> None:
    a = maps((6, 7))
    got = best_buddies(a, a)
    np.testing.assert_array_equal(got.nn_ab, np.arange(42))
    assert got.mutual.all()


def test_empty_maps() -> None:
    empty, full = np.zeros((0, 3, 4), np.float32), maps((2, 3), 4)
    got = best_buddies(full, empty)
    np.testing.assert_array_equal(got.nn_ab, np.full(6, -1))
    assert got.nn_ba.shape == (0,) and not got.mutual.any() and np.isnan(got.sim_ab).all()
    assert best_buddies(empty, full).mutual.shape == (0,)


def test_half_precision_input() -> None:
    a, b = maps((4, 5)).astype(np.float16), maps((5, 4), seed=1).astype(np.float16)
    got, expected = best_buddies(a, b), best_buddies(a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_array_equal(got.nn_ab, expected.nn_ab)


def test_more_cells_than_half_precision_can_count() -> None:
    a, b = maps((1, 66_000), 2, 5), maps((1, 2), 2, 6)
    got = best_buddies(a, b, 0)
    unit = a.reshape(-1, 2) / np.linalg.norm(a.reshape(-1, 2), axis=1, keepdims=True)
    expected = (unit @ b.reshape(-1, 2).T).argmax(axis=0)
    assert (
        np.abs((unit @ b.reshape(-1, 2).T)[got.nn_ba, [0, 1]] - (unit @ b.reshape(-1, 2).T)[expected, [0, 1]]) < 1e-5
    ).all()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((2, 2, 3), np.float32), np.zeros((2, 2, 4), np.float32), "3 channels and map_b 4"),
        (np.full((2, 2, 3), np.nan, np.float32), np.zeros((2, 2, 3), np.float32), "NaN"),
        (np.zeros((4, 3), np.float32), np.zeros((2, 2, 3), np.float32), r"shape \(4, 3\)"),
    ],
)
def test_bad_input(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        best_buddies(a, b)
