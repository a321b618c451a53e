"""Images in, descriptors out, all of it on the device: upload, resize, encode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.device.transfer import split_tokens
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder
from facetrt.engine.encoding.passes import Passes
from facetrt.engine.features.features import SaliencyMode
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.images.emptiness import detail_of
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import MAX_PIXELS, half_size, load_image, loaded_size
from facetrt.engine.images.resampling import pillow_nearest
from facetrt.kernels.device import convert, preprocess, select
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.exchange import CUDA, from_external
from facetrt.kernels.device.runtime.program import ALIGNMENT
from facetrt.kernels.errors import InputError

SIZES = 8  # of images, whose tables stay on the device


class EncoderLane(Protocol):
    """One stream of a GPU backend."""

    @property
    def device(self) -> Device: ...
    def run(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]: ...


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image and the sizes that it is resized to.

    ``pixels (H, W, 3)`` are uint8 RGB at the ``original_size``: a NumPy array, one that was uploaded, or another
    library's on the GPU, of which no ``detail`` is known (see :class:`Features`).
    """

    pixels: Any = field(repr=False)
    name: str
    original_size: tuple[int, int]
    size: tuple[int, int]
    half: tuple[int, int] | None
    detail: float | None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return self.pixels.nbytes if isinstance(self.pixels, np.ndarray) else 0


def decode(encoder: Encoder, name: str, image: Any, options: EncodeOptions) -> DecodedImage:
    """Decode an image and check that it can be encoded; resizing is left to the device.

    Args:
        name: how messages call an array.

    Raises:
        MissingFileError, InputError: as for ``Engine.encode``.
    """
    pixels = image
    if options.fit is not Fit.NONE:
        raise InputError(f"fit={options.fit}: images are fitted on the host only: use Engine.encode")
    if is_on_device(image):
        original = _device_image_size(image, name)
    else:
        loaded = load_image(image, None, name=name)
        name, pixels, original = loaded.name, loaded.pixels, loaded.original_size
    size = loaded_size(original, options.load_size, name)
    half = half_size(size) if options.halve else None
    stride = options.stride or encoder.manifest.stride
    encoder.check_size(name, original, size, half, options)
    geometry = Geometry(original, size, encoder.manifest.architecture.patch, stride)
    detail = detail_of(pixels, geometry) if isinstance(pixels, np.ndarray) else None
    return DecodedImage(pixels, name, original, size, half, detail)


def batches(encoder: Encoder, frames: Iterable[DecodedImage], options: EncodeOptions) -> Iterator[list[DecodedImage]]:
    """Neighbours of one loaded size, as many at a time as are encoded at once. The backend is active by now."""
    batch: list[DecodedImage] = []
    for frame in frames:
        if batch and (batch[0].size != frame.size or len(batch) == encoder.lane_batch(frame.size, options)):
            yield batch
            batch = []
        batch.append(frame)
    if batch:
        yield batch


def is_on_device(image: object) -> bool:
    """Whether another library's array lies in a GPU's memory."""
    if isinstance(image, np.ndarray):
        return False
    located = getattr(image, "__dlpack_device__", None)
    return bool(located and int(located()[0]) == CUDA) or hasattr(image, "__cuda_array_interface__")


def _device_image_size(image: Any, name: str) -> tuple[int, int]:
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or not str(image.dtype).endswith("uint8"):
        raise InputError(
            f"{name} is an array on the GPU of shape {shape} and type {image.dtype}: expected (height, width, 3) uint8 "
            "RGB"
        )
    if shape[0] * shape[1] > MAX_PIXELS:
        raise InputError(f"{name} has {shape[0] * shape[1]:,} pixels: expected at most {MAX_PIXELS:,}")
    return shape[0], shape[1]


@dataclass(frozen=True)
class _Ready:
    """A frame on the device, resized: ``loaded (h, w, 3)`` and, where saliency wants it, ``half`` its size."""

    frame: DecodedImage
    loaded: DeviceArray
    half: DeviceArray | None


