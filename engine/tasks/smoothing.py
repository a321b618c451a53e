"""Steady decisions over a clip: scores of cells averaged over frames before the best label is taken."""

from __future__ import annotations

import math

import numpy as np

from facetrt.engine.features.features import Float
from facetrt.kernels.errors import InputError


class Smoother:
    """Exponential average of what a model's labels cost each cell; one for each video and model.

    Cells that waver between two labels settle, and a change shows a little later: where the new frames are as clear as
    the old ones, the ``lag``-th of them decides. Cells are compared in place, so a moving camera should have a small
    ``decay``. Memory is that of one frame's scores.

    Args:
        decay: weight of the past, from 0 (none) to below 1.

    Raises:
        InputError: ``decay`` out of range.
    """

    def __init__(self, decay: float = 0.6) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay={decay}: expected 0 (each frame alone) to below 1")
        self.decay = decay
        self._mean: Float | None = None

    @property
    def lag(self) -> int:
        """After so many frames a change of equal strength has won: the smallest n with ``decay ** n`` below 1/2."""
        return 1 if self.decay == 0 else math.floor(math.log(0.5) / math.log(self.decay)) + 1

    def smooth(self, energy: Float) -> Float:
        """``energy (labels, grid_h, grid_w)`` of a frame, averaged with that of the frames before it.

        A frame of another shape begins anew.

        Raises:
            InputError: NaN or infinite values, which no later frame would get rid of; the frame is not counted.
        """
        if not np.isfinite(energy).all():
            raise InputError("the scores of a frame hold NaN or infinite values: expected finite ones; leave it out")
        if self._mean is None or self._mean.shape != energy.shape:
            self._mean = np.array(energy, np.float32)
        else:
            self._mean += np.float32(1 - self.decay) * (energy - self._mean)
        return self._mean.copy()

    def reset(self) -> None:
        """Forget all frames, as after a cut."""
        self._mean = None
