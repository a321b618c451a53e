"""The dense CRF of :mod:`facetrt.kernels.dense_crf` on a device.

Lattices depend on the pixels alone and are built on the host; everything that depends on energies runs on the device.
Labels are the host's, and marginals within 1e-5 of what it computes when it passes every change on (small scenes, four
rounds, weights of 0, 1 and the defaults, in Triton's interpreter). As it stands, the host lets changes below 1e-5
gather, which heavy kernels amplify: 3.7e-5 was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.dense_crf import Lattice, lattices
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError

SPLAT_ROWS = 64  # vertices of a program instance
SPLAT_STEP = 8  # entries of each at a time; a vertex of a photograph has a few to a few dozen
BLOCK = 256
MAX_ENTRIES = 2**31 - 2**10  # lattice entries are numbered by 32 bits, and the last step reads beyond the end

_SPLAT = Program(
    "crf_splat",
    "dense_crf:splat",
    (
        ("values", "*fp32"),
        ("scale", "*fp32"),
        ("starts", "*i32"),
        ("pixels", "*i32"),
        ("weights", "*fp32"),
        ("vertices_out", "*fp32"),
        ("num_vertices", "i32"),
        ("num_pixels", "i32"),
    ),
    {"ROWS": SPLAT_ROWS, "STEP": SPLAT_STEP},
)
_BLUR = Program(
    "crf_blur",
    "dense_crf:blur",
    (
        ("vertices", "*fp32"),
        ("neighbours", "*i32"),
        ("blurred", "*fp32"),
        ("num_vertices", "i32"),
        ("axis", "i32"),
    ),
    {"BLOCK": BLOCK},
)
_SLICE = Program(
    "crf_slice",
    "dense_crf:slice_vertices",
    (
        ("vertices", "*fp32"),
        ("corners", "*i32"),
        ("weights", "*fp32"),
        ("scale", "*fp32"),
        ("base", "*fp32"),
        ("out", "*fp32"),
        ("strength", "fp32"),
        ("num_vertices", "i32"),
        ("num_pixels", "i32"),
        ("num_corners", "i32"),
    ),
    {"BLOCK": BLOCK},
)
_ROOT = Program(
    "crf_reciprocal_root",
    "dense_crf:reciprocal_root",
    (("values", "*fp32"), ("out", "*fp32"), ("count", "i32")),
    {"BLOCK": BLOCK},
)
_SOFTMAX = Program(
    "crf_softmax",
    "dense_crf:softmax",
    (("energy", "*fp32"), ("marginals", "*fp32"), ("num_labels", "i32"), ("num_pixels", "i32")),
    {"BLOCK": BLOCK},
)

PROGRAMS = (_SPLAT, _BLUR, _SLICE, _ROOT, _SOFTMAX)


@dataclass(frozen=True)
class DeviceLattice:
    """A :class:`~facetrt.kernels.dense_crf.Lattice` in device memory; d is the dimension of its kernel.

    Attributes:
        corners: ``(d + 1, pixels)`` int32.
        weights: ``(d + 1, pixels)`` float32.
        neighbours: ``(d + 1, 2, vertices)`` int32.
        starts: ``(vertices + 1,)`` int32, where the list of each vertex begins in the two arrays that follow.
        list_pixels: ``((d + 1)·pixels,)`` int32, by vertex the pixels around it.
        list_weights: ``((d + 1)·pixels,)`` float32, their weights.
        roots: ``(pixels,)`` float32, D^-1/2 of the symmetric normalisation.
        strength: the kernel's Potts weight times the gain of the lattice.
    """

    corners: DeviceArray
    weights: DeviceArray
    neighbours: DeviceArray
    starts: DeviceArray
    list_pixels: DeviceArray
    list_weights: DeviceArray
    roots: DeviceArray
    strength: float

    @property
    def num_pixels(self) -> int:
        return self.corners.shape[1]

    @property
    def num_vertices(self) -> int:
        return self.neighbours.shape[2]


def upload_lattices(device: Device, image: NDArray[np.uint8], **scales: float) -> list[DeviceLattice]:
    """The lattices of an image ``(H, W, 3)`` uint8 RGB in device memory, one per kernel with a weight.

    ``scales`` are the scales and weights of :func:`facetrt.kernels.dense_crf.dense_crf`, with its defaults and errors.
    """
    built = lattices(image, **scales)
    ones = device.upload(np.ones((1, image[..., 0].size), np.float32))
    return [_upload(device, lattice, ones) for lattice in built]


def mean_field(
    device: Device, energy: DeviceArray, lattices: list[DeviceLattice], *, iterations: int = 10
) -> DeviceArray:
    """Marginals ``(labels, pixels)`` float32 after a fixed number of mean-field iterations.

    Args:
        energy: ``(labels, pixels)`` float32, finite, smaller is better; at most 65,535 labels.
        lattices: of the image whose pixels these are.

    Raises:
        InputError: shape or type of the energies, a lattice of another image, a negative number of iterations.
    """
    _check(energy, lattices, iterations)
    marginals, running = device.empty(energy.shape, np.float32), device.empty(energy.shape, np.float32)
    room = len(energy) * max((lattice.num_vertices for lattice in lattices), default=0)
    spare = (device.empty((room,), np.float32), device.empty((room,), np.float32))
    _softmax(device, energy, marginals)
    for _ in range(iterations):
        base = energy
        for lattice in lattices:
            _message(device, lattice, marginals, lattice.roots, base, running, lattice.strength, spare)
            base = running
        _softmax(device, base, marginals)
    return marginals


def dense_crf(
    device: Device, image: NDArray[np.uint8], energy: DeviceArray, *, iterations: int = 10, **scales: float
) -> DeviceArray:
    """:func:`facetrt.kernels.dense_crf.dense_crf` of energies on a device, ``(labels, H, W)`` float32, to the same."""
    if len(energy.shape) != 3 or energy.shape[1:] != image.shape[:2]:
        raise InputError(f"energy has shape {energy.shape} and image {image.shape}: expected (labels, H, W), (H, W, 3)")
    flat = energy.reshape(energy.shape[0], -1)
    found = mean_field(device, flat, upload_lattices(device, image, **scales), iterations=iterations)
    return found.reshape(*energy.shape)


def _upload(device: Device, lattice: Lattice, ones: DeviceArray) -> DeviceLattice:
    starts, pixels, weights = _vertex_lists(lattice)
    uploaded = DeviceLattice(
        device.upload(lattice.corners.astype(np.int32)),
        device.upload(lattice.weights),
        device.upload(lattice.neighbours.astype(np.int32)),
        device.upload(starts),
        device.upload(pixels),
        device.upload(weights),
        device.empty((ones.size,), np.float32),
        float(lattice.gain) * lattice.weight,
    )
    spare = tuple(device.empty((uploaded.num_vertices,), np.float32) for _ in range(2))
    filtered = device.empty(ones.shape, np.float32)
    nothing = device.zeros(ones.shape, np.float32)
    _message(device, uploaded, ones, ones, nothing, filtered, -float(lattice.gain), (spare[0], spare[1]))
    device.launch(_ROOT, (_blocks(ones.size),), filtered, uploaded.roots, ones.size)
    return uploaded


def _vertex_lists(lattice: Lattice) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """``starts``, ``list_pixels`` and ``list_weights`` of a :class:`DeviceLattice`; a list is in order of pixels."""
    dims, pixels = lattice.corners.shape
    if dims * pixels > MAX_ENTRIES:
        raise InputError(f"an image of {pixels} pixels: expected at most {MAX_ENTRIES // dims} here; reduce it")
    by_pixel = lattice.corners.T.ravel()
    order = np.argsort(by_pixel, kind="stable")
    sizes = np.bincount(by_pixel, minlength=lattice.neighbours.shape[2])
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return starts, (order // dims).astype(np.int32), np.ascontiguousarray(lattice.weights.T.ravel()[order])


def _message(
    device: Device,
    lattice: DeviceLattice,
    values: DeviceArray,
    scale: DeviceArray,
    base: DeviceArray,
    out: DeviceArray,
    strength: float,
    spare: tuple[DeviceArray, DeviceArray],
) -> None:
    """``out = base - strength · scale · filtered(scale · values)``; ``spare`` holds two sets of vertices."""
    labels, vertices, pixels = len(values), lattice.num_vertices, lattice.num_pixels
    held, free = spare
    lists = (lattice.starts, lattice.list_pixels, lattice.list_weights)
    device.launch(_SPLAT, (-(-vertices // SPLAT_ROWS), labels), values, scale, *lists, held, vertices, pixels)
    for axis in range(len(lattice.neighbours)):
        device.launch(_BLUR, (_blocks(vertices), labels), held, lattice.neighbours, free, vertices, axis)
        held, free = free, held
    arrays: tuple[Any, ...] = (held, lattice.corners, lattice.weights, scale, base, out)
    sizes = (vertices, pixels, len(lattice.corners))
    device.launch(_SLICE, (_blocks(pixels), labels), *arrays, strength, *sizes)


def _softmax(device: Device, energy: DeviceArray, marginals: DeviceArray) -> None:
    labels, pixels = energy.shape
    device.launch(_SOFTMAX, (_blocks(pixels),), energy, marginals, labels, pixels)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _check(energy: DeviceArray, lattices: list[DeviceLattice], iterations: int) -> None:
    if len(energy.shape) != 2 or not energy.size or energy.dtype != np.float32:
        raise InputError(f"energy is {energy.dtype} {energy.shape}: expected (labels, pixels) float32, at least one")
    for lattice in lattices:
        if lattice.num_pixels != energy.shape[1]:
            raise InputError(
                f"energy has {energy.shape[1]} pixels and a lattice {lattice.num_pixels}: expected those of one image"
            )
    if iterations < 0:
        raise InputError(f"iterations is {iterations}: expected 0 or more")
