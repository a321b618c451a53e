"""TAP-Vid's measures, against cases computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from facetrt.engine.evaluation.track_scores import DETAILS, METRICS, THRESHOLDS, track_scores


def scores(off: list[list[float]], found: Any, visible: Any, scored: Any = None) -> dict[str, float | None]:
    """Points that are ``off`` by so many pixels, with ones for what is found, visible and scored."""
    annotated = np.random.default_rng(0).integers(0, 200, (*np.shape(off), 2)).astype(float)
    moved = annotated + np.stack([np.array(off), np.zeros(np.shape(off))], axis=2)
    every = np.ones(np.shape(off)) if scored is None else np.array(scored)
    return track_scores(moved, np.array(found) > 0, annotated, np.array(visible) > 0, every > 0)


def test_perfect_tracks() -> None:
    found = scores([[0, 0, 900]], [[1, 1, 0]], [[1, 1, 0]])
    assert list(found) == [*METRICS, *DETAILS]
    assert set(found.values()) == {1}


def test_distances_are_below_the_threshold() -> None:
    found = scores([[0.5, 1, 3, 7, 20]], [[1] * 5], [[1] * 5])
    shares = [1 / 5, 2 / 5, 3 / 5, 4 / 5, 4 / 5]
    assert [found[f"delta_{t}"] for t in THRESHOLDS] == pytest.approx(shares)
    assert found["delta_avg"] == pytest.approx(sum(shares) / 5)
    # a point that is too far off is missed at its own place and one too many where it is
    assert [found[f"J_{t}"] for t in THRESHOLDS] == pytest.approx([1 / 9, 2 / 8, 3 / 7, 4 / 6, 4 / 6])
    assert found["AJ"] == pytest.approx((1 / 9 + 2 / 8 + 3 / 7 + 4 / 6 + 4 / 6) / 5)
    assert found["OA"] == 1


def test_hidden_points() -> None:
    """One of each: found, missed, invented, rightly absent."""
    found = scores([[0, 0, 0, 0]], [[1, 0, 1, 0]], [[1, 1, 0, 0]])
    assert found["OA"] == 2 / 4
    assert found["delta_avg"] == 1  # wherever a point is said to be while it is said to be hidden
    assert found["AJ"] == pytest.approx(1 / 3)


def test_only_scored_frames_count() -> None:
    found = scores([[0, 0, 90], [90, 0, 0]], np.ones((2, 3)), np.ones((2, 3)), [[1, 1, 0], [0, 1, 1]])
    assert set(found.values()) == {1}


def test_no_visible_point() -> None:
    found = scores([[0, 0]], [[0, 0]], [[0, 0]])
    assert (found["OA"], found["delta_avg"], found["AJ"]) == (1, None, None)
    assert scores([[0, 0]], [[1, 0]], [[0, 0]])["AJ"] == 0
