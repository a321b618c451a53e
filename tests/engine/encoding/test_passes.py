from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import CLS_ATTENTION
from facetrt.engine.encoding.passes import Passes

Array = NDArray[Any]
IMAGES = [np.zeros((48, 32, 3), np.uint8)] * 2
HALVES = [np.zeros((24, 16, 3), np.uint8)] * 2


class Counted(Passes[Array]):
    """Patch 8 at stride 4; notes its passes and gives one facet of ones."""

    def __init__(self, saliency: bool) -> None:
        self.manifest: Any = SimpleNamespace(stride=4, architecture=SimpleNamespace(patch=8))
        self.saliency = saliency
        self.passes: list[tuple[tuple[int, ...], int]] = []
        self.grids: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def run(self, images: Sequence[Array], step: int, picture: tuple[int, int] | None = None) -> dict[str, Array]:
        self.passes.append((images[0].shape[:2], step))
        attention = np.full((len(images), 1), len(self.passes), np.float32)
        return {"key@0": np.ones((len(images), 2, 3), np.float32)} | (
            {CLS_ATTENTION: attention} if self.saliency else {}
        )

    def enlarge(self, attention: Array, small: tuple[int, int], grid: tuple[int, int]) -> Array:
        self.grids.append((small, grid))
        return attention


@pytest.mark.parametrize(("stride", "step"), [(4, 1), (8, 2)])
def test_one_pass_gives_both(stride: int, step: int) -> None:
    passes = Counted(saliency=True)
    outputs, attention = passes.outputs(IMAGES, [], stride)
    assert list(outputs) == ["key@0"] and attention is not None and attention[0] == 1
    assert passes.passes == [((48, 32), step)] and passes.grids == []


def test_low_resolution_saliency_is_that_of_a_second_pass_at_stride_8() -> None:
    passes = Counted(saliency=True)
    _, attention = passes.outputs(IMAGES, HALVES, 4)
    assert attention is not None and attention[0] == 2
    assert passes.passes == [((48, 32), 1), ((24, 16), 2)]
    assert passes.grids == [((3, 2), (11, 7))]


def test_a_bundle_without_saliency_needs_no_second_pass() -> None:
    passes = Counted(saliency=False)
    outputs, attention = passes.outputs(IMAGES, HALVES, 4)
    assert attention is None and list(outputs) == ["key@0"] and len(passes.passes) == 1
