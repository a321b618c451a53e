"""Eigenvectors of graphs, against SciPy's dense solver for the generalised problem."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import eigh

from facetrt.kernels import eigenvectors as module
from facetrt.kernels.affinity import CosineGraph, Graph, spectral_graph, threshold_graph
from facetrt.kernels.eigenvectors import sign_of_lapack, smallest_eigenvectors
from facetrt.kernels.errors import InputError


def field(grid_h: int, grid_w: int) -> NDArray[np.float32]:
    """Descriptors that change smoothly over a grid, with noise."""
    random = np.random.default_rng(0)
    maps = [cv2.GaussianBlur(random.normal(size=(grid_h, grid_w)), (0, 0), 3) for _ in range(32)]
    rows = np.stack(maps, axis=-1).reshape(grid_h * grid_w, 32)
    return (rows / rows.std(axis=0) + 0.5 * random.normal(size=rows.shape)).astype(np.float32)


def reference(graph: Graph, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    weights = graph.dense()
    diagonal = np.diag(weights.sum(axis=1))
    values, vectors = eigh(diagonal - weights, diagonal)
    return values[:count], vectors[:, :count]


@pytest.mark.parametrize(
    "graph",
    [
        spectral_graph(field(5, 7)),
        threshold_graph(field(11, 13), 0.2),
        threshold_graph(field(16, 20), 0.15).without(np.arange(320) % 7 == 0),
        spectral_graph(field(16, 20)),
    ],
)
@pytest.mark.parametrize("count", [2, 5])
def test_vectors_are_those_of_the_dense_solver(graph: Graph, count: int) -> None:
    values, vectors = reference(graph, count)
    found = smallest_eigenvectors(graph, count)
    assert found.solver == ("dense" if len(graph) == 35 else "lanczos")
    np.testing.assert_allclose(found.values, values, atol=2e-7)
    signs = np.sign((found.vectors * vectors).sum(axis=0))
    np.testing.assert_allclose(found.vectors * signs, vectors, atol=1e-5 * np.abs(vectors).max())
    assert found.residual < 1e-9


def test_a_start_near_the_answer_leads_to_the_same_vector_sooner() -> None:
    graph = threshold_graph(field(16, 20), 0.2)
    cold = smallest_eigenvectors(graph, 2)
    warm = smallest_eigenvectors(graph, 2, start=cold.vectors[:, 1])
    assert warm.products <= cold.products
    sign = np.sign(warm.vectors[:, 1] @ cold.vectors[:, 1])
    np.testing.assert_allclose(sign * warm.vectors[:, 1], cold.vectors[:, 1], atol=1e-8)


def test_restarts_converge() -> None:
    """A chain of cells: neighbours only, so that eigenvalues lie close together."""
    angles = np.arange(300) * 0.3
    rows = np.stack([np.cos(angles), np.sin(angles)] + [np.cos(angles * k) for k in (1.7, 2.9)], axis=1)
    graph = threshold_graph(rows.astype(np.float32), 0.9)
    found = smallest_eigenvectors(graph, 4)
    np.testing.assert_allclose(found.values, reference(graph, 4)[0], atol=1e-9)
    assert found.products > module.BASIS


@pytest.mark.parametrize(("rows", "value"), [(np.ones((100, 4)), 1.0), (np.eye(100), 0.0)])
def test_without_structure_there_is_no_gap(rows: NDArray[Any], value: float) -> None:
    """All edges alike, strong or weak: any vector is as good as another."""
    found = smallest_eigenvectors(threshold_graph(rows.astype(np.float32), 0.2), 2)
    assert found.gap < 1e-6
    assert (found.values[1] > 0.99) == (value > 0.99)


def test_one_node_has_one_vector() -> None:
    found = smallest_eigenvectors(threshold_graph(np.ones((1, 4), np.float32), 0.2), 2)
    assert found.vectors.shape == (1, 1) and found.values[0] == pytest.approx(0)


def test_nodes_without_edges_are_refused() -> None:
    rows = np.eye(4, dtype=np.float32)
    rows[0] = 0
    with pytest.raises(InputError, match="1 of 4 nodes have no edges"):
        smallest_eigenvectors(CosineGraph(rows, least=0.5, weak=0.0), 2)


def test_too_many_nodes_for_the_dense_solver_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = threshold_graph(field(11, 13), 0.2)
    monkeypatch.setattr(module, "MAX_PRODUCTS", 0)
    assert smallest_eigenvectors(graph, 2).solver == "dense"
    monkeypatch.setattr(module, "MAX_DENSE", 100)
    with pytest.raises(InputError, match="143 nodes did not converge"):
        smallest_eigenvectors(graph, 2)


@pytest.mark.parametrize("seed", range(6))
def test_the_sign_is_that_of_lapack(seed: int) -> None:
    random = np.random.default_rng(seed)
    grid_h, grid_w = (int(side) for side in random.integers(7, 15, 2))
    rows = field(grid_h, grid_w) + random.normal(size=(grid_h * grid_w, 32)).astype(np.float32)
    graph = threshold_graph(rows, 0.15)
    if seed % 2:
        graph = graph.without(random.random(len(graph)) < 0.3)
    vector, degree = smallest_eigenvectors(graph, 2).vectors[:, 1], graph.degree
    expected = eigh(np.diag(degree) - graph.dense(), np.diag(degree), subset_by_index=(1, 2))[1][:, 0]
    assert sign_of_lapack(graph, vector) == np.sign(expected @ (degree * vector))
    assert sign_of_lapack(graph, -vector) == -sign_of_lapack(graph, vector)
