"""Images in: any readable file, PIL image or uint8 array becomes RGB pixels at the loaded size.

Resizing is the reference's: Pillow's Lanczos on 8-bit pixels, the shorter side exact, the longer one truncated. One
deliberate difference: the EXIF orientation is applied, where the reference ignores it.

A JPEG or PNG without its last bytes is read as far as it goes, with a warning, unless more than a quarter of its rows
is missing.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from facetrt.engine.images.truncation import MOST_MISSING, complete
from facetrt.engine.settings import Setting
from facetrt.kernels.errors import InputError, MissingFileError


class Tensor(Protocol):
    """An array of another library, such as PyTorch's; none of them is imported."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | bytes | BinaryIO | Tensor
LoadSize = int | tuple[int, int] | None
Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000  # of an input or of a resized image; larger ones are refused before they are decoded
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # no other is tried
CPU_DEVICES = (1, 3)  # of DLPack: memory of the processor, plain and pinned
ORIENTATION, SHORT = 0x0112, 3  # EXIF's tag, and the type that it has
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXPECTED = (
    "expected a path, a PIL image, a (height, width, 3) uint8 RGB array or tensor, or an image file's bytes or file "
    "object"
)


@dataclass(frozen=True)
class LoadedImage:
    """``pixels (height, width, 3)`` uint8 RGB at the loaded size.

    ``half`` is the image at half that size, resized from the original as well, if it was asked for;
    ``original_size`` is ``(height, width)`` before resizing, after EXIF orientation; ``resized`` is the picture's size
    where a border was added after resizing, see :class:`facetrt.engine.images.geometry.Geometry`.
    """

    pixels: Pixels
    half: Pixels | None
    original_size: tuple[int, int]
    name: str
    resized: tuple[int, int] | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` of :attr:`pixels`."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels held."""
        return self.pixels.nbytes + (0 if self.half is None else self.half.nbytes)


def load_image(
    image: ImageLike,
    load_size: LoadSize = None,
    *,
    name: str = "image",
    half: bool = False,
    adapt: Callable[[tuple[int, int]], tuple[int, int]] = lambda size: size,
) -> LoadedImage:
    """Read an image and resize it.

    Args:
        image: a path, a PIL image, an image file's bytes, a file object opened as binary (read from its beginning), or
            an ``(H, W, 3)`` uint8 RGB array or tensor (``(H, W)`` grey is accepted). Nobody can tell BGR, which OpenCV
            reads, from RGB: give ``image[..., ::-1]``.
        load_size: length of the shorter side, or ``(height, width)``, or None to keep the size.
        name: how messages call an image that is not a file.
        half: whether the image at half its loaded size is needed as well.
        adapt: makes of the loaded size the one that is wanted, before the image is resized, once.

    Raises:
        MissingFileError: the file does not exist.
        InputError: it cannot be read as an image, is too large, or has a type that cannot be converted.
    """
    original, name = _open(image, name)
    size = adapt(loaded_size((original.height, original.width), load_size, name))
    small = resize(original, half_size(size)) if half else None
    return LoadedImage(resize(original, size), small, (original.height, original.width), name)


def loaded_size(original: tuple[int, int], load_size: LoadSize, name: str = "image") -> tuple[int, int]:
    """``(height, width)`` after loading; the longer side is truncated, not rounded."""
    height, width = original
    load_size = check_load_size(load_size)
    if load_size is None or (isinstance(load_size, AtMost) and min(original) <= load_size):
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


class AtMost(int):
    """A shorter side for images whose own is longer; all others keep their size."""


DEFAULT_SIZE = DefaultSize(224)  # the reference's shorter side

LOAD_SIZE_SETTING = Setting(
    "Shorter side (224), HEIGHTxWIDTH (224x336), or none.",
    minimum=1,
    expected="the shorter side, a pair (height, width), written HEIGHTxWIDTH, or None",
)
LoadSizeChoice = Annotated[LoadSize, LOAD_SIZE_SETTING]


def check_load_size(load_size: LoadSize) -> LoadSize:
    """The same in Python's own integers; raises :class:`InputError` unless it is the shorter side, a pair or None."""
    if load_size is None:
        return None
    sides = load_size if isinstance(load_size, tuple) else (load_size,)
    whole = all(isinstance(side, (int, np.integer)) for side in sides)
    if not whole or (isinstance(load_size, tuple) and len(load_size) != 2):
        raise InputError(f"load_size={load_size!r}: expected the shorter side, a pair (height, width), or None")
    if isinstance(load_size, AtMost):
        return load_size
    return (int(load_size[0]), int(load_size[1])) if isinstance(load_size, tuple) else int(load_size)


def resize(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """Pillow's Lanczos to ``(height, width)``, as ``(height, width, 3)`` uint8."""
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _open(image: ImageLike, name: str) -> tuple[Image.Image, str]:
    if isinstance(image, Image.Image):
        with decoding(name):  # it may not be decoded yet
            check_pixels(image, name)
            image.load()
            return _to_rgb(image, name), name
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if not path.is_file():
            raise MissingFileError(f"{path} is not a file: expected an image")
        with decoding(str(path)):
            return _read(path, str(path)), str(path)
    if isinstance(image, (bytes, bytearray, memoryview)) or hasattr(image, "read"):
        name = _file_name(image) or name
        with decoding(name):
            return _read(io.BytesIO(_contents(image, name)), name), name
    return _from_array(as_array(image, name), name, _called(image)), name


def _called(array: object) -> str:
    """How an expression that converts it begins."""
    return "array" if isinstance(array, np.ndarray) else "tensor.cpu().numpy()"


def is_picture(item: object) -> bool:
    """Whether it is to be decoded: a path, a PIL image, or the bytes or file object of an image file."""
    given = isinstance(item, (str, os.PathLike, Image.Image, bytes, bytearray, memoryview))
    return given or hasattr(item, "read")


def image_suffixes() -> frozenset[str]:
    """Endings of the formats that are read, as this Pillow registers them. ``.pfm`` holds floats, which are refused."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in FORMATS) - {".pfm"}


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Pillow's, of the formats that facetrt reads."""
    Image.init()  # those that an older Pillow lacks are left out
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def _read(file: Path | io.BytesIO, name: str) -> Image.Image:
    with open_image(file) as opened:
        check_pixels(opened, name)
        try:
            opened.load()
        except (OSError, SyntaxError, struct.error):
            whole = _completed(file, name)
            if whole is None:
                raise
        else:
            return _to_rgb(opened, name)
    with open_image(whole) as opened:
        opened.load()
        return _to_rgb(opened, name)


def _completed(file: Path | io.BytesIO, name: str) -> io.BytesIO | None:
    """The file with its end, if that is all it lacks."""
    completed = complete(file.getvalue() if isinstance(file, io.BytesIO) else file.read_bytes())
    if completed is None or completed.missing > MOST_MISSING:
        return None
    if completed.missing:
        warnings.warn(
            f"{name} lacks its end: about {max(completed.missing, 0.01):.0%} of its rows are empty", stacklevel=2
        )
    return io.BytesIO(completed.data)


def _file_name(image: object) -> str | None:
    name = getattr(image, "name", None)
    return name if isinstance(name, str) else None


def _contents(image: Any, name: str) -> bytes:
    """What a file object holds from its beginning, or ``bytes``."""
    if not hasattr(image, "read"):
        return bytes(image)
    with suppress(AttributeError, OSError):  # a pipe cannot be rewound
        image.seek(0)
    data = image.read()
    if not isinstance(data, bytes):
        raise InputError(f"{name} is a file opened as text: open it with mode 'rb'")
    return data


@contextmanager
def decoding(name: str) -> Generator[None]:
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


def as_array(item: Any, name: str) -> NDArray[Any]:
    """A NumPy array of what an array library holds: DLPack, or whatever NumPy itself takes for an array.

    Raises:
        InputError: no array, or one that cannot be read here.
    """
    if isinstance(item, np.ndarray):
        return np.asarray(item)  # of subclasses, the plain array
    if not (hasattr(item, "__dlpack__") and hasattr(item, "__dlpack_device__")):
        if hasattr(item, "__array__"):
            return np.asarray(item)
        raise InputError(f"{name} is a {type(item).__name__}: {EXPECTED}")
    device = int(item.__dlpack_device__()[0])
    if device not in CPU_DEVICES:
        item = _copied_to_cpu(item, device, name)
    if isinstance(item, np.ndarray):
        return item
    try:
        return np.from_dlpack(item)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name}, a {type(item).__name__}, cannot be read through DLPack: {error}") from error


def _copied_to_cpu(item: Any, device: int, name: str) -> Any:
    """Array libraries say differently how: PyTorch ``cpu()``, CuPy ``get()``."""
    for method in ("cpu", "get"):
        if callable(copy := getattr(item, method, None)):
            return copy()
    raise InputError(
        f"{name} is a {type(item).__name__} on a device (DLPack type {device}) without cpu() or get(): copy it "
        "to the processor first"
    )


def check_array(pixels: NDArray[Any], name: str, called: str = "array") -> None:
    """Raise :class:`InputError`, which says how to convert it, unless ``pixels`` are ``(H, W, 3)`` uint8."""
    if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
        return
    how = conversion(pixels, called)
    raise InputError(
        f"{name} is an array of shape {pixels.shape} and type {pixels.dtype}: expected (height, width, 3) uint8 RGB"
        + (f", which {how} gives" if how else "")
    )


def conversion(array: NDArray[Any], called: str = "array") -> str | None:
    """How ``array`` becomes ``(H, W, 3)`` uint8, as an expression; None if that cannot be told from shape and type."""
    if array.ndim == 1 and array.dtype == np.uint8 and array.size:
        return f"{called}.tobytes(), if these are the bytes of an image file,"
    if not array.size or array.dtype.kind not in "buif" or not (array >= 0).all():  # normalised, or not a number
        return None
    if array.ndim == 4:
        return f"each of list({called})"
    layout = _layout(array.shape)
    if layout is None:
        return None
    if array.dtype == np.uint8:
        return f"{called}{layout}"
    return _eight_bits(array, f"{called}{layout}")


def _layout(shape: tuple[int, ...]) -> str | None:
    """What is written behind the array's name."""
    if len(shape) == 2:
        return "[..., None].repeat(3, axis=2)"
    if len(shape) != 3:
        return None
    known = {3: "", 4: "[..., :3]", 1: ".repeat(3, axis=2)", 2: "[..., :1].repeat(3, axis=2)"}  # 2: grey and alpha
    if shape[2] in known:
        return known[shape[2]]
    first = {3: "", 4: "[:3]", 1: "[[0, 0, 0]]"}
    return f"{first[shape[0]]}.transpose(1, 2, 0)" if shape[0] in first else None


def _eight_bits(array: NDArray[Any], text: str) -> str:
    if array.dtype.kind == "b":
        return f"{text}.astype('uint8') * 255"
    if array.dtype.kind == "u" and array.dtype.itemsize == 2 and array.max() > 255:
        return f"({text} >> 8).astype('uint8')"
    if array.dtype.kind == "f" and array.max() <= 1:
        return f"(255 * {text}).round().clip(0, 255).astype('uint8')"
    return f"{text}{'.round()' if array.dtype.kind == 'f' else ''}.clip(0, 255).astype('uint8')"


def _from_array(image: NDArray[Any], name: str, called: str) -> Image.Image:
    grey = image.ndim == 2 and image.dtype == np.uint8 and image.size
    if not grey:
        check_array(image, name, called)
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        raise InputError(_too_large(name, f"{image.shape[0] * image.shape[1]:,}"))
    return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A decoded image, turned as its EXIF says, and converted.

    Alpha is dropped as in the reference; 16-bit grey keeps its upper 8 bits.
    """
    _warn_of_more(image, name)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        upper = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return turned(Image.fromarray(upper), orientation(image)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} stores {'floats' if image.mode == 'F' else '32-bit integers'} per pixel, whose range is "
            "unknown: convert it to 8-bit RGB"
        )
    oriented = turned(image, orientation(image))
    return oriented if oriented.mode == "RGB" else oriented.convert("RGB")


def _warn_of_more(image: Image.Image, name: str) -> None:
    """Warn of pictures behind the first, save for a phone's: its second is a preview or a depth map of the same."""
    if image.format == "MPO":
        return
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception:  # noqa: BLE001  (damage behind the first picture, which is all that is read)
        return
    if frames > 1:
        kind, parts = ("has pages", "pages") if image.format == "TIFF" else ("is animated", "frames")
        warnings.warn(f"{name} {kind}: only the first of its {frames} {parts} is used", stacklevel=2)


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it is looked at; the same object where it lies right."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8, of a decoded image; 1 (as it lies) if there is none, or none that can be."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001  (a tag that nobody needs may be wrong in any way)
        found = _orientation_of(image.info.get("exif", b""))
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _orientation_of(exif: bytes) -> int | None:
    """Read the orientation from the bytes, where Pillow gives up: the first directory's entries have 12 bytes each."""
    tiff = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        (place,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == ORIENTATION and kind == SHORT:
                return int(value)
    except struct.error:
        return None
    return None


def check_pixels(image: Image.Image, name: str) -> None:
    """Raise :class:`InputError` if there are too many to decode."""
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_too_large(name, f"{image.width * image.height:,}"))


def _too_large(name: str, pixels: str) -> str:
    return f"{name} has {pixels} pixels; at most {MAX_PIXELS:,} are decoded: make it smaller first"
