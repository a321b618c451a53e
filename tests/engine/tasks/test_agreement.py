"""How alike results of tasks are, and when they differ too much."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from facetrt.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.samples import sample_images, second_view
from facetrt.engine.tasks.agreement import (
    BOUNDS,
    FeaturePair,
    adjusted_rand,
    compare_tasks,
    coordinates_alike,
    describe,
    violation,
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open("builtin")


@pytest.fixture(scope="module")
def pairs(engine: Engine) -> list[FeaturePair]:
    photographs = [np.asarray(image) for image in list(sample_images().values())[:2]]
    views = [view for pixels in photographs for view in (pixels, second_view(pixels)[0])]
    found = iter(engine.encode(views, load_size=64))
    return list(zip(found, found, strict=True))


def disturbed(pairs: list[FeaturePair], share: float) -> list[FeaturePair]:
    """The same with noise on each descriptor, as large as a share of what descriptors vary by."""
    rng = np.random.default_rng(0)

    def noisy(item: Features) -> Features:
        tokens = {
            name: np.asarray(rows + rng.normal(size=rows.shape) * share * rows.std(axis=0), np.float32)
            for name, rows in item.tokens.items()
        }
        return Features.of(item.record, tokens, item.attention, item.pixels)

    return [(noisy(a), noisy(b)) for a, b in pairs]


def test_equal_descriptors_agree_in_full(engine: Engine, pairs: list[FeaturePair]) -> None:
    found = compare_tasks(pairs, pairs, engine.manifest, "twice")
    assert found.figures == pytest.approx(dict.fromkeys(BOUNDS, 1.0)) and not found.missed and not found.absent


def test_noise_is_seen_and_missed_bounds_are_named(engine: Engine, pairs: list[FeaturePair]) -> None:
    little, much = (compare_tasks(pairs, disturbed(pairs, share), engine.manifest, "") for share in (0.001, 2.0))
    assert not little.missed
    assert all(much.figures[name] < little.figures[name] for name in ("buddies", "points", "labels", "pca"))
    assert "buddies" in much.missed and f"< {BOUNDS['buddies']:g}" in describe(much)


def test_nan_is_out_of_bounds() -> None:
    assert "pca" in violation({"pca": float("nan"), "masks": 1.0})


def test_clusters_count_and_not_their_names() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert adjusted_rand(labels, np.array([5, 5, 0, 0, 3, 3])) == 1
    assert adjusted_rand(labels, np.zeros(6, np.int64)) == 0
    assert adjusted_rand(np.zeros(6, np.int64), np.zeros(6, np.int64)) == 1
    one_moved = np.array([0, 0, 1, 1, 2, 1])  # by hand: pairs 2, of 3 and 4; expected 0.8; most 3.5
    assert adjusted_rand(labels, one_moved) == pytest.approx((2 - 0.8) / (3.5 - 0.8))


def test_coordinates_may_turn_and_mirror() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 3)) * [3, 2, 1]
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    alike = partial(coordinates_alike, a)
    assert alike(a @ turn + 7) == pytest.approx(1) and alike(rng.normal(size=(50, 3))) < 0.5
