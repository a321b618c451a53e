"""Run-length encoding against COCO's own tools."""

from __future__ import annotations

import numpy as np
import pytest

from facetrt.engine.tasks.discovery.rle import encode_rle

SHAPES = [(1, 1), (5, 7), (64, 48), (1, 200), (300, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_the_text_is_that_of_coco(shape: tuple[int, int], share: float) -> None:
    mask_tools = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(0).random(shape) < share
    theirs = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = encode_rle(mask)
    assert ours == {"size": list(shape), "counts": theirs["counts"].decode()}
    np.testing.assert_array_equal(mask_tools.decode(ours).astype(np.bool_), mask)


def test_a_mask_that_is_known() -> None:
    mask = np.zeros((3, 4), np.bool_)
    mask[1:, 1:3] = True  # down the columns: 4 zeros, 2 ones, 1 zero, 2 ones, 3 zeros
    assert encode_rle(mask) == {"size": [3, 4], "counts": "42102"}
