"""Graphs of cells, against their matrices written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.kernels.affinity import (
    Graph,
    StretchedGraph,
    ThresholdGraph,
    spectral_graph,
    threshold_graph,
    unit_length,
    weighted_graph,
)
from facetrt.kernels.colour_affinity import colour_affinity
from facetrt.kernels.errors import InputError

WEAK = 1e-5


def rows_of(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Descriptors of which some are alike."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(3, 16))[random.integers(0, 3, count)] + random.normal(size=(count, 16))).astype("f4")


def cosines(rows: NDArray[Any]) -> NDArray[np.float64]:
    unit = unit_length(rows).astype(np.float64)
    return np.asarray(unit @ unit.T)


def strong(rows: NDArray[Any], threshold: float) -> NDArray[np.float64]:
    return np.where(cosines(rows) > threshold, 1.0, WEAK)


def spectral(rows: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.maximum(cosines(rows), 0) / cosines(rows).max())


def stretched(rows: NDArray[Any]) -> NDArray[np.float64]:
    values = cosines(rows)
    return np.asarray((values - values.min()) / np.ptp(values))


@pytest.mark.parametrize("count", [1, 2, 8, 61, 130])
@pytest.mark.parametrize(
    ("make", "reference"),
    [
        (lambda rows: threshold_graph(rows, 0.2), lambda rows: strong(rows, 0.2)),
        (lambda rows: weighted_graph(rows, 0.2), lambda rows: np.where(cosines(rows) >= 0.2, cosines(rows), WEAK)),
        (spectral_graph, spectral),
    ],
)
def test_products_and_degrees_are_those_of_the_matrix(count: int, make: Any, reference: Any) -> None:
    rows = rows_of(count)
    graph, matrix = make(rows), reference(rows)
    vector = np.random.default_rng(1).normal(size=count)
    assert len(graph) == count
    np.testing.assert_allclose(graph.dense(), matrix, atol=2e-7)
    np.testing.assert_allclose(graph.product(vector), matrix @ vector, atol=1e-5)
    np.testing.assert_allclose(graph.degree, matrix.sum(axis=1), atol=2e-5)


def test_cosines_are_stretched_without_their_matrix() -> None:
    rows = rows_of(61)
    graph, vector = StretchedGraph(rows), np.random.default_rng(1).normal(size=61)
    np.testing.assert_allclose(graph.product(vector), stretched(rows) @ vector, atol=1e-5)
    np.testing.assert_allclose(Graph.dense(graph), graph.dense(), atol=1e-6)


def test_a_graph_too_large_to_be_held_gives_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vector = rows_of(130), np.random.default_rng(1).normal(size=130)
    held = spectral_graph(rows).product(vector)
    monkeypatch.setattr("facetrt.kernels.affinity.HELD_BYTES", 0)
    np.testing.assert_allclose(spectral_graph(rows).product(vector), held, atol=1e-6)


def test_edges_next_to_the_threshold_are_decided_in_float64() -> None:
    rows = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8], [0.28, 0.96]], np.float32)
    unit = unit_length(rows).astype(np.float64)
    threshold = float(unit[0] @ unit[1])
    edges = threshold_graph(rows, threshold).strong()
    assert not edges[0, 1] and not edges[1, 0]
    assert threshold_graph(rows, np.nextafter(threshold, 0)).strong()[0, 1]


def test_painted_cells_are_those_of_zero_descriptors() -> None:
    rows, painted = rows_of(61), np.zeros(61, np.bool_)
    painted[[0, 7, 8, 60]] = True
    expected = threshold_graph(np.where(painted[:, None], 0, rows).astype(np.float32), 0.15)
    without = threshold_graph(rows, 0.15).without(painted)
    assert isinstance(without, ThresholdGraph)
    np.testing.assert_array_equal(without.bits, expected.bits)
    assert without.dense()[7, 7] == WEAK


@pytest.mark.parametrize("rows", [np.full((3, 4), np.nan, np.float32), np.zeros((0, 4), np.float32)])
def test_what_is_no_descriptor_is_refused(rows: NDArray[np.float32]) -> None:
    with pytest.raises(InputError, match="descriptors"):
        threshold_graph(rows, 0.2)


def test_colours_link_cells_both_ways() -> None:
    colours = np.random.default_rng(0).random((6, 7, 3))
    links = colour_affinity(colours).toarray()
    np.testing.assert_array_equal(links, links.T)
    np.testing.assert_array_equal(np.diag(links), 4)
    assert links.sum() == 2 * 42 * (20 + 10)
    assert colour_affinity(colours[:1, :2]).toarray().tolist() == [[4, 4], [4, 4]]
