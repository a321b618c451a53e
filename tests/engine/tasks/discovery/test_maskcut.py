from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers_discovery import make_scene, two_sides
from numpy.typing import NDArray

from facetrt.engine.tasks.discovery.maskcut import MaskCut, at_original_size
from facetrt.engine.tasks.masks import fill_holes, iou, maskcut_crf

Golden = dict[str, NDArray[Any]]


def test_every_round_is_the_published_one(objects: Golden) -> None:
    """Of this picture, whose cuts come out otherwise with the other sign of the eigenvector."""
    pixels = objects["image_maskcut128.astronaut"]
    scene = make_scene(objects["struct.maskcut128.astronaut.features"], (16, 16), original=(125, 125), pixels=pixels)
    rounds = list(MaskCut()._rounds(scene))
    assert len(rounds) == 3
    for number, (output, _, cut) in enumerate(rounds):
        expected = f"maskcut.struct.astronaut.{number}."
        vector = objects[f"{expected}eigenvector"].ravel()
        np.testing.assert_allclose(cut.vector / np.linalg.norm(cut.vector), vector / np.linalg.norm(vector), atol=1e-8)
        np.testing.assert_array_equal(cut.side.reshape(16, 16), objects[f"{expected}partition"])
        np.testing.assert_array_equal(output, objects[f"{expected}output"])
        smooth = maskcut_crf(pixels, output)
        assert (smooth != objects[f"{expected}crf"]).mean() < 1e-3
        np.testing.assert_array_equal(fill_holes(objects[f"{expected}crf"]), objects[f"{expected}filled"])
        shared = objects[f"{expected}iou"]
        if np.isfinite(shared):
            assert iou(output, objects[f"{expected}filled"]) == pytest.approx(float(shared), abs=1e-6)
        final = at_original_size(MaskCut()._smoothed(pixels, output), (125, 125))
        assert (final != objects[f"{expected}final"]).mean() < 1e-3


def test_several_objects_are_found_one_after_the_other() -> None:
    grid = (16, 16)
    labels = np.zeros(grid, np.int64)
    labels[2:6, 2:7], labels[9:14, 9:14] = 1, 2
    random = np.random.default_rng(0)
    rows = random.normal(size=(3, 32))[labels.ravel()] + 0.3 * random.normal(size=(256, 32))
    found = MaskCut(cuts=3, crf=False, corrected=True).find(make_scene(rows, grid))
    assert found.masks is not None
    sizes = sorted(int(mask.sum()) for mask in found.masks)
    assert len(sizes) >= 2 and sizes[:2] == [20 * 64, 25 * 64]
    assert not (found.masks[0] & found.masks[1]).any()


def test_a_rejected_region_comes_back_only_as_published() -> None:
    grid = (12, 12)
    scene = make_scene(two_sides(grid, np.s_[4:9, 4:9]), grid)
    published, corrected = (MaskCut(cuts=4, crf=False, corrected=each).find(scene) for each in (False, True))
    assert published.masks is not None and corrected.masks is not None
    assert np.array_equal(published.masks[0], corrected.masks[0])
    assert len(published.masks) >= len(corrected.masks)


def test_fewer_regions_than_cuts_are_fewer_objects() -> None:
    grid = (3, 3)
    found = MaskCut(cuts=50, crf=False).find(make_scene(two_sides(grid, np.s_[1:2, 1:2]), grid))
    assert 1 <= len(found.boxes) < 50


@pytest.mark.parametrize("rows", [np.ones((9, 4)), np.ones((1, 4))])
def test_without_a_cut_nothing_is_found(rows: NDArray[Any]) -> None:
    grid = (3, 3) if len(rows) == 9 else (1, 1)
    assert not len(MaskCut().find(make_scene(rows, grid)).boxes)
