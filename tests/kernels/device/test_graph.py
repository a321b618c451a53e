"""Graphs of alike cells on a device against those of the host."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_discovery import two_sides
from numpy.typing import NDArray

from facetrt.kernels import InputError, smallest_eigenvectors, threshold_graph
from facetrt.kernels.device import graph
from facetrt.kernels.device.runtime.triton_device import TritonDevice

GRID = (7, 11)


def images(count: int = 2, grid: tuple[int, int] = GRID) -> NDArray[np.float32]:
    """``(count, cells, 32)``, of two kinds with much noise."""
    random = np.random.default_rng(5)
    sides = [two_sides(grid, (slice(1, 4 + i), slice(2, 6 + i)), i) for i in range(count)]
    return np.stack([rows + 0.5 * random.normal(size=rows.shape) for rows in sides]).astype(np.float32)


def chain(count: int, cells: int) -> NDArray[np.float32]:
    """``(count, cells, 64)``: each cell is like its neighbours in a row, so that many products are needed."""
    waves = np.random.default_rng(3).normal(size=(count, 64)), np.random.default_rng(4).uniform(0, 6, 64)
    return np.cos(np.arange(cells)[:, None] / 4 * waves[0][:, None] + waves[1]).astype(np.float32)


def test_edges_degrees_and_products_are_those_of_the_host(device: TritonDevice) -> None:
    rows = images()
    found = graph.threshold_graphs(device, device.upload(rows), 0.2, 1e-5)
    vectors = np.random.default_rng(1).normal(size=rows.shape[:2])
    products = found.product(vectors)
    for number, own in enumerate(rows):
        expected = threshold_graph(own, 0.2, 1e-5)
        assert 0.1 < expected.strong().mean() < 0.9
        np.testing.assert_array_equal(found.on_host(number).bits, expected.bits)
        np.testing.assert_array_equal(found.degree[number], expected.degree)
        np.testing.assert_allclose(products[number], expected.product(vectors[number]), rtol=1e-12, atol=1e-12)
    device.check_canaries(found.bits)


def test_cosines_at_the_threshold_are_decided_in_float64(device: TritonDevice) -> None:
    """Rows whose cosine is 0.6 but for rounding of float32, on both sides of it."""
    angles = np.arccos(0.6) + np.linspace(-2e-7, 2e-7, 12)
    rows = np.zeros((13, 16), np.float32)
    rows[0, 0] = 1
    rows[1:, 0], rows[1:, 1] = np.cos(angles), np.sin(angles)
    found = graph.threshold_graphs(device, device.upload(rows[None]), 0.6).on_host(0)
    np.testing.assert_array_equal(found.bits, threshold_graph(rows, 0.6).bits)
    assert 0 < found.strong()[0, 1:].sum() < 12


def test_cells_are_taken_out(device: TritonDevice) -> None:
    rows, cells = images(1), np.random.default_rng(2).random((1, GRID[0] * GRID[1])) < 0.3
    left = graph.threshold_graphs(device, device.upload(rows), 0.2).without(cells)
    expected = threshold_graph(rows[0], 0.2).without(cells[0])
    np.testing.assert_array_equal(left.on_host(0).bits, expected.bits)
    np.testing.assert_array_equal(left.degree[0], expected.degree)


def test_eigenvectors_are_those_of_the_host(device: TritonDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small basis the search begins anew."""
    monkeypatch.setattr(graph, "BASIS", 14)
    monkeypatch.setattr(graph, "KEPT", 5)
    rows = chain(2, 70)
    graphs = graph.threshold_graphs(device, device.upload(rows), 0.4, 1e-3)
    starts = np.sin(np.arange(70) / 50)[None].repeat(2, axis=0)
    for number, found in enumerate(graph.solve(graphs, 3, starts)):
        expected = smallest_eigenvectors(threshold_graph(rows[number], 0.4, 1e-3), 3)
        assert found.solver == "lanczos" and found.residual < 1e-8 and found.products > 16
        np.testing.assert_allclose(found.values, expected.values, atol=1e-10)
        for one, other in zip(found.vectors.T[1:], expected.vectors.T[1:], strict=True):
            np.testing.assert_allclose(one * np.sign(one @ other), other, atol=1e-7)
        overlaps = found.vectors.T @ (graphs.degree[number][:, None] * found.vectors)
        np.testing.assert_allclose(overlaps, np.eye(3), atol=1e-8)


def test_what_is_not_determined_is_left_to_the_host(device: TritonDevice) -> None:
    alike = np.ones((1, 70, 16), np.float32)
    (found,) = graph.solve(graph.threshold_graphs(device, device.upload(alike), 0.2), 2)
    expected = smallest_eigenvectors(threshold_graph(alike[0], 0.2), 2)
    assert (found.solver, found.gap) == (expected.solver, pytest.approx(expected.gap, abs=1e-9))
    few = images(1, (2, 3))
    (found,) = graph.solve(graph.threshold_graphs(device, device.upload(few), 0.2), 2)
    assert found.solver == "dense"


def test_rows_that_do_not_fit(device: TritonDevice) -> None:
    with pytest.raises(InputError, match="C a multiple of 16"):
        graph.threshold_graphs(device, device.upload(np.zeros((1, 4, 17), np.float32)), 0.2)
    with pytest.raises(InputError, match="expected those of one"):
        graph.DeviceGraph(graph.threshold_graphs(device, device.upload(images()), 0.2))
