"""Points followed on the device: what :mod:`facetrt.engine.video.tracking` does with maps, a launch for each step.

Descriptors stay: positions and shapes, a few numbers for each point, are all that need to go up or come down. Searches
compare a point with every cell, not from coarse to fine as the host does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from facetrt.kernels import tracking
from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.device.best_buddies import binned_norms
from facetrt.kernels.device.log_bin import check_map, pool_level
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import bin_offsets
from facetrt.kernels.products import TIE

BINS = len(bin_offsets(tracking.HIERARCHY))
SAMPLES = tracking.SAMPLES**2  # of a patch

_KINDS = {np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32"}
_CENTRE = {"ROWS": 8, "BLOCK": 128}
_SCORES = {"BLOCK_POINTS": 16, "BLOCK_CELLS": 64, "BLOCK_CHANNELS": 32}
_PATCH_CHANNELS = 64
_GRID = (("grid_h", "i32"), ("grid_w", "i32"))
_MAP = (*_GRID, ("channels", "i32"))
_PATCH = {"SLOTS": 64, "SIDE": tracking.SAMPLES, "SPREAD": tracking.SPREAD}


def _centre(kind: str) -> Program:
    arrays = (("values", f"*{kind}"), ("mean", "*fp32"), ("previous", "*fp32"), ("out", "*fp32"), ("flags", "*i32"))
    sizes = tuple((name, "i32") for name in ("cells", "channels", "first", "total", "compared"))
    return Program(
        f"track_centre_{kind}",
        "track:centre",
        (*arrays, ("factor", "fp32"), *sizes),
        _CENTRE,
        divisible=("channels", "first", "total"),
    )


CENTRE = {dtype: _centre(kind) for dtype, kind in _KINDS.items()}
BINNED = Program(
    "track_binned",
    "track:binned",
    (("levels", "*fp32"), ("positions", "*fp32"), ("shapes", "*fp32"), ("out", "*fp32"), ("turned", "i32"),
     ("kept", "fp32"), *_MAP),
    {"SLOTS": 32, "BLOCK": 64, "FLOOR": NORM_FLOOR},
    divisible=("channels",),
)  # fmt: skip
SCORES = Program(
    "track_scores",
    "track:scores",
    (("levels", "*fp32"), ("norms", "*fp32"), ("queries", "*fp32"), ("windows", "*i32"), ("out", "*fp32"),
     ("count", "i32"), *_MAP),
    {**_SCORES, "FLOOR": NORM_FLOOR},
    divisible=("channels",),
)  # fmt: skip
PEAKS = Program(
    "track_peaks",
    "track:peaks",
    (("cosines", "*fp32"), ("windows", "*i32"), ("out", "*fp32"), *_GRID),
    {"TIE": TIE, "TEMPERATURE": tracking.PEAK_TEMPERATURE, "BLOCK": 1024},
)
PATCHES = Program(
    "track_patches",
    "track:patches",
    (("values", "*fp32"), ("positions", "*fp32"), ("out", "*fp32"), *_MAP),
    {**_PATCH, "BLOCK": _PATCH_CHANNELS},
    divisible=("channels",),
)
ALIGN = Program(
    "track_align",
    "track:align",
    (("samples", "*fp32"), ("places", "*fp32"), ("rows", "*i32"), ("values", "*fp32"), ("starts", "*fp32"),
     ("shapes", "*fp32"), ("positions", "*fp32"), ("turned", "*fp32"), ("similarity", "*fp32"), ("key_h", "i32"),
     ("key_w", "i32"), *_MAP),
    {
        **_PATCH, "SIGMA": tracking.SIGMA, "BLOCK": 32, "ITERATIONS": tracking.ITERATIONS,
        "LARGEST_STEP": tracking.LARGEST_STEP, "LARGEST_TURN": tracking.LARGEST_TURN,
        "SMALLEST_STEP": tracking.SMALLEST_STEP, "DAMPING": tracking.DAMPING, "FLOOR": NORM_FLOOR,
    },
    divisible=("channels",),
    warps=8,
)  # fmt: skip

PROGRAMS = (*CENTRE.values(), BINNED, SCORES, PEAKS, PATCHES, ALIGN)


@dataclass(frozen=True)
class Part:
    """A facet of a frame: ``values (grid_h, grid_w, C)`` less ``mean (C,)``, times ``factor``, is compared."""

    values: DeviceArray = field(repr=False)
    mean: DeviceArray = field(repr=False)
    factor: float


@dataclass(frozen=True)
class TrackMap:
    """A frame that points are followed to and from.

    Attributes:
        levels: the centred map and its means over 3 × 3 cells, ``(2, grid_h, grid_w, C)`` float32.
        norms: lengths of the binned descriptors that both make, ``(grid_h·grid_w,)`` float32.
    """

    levels: DeviceArray = field(repr=False)
    norms: DeviceArray = field(repr=False)

    @property
    def grid(self) -> tuple[int, int]:
        """``(grid_h, grid_w)``."""
        return self.levels.shape[1], self.levels.shape[2]

    @property
    def channels(self) -> int:
        return self.levels.shape[3]

    def adopt(self, device: Device) -> TrackMap:
        """The same for use on another stream."""
        return TrackMap(device.adopt(self.levels), device.adopt(self.norms))


@dataclass(frozen=True)
class Patches:
    """Surroundings of points: ``samples (N, SAMPLES, C)`` float32 around ``places (N, 2)``, on a map of ``grid``."""

    samples: DeviceArray = field(repr=False)
    places: DeviceArray = field(repr=False)
    grid: tuple[int, int]

    def adopt(self, device: Device) -> Patches:
        """The same for use on another stream."""
        return Patches(device.adopt(self.samples), device.adopt(self.places), self.grid)


@dataclass(frozen=True)
class Aligned:
    """``positions (n, 2)``, ``shapes (n, 2, 2)`` and the windows' cosine ``similarity (n,)``, all float32."""

    positions: DeviceArray
    shapes: DeviceArray
    similarity: DeviceArray


