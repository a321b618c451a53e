"""Masks followed through a video from that of its first frame, frame by frame.

Source: label propagation as in the DAVIS-2017 protocol of the DINO repository, specification §14.4; the arithmetic of
one frame is :func:`facetrt.kernels.propagate.propagate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.features.features import Features, Float, ImageRecord, Provenance
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.settings import BUNDLES_CHOICE, FacetChoice, Setting, check
from facetrt.engine.video.heads import first_then
from facetrt.kernels.errors import InputError
from facetrt.kernels.propagate import propagate_descriptors
from facetrt.kernels.short_descriptors import Descriptors, Subspace

Labels = NDArray[np.int64]

MAX_OBJECTS = 255  # as many as a palette image can have
CONSTANT = 4 * float(np.finfo(np.float32).eps)  # relative range of a channel that is 1 everywhere but for rounding
MAX_LABEL = (1 << 24) - 1  # as many as three bytes can tell


@dataclass(frozen=True)
class PropagateOptions:
    """Options of propagation, with the protocol's defaults; :class:`MaskPropagator` documents them."""

    facet: FacetChoice = BUNDLES_CHOICE
    queue: Annotated[int, Setting("Previous frames that give labels, beside the first.", minimum=0)] = 7
    radius: Annotated[int, Setting("Rows and columns, in cells, that an object may move.", minimum=0)] = 12
    topk: Annotated[int, Setting("How many cells a cell listens to.", minimum=1)] = 5
    temperature: Annotated[float, Setting("Divides the cosine in the exponent.", above=0)] = 0.1

    def __post_init__(self) -> None:
        check(self)


class Memory(ABC):
    """What a frame takes its labels from: descriptors and soft labels of the first frame and the last few."""

    @abstractmethod
    def begin(self, features: Any, soft: Float) -> None:
        """Take the first frame, with ``soft (grid_h, grid_w, channels)``, and forget all others."""

    @abstractmethod
    def follow(self, features: Any) -> Float:
        """The soft labels of the next frame, ``(grid_h, grid_w, channels)``, which is kept with them.

        Raises:
            InputError: NaN or infinite descriptors; the frame is not kept.
        """


class HostMemory(Memory):
    """Descriptors in the processor's memory, as :class:`Features` have them."""

    def __init__(self, options: PropagateOptions) -> None:
        self._options = options
        self._queue: deque[tuple[Descriptors, Float]] = deque(maxlen=options.queue)

    def begin(self, features: Features, soft: Float) -> None:
        values = self._values(features)
        self._subspace = Subspace.fit(values)
        self._first = Descriptors.of(values, self._subspace), soft
        self._queue.clear()

    def follow(self, features: Features) -> Float:
        target = Descriptors.of(self._values(features), self._subspace)
        context, labels = zip(self._first, *self._queue, strict=True)
        soft = propagate_descriptors(target, context, np.stack(labels), **arithmetic(self._options, features.grid))
        self._queue.append((target, soft))
        return soft

    def _values(self, features: Features) -> Float:
        values = features.map(self._options.facet)
        if not np.isfinite(values).all():
            raise InputError(nonfinite(features.name))
        return values


def arithmetic(options: PropagateOptions, grid: tuple[int, int]) -> dict[str, Any]:
    """Radius, topk and temperature; the radius at most what reaches all cells, because memory is its square."""
    radius = min(options.radius, max(grid))
    return {"radius": radius, "topk": options.topk, "temperature": options.temperature}


def nonfinite(name: str) -> str:
    """What is said of a frame that cannot be followed."""
    return f"{name} has NaN or infinite descriptors: expected finite ones; leave it out"


@dataclass(frozen=True)
class _First:
    """The first frame, and the label of each channel of the soft labels, ascending from 0."""

    memory: Memory
    values: Labels
    geometry: Geometry
    provenance: Provenance


Given = Features | DeviceFeatures


