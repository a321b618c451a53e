"""Mutual nearest neighbours of two maps on the device, without the matrix of their similarities.

Bin ``b`` of a binned descriptor is the pooled map of its level at a shifted cell. So a dot product of binned
descriptors is a sum over bins of dot products of pooled maps, ``S_k[a + offset_b, b + offset_b]``, and there are two
ways to it:

- *direct*: one product whose inner dimension runs over bins and channels, reading the pooled maps at shifted cells.
  Nothing is stored but a maximum per tile and row or column.
- *identity*: one product ``S_k`` of width C per level, stored for a band of A's grid rows and as many rows around it as
  the largest offset reaches, and then the sum of its shifted entries. Bands are as high as ``SCRATCH_BYTES`` allow.

float16 maps are multiplied as they are, with sums in float32: means of float16 values are float16 values again, and
no product or sum of them leaves the range of float32. float32 maps are multiplied in float32, not in TF32.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.device.log_bin import check_map, pool_level
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import bin_offsets

SCRATCH_BYTES = 512 << 20  # of products held at a time: 3,025 × 3,025 in one band, 12,321 × 12,321 in three
CENTRE = 4  # the bin that is used alone where nothing is binned

_KINDS = {np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32"}
_SUM_BLOCKS = {"BLOCK_A": 32, "BLOCK_B": 128}
_BEST = (("value_a", "*fp32"), ("index_a", "*i32"), ("value_b", "*fp32"), ("index_b", "*i32"))
_NORMS = (("norms_a", "*fp32"), ("norms_b", "*fp32"))
_GRIDS = (("height_a", "i32"), ("width_a", "i32"), ("height_b", "i32"), ("width_b", "i32"))
_BINS = (("first", "i32"), ("last", "i32"))
_GEMM = {  # three stages of 128 × 64 float16 for either side are 96 KiB: two programs per multiprocessor of 228 KiB
    "fp16": {"BLOCK_A": 128, "BLOCK_B": 128, "BLOCK_CHANNELS": 64, "GROUP": 8},
    "fp32": {"BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_CHANNELS": 32, "GROUP": 8},
}
_WARPS = {"fp16": 8, "fp32": 4}
_STAGES = {"fp16": 3, "fp32": 2}
_NORM_ROWS = 4
_NORM_CELLS = 128
_REDUCE_CELLS = 32


def _direct(kind: str) -> Program:
    maps = (("levels_a", f"*{kind}"), ("levels_b", f"*{kind}"))
    return Program(
        name=f"best_buddies_direct_{kind}",
        source="best_buddies:direct",
        arguments=(*maps, *_NORMS, *_BEST, *_GRIDS, ("channels", "i32"), *_BINS),
        constants={**_GEMM[kind], "FLOOR": NORM_FLOOR},
        divisible=("channels",),
        warps=_WARPS[kind],
        stages=_STAGES[kind],
    )


def _products(kind: str) -> Program:
    maps = (("rows_a", f"*{kind}"), ("rows_b", f"*{kind}"), ("out", "*fp32"))
    return Program(
        name=f"best_buddies_products_{kind}",
        source="best_buddies:products",
        arguments=(*maps, ("count_a", "i32"), ("count_b", "i32"), ("stride", "i32"), ("channels", "i32")),
        constants=_GEMM[kind],
        divisible=("stride", "channels"),
        warps=_WARPS[kind],
        stages=_STAGES[kind],
    )


def _squared_norms(kind: str) -> Program:
    return Program(
        name=f"squared_norms_{kind}",
        source="best_buddies:squared_norms",
        arguments=(("rows", f"*{kind}"), ("out", "*fp32"), ("count", "i32"), ("channels", "i32")),
        constants={"BLOCK_ROWS": _NORM_ROWS, "BLOCK_CHANNELS": 128},
        divisible=("channels",),
    )


DIRECT = {kind: _direct(name) for kind, name in _KINDS.items()}
PRODUCTS = {kind: _products(name) for kind, name in _KINDS.items()}
SQUARED_NORMS = {kind: _squared_norms(name) for kind, name in _KINDS.items()}

BINNED_NORMS = Program(
    name="binned_norms",
    source="best_buddies:binned_norms",
    arguments=(("squares", "*fp32"), ("out", "*fp32"), ("grid_h", "i32"), ("grid_w", "i32"), *_BINS),
    constants={"BLOCK": _NORM_CELLS},
)

_BAND = (("top", "i32"), ("held", "i32"), ("start", "i32"), ("end", "i32"), ("tile", "i32"))
SHIFT_SUM = Program(
    name="best_buddies_shift_sum",
    source="best_buddies:shift_sum",
    arguments=(
        ("products", "*fp32"), *_NORMS, *_BEST, *_GRIDS, *_BAND, ("stride", "i32"), ("level_size", "i64"), *_BINS
    ),
    constants={**_SUM_BLOCKS, "FLOOR": NORM_FLOOR},
    divisible=("stride", "level_size"),
)  # fmt: skip

REDUCE_BEST = Program(
    name="reduce_best",
    source="best_buddies:reduce_best",
    arguments=(
        ("values", "*fp32"), ("indices", "*i32"), ("value", "*fp32"), ("index", "*i32"),
        ("tiles", "i32"), ("count", "i32"), ("limit", "i32"),
    ),
    constants={"BLOCK_TILES": 32, "BLOCK": _REDUCE_CELLS},
)  # fmt: skip

PROGRAMS = (*DIRECT.values(), *PRODUCTS.values(), *SQUARED_NORMS.values(), BINNED_NORMS, SHIFT_SUM, REDUCE_BEST)


class Method(StrEnum):
    """How binned dot products are made; the module's documentation says what sets them apart."""

    AUTO = "auto"
    DIRECT = "direct"
    IDENTITY = "identity"