def prepare(device: Device, parts: Sequence[Part], flags: DeviceArray, previous: TrackMap | None = None) -> TrackMap:
    """A frame's map from its facets, whose channels come one after the other.

    Args:
        parts: values float16 or float32, of one grid; C of each a multiple of 16.
        flags: ``(2,)`` int32, zero: the first becomes 1 if a number is not finite, the second if ``previous`` differs.
        previous: a map of the same grid and channels to compare with.

    Raises:
        InputError: wrong shapes or types, too many cells.
    """
    total = _check_parts(parts)
    grid_h, grid_w, _ = parts[0].values.shape
    if 2 * grid_h * grid_w * total >= 1 << 31:
        raise InputError(f"{grid_h} × {grid_w} cells of {total} channels: expected at most 1,073,741,823 numbers")
    if previous is not None and previous.levels.shape[1:] != (grid_h, grid_w, total):
        raise InputError(f"previous is a map {previous.levels.shape[1:]}: expected {(grid_h, grid_w, total)}")
    levels, first = device.empty((2, grid_h, grid_w, total), np.float32), 0
    centred = levels.rows(0, 1)
    for part in parts:
        channels = part.values.shape[2]
        grid = (-(-grid_h * grid_w // _CENTRE["ROWS"]), -(-channels // _CENTRE["BLOCK"]))
        arrays = (part.values, part.mean, levels if previous is None else previous.levels, levels, flags)
        sizes = (grid_h * grid_w, channels, first, total, int(previous is not None))
        device.launch(CENTRE[part.values.dtype], grid, *arrays, part.factor, *sizes)
        first += channels
    pool_level(device, centred, 1, levels.rows(1, 2))
    return TrackMap(levels, binned_norms(device, levels.reshape(-1, total), (grid_h, grid_w), (0, BINS)))


def _check_parts(parts: Sequence[Part]) -> int:
    """How many channels they have together."""
    for part in parts:
        check_map("values", part.values, "(grid_h, grid_w, C)")
        if part.values.shape[:2] != parts[0].values.shape[:2] or part.mean.shape != part.values.shape[2:]:
            raise InputError(
                f"a facet {part.values.shape} with a mean {part.mean.shape}: expected the grid "
                f"{parts[0].values.shape[:2]} of the first and a mean for each channel"
            )
    if not parts or not parts[0].values.size:
        raise InputError(f"{len(parts)} facets were given, or a map without cells: expected at least one of either")
    return sum(part.values.shape[2] for part in parts)


def binned(
    device: Device,
    seen: TrackMap,
    positions: DeviceArray,
    shapes: DeviceArray | None = None,
    mixed_with: DeviceArray | None = None,
) -> DeviceArray:
    """Unit binned descriptors ``(n, BINS, C)`` float32 at ``positions (n, 2)`` float32.

    Args:
        shapes: ``(n, 2, 2)`` float32, which lay out the bins.
        mixed_with: some of another map, into which their means are written.

    Raises:
        InputError: arrays of other shapes.
    """
    count = _check_count(positions, shapes)
    out = device.empty((count, BINS, seen.channels), np.float32) if mixed_with is None else mixed_with
    if out.shape != (count, BINS, seen.channels):
        raise InputError(f"mixed_with has shape {out.shape}: expected {(count, BINS, seen.channels)}")
    kept = 0.0 if mixed_with is None else 0.5
    layout, sizes = positions if shapes is None else shapes, (*seen.grid, seen.channels)
    device.launch(BINNED, (count,), seen.levels, positions, layout, out, int(shapes is not None), kept, *sizes)
    return out


def search(device: Device, seen: TrackMap, queries: DeviceArray, windows: DeviceArray) -> DeviceArray:
    """Where in ``seen`` what is most like each of ``queries (n, BINS, C)`` is, to a fraction of a cell: ``(n, 2)``.

    The first cell that ties with the best one, and a soft-argmax over it and its neighbours. Memory: a float32 for
    each cell and point.

    Args:
        windows: ``(n, 4)`` int32, the first row and column and the last ones of the cells that take part; inside the
            grid.

    Raises:
        InputError: arrays of other shapes.
    """
    count, (grid_h, grid_w) = len(queries), seen.grid
    if queries.shape != (count, BINS, seen.channels) or windows.shape != (count, 4) or not count:
        raise InputError(
            f"queries of shape {queries.shape} and windows {windows.shape}: expected (n, {BINS}, {seen.channels}) and "
            "(n, 4), at least one"
        )
    cosines = device.empty((count, grid_h * grid_w), np.float32)
    grid = (-(-count // _SCORES["BLOCK_POINTS"]) * -(-grid_h * grid_w // _SCORES["BLOCK_CELLS"]),)
    sizes = (count, grid_h, grid_w, seen.channels)
    device.launch(SCORES, grid, seen.levels, seen.norms, queries, windows, cosines, *sizes)
    found = device.empty((count, 2), np.float32)
    device.launch(PEAKS, (count,), cosines, windows, found, grid_h, grid_w)
    return found


def patches(device: Device, seen: TrackMap, positions: DeviceArray) -> Patches:
    """The surroundings of ``positions (N, 2)`` float32 in a map, which :func:`align` lays on another."""
    count = _check_count(positions)
    samples = device.empty((count, SAMPLES, seen.channels), np.float32)
    grid = (count, -(-seen.channels // _PATCH_CHANNELS))
    device.launch(PATCHES, grid, seen.levels, positions, samples, *seen.grid, seen.channels)
    return Patches(samples, positions, seen.grid)


def align(
    device: Device,
    around: Patches,
    rows: DeviceArray,
    seen: TrackMap,
    starts: DeviceArray,
    shapes: DeviceArray,
) -> Aligned:
    """Move, turn and zoom patches until they lie best on another map: :func:`facetrt.engine.video.alignment.align`.

    Args:
        around: the patches, of which those of the numbers ``rows (n,)`` int32 are used.
        starts: ``(n, 2)`` float32 about where their middles are; ``shapes (n, 2, 2)`` about how they are turned.

    Raises:
        InputError: arrays of other shapes.
    """
    count = _check_count(starts, shapes)
    if rows.shape != (count,) or around.samples.shape[2] != seen.channels:
        raise InputError(
            f"rows of shape {rows.shape} for patches of {around.samples.shape[2]} channels: expected {(count,)} and "
            f"{seen.channels}"
        )
    found = [device.empty(shape, np.float32) for shape in ((count, 2), (count, 2, 2), (count,))]
    arrays = (around.samples, around.places, rows, seen.levels, starts, shapes, *found)
    device.launch(ALIGN, (count,), *arrays, *around.grid, *seen.grid, seen.channels)
    return Aligned(*found)


def _check_count(positions: DeviceArray, shapes: DeviceArray | None = None) -> int:
    """How many points there are."""
    count = len(positions)
    if not count or positions.shape != (count, 2) or (shapes is not None and shapes.shape != (count, 2, 2)):
        given = "" if shapes is None else f" and shapes {shapes.shape}"
        raise InputError(f"positions {positions.shape}{given}: expected (n, 2) and (n, 2, 2), at least one")
    return count
