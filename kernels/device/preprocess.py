"""Images of the loaded size from decoded ones, on the device, and encoder inputs from them.

The resize is Pillow's Lanczos for 8-bit pixels to the last bit (``Resample.c``): one pass for each side that changes,
weights rounded to 22 binary digits, 8-bit pixels in between. Weights are made on the host, in float64 as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import __version__ as PILLOW

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError

BLOCK = 256  # (pixel, channel) pairs per program
BLOCK_ROWS = 4
SUPPORT = 3.0  # of the Lanczos filter, in pixels of the smaller image
ONE = 1 << 22  # a weight of 1

_TABLES = (("starts", "*i32"), ("counts", "*i32"), ("weights", "*i32"))

COLUMNS = Program(
    name="resize_columns",
    source="preprocess:resize_columns",
    arguments=(("images", "*u8"), *_TABLES, ("out", "*u8"),
               ("top", "i32"), ("height", "i32"), ("rows", "i32"), ("width", "i32"), ("out_width", "i32")),
    constants={"BLOCK_ROWS": BLOCK_ROWS, "BLOCK": BLOCK},
)  # fmt: skip

_ROW_SIZES = (("top", "i32"), ("rows", "i32"), ("out_height", "i32"), ("width", "i32"))

ROWS = Program(
    name="resize_rows",
    source="preprocess:resize_rows",
    arguments=(("images", "*u8"), *_TABLES, ("out", "*u8"), *_ROW_SIZES),
    constants={"BLOCK": BLOCK},
)


def _normalising(kind: str) -> Program:
    return Program(
        name=f"resize_rows_{kind}",
        source="preprocess:resize_rows_normalised",
        arguments=(("images", "*u8"), *_TABLES, ("table", f"*{kind}"), ("out", f"*{kind}"), *_ROW_SIZES),
        constants={"BLOCK": BLOCK},
    )


NORMALISED = {np.dtype(np.float16): _normalising("fp16"), np.dtype(np.float32): _normalising("fp32")}
PROGRAMS = (COLUMNS, ROWS, *NORMALISED.values())


@dataclass(frozen=True)
class Weights:
    """One pass along a side: output ``i`` is the sum of ``weights[t, i] · input[starts[i] + t]`` for t < ``counts[i]``.

    ``starts`` and ``counts`` ``(out,)`` int32, ``weights (taps, out)`` int32 in units of 2^-22.
    """

    starts: NDArray[np.int32]
    counts: NDArray[np.int32]
    weights: NDArray[np.int32]


@lru_cache(maxsize=256)
def lanczos_weights(size: int, out_size: int) -> Weights:
    """Pillow's weights from ``size`` to ``out_size`` pixels; a pass that changes nothing for equal sizes.

    The C library's sine and additions one after the other, as in Pillow: a last digit can decide a rounding.
    """
    if size == out_size:
        once = np.ones(size, np.int32)
        return Weights(np.arange(size, dtype=np.int32), once, (once * ONE)[None])
    scale = size / out_size
    stretch = max(scale, 1.0)
    support = SUPPORT * stretch
    centres = (np.arange(out_size) + 0.5) * scale
    starts = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    counts = np.minimum((centres + support + 0.5).astype(np.int64), size) - starts
    taps = np.arange(counts.max())[:, None]
    found = _lanczos((taps + starts - centres + 0.5) * (1.0 / stretch))
    found[taps >= counts] = 0.0
    totals = np.add.accumulate(found, axis=0)[-1]
    found /= np.where(totals == 0.0, 1.0, totals)
    rounded = np.trunc(found * ONE + np.copysign(0.5, found)).astype(np.int32)
    return Weights(starts.astype(np.int32), counts.astype(np.int32), rounded)


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((x >= -SUPPORT) & (x < SUPPORT), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: NDArray[np.float64]) -> NDArray[np.float64]:
    angles = (x * math.pi).ravel()
    sines = np.fromiter(map(math.sin, angles.tolist()), np.float64, angles.size)
    return np.divide(sines, angles, out=np.ones_like(sines), where=angles != 0.0).reshape(x.shape)


def normalisation_table(mean: Sequence[float], std: Sequence[float], dtype: DTypeLike) -> NDArray[np.floating]:
    """``(3, 256)``: (pixel / 255 - mean) / std for each channel and 8-bit value, in float32 and then rounded."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"mean {mean} and std {std}: expected three numbers each, the deviations positive")
    if np.dtype(dtype) not in NORMALISED:
        raise InputError(f"encoder input of type {np.dtype(dtype)}: expected float16 or float32")
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    columns = [np.asarray(values, np.float32)[:, None] for values in (mean, std)]
    table: NDArray[np.floating] = ((levels - columns[0]) / columns[1]).astype(dtype)
    return table


