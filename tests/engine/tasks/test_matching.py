from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import Engine, InputError
from facetrt.engine.tasks.matching import keep_salient, pick_diverse
from facetrt.kernels import BestBuddies


def test_an_image_matches_itself(tiny_engine: Engine) -> None:
    image = photo(64, 80)
    matches = tiny_engine.match(image, image, load_size=48, saliency_threshold=0.0, num_pairs=6)
    assert len(matches) == 6
    np.testing.assert_array_equal(matches.points_a_xy, matches.points_b_xy)
    np.testing.assert_allclose(matches.similarity, 1, atol=1e-5)
    assert (matches.points_a_xy <= [80, 64]).all() and (matches.points_a_xy > 0).all()
    np.testing.assert_allclose(matches.points_a_xy, matches.loaded_points_a_xy * [80 / 60, 64 / 48])


def test_the_saliency_filter_is_the_references() -> None:
    buddies = BestBuddies(
        nn_ab=np.array([0, 1, 2, 0]), nn_ba=np.array([0, 1, 2, 2]),
        sim_ab=np.ones(4, np.float32), sim_ba=np.ones(4, np.float32),
    )  # fmt: skip
    saliency_a = np.array([0.9, 0.05, 0.9, 0.9], np.float32)
    saliency_b = np.array([0.0, 0.9, 0.0, 0.9], np.float32)
    # 0: its buddy is not salient and no other salient cell points at it; 1: not strictly above the threshold itself;
    # 2: its buddy is not salient, but the salient cell 3 of B points at it; 3: no best buddy
    np.testing.assert_array_equal(keep_salient(buddies, saliency_a, saliency_b, 0.05), [2])


def test_no_best_buddies_give_an_empty_result(tiny_engine: Engine) -> None:
    matches = tiny_engine.match(photo(40, 40), photo(48, 40, 3), load_size=None, saliency_threshold=1.0)
    assert len(matches) == 0 and matches.points_a_xy.shape == (0, 2) and matches.similarity.shape == (0,)


def test_the_best_of_each_cluster_is_taken() -> None:
    joined = np.array([[1, 0], [1, 0.01], [0, 1], [0.01, 1]], np.float32)
    clusters, selected = pick_diverse(joined, np.array([0.1, 0.7, 0.5, 0.5], np.float32), 2)
    assert clusters[0] == clusters[1] != clusters[2] == clusters[3]
    assert sorted(selected) == [1, 2]  # the second has the higher rank; on ties the first


def test_fewer_survivors_than_pairs() -> None:
    joined = np.eye(3, dtype=np.float32)
    clusters, selected = pick_diverse(joined, np.ones(3, np.float32), 10)
    assert sorted(clusters) == [0, 1, 2] and sorted(selected) == [0, 1, 2]


def test_options_are_checked(tiny_engine: Engine) -> None:
    with pytest.raises(InputError, match="saliency_threshold=nan"):
        tiny_engine.match(photo(40, 40), photo(40, 40), load_size=None, saliency_threshold=np.nan)
    with pytest.raises(InputError, match="num_pairs=0"):
        tiny_engine.match(photo(40, 40), photo(40, 40), num_pairs=0)
    with pytest.raises(InputError, match="value@0 was not exported"):
        tiny_engine.match(photo(40, 40), photo(40, 40), facet="value@0", load_size=None)


def test_unbinned_matching(tiny_engine: Engine, golden: dict[str, Any]) -> None:
    image = photo(48, 48)
    matches = tiny_engine.match(image, image, load_size=None, hierarchy=0, saliency_threshold=0.0)
    np.testing.assert_array_equal(matches.cells_a, matches.cells_b)
