"""How a piece of one descriptor map lies in another: sub-cell position, turn and zoom."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Float
from facetrt.engine.video.descriptor_maps import DescriptorMap, Positions, Shapes, bilinear
from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.parallel import one_blas_thread
from facetrt.kernels.tracking import (
    DAMPING,
    ITERATIONS,
    LARGEST_STEP,
    LARGEST_TURN,
    SAMPLES,
    SIGMA,
    SMALLEST_STEP,
    SPREAD,
)

HALF_RIGHT, HALF_DOWN = np.array([0.5, 0.0]), np.array([0.0, 0.5])
CHUNK_BYTES = 2 << 20  # of samples, residuals and slopes, that are worked on at a time

SIDE = SPREAD * (np.arange(SAMPLES) - SAMPLES // 2)  # cells
OFFSETS = np.stack(np.meshgrid(SIDE, SIDE), axis=-1).reshape(-1, 2)  # (k, 2)
FALLOFF = np.exp(-np.square(OFFSETS).sum(axis=1) / (2 * SIGMA**2))  # (k,)


@dataclass(frozen=True)
class Patches:
    """Pieces of a map around points: ``samples (n, k, C)`` float32 and ``weights (n, k)``, 0 outside the grid."""

    samples: Float = field(repr=False)
    weights: NDArray[np.float64] = field(repr=False)

    @classmethod
    def around(cls, seen: DescriptorMap, positions: Positions) -> Patches:
        """Those around ``positions (n, 2)``."""
        points = positions[:, None] + OFFSETS
        return cls(bilinear(seen.values, points), FALLOFF * _inside(points, seen.grid))

    def only(self, index: NDArray[np.int64]) -> Patches:
        """The patches of some points."""
        return Patches(self.samples[index], self.weights[index])


@dataclass(frozen=True)
class Slopes:
    """How a map changes from cell to cell: ``values`` itself, ``right (grid_h, grid_w + 1, C)`` and ``down``.

    Half a cell to either side of a position, the map differs by what these have half a cell further on.
    """

    values: Float = field(repr=False)
    right: Float = field(repr=False)
    down: Float = field(repr=False)

    @classmethod
    def of(cls, seen: DescriptorMap) -> Slopes:
        """Those of a map; beyond its border nothing changes."""
        values, (height, width) = seen.values, seen.grid
        right = np.zeros((height, width + 1, values.shape[2]), np.float32)
        down = np.zeros((height + 1, width, values.shape[2]), np.float32)
        np.subtract(values[:, 1:], values[:, :-1], out=right[:, 1:-1])
        np.subtract(values[1:], values[:-1], out=down[1:-1])
        return cls(values, right, down)

    @property
    def grid(self) -> tuple[int, int]:
        """``(grid_h, grid_w)``."""
        return self.values.shape[0], self.values.shape[1]

    def at(self, points: Positions) -> tuple[Float, Float]:
        """Differences in x and in y over a cell around ``points (n, k, 2)``, ``(n, k, C)`` each."""
        return bilinear(self.right, points + HALF_RIGHT), bilinear(self.down, points + HALF_DOWN)


@dataclass(frozen=True)
class Alignment:
    """Result of :func:`align`: ``positions (n, 2)``, ``shapes (n, 2, 2)``, and the windows' cosine ``(n,)``."""

    positions: Positions
    shapes: Shapes
    similarity: NDArray[np.float64]


