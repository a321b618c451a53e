"""Bounds on cosines from a few numbers per descriptor, so that most of the cosines need not be computed.

A unit descriptor is split into its part in a small subspace, ``short``, and the length of the ``rest``. By Cauchy and
Schwarz the cosine of two lies within the product of their rests of the product of their short parts, whatever the
subspace; the nearer the descriptors lie to it, the closer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.parallel import one_blas_thread

Float = NDArray[np.float32]

NORM_FLOOR = 1e-12  # a descriptor of length zero has cosine 0 with everything, as in torch's normalize
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128)  # of the subspace; at most half of the channels
RESIDUAL = 0.005  # mean square of the rest, as a share of the mean of 1 - cosine, that is worth it
ROUNDING = 1e-6  # of a rest's length: unit lengths and products in float32 are off by less
SAMPLES = 4096  # cells at most that the subspace is fitted to


@dataclass(frozen=True)
class Subspace:
    """Directions ``(C, r)``, orthonormal, along which descriptors of a clip vary most; r may be 0: none is worth it."""

    directions: Float = field(repr=False)

    @classmethod
    def fit(cls, values: Float) -> Subspace:
        """The smallest that holds nearly all of descriptors ``values (grid_h, grid_w, C)``."""
        rows = unit(values).reshape(values.shape[0] * values.shape[1], values.shape[2])
        rows = rows[:: max(1, len(rows) // SAMPLES)].astype(np.float64)
        channels = rows.shape[1]
        none = cls(np.zeros((channels, 0), np.float32))
        if channels < 2 * WIDTHS[0] or len(rows) < 2 * WIDTHS[0]:
            return none
        with one_blas_thread:
            energies, directions = np.linalg.eigh(rows.T @ rows / len(rows))  # ascending
        spread = energies.sum() - np.square(rows.mean(axis=0)).sum()  # mean of 1 - cosine over all pairs
        for width in WIDTHS:
            if 2 * width <= channels and energies[:-width].sum() <= RESIDUAL * spread:
                return cls(np.ascontiguousarray(directions[:, -width:], np.float32))
        return none

    @property
    def width(self) -> int:
        """Number of directions."""
        return int(self.directions.shape[1])


@dataclass(frozen=True)
class Descriptors:
    """A frame's descriptors.

    Attributes:
        unit: ``(grid_h, grid_w, C)`` float32 of length 1, or 0.
        short: ``(grid_h, grid_w, r + 1)``: their part in the subspace, and the length of the rest.
    """

    unit: Float = field(repr=False)
    short: Float = field(repr=False)

    @classmethod
    def of(cls, values: Float, subspace: Subspace) -> Descriptors:
        """Those of ``values (grid_h, grid_w, C)``."""
        rows = unit(values)
        short = np.empty((*rows.shape[:2], subspace.width + 1), np.float32)
        with one_blas_thread:
            np.matmul(rows, subspace.directions, out=short[..., :-1])
            rest = rows - np.matmul(short[..., :-1], subspace.directions.T)
        short[..., -1] = np.sqrt(squared(np.asarray(rest, np.float32))) + np.float32(ROUNDING)
        return cls(rows, short)


def unit(values: Float) -> Float:
    """``values (grid_h, grid_w, C)`` with length 1 each."""
    return np.asarray(values / np.maximum(np.sqrt(squared(values)), np.float32(NORM_FLOOR))[..., None])


def squared(values: Float) -> Float:
    """Squared lengths of ``values (grid_h, grid_w, C)``, ``(grid_h, grid_w)``."""
    return np.asarray(np.einsum("yxc,yxc->yx", values, values))