class MaskPropagator:
    """Labels of every frame of a video from those of the first: give it :meth:`start`, then :meth:`step` per frame.

    Each cell takes the soft labels of the cells most like it near its place, in the first frame and the last few ones.
    Memory does not grow: ``1 + queue`` frames' descriptors of one facet are held, and one frame is worked on in tiles.
    A hidden object may be found again while the first frame still resembles it. An object that has left may keep a few
    cells: the protocol scales the soft labels of each object up to 1, however small they are.

    On a GPU whose engine has its kernels there, ``encode_on_device`` gives frames that stay: of each, only the soft
    labels come down.

    Args:
        facet: of the features that cells are compared by; the protocol's is the last block's normed output.
        queue: how many previous frames to take labels from, beside the first.
        radius: rows and columns, in cells, that an object may move.
        topk: how many cells, over all these frames together, a cell listens to.
        temperature: divides the cosine in the exponent.
        on_device: makes a memory for frames that lie on a device; ``Engine.propagator`` fills it in.

    Raises:
        InputError: an option out of range.
    """

    def __init__(
        self,
        facet: str,
        *,
        queue: int = PropagateOptions.queue,
        radius: int = PropagateOptions.radius,
        topk: int = PropagateOptions.topk,
        temperature: float = PropagateOptions.temperature,
        on_device: Callable[[PropagateOptions], Memory] | None = None,
    ) -> None:
        self._options = PropagateOptions(facet, queue, radius, topk, temperature)
        self._on_device = on_device
        self.facet = facet
        self._first: _First | None = None

    @property
    def objects(self) -> list[int]:
        """Labels that are followed. One of the first mask that is missing here is too small for the grid."""
        return [] if self._first is None else self._first.values[1:].tolist()

    def start(self, features: Given, labels: NDArray[np.integer] | NDArray[np.bool_]) -> None:
        """Begin a video, or begin anew.

        Args:
            features: of the first frame; if they lie on a device, all others must.
            labels: ``(H, W)`` at the frame's original size: 0 background, any positive numbers objects; a bool mask is
                object 1.

        Raises:
            InputError: labels of another size or kind, without an object, or whose objects are too small for the grid;
                features without the facet, or with an added border.
        """
        record = record_of(features)
        if record.geometry.resized is not None:
            raise InputError(f"{record.name} was padded, and labels lie on whole frames: encode them with fit 'none'")
        cells = reduce_labels(_check_labels(record, labels), record.grid)
        values = np.union1d([0], cells).astype(np.int64)
        if not 2 <= len(values) <= 1 + MAX_OBJECTS:
            grid_h, grid_w = record.grid
            raise InputError(
                f"{len(values) - 1} objects of the first mask are left on the grid of {grid_h}×{grid_w} cells: "
                f"expected 1 to {MAX_OBJECTS}; for small objects use a larger load size or a smaller stride"
            )
        memory = self._memory(features)
        memory.begin(features, one_hot(np.searchsorted(values, cells), len(values)))
        self._first = _First(memory, values, record.geometry, record.provenance)

    def step(self, features: Given) -> Labels:
        """Labels of the next frame, ``(H, W)`` int64 at its original size.

        Raises:
            InputError: before :meth:`start`; a frame of another size, stride or bundle than the first, or that lies
                elsewhere.
        """
        first = self._first
        if first is None:
            raise InputError("step was called before start: call start(features, labels) with the first result's")
        record = record_of(features)
        _check_alike(first, record)
        if isinstance(features, DeviceFeatures) == isinstance(first.memory, HostMemory):
            raise InputError(f"{record.name} and the first frame lie on the host and on a device: encode all alike")
        soft = first.memory.follow(features)
        return first.values[enlarge_labels(soft, record.image_size, record.original_size)]

    def _memory(self, features: Given) -> Memory:
        if isinstance(features, Features):
            return HostMemory(self._options)
        if self._on_device is None:
            raise InputError(f"{features.record.name} lies on a device: take the propagator from Engine.propagator")
        return self._on_device(self._options)

    def following(self, labels: NDArray[np.integer] | NDArray[np.bool_]) -> Callable[[Given], Labels]:
        """A head for :meth:`Stream.attach`: :meth:`start` with the first features, :meth:`step` with all others.

        Args:
            labels: of the first frame, as for :meth:`start`; they are the first result.
        """

        def start(features: Given) -> Labels:
            self.start(features, labels)
            return np.asarray(labels).astype(np.int64)

        return first_then(start, self.step)