def vertical_first(original: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether Pillow resizes the height before the width; the 8-bit pixels in between make that a difference.

    Until version 12 the width always comes first; since 13 the height does if it shrinks by more than twice as many
    pixels as the width.
    """
    shrinks = original[0] - size[0]
    return int(PILLOW.partition(".")[0]) >= 13 and shrinks > 0 and shrinks > 2 * (original[1] - size[1])


@dataclass(frozen=True)
class _Pass:
    """Weights of one side on the device, and how many rows or columns of the input they use, from which one on."""

    arrays: tuple[DeviceArray, DeviceArray, DeviceArray]
    first: int
    used: int

    @classmethod
    def upload(cls, device: Device, weights: Weights) -> _Pass:
        arrays = device.upload(weights.starts), device.upload(weights.counts), device.upload(weights.weights)
        first = int(weights.starts[0])
        return cls(arrays, first, int(weights.starts[-1] + weights.counts[-1]) - first)


class Resizer:
    """A resize from one size to another, with its weights on the device; made once and reused.

    Args:
        device: where the images are.
        original: ``(height, width)`` of the images that will come.
        size: ``(height, width)`` they become.

    Raises:
        InputError: a side below one pixel.
    """

    def __init__(self, device: Device, original: tuple[int, int], size: tuple[int, int]) -> None:
        if min(*original, *size) < 1:
            raise InputError(f"a resize from {original} to {size}: expected (height, width) of at least one pixel each")
        self.original, self.size = original, size
        self._device = device
        self._vertical_first = vertical_first(original, size)
        self._rows = _Pass.upload(device, lanczos_weights(original[0], size[0]))
        self._columns = _Pass.upload(device, lanczos_weights(original[1], size[1]))
        self._same_rows = _Pass.upload(device, lanczos_weights(size[0], size[0])) if self._vertical_first else None

    def resize(self, images: DeviceArray) -> DeviceArray:
        """``(B, height, width, 3)`` uint8 at the new size, equal to Pillow's; ``images`` itself at its own size."""
        self._check(images)
        if self._vertical_first:
            return self._resize_columns(self._resize_rows(images, 0), 0, self.size[0])
        top, rows = self._band
        return self._resize_rows(self._resize_columns(images, top, rows), top)

    def normalised(self, images: DeviceArray, table: DeviceArray) -> DeviceArray:
        """Encoder input ``(B, 3, height, width)`` at the new size, of the type of ``table``.

        Args:
            images: ``(B, height, width, 3)`` uint8 at the original size.
            table: ``(3, 256)``, an upload of :func:`normalisation_table`.
        """
        self._check(images)
        out = self._device.empty((len(images), 3, *self.size), table.dtype)
        program = NORMALISED[table.dtype]
        if self._same_rows is not None:  # the horizontal pass came last
            self._launch_rows(program, self.resize(images), 0, self._same_rows, table, out)
        else:
            top, rows = self._band
            self._launch_rows(program, self._resize_columns(images, top, rows), top, self._rows, table, out)
        return out

    @property
    def _band(self) -> tuple[int, int]:
        """First and number of the rows that the vertical pass needs of the horizontal one."""
        if self.original[1] == self.size[1]:
            return 0, self.original[0]  # there is no horizontal pass
        return self._rows.first, self._rows.used

    def _check(self, images: DeviceArray) -> None:
        if images.shape[1:] != (*self.original, 3):
            raise InputError(f"images of shape {images.shape}: expected (B, {self.original[0]}, {self.original[1]}, 3)")

    def _resize_columns(self, images: DeviceArray, top: int, rows: int) -> DeviceArray:
        """The given rows of the images at the new width."""
        (batch, height, width, _), out_width = images.shape, self.size[1]
        if width == out_width:
            return images
        out = self._device.empty((batch, rows, out_width, 3), np.uint8)
        if batch:
            grid = (-(-out_width * 3 // BLOCK), -(-rows // BLOCK_ROWS), batch)
            self._device.launch(COLUMNS, grid, images, *self._columns.arrays, out, top, height, rows, width, out_width)
        return out

    def _resize_rows(self, pixels: DeviceArray, top: int) -> DeviceArray:
        """Images of the new height from images whose first row is row ``top`` of the originals."""
        if self.original[0] == self.size[0]:
            return pixels
        out = self._device.empty((len(pixels), self.size[0], pixels.shape[2], 3), np.uint8)
        self._launch_rows(ROWS, pixels, top, self._rows, out)
        return out

    def _launch_rows(
        self, program: Program, pixels: DeviceArray, top: int, weights: _Pass, *targets: DeviceArray
    ) -> None:
        (batch, rows, width, _), height = pixels.shape, self.size[0]
        if batch:
            grid = (-(-width * 3 // BLOCK), height, batch)
            self._device.launch(program, grid, pixels, *weights.arrays, *targets, top, rows, height, width)


def resize(device: Device, images: DeviceArray, size: tuple[int, int]) -> DeviceArray:
    """``(B, height, width, 3)`` uint8 images at another size, equal to Pillow's Lanczos; see :class:`Resizer`."""
    return _resizer(device, images, size).resize(images)


def normalise(
    device: Device, images: DeviceArray, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> DeviceArray:
    """(pixel / 255 - mean) / std of ``(B, h, w, 3)`` uint8 images, as ``(B, 3, h, w)`` float16 or float32."""
    return preprocess(device, images, images.shape[1:3], mean, std, dtype)  # type: ignore[arg-type]


def preprocess(
    device: Device,
    images: DeviceArray,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike,
) -> DeviceArray:
    """:func:`resize` to ``(height, width)`` and :func:`normalise`, in one pass where the height is resized last."""
    table = device.upload(normalisation_table(mean, std, dtype))
    return _resizer(device, images, size).normalised(images, table)


def _resizer(device: Device, images: DeviceArray, size: tuple[int, int]) -> Resizer:
    if len(images.shape) != 4 or images.shape[3] != 3:
        raise InputError(f"images of shape {images.shape}: expected (B, height, width, 3) uint8")
    return Resizer(device, (images.shape[1], images.shape[2]), size)
