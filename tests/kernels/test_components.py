"""Connected parts, against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from facetrt.kernels.components import component_at, connected_components, extent, largest_component


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (40, 31)])
def test_parts_are_numbered_as_they_are_met(size: tuple[int, int], connectivity: int) -> None:
    mask = np.random.default_rng(0).random(size) < 0.5
    structure = np.ones((3, 3)) if connectivity == 8 else None
    expected, count = ndimage.label(mask, structure)
    labels, found = connected_components(mask, connectivity)
    assert found == count
    np.testing.assert_array_equal(labels, expected)


def test_the_first_of_several_largest_parts_is_taken() -> None:
    mask = np.array([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], np.bool_)
    assert largest_component(mask)[0].tolist() == [True, True, False, False, False]
    assert not largest_component(np.zeros((2, 2), np.bool_)).any()


def test_the_part_at_a_cell() -> None:
    mask = np.array([[1, 0, 0], [0, 1, 1]], np.bool_)
    assert component_at(mask, 5).sum() == 2
    assert component_at(mask, 5, connectivity=8).sum() == 3
    assert not component_at(mask, 1).any()


def test_extents_exclude_their_ends() -> None:
    mask = np.zeros((5, 6), np.bool_)
    assert extent(mask) is None
    mask[1:3, 2:6] = True
    assert extent(mask) == (2, 1, 6, 3)
