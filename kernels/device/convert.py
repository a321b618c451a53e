"""Small conversions between the encoder's outputs and the operations."""

from __future__ import annotations

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError

BLOCK = 1024
HALF_LIMIT = 65504.0  # largest finite float16

PLACE = Program(
    "convert_place",
    "convert:place",
    (
        ("source", "*u8"),
        ("target", "*u8"),
        ("offset", "i64"),
        ("source_width", "i32"),
        ("height", "i32"),
        ("width", "i32"),
        ("size", "i32"),
    ),
    {"BLOCK": BLOCK},
)
TO_HALF = Program(
    "convert_to_half",
    "convert:to_half",
    (("source", "*fp32"), ("target", "*fp16"), ("size", "i64")),
    {"LIMIT": HALF_LIMIT, "BLOCK": BLOCK},
)
TAKE = Program(
    "convert_take",
    "convert:take",
    (("source", "*fp32"), ("indices", "*i32"), ("target", "*fp32"), ("size", "i32")),
    {"BLOCK": BLOCK},
)
TAKE_INTEGERS = Program(
    "convert_take_integers",
    "convert:take_integers",
    (("source", "*i32"), ("indices", "*i32"), ("target", "*i32"), ("size", "i32")),
    {"BLOCK": BLOCK},
)
ADD_TAKEN = Program(
    "convert_add_taken",
    "convert:add_taken",
    (
        ("a", "*fp32"),
        ("cells_a", "*i32"),
        ("b", "*fp32"),
        ("cells_b", "*i32"),
        ("target", "*fp32"),
        ("size", "i32"),
    ),
    {"BLOCK": BLOCK},
)
JOIN_ROWS = Program(
    "convert_join_rows",
    "convert:join_rows",
    (
        ("a", "*fp32"),
        ("b", "*fp32"),
        ("target", "*fp32"),
        ("count", "*i32"),
        ("width_a", "i32"),
        ("width_b", "i32"),
    ),
    {"BLOCK": BLOCK},
    divisible=("width_a", "width_b"),
)

PROGRAMS = (PLACE, TO_HALF, TAKE, TAKE_INTEGERS, ADD_TAKEN, JOIN_ROWS)


def place(device: Device, image: DeviceArray, batch: DeviceArray, number: int) -> None:
    """Copy the upper-left part of ``image (h, w, 3)`` uint8 into ``batch[number]``, ``(B, height, width, 3)`` uint8.

    Raises:
        InputError: the image is smaller than the batch's images.
    """
    height, width = batch.shape[1:3]
    if image.shape[0] < height or image.shape[1] < width:
        raise InputError(f"an image of {image.shape[:2]} was given: expected at least {(height, width)}")
    size = height * width * 3
    device.launch(PLACE, (_blocks(size),), image, batch, number * size, image.shape[1], height, width, size)


def to_half(device: Device, values: DeviceArray) -> DeviceArray:
    """float32 as float16, same shape; numbers that it cannot hold become its largest ones."""
    out = device.empty(values.shape, "float16")
    if values.size:
        device.launch(TO_HALF, (_blocks(values.size),), values, out, values.size)
    return out


def take(device: Device, values: DeviceArray, indices: DeviceArray) -> DeviceArray:
    """``values[indices]``: ``(n,)`` float32 or int32 by ``(m,)`` int32; negative indices give 0, or -1 for integers."""
    out = device.empty(indices.shape, values.dtype)
    if indices.size:
        program = TAKE if values.dtype.kind == "f" else TAKE_INTEGERS
        device.launch(program, (_blocks(indices.size),), values, indices, out, indices.size)
    return out


def add_taken(
    device: Device, a: DeviceArray, cells_a: DeviceArray, b: DeviceArray, cells_b: DeviceArray
) -> DeviceArray:
    """``a[cells_a] + b[cells_b]``, ``(n,)`` float32; zero where a cell is negative."""
    out = device.empty(cells_a.shape, "float32")
    if cells_a.size:
        device.launch(ADD_TAKEN, (_blocks(cells_a.size),), a, cells_a, b, cells_b, out, cells_a.size)
    return out


def join_rows(device: Device, a: DeviceArray, b: DeviceArray, count: DeviceArray) -> DeviceArray:
    """Rows of ``a (n, D)`` and ``b (n, E)`` float32 side by side, each divided by its length: ``(n, D + E)``.

    Rows from ``count (1,)`` int32 on are zero, as are rows without length.
    """
    out = device.empty((a.shape[0], a.shape[1] + b.shape[1]), "float32")
    if a.shape[0]:
        device.launch(JOIN_ROWS, (a.shape[0],), a, b, out, count, a.shape[1], b.shape[1])
    return out


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
