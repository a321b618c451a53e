"""Choosing cells and rows on a device: what matching and co-segmentation do between their larger operations."""

from __future__ import annotations

from dataclasses import dataclass

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError

BLOCK = 1024  # cells per program
ROWS, CHANNELS = 8, 128  # of a tile where rows are normalised
GATHERED_ROWS = 4  # of a tile where rows are copied; more spill registers on sm_90

_BUDDIES = (("nn_ab", "*i32"), ("nn_ba", "*i32"), ("saliency_a", "*fp32"), ("reached", "*u8"), ("sizes", "*i32"))
_COUNT = (("count_a", "i32"), ("threshold", "fp32"))

NORMALISE_SALIENCY = Program(
    "select_normalise_saliency",
    "select:normalise_saliency",
    (("attention", "*fp32"), ("saliency", "*fp32"), ("cells", "i32")),
    {"BLOCK": BLOCK},
)
REACH = Program(
    "select_reach",
    "select:reach",
    (("nn_ba", "*i32"), ("saliency_b", "*fp32"), ("reached", "*u8"), ("count_b", "i32"), ("threshold", "fp32")),
    {"BLOCK": BLOCK},
)
COUNT_KEPT = Program("select_count_kept", "select:count_kept", (*_BUDDIES, *_COUNT), {"BLOCK": BLOCK})
STORE_KEPT = Program(
    "select_store_kept",
    "select:store_kept",
    (*_BUDDIES, ("cells", "*i32"), ("count", "*i32"), *_COUNT),
    {"BLOCK": BLOCK},
)
NORMALISE_ROWS = {
    kind: Program(
        f"select_normalise_rows_{kind}",
        "select:normalise_rows",
        (("rows", f"*{kind}"), ("units", "*fp32"), ("count", "i32"), ("channels", "i32")),
        {"ROWS": ROWS, "BLOCK": CHANNELS},
        divisible=("channels",),
    )
    for kind in ("fp32", "fp16")
}
GATHER_ROWS = {
    kind: Program(
        f"select_gather_rows_{kind}",
        "select:gather_rows",
        (("rows", f"*{kind}"), ("indices", "*i32"), ("taken", f"*{kind}"), ("count", "i32"), ("channels", "i32")),
        {"ROWS": GATHERED_ROWS, "BLOCK": CHANNELS},
        divisible=("channels",),
    )
    for kind in ("fp32", "fp16")
}
BEST_OF_CLUSTERS = Program(
    "select_best_of_clusters",
    "select:best_of_clusters",
    (("clusters", "*i32"), ("rank", "*fp32"), ("count", "*i32"), ("selected", "*i32")),
    {"BLOCK": BLOCK},
)
PROGRAMS = (
    NORMALISE_SALIENCY,
    REACH,
    COUNT_KEPT,
    STORE_KEPT,
    *NORMALISE_ROWS.values(),
    *GATHER_ROWS.values(),
    BEST_OF_CLUSTERS,
)


@dataclass(frozen=True)
class KeptCells:
    """``cells (n_a,)`` int32, ascending and then -1, and how many they are, ``count (1,)`` int32."""

    cells: DeviceArray
    count: DeviceArray


def normalise_saliency(device: Device, attention: DeviceArray) -> DeviceArray:
    """[CLS] attention ``(B, cells)`` float32 min-max normalised within each image; zeros where an image is flat."""
    images, cells = attention.shape
    saliency = device.empty(attention.shape, "float32")
    if attention.size:
        device.launch(NORMALISE_SALIENCY, (images,), attention, saliency, cells)
    return saliency


def keep_salient(
    device: Device,
    nn_ab: DeviceArray,
    nn_ba: DeviceArray,
    saliency_a: DeviceArray,
    saliency_b: DeviceArray,
    threshold: float,
) -> KeptCells:
    """Cells of A that are a best buddy, salient, and the neighbour of some salient cell of B.

    Args:
        nn_ab: ``(n_a,)`` int32 nearest cell of B, -1 without one; ``nn_ba (n_b,)`` likewise.
        saliency_a: ``(n_a,)`` float32; ``saliency_b (n_b,)`` likewise.
        threshold: saliency is strictly above it.
    """
    count_a, count_b = nn_ab.size, nn_ba.size
    cells, count = device.empty((count_a,), "int32"), device.zeros((1,), "int32")
    if not count_a:
        return KeptCells(cells, count)
    reached, sizes = device.zeros((count_a,), "uint8"), device.empty((_blocks(count_a),), "int32")
    if count_b:
        device.launch(REACH, (_blocks(count_b),), nn_ba, saliency_b, reached, count_b, threshold)
    arrays = (nn_ab, nn_ba, saliency_a, reached, sizes)
    device.launch(COUNT_KEPT, (len(sizes),), *arrays, count_a, threshold)
    device.launch(STORE_KEPT, (len(sizes),), *arrays, cells, count, count_a, threshold)
    return KeptCells(cells, count)


def normalise_rows(device: Device, rows: DeviceArray) -> DeviceArray:
    """``rows (n, C)`` float32 or float16, divided by their length, as float32; zero rows stay zero.

    Raises:
        InputError: C is not a multiple of 16, or rows of another type.
    """
    units = device.empty(rows.shape, "float32")
    if rows.size:
        program = NORMALISE_ROWS[_check_rows(rows)]
        device.launch(program, (-(-len(rows) // ROWS),), rows, units, *rows.shape)
    return units


def gather_rows(device: Device, rows: DeviceArray, indices: DeviceArray) -> DeviceArray:
    """``rows[indices]``, ``(m, C)``, of ``rows (n, C)`` float32 or float16 and ``indices (m,)`` int32.

    A negative index gives a row of zeros.

    Raises:
        InputError: C is not a multiple of 16, or rows of another type.
    """
    taken = device.empty((indices.size, rows.shape[1]), rows.dtype)
    if taken.size:
        program = GATHER_ROWS[_check_rows(rows)]
        device.launch(program, (-(-indices.size // GATHERED_ROWS),), rows, indices, taken, *taken.shape)
    return taken


def best_of_clusters(
    device: Device, clusters: DeviceArray, rank: DeviceArray, count: DeviceArray, num_clusters: int
) -> DeviceArray:
    """The member of each cluster that ranks highest, the first one on ties: ``(num_clusters,)`` int32, -1 if empty.

    Args:
        clusters: ``(n,)`` int32, of which the first ``count (1,)`` int32 are valid; ``rank (n,)`` float32 likewise.
    """
    selected = device.empty((num_clusters,), "int32")
    device.launch(BEST_OF_CLUSTERS, (num_clusters,), clusters, rank, count, selected)
    return selected


def _check_rows(rows: DeviceArray) -> str:
    """The Triton name of the rows' type."""
    kind = {"float32": "fp32", "float16": "fp16"}.get(rows.dtype.name)
    if kind is None or len(rows.shape) != 2 or rows.shape[1] % 16:
        raise InputError(
            f"rows of shape {rows.shape} and type {rows.dtype} were given: expected (n, C) float32 or float16, "
            "C a multiple of 16"
        )
    return kind


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
