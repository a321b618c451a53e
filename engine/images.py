"""Images in: any readable file, PIL image or uint8 array becomes RGB pixels at the loaded size.

Resizing is the reference's: Pillow's Lanczos on 8-bit pixels, the shorter side exact, the longer one truncated. One
deliberate difference: the EXIF orientation is applied, where the reference ignores it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from facetrt.kernels.errors import InputError, MissingFileError

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
LoadSize = int | tuple[int, int] | None
Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000  # of an input or of a resized image; larger ones are refused before they are decoded


@dataclass(frozen=True)
class LoadedImage:
    """``pixels (height, width, 3)`` uint8 RGB at the loaded size.

    ``half`` is the image at half that size, resized from the original as well, if it was asked for;
    ``original_size`` is ``(height, width)`` before resizing, after EXIF orientation.
    """

    pixels: Pixels
    half: Pixels | None
    original_size: tuple[int, int]
    name: str

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` of :attr:`pixels`."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the pixels held."""
        return self.pixels.nbytes + (0 if self.half is None else self.half.nbytes)


def load_image(image: ImageLike, load_size: LoadSize = None, *, name: str = "image", half: bool = False) -> LoadedImage:
    """Read an image and resize it.

    Args:
        image: a path, a PIL image, or an ``(H, W, 3)`` uint8 RGB array (``(H, W)`` grey is accepted).
        load_size: length of the shorter side, or ``(height, width)``, or None to keep the size.
        name: how messages call an image that is not a file.
        half: whether the image at half its loaded size is needed as well.

    Raises:
        MissingFileError: the file does not exist.
        InputError: it cannot be read as an image, is too large, or has a type that cannot be converted.
    """
    original, name = _open(image, name)
    size = loaded_size((original.height, original.width), load_size, name)
    small = resize(original, half_size(size)) if half else None
    return LoadedImage(resize(original, size), small, (original.height, original.width), name)


def loaded_size(original: tuple[int, int], load_size: LoadSize, name: str = "image") -> tuple[int, int]:
    """``(height, width)`` after loading; the longer side is truncated, not rounded."""
    height, width = original
    load_size = check_load_size(load_size)
    if load_size is None:
        size = original
    elif isinstance(load_size, tuple):
        size = load_size
    else:
        short, long = sorted(original)
        scaled = load_size * long // short
        size = (load_size, scaled) if height <= width else (scaled, load_size)
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"{name} ({width}×{height}) with load size {load_size} would become {size[1]}×{size[0]} pixels: expected 1 "
            f"to {MAX_PIXELS:,} pixels"
        )
    return size


def half_size(size: tuple[int, int]) -> tuple[int, int]:
    """``(height, width)`` of the second, smaller image that low-resolution saliency comes from."""
    return max(size[0] // 2, 1), max(size[1] // 2, 1)


class DefaultSize(int):
    """A load size that nobody asked for: it acts like the number, and features may stand where images could."""


DEFAULT_SIZE = DefaultSize(224)  # the reference's shorter side


def check_load_size(load_size: LoadSize) -> LoadSize:
    """The same in Python's own integers; raises :class:`InputError` unless it is the shorter side, a pair or None."""
    if load_size is None:
        return None
    sides = load_size if isinstance(load_size, tuple) else (load_size,)
    whole = all(isinstance(side, (int, np.integer)) for side in sides)
    if not whole or (isinstance(load_size, tuple) and len(load_size) != 2):
        raise InputError(f"load_size={load_size!r}: expected the shorter side, a pair (height, width), or None")
    return (int(load_size[0]), int(load_size[1])) if isinstance(load_size, tuple) else int(load_size)


def resize(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """Pillow's Lanczos to ``(height, width)``, as ``(height, width, 3)`` uint8."""
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _open(image: ImageLike, name: str) -> tuple[Image.Image, str]:
    if isinstance(image, np.ndarray):
        return _from_array(image, name), name
    if isinstance(image, Image.Image):
        with _decoding(name):  # it may not be decoded yet
            _check_pixels(image, name)
            return _to_rgb(image, name), name
    if not isinstance(image, (str, os.PathLike)):
        raise InputError(f"{name} is a {type(image).__name__}: expected a path, a PIL image or a uint8 RGB array")
    path = Path(image)
    if not path.is_file():
        raise MissingFileError(f"{path} is not a file: expected an image")
    with _decoding(str(path)), Image.open(path) as opened:
        _check_pixels(opened, str(path))
        return _to_rgb(opened, str(path), own=True), str(path)


@contextmanager
def _decoding(name: str) -> Generator[None]:
    """Whatever a decoder raises becomes an :class:`InputError` that names the image."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image that can be read: convert it to PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(name, "more")) from error
    except (InputError, MemoryError):
        raise
    except PermissionError as error:
        raise InputError(f"{name} cannot be read: permission denied") from error
    except Exception as error:  # decoders fail on damaged files in any way
        raise InputError(f"{name} is damaged and cannot be read as an image: {error}") from error


def _from_array(image: NDArray[np.uint8], name: str) -> Image.Image:
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not fits or 0 in image.shape:
        raise InputError(
            f"{name} is an array of shape {image.shape} and type {image.dtype}: expected (height, width, 3) uint8 RGB"
        )
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise InputError(_too_large(name, f"{image.shape[0] * image.shape[1]:,}"))
    return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")


def _to_rgb(image: Image.Image, name: str, *, own: bool = False) -> Image.Image:
    """Oriented by EXIF and converted; alpha is dropped as in the reference, 16-bit grey keeps its upper 8 bits.

    ``own`` images may be changed, which saves a copy at full size.
    """
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        warnings.warn(f"{name} is animated: only the first of its {frames} frames is used", stacklevel=2)
    oriented = image
    if own:
        ImageOps.exif_transpose(image, in_place=True)
    else:
        oriented = ImageOps.exif_transpose(image)
    if oriented.mode.startswith("I;16") or (oriented.mode == "I" and image.format == "PNG"):
        oriented = Image.fromarray((np.asarray(oriented, np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if oriented.mode in ("I", "F"):
        raise InputError(
            f"{name} stores {'floats' if oriented.mode == 'F' else '32-bit integers'} per pixel, whose range is "
            "unknown: convert it to 8-bit RGB"
        )
    return oriented if oriented.mode == "RGB" else oriented.convert("RGB")


def _check_pixels(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_too_large(name, f"{image.width * image.height:,}"))


def _too_large(name: str, pixels: str) -> str:
    return f"{name} has {pixels} pixels; at most {MAX_PIXELS:,} are decoded: make it smaller first"
