"""Tensors as KServe's protocol (v2, which Triton speaks too) names them, and images and masks in them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.tasks.discovery.rle import encode_rle
from facetrt.kernels.errors import InputError

DTYPES: dict[str, Any] = {"BYTES": np.object_, "FP32": np.float32, "INT32": np.int32, "BOOL": np.bool_}
MEBIBYTE = 1 << 20

Outputs = Mapping[str, NDArray[Any]]


class MaskFormat(StrEnum):
    """How masks travel: as a PNG file, or as JSON of COCO's run lengths (``size`` and ``counts``)."""

    PNG = "png"
    RLE = "rle"


@dataclass(frozen=True)
class Tensor:
    """One input or output of a task.

    Attributes:
        datatype: a key of :data:`DTYPES`.
        shape: of one item; -1 where it varies. Requests have the number of items before it.
        optional: whether it may be missing.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Request:
    """What a client sent.

    Attributes:
        tensors: by name; BYTES are arrays of ``bytes`` objects.
        parameters: of the request, by name; of sequences ``sequence_id``, ``sequence_start`` and ``sequence_end``.
    """

    tensors: Mapping[str, NDArray[Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What one request may hold.

    Attributes:
        images: how many.
        image_bytes: of each file; how many pixels it may have is bounded for all of facetrt.
    """

    images: int = 64
    image_bytes: int = 32 * MEBIBYTE


class ImageFile(io.BytesIO):
    """An image's file in memory, with the name that messages call it."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def read_images(request: Request, name: str, limits: Limits) -> list[ImageFile]:
    """The image files of an input ``(N, 1)`` or ``(N,)``; they are decoded later.

    Raises:
        InputError: the input is missing or no files, there are too many, or one is too large.
    """
    files = _column(request, name)
    if len(files) > limits.images:
        raise InputError(f"{name} has {len(files)} images: expected at most {limits.images} in a request")
    found = []
    for number, data in enumerate(files):
        called = name if len(files) == 1 else f"{name} {number}"
        if not isinstance(data, bytes):
            raise InputError(f"{called} is {type(data).__name__}: expected the bytes of an image file (BYTES)")
        if len(data) > limits.image_bytes:
            size, most = len(data) / MEBIBYTE, limits.image_bytes / MEBIBYTE
            raise InputError(f"{called} has {size:.1f} MiB: expected at most {most:g} MiB")
        found.append(ImageFile(data, called))
    return found


def _column(request: Request, name: str) -> list[Any]:
    if name not in request.tensors:
        raise InputError(f"input {name} is missing: the request has {', '.join(request.tensors) or 'none'}")
    values = request.tensors[name]
    if values.size == 0 or values.ndim > 2 or values.size != values.shape[0]:
        raise InputError(f"{name} has shape {values.shape}: expected (N, 1), one image file each")
    return list(values.reshape(-1))


def mask_bytes(mask: NDArray[np.bool_], how: MaskFormat) -> bytes:
    """A mask ``(height, width)``: 255 in a grey PNG, or ones in COCO's run lengths."""
    return png_bytes(mask.astype(np.uint8) * 255) if how is MaskFormat.PNG else json.dumps(encode_rle(mask)).encode()


def label_bytes(labels: NDArray[Any], how: MaskFormat) -> bytes:
    """Labels ``(height, width)`` from -1, the background: a grey PNG of label + 1, or run lengths of each."""
    if how is MaskFormat.PNG:
        return png_bytes((labels + 1).astype(np.uint8))
    return json.dumps([encode_rle(labels == label) for label in range(int(labels.max(initial=-1)) + 1)]).encode()


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """A grey image ``(height, width)`` as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def as_bytes(items: Sequence[bytes]) -> NDArray[Any]:
    """A BYTES tensor ``(len(items),)``."""
    array = np.empty(len(items), np.object_)
    array[:] = list(items)
    return array


def stacked(results: Sequence[Outputs], tensors: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
    """The outputs of a request's items, one behind the other; shorter ones are filled up with NaN, -1 or nothing."""
    return {tensor.name: _stacked([result[tensor.name] for result in results], tensor) for tensor in tensors}


def _stacked(parts: Sequence[NDArray[Any]], tensor: Tensor) -> NDArray[Any]:
    shape = tuple(max(part.shape[axis] for part in parts) for axis in range(len(tensor.shape)))
    filling: Any = {"FP32": np.nan, "INT32": -1, "BOOL": False, "BYTES": b""}[tensor.datatype]
    out = np.full((len(parts), *shape), filling, DTYPES[tensor.datatype])
    for row, part in zip(out, parts, strict=True):
        row[tuple(slice(side) for side in part.shape)] = part
    return out
