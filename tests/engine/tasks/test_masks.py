from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from facetrt.engine.tasks.masks import all_but_largest, fill_holes, iou, largest_beside_background, refine_objects
from facetrt.engine.tasks.refinement import Refinement
from facetrt.kernels.errors import InputError


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


@pytest.mark.parametrize("refinement", [Refinement.BILATERAL, Refinement.CRF, Refinement.GRABCUT])
def test_objects_are_refined_to_the_colours_and_keep_their_numbers(refinement: Refinement) -> None:
    pixels = np.full((48, 64, 3), 40, np.uint8)
    pixels[8:40, 6:28], pixels[8:40, 36:58] = (220, 60, 60), (60, 60, 220)
    truth = np.zeros((48, 64), np.int64)
    truth[8:40, 6:28], truth[8:40, 36:58] = 3, 7
    rough = np.zeros_like(truth)
    rough[12:44, 9:26], rough[5:38, 34:56] = 3, 7
    refined = refine_objects(pixels, rough, refinement)
    assert refined.dtype == np.int64 and set(np.unique(refined)) == {0, 3, 7}
    assert (refined != truth).mean() < (rough != truth).mean() / 2
    np.testing.assert_array_equal(refine_objects(pixels, 0 * rough, refinement), 0 * rough)


def test_what_cannot_be_refined() -> None:
    pixels, labels = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.int64)
    with pytest.raises(InputError, match="expected the same size"):
        refine_objects(pixels, labels[:4], Refinement.CRF)
    with pytest.raises(InputError, match="'pydensecrf' is co-segmentation's"):
        refine_objects(pixels, labels, Refinement.PYDENSECRF)
