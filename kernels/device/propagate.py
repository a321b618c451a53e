"""Label propagation of :mod:`facetrt.kernels.propagate` on a device."""

from __future__ import annotations

import numpy as np

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError
from facetrt.kernels.short_descriptors import NORM_FLOOR

TILE = 8  # side of the square of target cells that share their candidates: 61 % of the cosines count at radius 12
CANDIDATES = 64
STEP = 32  # channels of a product
SLOTS = 32  # the largest topk
LABELS = 16  # of a program instance; each further one repeats the cosines
ROWS = 16  # rows whose length a program instance computes
LENGTH_STEP = 128

KINDS = {np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32"}


def _lengths_program(kind: str) -> Program:
    return Program(
        f"propagate_lengths_{kind}",
        "propagate:inverse_lengths",
        (("values", f"*{kind}"), ("out", "*fp32"), ("count", "i32"), ("channels", "i32"), ("floor", "fp32")),
        {"ROWS": ROWS, "STEP": LENGTH_STEP},
        divisible=("channels",),
    )


def _propagate_program(kind: str) -> Program:
    arrays = (("target", f"*{kind}"), ("context", f"*{kind}"), ("target_scale", "*fp32"), ("context_scale", "*fp32"))
    sizes = ("frames", "grid_h", "grid_w", "channels", "num_labels", "radius", "topk")
    return Program(
        f"propagate_{kind}",
        "propagate:propagate",
        (
            *arrays,
            ("labels", "*fp32"),
            ("out", "*fp32"),
            *((size, "i32") for size in sizes),
            ("temperature", "fp32"),
        ),
        {"TILE": TILE, "CANDIDATES": CANDIDATES, "STEP": STEP, "SLOTS": SLOTS, "LABELS": LABELS},
        divisible=("channels",),
        warps=8,
    )


_LENGTHS = {dtype: _lengths_program(kind) for dtype, kind in KINDS.items()}
_PROPAGATE = {dtype: _propagate_program(kind) for dtype, kind in KINDS.items()}

PROGRAMS = (*_LENGTHS.values(), *_PROPAGATE.values())


def propagate(
    device: Device,
    features: DeviceArray,
    context_features: DeviceArray,
    context_labels: DeviceArray,
    *,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> DeviceArray:
    """Soft labels of a frame's cells from those of its context frames.

    Memory beyond the arguments and the result is one float per cell. Ties at the smallest kept cosine are all kept.

    Args:
        features: ``(grid_h, grid_w, C)`` float16 or float32, finite, C a multiple of 16; need not be normalised.
        context_features: ``(frames, grid_h, grid_w, C)`` of the same type.
        context_labels: ``(frames, grid_h, grid_w, labels)`` float32.
        radius: rows and columns, in cells, that a context cell may lie away from the target cell.
        topk: how many context cells a target cell listens to, over all context frames together; 1 to 32.
        temperature: divides the cosine in the exponent.

    Returns:
        ``(grid_h, grid_w, labels)`` float32.

    Raises:
        InputError: wrong shapes or types, no context frame, an option out of range.
    """
    _check_options(radius, topk, temperature)
    _check_arrays(features, context_features, context_labels)
    frames, grid_h, grid_w, channels = context_features.shape
    num_labels = context_labels.shape[3]
    out = device.empty((grid_h, grid_w, num_labels), np.float32)
    scales = (_inverse_lengths(device, features), _inverse_lengths(device, context_features))
    grid = (-(-grid_h // TILE) * -(-grid_w // TILE), -(-num_labels // LABELS))
    radius = min(radius, max(grid_h, grid_w))  # more reaches no further cell
    sizes = (frames, grid_h, grid_w, channels, num_labels, radius, topk)
    arrays = (features, context_features, *scales, context_labels, out)
    device.launch(_PROPAGATE[features.dtype], grid, *arrays, *sizes, temperature)
    return out


def _inverse_lengths(device: Device, values: DeviceArray) -> DeviceArray:
    """One float32 per descriptor of ``values (…, C)``."""
    channels = values.shape[-1]
    out = device.empty(values.shape[:-1], np.float32)
    grid = (-(-out.size // ROWS),)
    device.launch(_LENGTHS[values.dtype], grid, values, out, out.size, channels, NORM_FLOOR)
    return out


def _check_options(radius: int, topk: int, temperature: float) -> None:
    if radius < 0 or not 1 <= topk <= SLOTS or not temperature > 0:
        raise InputError(
            f"radius={radius}, topk={topk}, temperature={temperature}: expected a radius of at least 0 cells, a topk "
            f"of 1 to {SLOTS} and a positive temperature"
        )


def _check_arrays(features: DeviceArray, context_features: DeviceArray, context_labels: DeviceArray) -> None:
    shape = features.shape
    if len(shape) != 3 or not features.size or shape[2] % 16 or features.dtype not in KINDS:
        raise InputError(
            f"features are {features.dtype} {shape}: expected (grid_h, grid_w, C) float16 or float32, C a multiple "
            "of 16"
        )
    context = context_features
    if len(context.shape) != 4 or not context.size or context.shape[1:] != shape or context.dtype != features.dtype:
        raise InputError(
            f"context features are {context.dtype} {context.shape}: expected (frames, {shape[0]}, {shape[1]}, "
            f"{shape[2]}) {features.dtype} like the features, at least one frame"
        )
    labels = context_labels
    if labels.shape[:-1] != context.shape[:-1] or not labels.size or labels.dtype != np.float32:
        raise InputError(
            f"context labels are {labels.dtype} {labels.shape}: expected {(*context.shape[:3], 'labels')} float32"
        )
