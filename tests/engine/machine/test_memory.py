from __future__ import annotations

import pytest

from facetrt.engine.machine.memory import MAX_CELLS, bound_on_cells


@pytest.mark.parametrize(
    ("original", "loaded", "bound"),
    [
        ((480, 640), (224, 298), 32),  # smaller than it was
        ((56, 56), (224, 224), 32),  # 16 times its pixels
        ((55, 56), (224, 224), 8),  # more than that
    ],
)
def test_much_enlarged_images_may_have_a_quarter(
    original: tuple[int, int], loaded: tuple[int, int], bound: int
) -> None:
    assert bound_on_cells(32, original, loaded) == bound


def test_a_small_bound_leaves_one_cell() -> None:
    assert bound_on_cells(1, (1, 8), (224, 1792)) == 1 < MAX_CELLS
