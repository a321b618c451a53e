"""Scores of saliency maps: the numbers of the published programs on the same maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.engine.evaluation.saliency_scores import Variant
from facetrt.kernels.errors import InputError

Golden = dict[str, NDArray[Any]]
ORDER = ("IoU", "acc", "maxF", "meanF", "F", "MAE", "S")


@pytest.mark.parametrize(
    ("variant", "key"), [(Variant.SELFMASK, "selfmask.metrics.chelsea"), (Variant.FOUND, "found.metrics.chelsea")]
)
def test_figures_are_the_published_ones(objects: Golden, variant: Variant, key: str) -> None:
    grey = objects["found.metrics.chelsea.gt"].astype(np.uint8) * 255
    scores = variant.score(objects["found.metrics.chelsea.soft"].astype(np.float32), grey)
    np.testing.assert_allclose([scores[name] for name in ORDER], objects[key][:7], atol=1e-6)


def test_tokencut_takes_the_maximum_of_the_mean_curve(objects: Golden) -> None:
    scores = []
    for name in ("chelsea", "coffee", "astronaut", "cat"):
        grey = objects[f"tokencut.metrics.gt.{name}"].astype(np.uint8) * 255
        scores.append(Variant.TOKENCUT.score(objects[f"tokencut.resize.struct.{name}.mask"].astype(np.float32), grey))
    figures = [np.mean([score[name] for score in scores]) for name in ("IoU", "acc")]
    figures.append(np.mean([score["curve"] for score in scores], axis=0).max())
    np.testing.assert_allclose(figures, objects["tokencut.metrics.mask"], atol=1e-6)


def test_each_variant_has_its_own_foreground() -> None:
    grey = np.array([[0, 1, 100, 200, 255]], np.uint8)
    counts = {variant: int(variant.foreground(grey).sum()) for variant in Variant}
    assert counts == {Variant.TOKENCUT: 4, Variant.SELFMASK: 4, Variant.FOUND: 1, Variant.DEEP_SPECTRAL: 2}


def test_maps_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="expected one size"):
        Variant.FOUND.score(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.uint8))
