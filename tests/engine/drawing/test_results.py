"""Pictures that people look at."""

from __future__ import annotations

import numpy as np

from facetrt.engine.drawing import results as draw
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.matching import Matches


def test_matches_are_drawn_where_they_are_in_pictures_of_any_size() -> None:
    geometries = Geometry((96, 192), (48, 96), 8, 4), Geometry((48, 48), (48, 48), 8, 4)
    cells = np.array([30])
    found = Matches(
        cells,
        cells,
        np.ones(1, np.float32),
        np.zeros(1, np.int64),
        np.array([0]),
        *geometries,
        "key@1",
        np.ones(1, np.float32),
        1.0,
    )
    pictures = [np.full((48, 96, 3), 128, np.uint8), np.full((96, 96, 3), 128, np.uint8)]
    drawn = draw.draw_matches(pictures, found)
    assert drawn.shape == (96, 96 + 8 + 96, 3)
    colour = draw.spread_hues(1)[0]
    (xa, ya), (xb, yb) = found.points_a_xy[0] / 2, found.points_b_xy[0] * 2
    np.testing.assert_array_equal(drawn[int(ya), int(xa)], colour)
    np.testing.assert_array_equal(drawn[int(yb), int(xb) + 104], colour)
    assert drawn.max(axis=2).min() < 40  # a rim: it stands out from whatever lies behind


def test_pictures_are_capped_and_never_enlarged() -> None:
    assert draw.capped(np.zeros((4000, 1000, 3), np.uint8)).shape == (1600, 400, 3)
    assert draw.capped(np.zeros((40, 100, 3), np.uint8)).shape == (40, 100, 3)


def test_a_table_has_titles_and_labels() -> None:
    black = np.zeros((draw.CELL, draw.CELL, 3), np.uint8)
    sheet = draw.table([[black, black]], ["photograph", "mask"], ["cat"])
    for left in (-2 * draw.CELL - 2 * draw.GAP, -draw.CELL - draw.GAP):
        assert (sheet[: draw.STRIP, left : left + draw.CELL] < 128).any()
    assert (sheet[draw.STRIP :, : -2 * draw.CELL - 2 * draw.GAP] < 128).any()