def align(patches: Patches, slopes: Slopes, start: Positions, shapes: Shapes) -> Alignment:
    """Move, turn and zoom each patch until it lies best on another map.

    Gauss–Newton on the squared difference of the descriptors, four unknowns for each point (Baker and Matthews,
    "Lucas–Kanade 20 years on"), with Gaussian weights; what lies outside either grid does not count. Each channel's
    mean difference over the window does not count either: turning or lighting an image changes descriptors evenly, and
    that would pull the window aside (after ten shifts, 0.19 cells in the median instead of 0.07).

    Args:
        slopes: of the map that the patches are looked for in.
        start: ``(n, 2)`` about where the patches' middles are in it.
        shapes: ``(n, 2, 2)`` about how the patches' surroundings are turned and zoomed in it.
    """
    positions, shapes, similarity = start.copy(), shapes.copy(), np.zeros(len(start))
    count = max(1, CHUNK_BYTES // (4 * patches.samples[:1].size * 4))
    with one_blas_thread:
        for first in range(0, len(start), count):
            index = np.arange(first, min(first + count, len(start)))
            moving = index
            for _ in range(ITERATIONS):
                step = _gauss_newton(patches.only(moving), slopes, positions[moving], shapes[moving])
                positions[moving] += np.clip(step[:, :2], -LARGEST_STEP, LARGEST_STEP)
                shapes[moving] = _turned(step[:, 2:]) @ shapes[moving]
                rim = np.abs(step) @ [1, 1, SIDE[-1], SIDE[-1]]
                moving = moving[rim > SMALLEST_STEP]
                if not moving.size:
                    break
            similarity[index] = _cosine(patches.only(index), slopes, positions[index], shapes[index])
    return Alignment(positions, shapes, similarity)


def _turned(step: NDArray[np.float64]) -> Shapes:
    """The change of shape by ``step (n, 2)``, growth and turn."""
    grow, turn = np.clip(step, -LARGEST_TURN, LARGEST_TURN).T
    return np.stack([1 + grow, -turn, turn, 1 + grow], axis=1).reshape(-1, 2, 2)


def _gauss_newton(patches: Patches, slopes: Slopes, positions: Positions, shapes: Shapes) -> NDArray[np.float64]:
    """One step ``(n, 4)``: move in x and y, growth, turn.

    A sample's four slopes are sums of its differences in x and y, so that of the channels only the products of those
    two, with each other and with the residual, are needed, and the means over the window.
    """
    around = OFFSETS @ np.swapaxes(shapes, 1, 2)  # (n, k, 2)
    points = positions[:, None] + around
    weights = patches.weights * _inside(points, slopes.grid)
    residual = bilinear(slopes.values, points)
    np.subtract(patches.samples, residual, out=residual)  # (n, k, C)
    changes = slopes.at(points)
    parts = _parts(around)
    total = np.maximum(weights.sum(axis=1), np.finfo(np.float32).tiny)[:, None, None]
    shares = weights[:, None] / total  # (n, 1, k)
    mean_slopes = sum((parts[:, :, i] * shares).astype(np.float32) @ changes[i] for i in (0, 1))  # (n, 4, C)
    mean_residual = shares.astype(np.float32) @ residual  # (n, 1, C)
    normal = _products(changes, parts, shares) - mean_slopes @ np.swapaxes(mean_slopes, 1, 2)
    target = _crossed(changes, residual, parts, shares) - mean_slopes @ np.swapaxes(mean_residual, 1, 2)
    damping = DAMPING * np.trace(normal, axis1=1, axis2=2) / 4 + np.finfo(np.float32).tiny
    normal += damping[:, None, None] * np.eye(4)
    return np.asarray(np.linalg.solve(normal, target)[..., 0])


def _parts(around: Positions) -> NDArray[np.float64]:
    """Moves in x and y, growth and turn as sums of the differences in x and in y, ``(n, 4, 2, k)``."""
    x, y = np.moveaxis(around, -1, 0)
    one, none = np.ones_like(x), np.zeros_like(x)
    return np.stack([one, none, none, one, x, y, -y, x], axis=1).reshape(len(x), 4, 2, -1)


def _products(
    changes: tuple[Float, Float], parts: NDArray[np.float64], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Products of the four slopes with each other, summed over channels and, by ``shares (n, 1, k)``, over samples."""
    x, y = changes
    xx, xy, yy = (np.einsum("nkc,nkc->nk", a, b)[:, None] * shares for a, b in ((x, x), (x, y), (y, y)))
    of_x, of_y = parts[:, :, 0], parts[:, :, 1]  # (n, 4, k)
    in_x, in_y = of_x * xx + of_y * xy, of_x * xy + of_y * yy
    return np.asarray(in_x @ np.swapaxes(of_x, 1, 2) + in_y @ np.swapaxes(of_y, 1, 2))


def _crossed(
    changes: tuple[Float, Float], residual: Float, parts: NDArray[np.float64], shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Products of the four slopes with the residual, summed likewise, ``(n, 4, 1)``."""
    crossed = [np.einsum("nkc,nkc->nk", side, residual)[:, None] * shares for side in changes]
    of_x, of_y = parts[:, :, 0], parts[:, :, 1]
    return np.asarray((of_x * crossed[0] + of_y * crossed[1]).sum(axis=2, keepdims=True))


def _inside(positions: Positions, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which of ``positions (…, 2)`` lie between the outermost cells' centres."""
    limits = np.array(grid[::-1]) - 1
    return np.asarray(((positions >= 0) & (positions <= limits)).all(axis=-1))


def _cosine(patches: Patches, slopes: Slopes, positions: Positions, shapes: Shapes) -> NDArray[np.float64]:
    """Cosine of the patches and what they lie on, ``(n,)``."""
    points = positions[:, None] + OFFSETS @ np.swapaxes(shapes, 1, 2)
    weights = patches.weights * _inside(points, slopes.grid)
    a, b = patches.samples, bilinear(slopes.values, points)
    dots, squares_a, squares_b = (
        (np.einsum("nkc,nkc->nk", left, right) * weights).sum(axis=1) for left, right in ((a, b), (a, a), (b, b))
    )
    return np.asarray(dots / np.maximum(np.sqrt(squares_a * squares_b), NORM_FLOOR))
