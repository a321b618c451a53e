from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.engine.tasks.discovery.found_head import Photograph, TrainingOptions, _loss, train_head
from facetrt.kernels.bilateral import BilateralGrid
from facetrt.kernels.errors import InputError

GRID = (6, 8)


def photograph(seed: int) -> Photograph:
    """A bright rectangle on dark ground; the first channel of the keys tells it, with noise."""
    random = np.random.default_rng(seed)
    inside = np.zeros(GRID, np.bool_)
    top, left = random.integers(1, 3, 2)
    inside[top : top + 3, left : left + 4] = True
    pixels = (60 + 120 * np.kron(inside, np.ones((8, 8))))[..., None].repeat(3, axis=2).astype(np.uint8)
    keys = random.normal(size=(48, 8)).astype(np.float32) * 0.2
    keys[:, 0] += inside.ravel() * 2 - 1
    return Photograph(keys, GRID, BilateralGrid.of(pixels), inside)


def test_a_head_learns_the_foreground() -> None:
    photographs = [photograph(seed) for seed in range(4)]
    training = train_head(photographs, TrainingOptions(steps=60, background_steps=30), "key@3", "test")
    assert training.losses[29] < 0.7 * training.losses[0]
    weight, bias = np.array(training.head.weight), training.head.bias
    for each in photographs:
        found = (each.keys @ weight + bias > 0).reshape(GRID)
        assert (found & each.foreground).sum() / (found | each.foreground).sum() > 0.8


def test_a_seed_gives_the_same_head_again() -> None:
    photographs, options = [photograph(seed) for seed in range(3)], TrainingOptions(steps=5, batch=2, seed=7)
    one, again = (train_head(photographs, options, "key@3", "test").head for _ in range(2))
    assert one == again
    assert train_head(photographs, TrainingOptions(steps=5, batch=2, seed=8), "key@3", "test").head != one


@pytest.mark.parametrize("early", [True, False])
def test_the_gradient_is_that_of_the_loss(early: bool) -> None:
    each, random = photograph(0), np.random.default_rng(1)
    values: NDArray[Any] = random.normal(size=9)
    _, gradient = _loss(each, values, early=early)
    for number in (0, 3, 8):
        step = np.zeros(9)
        step[number] = 1e-6
        above, below = (_loss(each, values + sign * step, early=early)[0] for sign in (1, -1))
        assert gradient[number] == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6)


def test_what_the_solver_changes_too_much_is_not_used(objects: dict[str, NDArray[Any]]) -> None:
    cells, label = (objects[f"found.chelsea.train.{name}"] for name in ("object_cells", "pseudo_label"))
    solver = BilateralGrid.of(np.ascontiguousarray(objects["image.chelsea"][:96, :144]))
    found, used = Photograph(np.zeros((216, 2), np.float32), (12, 18), solver, cells).solved(cells)
    assert not used
    np.testing.assert_array_equal(found, label)


def test_without_photographs_nothing_is_trained() -> None:
    with pytest.raises(InputError, match="no photograph"):
        train_head([], TrainingOptions(), "key@3", "test")