@dataclass(frozen=True)
class DeviceBuddies:
    """Nearest neighbours in both directions, on the device.

    ``nn_ab (n_a,)`` and ``nn_ba (n_b,)`` int32 cell indices, the lowest one on ties, -1 where the other map is empty;
    ``sim_ab (n_a,)`` and ``sim_ba (n_b,)`` float32 cosines, NaN where there is no neighbour.
    """

    nn_ab: DeviceArray
    nn_ba: DeviceArray
    sim_ab: DeviceArray
    sim_ba: DeviceArray


def best_buddies(
    device: Device, map_a: DeviceArray, map_b: DeviceArray, hierarchy: int = 2, method: Method | str = Method.AUTO
) -> DeviceBuddies:
    """Nearest neighbours between two maps by the cosine of their (binned) descriptors.

    Memory besides the results: two copies of the maps per level, partial maxima of 16 bytes per cell and 128 cells of
    the other map (40 with *identity*), and with *identity* ``SCRATCH_BYTES``, or one band of a single grid row of A
    where that is more.

    Args:
        device: where the maps are.
        map_a: ``(grid_h, grid_w, C)`` float16 or float32 and finite; C a multiple of 16.
        map_b: likewise, of the same type and C; its grid may differ.
        hierarchy: levels of log-binning; 0 compares the descriptors as they are.
        method: how; see :class:`Method` and :func:`choose_method`.

    Raises:
        InputError: wrong shapes or types, different C, hierarchy out of range, an unknown method.
    """
    check_map("map_a", map_a, "(grid_h, grid_w, C)")
    check_map("map_b", map_b, "(grid_h, grid_w, C)")
    if map_a.dtype != map_b.dtype or map_a.shape[2] != map_b.shape[2]:
        raise InputError(
            f"map_a has {map_a.shape[2]} channels of type {map_a.dtype} and map_b {map_b.shape[2]} of {map_b.dtype}: "
            "expected the same facet of one model"
        )
    if method not in list(Method):
        raise InputError(f"method {method!r}: expected one of {', '.join(Method)}")
    bin_offsets(hierarchy)  # checks it
    pair = _Pair(device, map_a, map_b, hierarchy)
    if pair.count_a == 0 or pair.count_b == 0:
        return DeviceBuddies(*(_nothing(device, pair, np.int32, -1)), *(_nothing(device, pair, np.float32, np.nan)))
    chosen = Method(method)
    if chosen is Method.AUTO:
        chosen = choose_method(map_a.shape[:2], map_b.shape[:2], map_a.shape[2], hierarchy, map_a.dtype)
    return pair.directly() if chosen is Method.DIRECT else pair.by_identity()


def _nothing(device: Device, pair: _Pair, dtype: type, value: float) -> tuple[DeviceArray, DeviceArray]:
    return device.upload(np.full(pair.count_a, value, dtype)), device.upload(np.full(pair.count_b, value, dtype))


FLOPS_PER_BYTE = {np.dtype(np.float16): 80, np.dtype(np.float32): 8}