class DeviceEncoder(Passes[DeviceArray]):
    """Encodes on one lane. What depends on the grid alone stays on the device; one thread uses it at a time."""

    def __init__(self, encoder: Encoder, lane: EncoderLane) -> None:
        self._encoder, self._lane, self._device = encoder, lane, lane.device
        self.manifest = encoder.manifest
        device = lane.device

        def grid_inputs(size: tuple[int, int], step: int, picture: tuple[int, int] | None) -> dict[str, DeviceArray]:
            inputs = encoder.grid_inputs(size, step=step, picture=picture)
            return {name: device.upload(values) for name, values in inputs.items()}

        self._resizer = lru_cache(maxsize=SIZES)(partial(preprocess.Resizer, device))
        self._grid_inputs = lru_cache(maxsize=SIZES)(grid_inputs)
        self._enlarging = lru_cache(maxsize=SIZES)(lambda *grids: device.upload(_enlarging(*grids)))

    def encode(
        self, batch: Sequence[DecodedImage], facets: Sequence[str], options: EncodeOptions
    ) -> list[DeviceFeatures]:
        """Features of frames of one loaded size, in order; see :func:`batches`.

        Raises:
            InputError: the bundle has no such facet.
        """
        for facet in facets:
            if facet not in self.manifest.facets:
                raise InputError(self.manifest.missing_facet(facet))
        ready = [self._prepare(frame, options) for frame in batch]
        halves = [item.half for item in ready if item.half is not None]
        outputs, attention = self.outputs([item.loaded for item in ready], halves, self._encoder.stride(options))
        saliency = None if attention is None else select.normalise_saliency(self._device, attention)
        prefix, found = self.manifest.architecture.prefix, []
        for i, item in enumerate(ready):
            frame = item.frame
            found.append(
                DeviceFeatures(
                    facets={facet: split_tokens(_entry(outputs[facet], i), prefix) for facet in facets},
                    attention=self._own(attention, i),
                    normalised=self._own(saliency, i),
                    pixels=item.loaded,
                    record=self._encoder.record(frame.name, frame.original_size, frame.size, options, frame.detail),
                )
            )
        return found

    def _prepare(self, frame: DecodedImage, options: EncodeOptions) -> _Ready:
        pixels = self._on_device(frame)

        def resized(size: tuple[int, int]) -> DeviceArray:
            return self._resizer(frame.original_size, size).resize(pixels).reshape(*size, 3)

        low = options.saliency is SaliencyMode.LOW_RESOLUTION
        return _Ready(frame, resized(frame.size), resized(frame.half or frame.size) if low else None)

    def _on_device(self, frame: DecodedImage) -> DeviceArray:
        """``(1, H, W, 3)``; what lies on the device already is used where it is, if kernels can take it there."""
        if isinstance(frame.pixels, np.ndarray):
            return self._device.upload(frame.pixels[None])
        if isinstance(frame.pixels, DeviceArray):
            return self._device.adopt(frame.pixels).reshape(1, *frame.pixels.shape)
        given = from_external(self._device, frame.pixels)
        if given.pointer % ALIGNMENT:
            aligned = self._device.empty(given.shape, given.dtype)
            self._device.copy(given, aligned)
            given = aligned
        return given.reshape(1, *given.shape)

    def _own(self, values: DeviceArray | None, row: int) -> DeviceArray | None:
        """One row as an array of its own: inside ``values`` it need not begin where kernels can take it."""
        if values is None:
            return None
        out = self._device.empty(values.shape[1:], values.dtype)
        self._device.copy(values.rows(row, row + 1), out)
        return out

    def enlarge(self, attention: DeviceArray, small: tuple[int, int], grid: tuple[int, int]) -> DeviceArray:
        """See :class:`Passes`."""
        indices = self._enlarging(small, grid, len(attention))
        return convert.take(self._device, attention.reshape(-1), indices).reshape(len(attention), -1)

    def run(
        self, images: Sequence[DeviceArray], step: int, picture: tuple[int, int] | None = None
    ) -> dict[str, DeviceArray]:
        """See :class:`Passes`."""
        size = images[0].shape[0], images[0].shape[1]
        used_h, used_w = self._encoder.used_size(size)
        batch = self._device.empty((len(images), used_h, used_w, 3), np.uint8)
        for number, image in enumerate(images):
            convert.place(self._device, image, batch, number)
        return self._lane.run({"images": batch, **self._grid_inputs(size, step, picture)})


def _entry(values: DeviceArray, number: int) -> DeviceArray:
    """One of a batch."""
    return values.rows(number, number + 1).reshape(*values.shape[1:])


def _enlarging(small: tuple[int, int], large: tuple[int, int], batch: int) -> NDArray[np.int32]:
    """Which entry of a batch of ``small`` grids each cell of the ``large`` ones takes: Pillow's nearest neighbour."""
    own = pillow_nearest(np.arange(small[0] * small[1], dtype=np.float32).reshape(small), large).astype(np.int32)
    first = np.arange(batch, dtype=np.int32) * (small[0] * small[1])
    return np.asarray(first[:, None] + own.ravel()).ravel()
