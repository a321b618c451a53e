"""Graphs of alike cells on the device, and their smallest eigenvectors: several images of one size at a time.

The same graphs, edge by edge, as :func:`facetrt.kernels.affinity.threshold_graph`, and the same method as
:func:`facetrt.kernels.eigenvectors.smallest_eigenvectors`, in float64. The host sees the projected problem now and
then, and solves alone what is degenerate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.affinity import NOT_FINITE, Bools, Float, ThresholdGraph, Vectors
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.eigenvectors import (
    BASIS,
    FEW,
    KEPT,
    MAX_PRODUCTS,
    ROUNDING,
    Eigenvectors,
    SolvedElsewhere,
    converged,
    eigenvectors_of,
    first_vector,
    smallest_eigenvectors,
)
from facetrt.kernels.errors import InputError
from facetrt.kernels.products import TIE

WORD = 32  # edges
ROWS, EDGE_ROWS, CHANNELS, BLOCK = 8, 64, 32, 1024
CHECKED = 16  # products between two looks at the projected problem

_SIZES = (("count", "i32"), ("words", "i32"))
_BASIS = (("basis", "*fp64"), ("vectors", "*fp64"))
_PLACE = (("step", "i32"), ("stride", "i32"))

UNIT_ROWS = {
    np.dtype(kind): Program(
        f"graph_unit_rows_{name}",
        "graph:unit_rows",
        (("rows", f"*{name}"), ("units", "*fp32"), ("count", "i32"), ("channels", "i32")),
        {"ROWS": ROWS, "BLOCK": 128},
        divisible=("channels",),
    )
    for kind, name in ((np.float32, "fp32"), (np.float16, "fp16"))
}
STRONG_EDGES = Program(
    "graph_strong_edges",
    "graph:strong_edges",
    (("units", "*fp32"), ("limit", "*fp64"), ("bits", "*i32"), *_SIZES, ("channels", "i32")),
    {"TIE": TIE, "ROWS": EDGE_ROWS, "BLOCK": CHANNELS},
    divisible=("channels",),
)
KEEP_EDGES = Program(
    "graph_keep_edges",
    "graph:keep_edges",
    (("bits", "*i32"), ("kept", "*i32"), ("cells", "*u8"), ("left", "*i32"), *_SIZES),
    {"BLOCK": BLOCK},
)
PRODUCT = Program(
    "graph_product",
    "graph:graph_product",
    (("bits", "*i32"), ("vectors", "*fp64"), ("scale", "*fp64"), ("weak", "*fp64"), ("out", "*fp64"), *_SIZES),
    {"ROWS": EDGE_ROWS},
)
INNER_PRODUCTS = Program(
    "graph_inner_products",
    "graph:inner_products",
    (*_BASIS, ("out", "*fp64"), ("images", "i32"), ("width", "i32"), *_PLACE),
    {"BLOCK": BLOCK},
    divisible=("width",),
)
SUBTRACT = Program(
    "graph_subtract",
    "graph:subtract",
    (*_BASIS, ("coefficients", "*fp64"), ("images", "i32"), ("width", "i32"), ("count", "i32"), *_PLACE),
    {"BLOCK": 256},
    divisible=("width",),
)
NORMALISE = Program(
    "graph_normalise",
    "graph:normalise",
    (("vectors", "*fp64"), ("out", "*fp64"), ("lengths", "*fp64"), ("width", "i32"), *_PLACE),
    {"LEAST": ROUNDING, "BLOCK": BLOCK},
    divisible=("width",),
)
COMBINE = Program(
    "graph_combine",
    "graph:combine",
    (("basis", "*fp64"), ("shares", "*fp64"), ("out", "*fp64"), ("images", "i32"), ("width", "i32"), ("count", "i32"),
     ("stride", "i32")),
    {"BLOCK": 256},
    divisible=("width",),
)  # fmt: skip
PROGRAMS = (
    *UNIT_ROWS.values(), STRONG_EDGES, KEEP_EDGES, PRODUCT, INNER_PRODUCTS, SUBTRACT, NORMALISE, COMBINE
)  # fmt: skip


@dataclass(frozen=True)
class DeviceGraphs:
    """Graphs of several images of one size, as :class:`facetrt.kernels.affinity.ThresholdGraph` describes each.

    Attributes:
        bits: ``(B, ⌈n/32⌉, n)`` int32 of the strong edges.
        strong_degree: ``(B, n)`` int64, on the host.
    """

    device: Device = field(repr=False)
    bits: DeviceArray = field(repr=False)
    weak: float
    strong_degree: NDArray[np.int64] = field(repr=False)

    @property
    def degree(self) -> Vectors:
        """The sums of the weights, ``(B, n)`` float64."""
        return np.asarray(self.strong_degree + self.weak * (self.bits.shape[2] - self.strong_degree), np.float64)

    def without(self, cells: Bools) -> DeviceGraphs:
        """The same with only weak edges at ``cells (B, n)``."""
        images, words, count = self.bits.shape
        kept = ~np.asarray(cells, np.bool_)
        padded = np.pad(kept, ((0, 0), (0, words * WORD - count)))
        packed = np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32)
        left = self.device.empty(self.bits.shape, np.int32)
        given = self.bits, self.device.upload(packed), self.device.upload(kept.astype(np.uint8))
        self.device.launch(KEEP_EDGES, (-(-count // BLOCK), words, images), *given, left, count, words)
        return _with_degrees(self.device, left, self.weak)

    def product(self, vectors: Vectors) -> Vectors:
        """``W @ vector`` of each image's, ``(B, n)`` float64."""
        images, words, count = self.bits.shape
        given = self.device.upload(_padded(vectors, words))
        ones = self.device.upload(np.ones((images, words * WORD)))
        return self.device.download(_multiplied(self, given, ones, self.weak))[:, :count]

    def on_host(self, image: int) -> ThresholdGraph:
        """One image's graph."""
        count = self.bits.shape[2]
        held = self.device.download(self.bits)[image].astype("<i4")
        octets = np.ascontiguousarray(held.T).view(np.uint8)  # (n, 4 · words), the lowest bit first
        strong = np.unpackbits(octets, axis=1, count=count, bitorder="little")
        return ThresholdGraph(np.packbits(strong.T, axis=0), self.weak)