def choose_method(
    grid_a: tuple[int, ...], grid_b: tuple[int, ...], channels: int, hierarchy: int, dtype: np.dtype[np.generic]
) -> Method:
    """The method that should take less time.

    Both are counted in floating-point operations per pair of cells. Direct makes 2·C for each bin. Identity makes 2·C
    for each level, repeated where bands overlap, and moves four bytes for each product that it writes and each entry
    that it adds, from the second-level cache. A byte is taken to last as long as 80 operations of tensor cores (some
    400 TFLOP/s against 5 TB/s), or 8 in float32. With two levels identity then wins from about 200 channels on.
    """
    if hierarchy == 0:
        return Method.DIRECT  # there is nothing to sum
    bins, bands = len(bin_offsets(hierarchy)), Bands.plan(grid_a, grid_b, hierarchy)
    products = hierarchy * bands.repeats
    direct = 2 * channels * bins
    identity = 2 * channels * products + FLOPS_PER_BYTE[np.dtype(dtype)] * 4 * (products + bins)
    fits = 4 * hierarchy * bands.level_size <= SCRATCH_BYTES
    return Method.IDENTITY if fits and identity < direct else Method.DIRECT


@dataclass(frozen=True)
class Bands:
    """Bands of A's grid rows: what is summed at a time, and the rows of products that it needs.

    ``spans`` are ``(first row held, first row, end, end of rows held)``; ``stride`` elements lie between products of
    one cell of A and the next, ``level_size`` between levels.
    """

    spans: tuple[tuple[int, int, int, int], ...]
    stride: int
    level_size: int
    repeats: float

    @classmethod
    def plan(cls, grid_a: tuple[int, ...], grid_b: tuple[int, ...], hierarchy: int) -> Bands:
        height, width = grid_a
        reach, levels = 3 ** (hierarchy - 1) if hierarchy else 0, max(hierarchy, 1)
        stride = -(-grid_b[0] * grid_b[1] // 16) * 16
        allowed = max(SCRATCH_BYTES // (4 * levels * width * stride), 1)
        most = height if allowed >= height else max(allowed - 2 * reach, 1)
        rows = -(-height // -(-height // most))  # bands of about equal height
        starts = range(0, height, rows)
        spans = tuple((max(y - reach, 0), y, min(y + rows, height), min(y + rows + reach, height)) for y in starts)
        held = [bottom - top for top, _, _, bottom in spans]
        return cls(spans, stride, -(-max(held) * width * stride // 16) * 16, sum(held) / height)


class _Pair:
    """Two maps with all their levels and the norms of their binned descriptors."""

    def __init__(self, device: Device, map_a: DeviceArray, map_b: DeviceArray, hierarchy: int) -> None:
        self.device, self.dtype = device, map_a.dtype
        self.grid_a, self.grid_b, self.channels = map_a.shape[:2], map_b.shape[:2], map_a.shape[2]
        self.count_a, self.count_b = (grid[0] * grid[1] for grid in (self.grid_a, self.grid_b))
        self.hierarchy, self.levels = hierarchy, max(hierarchy, 1)
        self.bins = (0, len(bin_offsets(hierarchy))) if hierarchy else (CENTRE, CENTRE + 1)
        self._maps = map_a, map_b

    def directly(self) -> DeviceBuddies:
        stacks, norms = self._prepared()
        blocks = _GEMM[_KINDS[self.dtype]]
        tiles_a, tiles_b = _tiles(self.count_a, blocks["BLOCK_A"]), _tiles(self.count_b, blocks["BLOCK_B"])
        best = self._partial(tiles_a, tiles_b)
        sizes = (*self.grid_a, *self.grid_b, self.channels, *self.bins)
        self.device.launch(DIRECT[self.dtype], (tiles_a * tiles_b,), *stacks, *norms, *best, *sizes)
        return self._reduced(best)

    def by_identity(self) -> DeviceBuddies:
        (stack_a, stack_b), norms = self._prepared()
        bands = Bands.plan(self.grid_a, self.grid_b, self.hierarchy)
        width = self.grid_a[1]
        tiles = [_tiles((end - start) * width, _SUM_BLOCKS["BLOCK_A"]) for _, start, end, _ in bands.spans]
        tiles_b = _tiles(self.count_b, _SUM_BLOCKS["BLOCK_B"])
        best = self._partial(sum(tiles), tiles_b)
        products = self.device.empty((self.levels * bands.level_size,), np.float32)
        for i, (top, start, end, bottom) in enumerate(bands.spans):
            held = (bottom - top) * width
            self._multiply(stack_a, stack_b, top * width, held, bands, products)
            band = (top * width, held, start * width, end * width, sum(tiles[:i]))
            sizes = (*self.grid_a, *self.grid_b, *band, bands.stride, bands.level_size, *self.bins)
            self.device.launch(SHIFT_SUM, (tiles[i], tiles_b), products, *norms, *best, *sizes)
        return self._reduced(best)

    def _multiply(
        self, stack_a: DeviceArray, stack_b: DeviceArray, first: int, held: int, bands: Bands, out: DeviceArray
    ) -> None:
        """Products of ``held`` cells of A from ``first`` on with all of B, at each level."""
        blocks = _GEMM[_KINDS[self.dtype]]
        grid = (_tiles(held, blocks["BLOCK_A"]) * _tiles(self.count_b, blocks["BLOCK_B"]),)
        for level in range(self.levels):
            rows_a = stack_a.rows(level * self.count_a + first, level * self.count_a + first + held)
            rows_b = stack_b.rows(level * self.count_b, (level + 1) * self.count_b)
            target = out.rows(level * bands.level_size, level * bands.level_size + held * bands.stride)
            sizes = (held, self.count_b, bands.stride, self.channels)
            self.device.launch(PRODUCTS[self.dtype], grid, rows_a, rows_b, target, *sizes)

    def _prepared(self) -> tuple[list[DeviceArray], list[DeviceArray]]:
        """The maps of A and of B at all levels ``(levels·n, C)``, and the norms ``(n,)`` of binned descriptors."""
        stacks = [self._stack(values) for values in self._maps]
        return stacks, [self._norms(stack, values) for stack, values in zip(stacks, self._maps, strict=True)]

    def _stack(self, values: DeviceArray) -> DeviceArray:
        stack = self.device.empty((self.levels, *values.shape), self.dtype)
        images = values.reshape(1, *values.shape)
        self.device.copy(images, stack.rows(0, 1))
        for level in range(1, self.levels):
            pool_level(self.device, images, level, stack.rows(level, level + 1))
        return stack.reshape(-1, self.channels)

    def _norms(self, stack: DeviceArray, values: DeviceArray) -> DeviceArray:
        return binned_norms(self.device, stack, (values.shape[0], values.shape[1]), self.bins)

    def _partial(self, tiles_a: int, tiles_b: int) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray]:
        """Room for the best value and index of each cell of A by tiles of B, and of each cell of B by tiles of A."""
        shape_a, shape_b = (tiles_b, self.count_a), (tiles_a, self.count_b)
        values = [self.device.empty(shape, np.float32) for shape in (shape_a, shape_b)]
        indices = [self.device.empty(shape, np.int32) for shape in (shape_a, shape_b)]
        return values[0], indices[0], values[1], indices[1]

    def _reduced(self, best: tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray]) -> DeviceBuddies:
        sim_ab, nn_ab = self._reduce(best[0], best[1], self.count_b)
        sim_ba, nn_ba = self._reduce(best[2], best[3], self.count_a)
        return DeviceBuddies(nn_ab, nn_ba, sim_ab, sim_ba)

    def _reduce(self, values: DeviceArray, indices: DeviceArray, limit: int) -> tuple[DeviceArray, DeviceArray]:
        tiles, count = values.shape
        value, index = self.device.empty((count,), np.float32), self.device.empty((count,), np.int32)
        grid = (_tiles(count, _REDUCE_CELLS),)
        self.device.launch(REDUCE_BEST, grid, values, indices, value, index, tiles, count, limit)
        return value, index


def binned_norms(device: Device, stack: DeviceArray, grid: tuple[int, int], bins: tuple[int, int]) -> DeviceArray:
    """Lengths ``(cells,)`` float32 of binned descriptors, from a map and its pooled versions ``(levels·cells, C)``.

    Args:
        bins: the first bin that is meant, and the one behind the last.
    """
    squares = device.empty((len(stack),), np.float32)
    norms = device.empty((grid[0] * grid[1],), np.float32)
    blocks = (_tiles(len(stack), _NORM_ROWS),)
    device.launch(SQUARED_NORMS[stack.dtype], blocks, stack, squares, len(stack), stack.shape[1])
    device.launch(BINNED_NORMS, (_tiles(len(norms), _NORM_CELLS),), squares, norms, *grid, *bins)
    return norms


def _tiles(count: int, block: int) -> int:
    return -(-count // block)
