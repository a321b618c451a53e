"""Scorers against cases computed by hand, and against an independent DAVIS scorer where it is installed."""

import numpy as np
import pytest

from facetrt.engine import InputError
from facetrt.engine.evaluation.scores import (
    boundary,
    boundary_similarity,
    distances,
    jaccard,
    pixel_precision,
    region_similarity,
    within,
)


def _mask(*rows):
    return np.array([[character == "#" for character in row] for row in rows])


def _square(top, left, side, shape=(40, 60)):
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_distances_and_limits():
    found = distances(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(found, [0, 5])
    assert within(found, 5).tolist() == [True, True]
    assert within(found, 5, strict=True).tolist() == [True, False]


def test_jaccard_and_precision_by_hand():
    predicted, annotated = _mask("##..", "##.."), _mask(".##.", ".##.")
    assert jaccard(predicted, annotated) == pytest.approx(2 / 6)
    assert pixel_precision(predicted, annotated) == pytest.approx(4 / 8)
    assert jaccard(annotated, annotated) == 1
    assert jaccard(~annotated, annotated) == 0


def test_jaccard_of_an_empty_annotation_is_undefined_in_cosegmentation_and_one_in_davis():
    empty, full = _mask("..", ".."), _mask("##", "##")
    assert jaccard(full, empty) is None
    assert jaccard(empty, full) == 0
    assert pixel_precision(empty, empty) == 1
    assert region_similarity(empty, empty) == 1
    assert region_similarity(full, empty) == 0


def test_masks_of_different_size_are_named():
    with pytest.raises(InputError, match=r"\(2, 2\).*\(1, 2\)"):
        jaccard(_mask("##", "##"), _mask("##"))


def test_boundary_pixels_by_hand():
    mask = _mask(
        ".....",
        "..##.",
        "..##.",
        ".....",
    )
    expected = _mask(
        ".###.",
        ".#.#.",
        ".###.",
        ".....",
    )
    np.testing.assert_array_equal(boundary(mask), expected)


def test_boundary_does_not_see_beyond_the_image():
    assert not boundary(np.ones((4, 5), bool)).any()
    np.testing.assert_array_equal(boundary(_mask("..#", "..#")), _mask(".#.", ".#."))


def test_boundary_similarity_by_hand():
    square = _square(10, 10, 12)
    assert boundary_similarity(square, square) == 1
    # 40 × 60: the tolerance is ceil(0.008 · 72.1) = 1 pixel
    assert boundary_similarity(_square(10, 11, 12), square) == 1
    assert boundary_similarity(_square(10, 30, 8), square) == 0
    assert boundary_similarity(np.zeros((40, 60), bool), square) == 0
    assert boundary_similarity(square, np.zeros((40, 60), bool)) == 0
    assert boundary_similarity(np.zeros((40, 60), bool), np.zeros((40, 60), bool)) == 1


def test_boundary_similarity_counts_matched_pixels_on_both_sides():
    annotated = np.zeros((20, 20), bool)
    annotated[:, :10] = True  # boundary: 20 pixels of column 9
    predicted = annotated.copy()
    predicted[10:, :10] = False  # boundary: column 9 of rows 0..8 and row 9 (10 pixels), 19 in all
    # Tolerance 1. Of our 19 pixels rows 0..9 of column 9 and row 9's column 8 match: 11. Of theirs rows 0..10: 11.
    precision, recall = 11 / 19, 11 / 20
    assert boundary_similarity(predicted, annotated) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_an_independent_davis_scorer(seed):
    evaluator = pytest.importorskip("vos_benchmark.evaluator", reason="pip install vos-benchmark to compare scorers")
    random = np.random.default_rng(seed)
    blobs = random.random((2, 12, 21)).repeat(10, axis=1).repeat(10, axis=2) > 0.6
    blobs[0, :60] = blobs[1, :60]
    theirs = evaluator.Evaluator()
    theirs.feed_frame(blobs[0].astype(np.uint8), blobs[1].astype(np.uint8))
    iou, boundary_f = theirs.conclude()
    assert 100 * region_similarity(*blobs) == pytest.approx(iou[1])
    assert 100 * boundary_similarity(*blobs) == pytest.approx(boundary_f[1])
