"""Mean-field inference in a fully connected CRF with Gaussian pairwise kernels, in NumPy alone.

`dense_crf` filters with a permutohedral lattice; `dense_crf_reference` sums exact Gaussians over all pairs of pixels.

Sources: Krähenbühl & Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (NIPS 2011),
for the model and the mean-field update; Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral
Lattice" (Eurographics 2010), sections 3.1 to 3.3, for the filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError

# Exact pairs take pixels² exponentials per kernel and iteration: 10 000 pixels already take a minute.
REFERENCE_MAX_PIXELS = 10_000
# `np.take` copies rows of 4, 8, 16 or 32 bytes inline and all others through memmove, at 2 to 3 times the time per row.
# Wider rows than 16 bytes gain nothing per label and double the memory of the weights.
_MAX_LANES = 4
# The largest change of a marginal that is not splatted at once; it moves energies by at most this times the weights.
_SETTLED = 1e-5
# Largest feature, in standard deviations: beyond, float32 no longer resolves the weights within a lattice cell.
_MAX_STEPS = 2**16
# Packed vertex keys must stay clear of the sign bit of int64.
_MAX_KEY = 2**62
_ALL = slice(None)

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Index = NDArray[np.int64]
Real = TypeVar("Real", np.float32, np.float64)


def dense_crf(
    image: NDArray[np.uint8],
    energy: Float,
    *,
    position_scale: float = 3.0,
    position_weight: float = 50.0,
    colour_position_scale: float = 5.0,
    colour_scale: float = 13.0,
    colour_weight: float = 15.0,
    iterations: int = 10,
) -> Float:
    """Marginals of a fully connected CRF after a fixed number of mean-field iterations.

    Starts from Q = softmax(-energy); every iteration sets Q = softmax(-energy + sum_m w_m K_m Q), with two Gaussian
    kernels K_m, on positions and on positions with colours. Each is normalised symmetrically, D^-1/2 K D^-1/2 with D
    the kernel applied to ones, and contains the pixel itself. Gaussians are approximated by permutohedral lattice
    filtering, as in the authors' implementation, whose labels it reproduces.
    Scales near one pixel are the lattice's weak side: on small synthetic scenes, with unit weights, its marginals are
    within 0.02 of exact Gaussians at the default scales, 0.06 at half of them and 0.17 at a sixth.

    Memory: 550 to 700 bytes per pixel for photographs with 5 labels (180 MB at 640 x 480), 34 more for each further
    label; 1.5 kB per pixel for an image of pure noise, where hardly any two pixels share a lattice vertex.

    Args:
        image: (H, W, 3) uint8, RGB.
        energy: (labels, H, W) float32, unary energies, smaller is better.
        position_scale: standard deviation of the position kernel, in pixels.
        position_weight: Potts weight of the position kernel; 0 leaves it out.
        colour_position_scale: standard deviation of the colour kernel in position, in pixels.
        colour_scale: standard deviation of the colour kernel in colour, in grey levels (0 to 255).
        colour_weight: Potts weight of the colour kernel; 0 leaves it out.
        iterations: mean-field updates after the initial softmax.

    Returns:
        (labels, H, W) float32, sums to one over the labels.

    Raises:
        InputError: shape, dtype or value of an argument is not as above, or a scale is so small against the image
            that lattice coordinates overflow.
    """
    kernels = _checked_kernels(
        image, energy, position_scale, position_weight, colour_position_scale, colour_scale, colour_weight, iterations
    )
    if len(energy) == 1:
        return np.ones_like(energy)
    flat = energy.reshape(len(energy), -1)  # (labels, N)
    filters = [_LatticeFilter(_lattice(kernel), len(flat) - 1) for kernel in kernels]
    return _mean_field(flat, filters, iterations).reshape(energy.shape)


@dataclass(frozen=True)
class Lattice:
    """The permutohedral lattice of one pairwise kernel over an image of N pixels; d is the kernel's dimension.

    Attributes:
        corners: ``(d + 1, N)`` int64, the vertices around each pixel.
        weights: ``(d + 1, N)`` float32, its barycentric weights for them.
        neighbours: ``(d + 1, 2, vertices)`` int64, the vertices one step ahead and behind on each axis; ``vertices``
            where there is none.
        gain: the factor that gives splat, blur and slice together unit gain on a constant field.
        weight: Potts weight of the kernel.
    """

    corners: Index
    weights: Float
    neighbours: Index
    gain: np.float32
    weight: float


def lattices(
    image: NDArray[np.uint8],
    *,
    position_scale: float = 3.0,
    position_weight: float = 50.0,
    colour_position_scale: float = 5.0,
    colour_scale: float = 13.0,
    colour_weight: float = 15.0,
) -> list[Lattice]:
    """The lattices that `dense_crf` filters with, one per kernel with a weight; arguments and errors as there."""
    kernels = _kernels(image, position_scale, position_weight, colour_position_scale, colour_scale, colour_weight)
    return [_lattice(kernel) for kernel in kernels]


def dense_crf_reference(
    image: NDArray[np.uint8],
    energy: Float,
    *,
    position_scale: float = 3.0,
    position_weight: float = 50.0,
    colour_position_scale: float = 5.0,
    colour_scale: float = 13.0,
    colour_weight: float = 15.0,
    iterations: int = 10,
) -> Float:
    """The model of `dense_crf` with exact Gaussians, summed over all pairs of pixels in float64: the oracle.

    Arguments, result and errors are those of `dense_crf`; images above `REFERENCE_MAX_PIXELS` raise `InputError`.
    """
    kernels = _checked_kernels(
        image, energy, position_scale, position_weight, colour_position_scale, colour_scale, colour_weight, iterations
    )
    pixels = image.shape[0] * image.shape[1]
    if pixels > REFERENCE_MAX_PIXELS:
        raise InputError(
            f"image has {pixels} pixels; the reference compares all pairs and takes at most {REFERENCE_MAX_PIXELS}: "
            "reduce the image or call dense_crf"
        )
    flat = energy.reshape(len(energy), -1).astype(np.float64)  # (labels, N)
    roots = [1 / np.sqrt(_exact_filter(kernel.features, np.ones((1, pixels)))) for kernel in kernels]
    marginals = _softmax(-flat)
    for _ in range(iterations):
        logits = -flat
        for kernel, root in zip(kernels, roots, strict=True):
            logits = logits + kernel.weight * root * _exact_filter(kernel.features, root * marginals)
        marginals = _softmax(logits)
    return marginals.astype(np.float32).reshape(energy.shape)


@dataclass(frozen=True)
class _Kernel:
    """One pairwise term: its Potts ``weight`` and its ``features (d, N)`` float32, in standard deviations."""

    weight: float
    features: Float


def _checked_kernels(
    image: NDArray[np.uint8],
    energy: Float,
    position_scale: float,
    position_weight: float,
    colour_position_scale: float,
    colour_scale: float,
    colour_weight: float,
    iterations: int,
) -> list[_Kernel]:
    """The pairwise terms with a weight, after every argument of the public functions has been checked."""
    _check_image(image)
    _check_energy(energy, image.shape)
    if iterations < 0:
        raise InputError(f"iterations is {iterations}: expected 0 or more")
    return _kernels(image, position_scale, position_weight, colour_position_scale, colour_scale, colour_weight)


def _kernels(
    image: NDArray[np.uint8],
    position_scale: float,
    position_weight: float,
    colour_position_scale: float,
    colour_scale: float,
    colour_weight: float,
) -> list[_Kernel]:
    _check_image(image)
    height, width = image.shape[:2]
    _check_scale("position_scale", position_scale, max(height, width))
    _check_scale("colour_position_scale", colour_position_scale, max(height, width))
    _check_scale("colour_scale", colour_scale, 255)
    _check_weight("position_weight", position_weight)
    _check_weight("colour_weight", colour_weight)
    ys, xs = np.divmod(np.arange(height * width, dtype=np.int64), width)
    positions = np.stack([xs, ys]).astype(np.float32)  # (2, N)
    colours = image.reshape(-1, 3).T.astype(np.float32) / np.float32(colour_scale)  # (3, N)
    kernels = [
        _Kernel(position_weight, positions / np.float32(position_scale)),
        _Kernel(colour_weight, np.concatenate([positions / np.float32(colour_position_scale), colours])),
    ]
    return [kernel for kernel in kernels if kernel.weight > 0]


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(f"image has shape {image.shape}: expected (H, W, 3) with at least one pixel")
    if image.dtype != np.uint8:
        raise InputError(f"image is {image.dtype}: expected uint8 RGB; convert it with values from 0 to 255")


def _check_energy(energy: Float, image_shape: tuple[int, ...]) -> None:
    if energy.ndim != 3 or energy.shape[1:] != image_shape[:2]:
        raise InputError(
            f"energy has shape {energy.shape}: expected (labels, {image_shape[0]}, {image_shape[1]}), one map per "
            "label of the size of the image; enlarge the maps first"
        )
    if len(energy) == 0:
        raise InputError("energy has no labels: expected at least 1")
    if energy.dtype != np.float32:
        raise InputError(f"energy is {energy.dtype}: expected float32; convert it with astype")
    if not np.isfinite(energy).all():
        bad = energy.size - np.count_nonzero(np.isfinite(energy))
        raise InputError(f"energy has {bad} values that are NaN or infinite: expected finite ones; clip them first")


def _check_scale(name: str, value: float, span: int) -> None:
    smallest = span / _MAX_STEPS
    if not (math.isfinite(value) and value >= smallest):
        raise InputError(f"{name} is {value}: expected a finite number, at least {smallest:.2g} as values reach {span}")


def _check_weight(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{name} is {value}: expected a finite number, 0 (leaves the kernel out) or more")


def _exact_filter(features: Float, values: Double) -> Double:
    """``values (C, N)`` summed with Gaussian weights over all pairs of pixels; blocks of rows bound the memory."""
    coordinates = features.astype(np.float64)  # (d, N)
    result = np.empty_like(values)
    for start in range(0, values.shape[1], 256):
        block = slice(start, start + 256)
        squares = sum(np.subtract.outer(axis, axis[block]) ** 2 for axis in coordinates)  # (N, 256)
        result[:, block] = values @ np.exp(-squares / 2)
    return result


def _softmax(logits: NDArray[Real]) -> NDArray[Real]:
    """Softmax over the first axis of ``(labels, N)``."""
    result: NDArray[Real] = logits - logits.max(axis=0)
    np.exp(result, out=result)
    result /= result.sum(axis=0)
    return result


def _mean_field(energy: Float, filters: list[_LatticeFilter], iterations: int) -> Float:
    """Marginals ``(labels, N)`` of energies ``(labels, N)`` with two labels or more.

    Marginals sum to one, so the message of the last label is that of ones less those of the other labels. Lattices keep
    what was splatted; a pixel is splatted again once a marginal has moved by more than `_SETTLED`.
    """
    base = -energy
    marginals = _softmax(base)
    held = np.zeros_like(marginals[:-1])  # what the lattices hold, (labels - 1, N)
    for lattice in filters:
        base[-1] += lattice.message_of_ones
    for _ in range(iterations):
        moved = _moved(marginals[:-1], held)
        change = marginals[:-1, moved] - held[:, moved]
        held[:, moved] = marginals[:-1, moved]
        logits = base.copy()
        for lattice in filters:
            lattice.splat(change, moved)
            message = lattice.message()
            logits[:-1] += message
            logits[-1] -= message.sum(axis=0)
        marginals = _softmax(logits)
    return marginals


def _moved(values: Float, held: Float) -> Index | slice:
    """Pixels whose ``values (C, N)`` are no longer those held; all pixels where picking them out would cost more."""
    change = np.abs(values - held).max(axis=0)
    moved = np.flatnonzero(change > _SETTLED)
    return moved if 2 * len(moved) < len(change) else _ALL


class _LatticeFilter:
    """``w D^-1/2 K D^-1/2`` with a Gaussian K, on the permutohedral lattice of the kernel's features.

    Splat, blur, slice: each pixel adds its values to the d + 1 corners of its simplex with barycentric weights, the
    lattice is blurred with (1/2, 1, 1/2) along its d + 1 axes, and each pixel reads its corners with the same weights.
    Splatting adds to what the lattice holds. Blur and slice gather rows of ``lanes`` labels.
    """

    def __init__(self, lattice: Lattice, labels: int) -> None:
        """Hold ``labels`` maps, at least one, on ``lattice``."""
        self._corners, weights, self._neighbours = lattice.corners, lattice.weights, lattice.neighbours
        gain = lattice.gain
        self._hold(weights, weights * gain, 1)
        ones = np.ones((1, weights.shape[1]), np.float32)
        self.splat(ones)
        root = 1 / np.sqrt(self.message()[0])  # D^-1/2, (N,)
        self._hold(weights * root, weights * (root * gain * np.float32(lattice.weight)), 1)
        self.splat(ones)
        self.message_of_ones = self.message()[0]  # (N,)
        self._hold(self._splat_weights, self._slice_weights[:, :, 0], labels)

    def _hold(self, splat_weights: Float, slice_weights: Float, labels: int) -> None:
        """Start over with these weights ``(d + 1, N)`` and an empty lattice of ``labels`` maps."""
        lanes = min(_MAX_LANES, 1 << (labels - 1).bit_length())
        self._splat_weights = splat_weights
        # One copy per lane: products that broadcast over so short an axis take 4 to 6 times as long.
        self._slice_weights = np.repeat(slice_weights[:, :, None], lanes, axis=2)  # (d + 1, N, lanes)
        self._held = np.zeros((labels, self._neighbours.shape[2]))  # float64, (labels, vertices)

    def splat(self, values: Float, pixels: Index | slice = _ALL) -> None:
        """Add ``values (labels, n)`` at ``pixels``."""
        corners = self._corners[:, pixels].ravel()
        weights = self._splat_weights[:, pixels]
        for held, value in zip(self._held, values, strict=True):
            held += np.bincount(corners, (weights * value).ravel(), len(held))

    def message(self) -> Float:
        """What the lattice holds, blurred and read at all pixels, ``(labels, N)``."""
        lanes = self._slice_weights.shape[2]
        result = np.empty((len(self._held), self._corners.shape[1]), np.float32)
        for start in range(0, len(result), lanes):
            block = self._held[start : start + lanes]
            vertices = np.zeros((block.shape[1] + 1, lanes), np.float32)
            vertices[:-1, : len(block)] = block.T
            self._blur(vertices)
            result[start : start + lanes] = self._slice(vertices).T[: len(block)]
        return result

    def _blur(self, vertices: Float) -> None:
        """Blur in place, ``(vertices + 1, lanes)``. Absent neighbours are read from the last row, which stays zero."""
        ahead = np.empty_like(vertices[:-1])
        behind = np.empty_like(ahead)
        for axis in self._neighbours:
            np.take(vertices, axis[0], axis=0, out=ahead, mode="clip")
            np.take(vertices, axis[1], axis=0, out=behind, mode="clip")
            ahead += behind
            ahead *= np.float32(0.5)
            vertices[:-1] += ahead

    def _slice(self, vertices: Float) -> Float:
        """Blurred vertices read at the pixels, ``(N, lanes)``."""
        result = np.zeros((self._corners.shape[1], vertices.shape[1]), np.float32)
        corner = np.empty_like(result)
        for index, weight in zip(self._corners, self._slice_weights, strict=True):
            np.take(vertices, index, axis=0, out=corner, mode="clip")
            corner *= weight
            result += corner
        return result


def _lattice(kernel: _Kernel) -> Lattice:
    features = kernel.features
    origin, offset, rank = _enclosing_simplex(_elevate(features))
    pixels = np.arange(features.shape[1], dtype=np.int64)
    slot = rank.astype(np.int64) * len(pixels) + pixels  # where each coordinate goes when they are sorted by rank
    weights = _barycentric(offset, slot)
    keys, steps = _vertex_keys(origin, slot)
    corners, classes = _number_vertices(keys)
    # A constant field passes the blur with gain 1 + 2^-d; see the scaling step of Adams et al.
    gain = np.float32(1 / (1 + 2.0 ** -len(features)))
    return Lattice(corners, weights, _neighbours(classes, steps), gain, kernel.weight)


def _elevate(features: Float) -> Float:
    """Features ``(d, N)`` on the hyperplane of zero sum in d + 1 dimensions, ``(d + 1, N)``.

    The factor makes the standard deviation of splat, blur and slice together equal to one unit of the features
    (section 3.1 of the paper).
    """
    dims, pixels = features.shape
    unit = math.sqrt(2 / 3) * (dims + 1)
    result = np.empty((dims + 1, pixels), np.float32)
    above = np.zeros(pixels, np.float32)
    for i in range(dims, 0, -1):
        scaled = features[i - 1] * np.float32(unit / math.sqrt(i * (i + 1)))
        result[i] = above - i * scaled
        above += scaled
    result[0] = above
    return result


def _enclosing_simplex(elevated: Float) -> tuple[Float, Float, NDArray[np.int8]]:
    """Nearest vertex of remainder 0 in units of d + 1, the offset from it, and the rank of each offset from above.

    All ``(d + 1, N)``. Rounding each coordinate alone may leave the hyperplane; the coordinates that were rounded
    furthest in the wrong direction go back by one unit.
    """
    size = len(elevated)
    origin = np.rint(elevated / np.float32(size))
    offset = elevated - np.float32(size) * origin
    rank = np.zeros(elevated.shape, np.int8)
    for i in range(size):
        for j in range(i + 1, size):
            below = (offset[i] < offset[j]).view(np.int8)
            rank[i] += below
            rank[j] += 1 - below
    rank += origin.sum(axis=0).astype(np.int8)
    turn = (rank < 0).view(np.int8) - (rank >= size).view(np.int8)  # 1, 0 or -1
    rank += np.int8(size) * turn
    origin += turn
    offset -= np.float32(size) * turn.astype(np.float32)
    return origin, offset, rank


def _barycentric(offset: Float, slot: Index) -> Float:
    """Weights ``(d + 1, N)`` of the corners, by remainder."""
    size = len(offset)
    ordered = np.empty_like(offset)
    ordered.ravel()[slot] = offset
    weights = np.empty_like(offset)
    weights[1:] = (ordered[:-1] - ordered[1:])[::-1] / np.float32(size)
    weights[0] = 1 - (ordered[0] - ordered[-1]) / np.float32(size)
    return weights


def _vertex_keys(origin: Float, slot: Index) -> tuple[Index, Index]:
    """Keys ``(d + 1, N)`` of the corners, by remainder, and the key step ``(d + 1,)`` along each axis.

    A key packs all coordinates but the last, which follows from the zero sum. Corner k is corner k - 1 plus one in
    every coordinate, less d + 1 in the coordinate of rank d + 1 - k.
    """
    size = len(origin)
    margin = 2 * size  # corners reach d + 1 beyond the origins, their neighbours as far again
    low = size * origin.min(axis=1).astype(np.int64) - margin
    extent = size * origin.max(axis=1).astype(np.int64) + margin - low + 1
    if math.prod(int(e) for e in extent[:-1]) > _MAX_KEY:
        raise InputError(
            f"the lattice of this kernel spreads over {extent[:-1].tolist()} steps, more than 62 bits can number: its "
            "scales are too small for this image; give larger ones"
        )
    place = np.concatenate([[1], np.cumprod(extent[:-1])])
    place[-1] = 0
    steps = place.sum() - size * place  # (d + 1,)
    by_rank = np.empty(slot.shape, np.int64)
    by_rank.ravel()[slot] = steps[:, None]
    keys = np.empty(slot.shape, np.int64)
    keys[0] = place @ (size * origin.astype(np.int64) - low[:, None])
    for k in range(1, size):
        np.add(keys[k - 1], by_rank[size - k], out=keys[k])
    return keys, steps


def _number_vertices(keys: Index) -> tuple[Index, list[Index]]:
    """Vertex numbers ``(d + 1, N)`` and the sorted distinct keys of each remainder class.

    Vertices of different remainder never coincide, so d + 1 sorts of N keys replace one of (d + 1) N. Pixels side by
    side often share a vertex: only the first of each run is sorted, a third to four fifths of a photograph.
    """
    corners = np.empty_like(keys)
    classes: list[Index] = []
    count = 0
    for row, corner in zip(keys, corners, strict=True):
        first = np.concatenate([[True], row[1:] != row[:-1]])
        # `return_index` selects the stable sort, up to 3 times as fast as the other on keys in such long runs.
        distinct, _, inverse = np.unique(row[first], return_index=True, return_inverse=True)
        np.take(inverse + count, np.cumsum(first) - 1, out=corner)
        classes.append(distinct)
        count += len(distinct)
    return corners, classes


def _neighbours(classes: list[Index], steps: Index) -> Index:
    """Numbers ``(d + 1, 2, vertices)`` of the vertices one step ahead and behind on each axis; ``vertices`` if absent.

    A step leads from one remainder class to the next. Both are sorted, and the stable sort merges two sorted runs in
    linear time: 0.7 times the time of a binary search.
    """
    starts = np.cumsum([0] + [len(keys) for keys in classes])
    count = int(starts[-1])
    result = np.full((len(steps), 2, count), count, np.int64)
    for k, keys in enumerate(classes):
        following = (k + 1) % len(classes)
        candidates = classes[following]
        for (ahead, behind), step in zip(result, steps, strict=True):
            merged = np.concatenate([candidates, keys + step])
            order = np.argsort(merged, kind="stable")
            merged = merged[order]
            twin = np.flatnonzero(merged[1:] == merged[:-1])  # a candidate, then the key that leads to it
            there = order[twin] + starts[following]
            here = order[twin + 1] - len(candidates) + starts[k]
            ahead[here] = there
            behind[there] = here
    return result
