"""Turning labels of cells into labels of pixels on a device: enlarging, the dense CRF, masks.

GrabCut is not here: its graph cuts are sequential and stay OpenCV's, on the host.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.device.dense_crf import mean_field, upload_lattices
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError
from facetrt.kernels.nearest import centre_indices, corner_indices

BLOCK = 256


def _enlarge_program(name: str, kind: str) -> Program:
    arrays = (("values", kind), ("rows", "*i32"), ("columns", "*i32"), ("out", kind))
    sizes = (("grid_h", "i32"), ("grid_w", "i32"), ("height", "i32"), ("width", "i32"))
    return Program(name, "refine:enlarge", (*arrays, *sizes), {"BLOCK": BLOCK})


_ENLARGE = {
    np.dtype(np.float32): _enlarge_program("refine_enlarge_fp32", "*fp32"),
    np.dtype(np.uint8): _enlarge_program("refine_enlarge_u8", "*u8"),
}
_BEST_LABEL = Program(
    "refine_best_label",
    "refine:best_label",
    (("scores", "*fp32"), ("out", "*i32"), ("sign", "fp32"), ("num_labels", "i32"), ("num_pixels", "i32")),
    {"BLOCK": BLOCK},
)
PROGRAMS = (*_ENLARGE.values(), _BEST_LABEL)


def enlarge_labels(device: Device, values: DeviceArray, size: tuple[int, int]) -> DeviceArray:
    """``(planes, grid_h, grid_w)`` float32 or uint8 to ``(planes, height, width)``: nearest by torch's rule."""
    rows, columns = corner_indices(values.shape[-2], size[0]), corner_indices(values.shape[-1], size[1])
    return _enlarge(device, values, rows, columns)


def enlarge_mask(device: Device, mask: DeviceArray, size: tuple[int, int]) -> DeviceArray:
    """``(grid_h, grid_w)`` uint8 to ``(height, width)``: nearest by Pillow's rule."""
    rows, columns = centre_indices(mask.shape[-2], size[0]), centre_indices(mask.shape[-1], size[1])
    return _enlarge(device, mask.reshape(1, *mask.shape), rows, columns).reshape(*size)


def best_label(device: Device, scores: DeviceArray, *, smallest: bool = False) -> DeviceArray:
    """The label of the largest, or smallest, of ``scores (labels, …)`` float32: ``(…)`` int32, first on ties."""
    if not scores.size or scores.dtype != np.float32:
        raise InputError(f"scores are {scores.dtype} {scores.shape}: expected (labels, …) float32, at least one")
    labels, shape = scores.shape[0], scores.shape[1:]
    found = device.empty(shape, np.int32)
    device.launch(_BEST_LABEL, (_blocks(found.size),), scores, found, -1.0 if smallest else 1.0, labels, found.size)
    return found


def refine_labels(device: Device, pixels: NDArray[np.uint8], energy: DeviceArray) -> DeviceArray:
    """Labels of pixels from energies of cells, by the dense CRF with its default scales and weights.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB in host memory, where the lattices are built.
        energy: ``(labels, grid_h, grid_w)`` float32, finite, smaller is better; adding the same to all labels of a cell
            changes nothing.

    Returns:
        ``(H, W)`` int32, the winning label.

    Raises:
        InputError: shape or type of an argument.
    """
    if len(energy.shape) != 3 or energy.dtype != np.float32 or not energy.size:
        raise InputError(f"energy is {energy.dtype} {energy.shape}: expected (labels, grid_h, grid_w) float32")
    lattices = upload_lattices(device, pixels)
    height, width = pixels.shape[:2]
    large = enlarge_labels(device, energy, (height, width)).reshape(energy.shape[0], height * width)
    return best_label(device, mean_field(device, large, lattices)).reshape(height, width)


def _enlarge(device: Device, values: DeviceArray, rows: NDArray[np.int32], columns: NDArray[np.int32]) -> DeviceArray:
    if len(values.shape) != 3 or not values.size or values.dtype not in _ENLARGE:
        raise InputError(
            f"values are {values.dtype} {values.shape}: expected (planes, grid_h, grid_w) float32 or uint8, not empty"
        )
    planes, grid_h, grid_w = values.shape
    large = device.empty((planes, len(rows), len(columns)), values.dtype)
    indices = (device.upload(rows), device.upload(columns))
    sizes = (grid_h, grid_w, len(rows), len(columns))
    blocks = _blocks(len(rows) * len(columns))
    device.launch(_ENLARGE[values.dtype], (blocks, planes), values, *indices, large, *sizes)
    return large


def _blocks(count: int) -> int:
    return -(-count // BLOCK)
