from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from facetrt.engine.tasks.masks import all_but_largest, fill_holes, iou, largest_beside_background


@pytest.mark.parametrize("seed", range(4))
def test_holes_are_filled_as_by_scipy(seed: int) -> None:
    mask = np.random.default_rng(seed).random((20, 31)) < 0.6
    np.testing.assert_array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


def test_the_second_most_frequent_label_is_the_object() -> None:
    mask = np.zeros((6, 8), np.bool_)
    mask[1:3, 1:3] = mask[0, 6] = True
    assert largest_beside_background(mask).sum() == 4
    assert largest_beside_background(np.zeros((3, 3), np.bool_)).all()


def test_all_but_the_background_are_objects() -> None:
    mask = np.zeros((6, 8), np.bool_)
    mask[1:3, 1:3] = mask[0, 6] = True
    np.testing.assert_array_equal(all_but_largest(mask), mask)
    assert not all_but_largest(np.zeros((3, 3), np.bool_)).any()


def test_overlap_of_nothing_is_nothing() -> None:
    empty, full = np.zeros((2, 2), np.bool_), np.ones((2, 2), np.bool_)
    assert iou(empty, empty) == 0 and iou(full, full) == 1 and iou(empty, full) == 0