class DeviceGraph(SolvedElsewhere):
    """One image's graph on the device, for what works on graphs one by one."""

    def __init__(self, graphs: DeviceGraphs) -> None:
        if len(graphs.bits) != 1:
            raise InputError(f"graphs of {len(graphs.bits)} images: expected those of one")
        self.graphs = graphs

    def __len__(self) -> int:
        return self.graphs.bits.shape[2]

    @property
    def degree(self) -> Vectors:
        """See :class:`facetrt.kernels.affinity.Graph`."""
        return np.asarray(self.graphs.degree[0])

    def product(self, vector: Vectors) -> Vectors:
        """See :class:`facetrt.kernels.affinity.Graph`."""
        return np.asarray(self.graphs.product(vector[None])[0])

    def solve(self, count: int, start: Vectors | None) -> Eigenvectors:
        """See :class:`SolvedElsewhere`."""
        return solve(self.graphs, count, None if start is None else start[None])[0]

    def without(self, cells: Bools) -> DeviceGraph:
        """See :class:`facetrt.kernels.affinity.CutGraph`."""
        return DeviceGraph(self.graphs.without(cells[None]))


def threshold_graphs(device: Device, rows: DeviceArray, threshold: float, weak: float = 1e-5) -> DeviceGraphs:
    """The graphs of images with descriptors ``rows (B, n, C)`` float32 or float16, of any length.

    Edge by edge those of :func:`facetrt.kernels.affinity.threshold_graph`.

    Raises:
        InputError: rows of another shape or type, or C no multiple of 16.
    """
    if len(rows.shape) != 3 or not rows.size or rows.dtype not in UNIT_ROWS or rows.shape[2] % 16:
        raise InputError(
            f"rows of shape {rows.shape} and type {rows.dtype} were given: expected (images, cells, C) float32 or "
            "float16, C a multiple of 16"
        )
    images, count, channels = rows.shape
    words = -(-count // WORD)
    units = device.empty(rows.shape, np.float32)
    device.launch(UNIT_ROWS[rows.dtype], (-(-images * count // ROWS),), rows, units, images * count, channels)
    bits = device.empty((images, words, count), np.int32)
    limit = device.upload(np.array([threshold], np.float64))
    device.launch(STRONG_EDGES, (-(-count // EDGE_ROWS), words, images), units, limit, bits, count, words, channels)
    return _with_degrees(device, bits, weak)


def threshold_graph(device: Device, rows: Float, threshold: float, weak: float = 1e-5) -> DeviceGraph:
    """The graph of one image's ``rows (n, C)`` on the host, to be worked on by the device.

    Raises:
        InputError: a descriptor that is not finite.
    """
    if not np.isfinite(rows).all():
        raise InputError(NOT_FINITE)
    even = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 16)))  # channels of zeros change no cosine
    return DeviceGraph(threshold_graphs(device, device.upload(even[None].astype(np.float32)), threshold, weak))


def _with_degrees(device: Device, bits: DeviceArray, weak: float) -> DeviceGraphs:
    images, words, count = bits.shape
    graphs = DeviceGraphs(device, bits, weak, np.zeros((images, count), np.int64))
    ones = device.upload(np.ones((images, words * WORD)))
    inside = device.upload(_padded(np.ones((images, count)), words))
    strong = np.rint(device.download(_multiplied(graphs, inside, ones, 0.0))[:, :count])
    return DeviceGraphs(device, bits, weak, strong.astype(np.int64))


def _multiplied(graphs: DeviceGraphs, vectors: DeviceArray, scale: DeviceArray, weak: float) -> DeviceArray:
    """``scale · W (scale · vectors)``, ``(B, width)`` float64."""
    device, (images, words, count) = graphs.device, graphs.bits.shape
    out = device.empty((images, words * WORD), np.float64)
    light = device.upload(np.array([weak]))
    grid = -(-words * WORD // EDGE_ROWS), images
    device.launch(PRODUCT, grid, graphs.bits, vectors, scale, light, out, count, words)
    return out


def solve(graphs: DeviceGraphs, count: int, starts: Vectors | None = None) -> list[Eigenvectors]:
    """The ``count`` smallest eigenvectors of each image's normalised Laplacian.

    Few cells, and graphs whose eigenvectors are not determined, are left to the host.

    Args:
        starts: ``(B, n)``, vectors that may be near the second ones.

    Raises:
        InputError: as :func:`facetrt.kernels.eigenvectors.smallest_eigenvectors`.
    """
    images, _, cells = graphs.bits.shape
    found: list[Eigenvectors | None] = [None] * images
    if cells > max(FEW, count + BASIS) and count > 1:
        found = _Search(graphs, count - 1, starts).run()
    return [
        each
        if each is not None
        else smallest_eigenvectors(graphs.on_host(image), count, start=None if starts is None else starts[image])
        for image, each in enumerate(found)
    ]


class _Search:
    """Thick-restarted Lanczos of all images in step; the basis is on the device, its first vector the trivial one."""

    def __init__(self, graphs: DeviceGraphs, wanted: int, starts: Vectors | None) -> None:
        device, (images, words, cells) = graphs.device, graphs.bits.shape
        self.graphs, self.device, self.images, self.cells, self.wanted = graphs, device, images, cells, wanted
        self.width, self.size = words * WORD, wanted + BASIS
        self.stride = self.size + 2
        root = np.sqrt(graphs.degree)
        self.scale = 1 / root
        self.trivial = root / np.linalg.norm(root, axis=1, keepdims=True)
        self.scale_there = device.upload(_padded(self.scale, words))
        self.basis = device.zeros((self.stride, images, self.width), np.float64)
        device.copy(device.upload(_padded(self.trivial, words)), self.basis.rows(0, 1))
        self.lengths = device.zeros((images, self.stride), np.float64)
        self.passes = [device.zeros((images, self.stride, self.stride), np.float64) for _ in range(2)]
        given = [None] * images if starts is None else list(starts)
        first = np.stack([first_vector(root[i], given[i]) for i in range(images)])
        self._append(device.upload(_padded(first, words)), -1)

    def run(self) -> list[Eigenvectors | None]:
        """What was found of each image; None where the search ended early or did not end."""
        found: list[Eigenvectors | None] = [None] * self.images
        waiting, kept, products = set(range(self.images)), 0, 0
        diagonals = np.zeros((self.images, 0))
        while waiting and products < MAX_PRODUCTS:
            for step in range(kept, self.size):
                own = self.basis.rows(step + 1, step + 2).reshape(self.images, self.width)
                self._append(_multiplied(self.graphs, own, self.scale_there, self.graphs.weak), step)
                products += 1
                last = step == self.size - 1
                if step <= self.wanted or not (last or step % CHECKED == CHECKED - 1):
                    continue
                values, shares, residuals = self._projected(diagonals, step)
                closed = {i for i in waiting if np.isnan(residuals[i]).any()}
                done = {i for i in waiting - closed if converged(values[i], residuals[i], self.wanted)}
                if done:
                    ritz = self.device.download(self._combined(shares[:, :, : -self.wanted - 1 : -1], step + 1))
                for i in done:
                    found[i] = eigenvectors_of(
                        self.trivial[i],
                        ritz[:, i, : self.cells],
                        values[i],
                        residuals[i],
                        self.wanted,
                        self.scale[i],
                        products,
                    )
                waiting -= closed | done
                if not waiting:
                    return found
            kept = self.wanted + KEPT
            diagonals = values[:, -kept:]
            self._restart(shares[:, :, -kept:], kept)
        return found

    def _append(self, vectors: DeviceArray, step: int) -> None:
        """Make vectors orthogonal to the basis so far, in two passes, and put them behind it."""
        device, there = self.device, step + 2  # how many vectors there are
        place = step if step >= 0 else self.stride - 1
        for coefficients in self.passes:
            sizes = self.images, self.width
            device.launch(
                INNER_PRODUCTS, (there, self.images), self.basis, vectors, coefficients, *sizes, place, self.stride
            )
            device.launch(
                SUBTRACT, (-(-self.width // 256), self.images), self.basis, vectors, coefficients, *sizes, there, place,
                self.stride
            )  # fmt: skip
        behind = self.basis.rows(there, there + 1)
        device.launch(NORMALISE, (self.images,), vectors, behind, self.lengths, self.width, place, self.stride)

    def _projected(self, diagonals: Vectors, step: int) -> tuple[Vectors, Vectors, Vectors]:
        """Eigenvalues, eigenvectors and residuals of each image's projected problem; residuals are NaN of closed ones.

        A closed one has vectors that W does not lead out of: there the search goes on from anywhere, on the host.
        """
        lengths = self.device.download(self.lengths)[:, : step + 1]
        one, two = (self.device.download(each) for each in self.passes)
        kept, size = diagonals.shape[1], step + 1
        matrix = np.zeros((self.images, size, size))
        matrix[:, range(kept), range(kept)] = diagonals
        for number in range(kept, size):
            column = (one + two)[:, number, 1 : number + 2]
            matrix[:, : number + 1, number] = matrix[:, number, : number + 1] = column
        values, shares = np.linalg.eigh(matrix)
        residuals = lengths[:, -1:] * np.abs(shares[:, -1])
        residuals[(lengths[:, kept:] == 0).any(axis=1)] = np.nan
        return values, shares, residuals

    def _combined(self, shares: Vectors, count: int) -> DeviceArray:
        """Sums of the first vectors behind the trivial one by ``shares (B, count, kept)``: ``(kept, B, width)``."""
        device, kept = self.device, shares.shape[2]
        out = device.empty((kept, self.images, self.width), np.float64)
        behind, given = self.basis.rows(1, self.stride), device.upload(np.ascontiguousarray(shares))
        grid = -(-self.width // 256), kept, self.images
        device.launch(COMBINE, grid, behind, given, out, self.images, self.width, count, shares.shape[1])
        return out

    def _restart(self, shares: Vectors, kept: int) -> None:
        new = self._combined(shares, self.size)
        self.device.copy(self.basis.rows(self.size + 1, self.size + 2), self.basis.rows(kept + 1, kept + 2))
        self.device.copy(new, self.basis.rows(1, kept + 1))


def _padded(values: Vectors, words: int) -> Vectors:
    """``(B, n)`` with zeros behind, ``(B, 32 · words)`` float64."""
    return np.pad(np.asarray(values, np.float64), ((0, 0), (0, words * WORD - values.shape[1])))
