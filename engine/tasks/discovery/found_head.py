"""Training of FOUND's head on photographs without labels.

The published loss and schedule: the prediction is drawn to its own binarisation, and to what the bilateral solver makes
of that; at first to the complement of the discovered background as well. Features are computed once for each photograph
instead of for new crops at each step, so that the solver's grids are built once, too.
Source: specification, found "Training in brief" and corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import LinearHead, Manifest
from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.resampling import bilinear
from facetrt.engine.settings import Setting, check
from facetrt.engine.tasks.discovery.attention import cls_attention, per_head
from facetrt.engine.tasks.discovery.found import background_of
from facetrt.engine.tasks.discovery.fusing import Term
from facetrt.engine.tasks.discovery.objects import Bools
from facetrt.engine.tasks.masks import all_but_largest, iou
from facetrt.kernels.bilateral import BilateralGrid
from facetrt.kernels.errors import InputError
from facetrt.kernels.parallel import map_threads

Double = NDArray[np.float64]
Advance = Callable[[int, int], None]

SOLVER_WEIGHT, OWN_WEIGHT = 1.5, 4.0
AGREEMENT = 0.5  # IoU with its input above which a result of the solver is used
DECAY, DECAY_EVERY = 0.95, 50
MOMENTS, TINY, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.01  # AdamW's


@dataclass(frozen=True)
class TrainingOptions:
    """Options of the training of a head, with the published defaults."""

    steps: Annotated[int, Setting("How often the head is changed.", minimum=1, maximum=100_000)] = 500
    batch: Annotated[int, Setting("Photographs per step.", minimum=1, maximum=10_000)] = 50
    background_steps: Annotated[int, Setting("Steps that begin from the discovered background.", minimum=0)] = 100
    learning_rate: Annotated[float, Setting("Of AdamW; 0.95 of it after every 50 steps.", above=0)] = 0.05
    seed: Annotated[int, Setting("Of the first weights and of the order of photographs.", minimum=0)] = 0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Photograph:
    """What training keeps of one: ``keys (cells, C)`` float32, its grid, and the foreground that it begins from."""

    keys: Float = field(repr=False)
    grid: tuple[int, int]
    solver: BilateralGrid = field(repr=False)
    foreground: Bools = field(repr=False)

    @staticmethod
    def of(features: Features, manifest: Manifest, term: Term) -> Photograph | None:
        """None of a picture that shows nothing.

        Args:
            term: which descriptors the head is to weigh.

        Raises:
            InputError: the bundle lacks a facet of :func:`~facetrt.engine.tasks.discovery.attention.attention_facets`.
        """
        if features.why_empty is not None:
            return None
        keys, picture = term.rows(features), features.geometry.picture_size
        stage = background_of(per_head(keys, manifest), cls_attention(features, manifest)[:, features.prefix :])
        solver = BilateralGrid.of(np.ascontiguousarray(features.pixels[: picture[0], : picture[1]]))
        photograph = Photograph(keys, features.grid, solver, ~stage.background.reshape(features.grid))
        label, _ = photograph.solved(photograph.foreground)
        return Photograph(keys, features.grid, solver, label)

    def solved(self, cells: Bools) -> tuple[Bools, bool]:
        """What the solver makes of a mask of cells, on cells, and whether it was used: it may differ too much."""
        soft = self.solver.solve(bilinear(cells.astype(np.float32), self.solver.size))
        refined = all_but_largest(soft > 0.5)
        small = cv2.resize(refined.astype(np.float32), self.grid[::-1], interpolation=cv2.INTER_LINEAR) > 0
        used = iou(small, cells) > AGREEMENT
        return (np.asarray(small) if used else cells), used


@dataclass(frozen=True)
class Training:
    """A trained head, and the mean loss of each step, ``(steps,)``."""

    head: LinearHead
    losses: Double = field(repr=False)


def train_head(
    photographs: Sequence[Photograph],
    options: TrainingOptions,
    facet: str,
    source: str,
    progress: Advance | None = None,
) -> Training:
    """A head for ``facet``, of the photographs' keys.

    Args:
        source: what the head says of where it comes from.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: no photograph.
    """
    if not photographs:
        raise InputError("no photograph shows anything: expected at least one to train a head of")
    random = np.random.RandomState(options.seed)
    bound = photographs[0].keys.shape[1] ** -0.5
    values = random.uniform(-bound, bound, 1 + photographs[0].keys.shape[1])  # weights, then the bias
    optimiser, losses = _AdamW(values, options.learning_rate), []
    for step in range(options.steps):
        chosen = _batch(random, len(photographs), options.batch)
        early = step < options.background_steps
        found = map_threads(lambda i, early=early: _loss(photographs[i], values, early=early), chosen)  # type: ignore[misc]
        losses.append(float(np.mean([loss for loss, _ in found])))
        optimiser.step(np.mean([gradient for _, gradient in found], axis=0), step)
        if progress is not None:
            progress(step + 1, options.steps)
    head = LinearHead(facet, values[:-1].tolist(), float(values[-1]), source)
    return Training(head, np.array(losses))


def _batch(random: np.random.RandomState, count: int, batch: int) -> list[int]:
    """Some photographs, each once; all of them where there are fewer."""
    return [int(number) for number in random.permutation(count)[:batch]]


def _loss(photograph: Photograph, values: Double, *, early: bool) -> tuple[float, Double]:
    """The loss of one photograph's prediction, and its gradient."""
    keys = photograph.keys.astype(np.float64)
    logits = keys @ values[:-1] + values[-1]
    own = (logits > 0).reshape(photograph.grid)
    solved, used = photograph.solved(own)
    terms: list[tuple[float, Any]] = [(SOLVER_WEIGHT, solved)] if used else []
    terms.append((1.0, photograph.foreground) if early else (OWN_WEIGHT, own))
    shares = 1 / (1 + np.exp(-logits))
    loss, slope = 0.0, np.zeros_like(logits)
    for weight, target in terms:
        wanted = target.ravel().astype(np.float64)
        loss += weight * float((np.logaddexp(0, logits) - wanted * logits).mean())
        slope += weight * (shares - wanted) / len(logits)
    return loss, np.append(slope @ keys, slope.sum())


class _AdamW:
    """Adam with decoupled decay, in place."""

    def __init__(self, values: Double, rate: float) -> None:
        self._values, self._rate = values, rate
        self._first, self._second = np.zeros_like(values), np.zeros_like(values)

    def step(self, gradient: Double, number: int) -> None:
        rate = self._rate * DECAY ** (number // DECAY_EVERY)
        self._values *= 1 - rate * WEIGHT_DECAY
        self._first += (1 - MOMENTS[0]) * (gradient - self._first)
        self._second += (1 - MOMENTS[1]) * (gradient**2 - self._second)
        mean, spread = (
            moment / (1 - share ** (number + 1))
            for moment, share in zip((self._first, self._second), MOMENTS, strict=True)
        )
        self._values -= rate * mean / (np.sqrt(spread) + TINY)