def record_of(features: Given) -> ImageRecord:
    """What a frame is, wherever its descriptors lie."""
    return features if isinstance(features, Features) else features.record


def _check_labels(features: ImageRecord, labels: NDArray[np.integer] | NDArray[np.bool_]) -> NDArray[np.integer]:
    given = np.asarray(labels)
    size, expected = given.shape, features.original_size
    if size != expected:
        hint = "as it is shown: turned, with square pixels" if len(size) == 2 else "one number per pixel, not colours"
        raise InputError(
            f"the first mask has shape {size}: expected {expected}, the (height, width) of {features.name} before "
            f"loading; {hint}"
        )
    if given.dtype != np.bool_ and not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"the first mask has type {given.dtype}: expected integers, 0 for background, or bool")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high > MAX_LABEL:
        raise InputError(f"the first mask has labels from {low} to {high}: expected 0 for background up to {MAX_LABEL}")
    if high == 0:
        raise InputError("the first mask shows no object: expected labels 1, 2, … where the objects are")
    return given.astype(np.int64)


def _check_alike(first: _First, features: ImageRecord) -> None:
    if features.geometry != first.geometry:
        raise InputError(
            f"{features.name} has {_describe(features.geometry)} and the first frame {_describe(first.geometry)}: all "
            "frames of a video must have one size; call start with a mask for the new size"
        )
    if features.provenance.encoder_sha256 != first.provenance.encoder_sha256:
        raise InputError(
            f"{features.name} was encoded by another bundle ({features.provenance.model}) than the first frame "
            f"({first.provenance.model}): encode all frames with one"
        )


def _describe(geometry: Geometry) -> str:
    sizes = (geometry.original_size, geometry.image_size, geometry.grid)
    original, loaded, grid = (f"{width}×{height}" for height, width in sizes)
    return f"{original} pixels (width × height), {loaded} when loaded, {grid} cells"


def reduce_labels(labels: NDArray[np.integer], size: tuple[int, int]) -> Labels:
    """Labels ``(H, W)`` at another ``(height, width)`` by nearest neighbour, Pillow's rule."""
    image = Image.fromarray(labels.astype(np.int32)).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(image).astype(np.int64)


def one_hot(labels: NDArray[np.integer], count: int) -> Float:
    """``(grid_h, grid_w, count)`` float32 of labels below ``count``."""
    return np.asarray(np.eye(count, dtype=np.float32)[labels])


def enlarge_labels(soft: Float, size: tuple[int, int], original: tuple[int, int]) -> Labels:
    """The channel that wins each pixel of the ``original`` size, ``(H, W)``, of ``soft (grid_h, grid_w, channels)``.

    Bilinear to the loaded ``size``, each channel min–max scaled on its own, the largest wins, the first one on ties;
    then nearest (Pillow).
    """
    winner, highest = np.zeros(size, np.int64), np.full(size, -np.inf, np.float32)
    for channel in range(soft.shape[2]):  # one at a time: many objects take no more memory than one
        large = cv2.resize(np.ascontiguousarray(soft[..., channel]), size[::-1], interpolation=cv2.INTER_LINEAR)
        scaled = _min_max(np.asarray(large, np.float32))
        wins = scaled > highest
        winner[wins], highest[wins] = channel, scaled[wins]
    return reduce_labels(winner, original)


def _min_max(channel: Float) -> Float:
    """Scaled to 0..1 if anything in it is positive. A positive constant becomes 1: an object that fills the frame."""
    low, high = channel.min(), channel.max()
    if high <= 0:
        return channel
    if high - low <= CONSTANT * high:
        return np.ones_like(channel)
    return np.asarray((channel - low) / (high - low), np.float32)
