from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import photo
from PIL import Image

from facetrt.engine import InputError, MissingFileError
from facetrt.engine import images as module
from facetrt.engine.encoding import EncodeOptions
from facetrt.engine.images import LoadSize, check_load_size, load_image, loaded_size


@pytest.mark.parametrize(
    ("original", "load_size", "expected"),
    [
        ((333, 500), 224, (224, 336)),  # 336.3 truncated
        ((500, 333), 224, (336, 224)),
        ((300, 451), 98, (98, 147)),
        ((224, 300), 224, (224, 300)),
        ((100, 100), (64, 90), (64, 90)),
        ((31, 77), None, (31, 77)),
    ],
)
def test_loaded_size(original: tuple[int, int], load_size: object, expected: tuple[int, int]) -> None:
    assert loaded_size(original, load_size) == expected  # type: ignore[arg-type]


def test_load_sizes_of_numpy_become_plain() -> None:
    sizes: list[LoadSize] = [np.uint8(200), (np.int64(64), 90), None]  # type: ignore[list-item]
    assert json.dumps([EncodeOptions(size).load_size for size in sizes]) == "[200, [64, 90], null]"
    assert loaded_size((300, 600), sizes[0]) == (200, 400)


@pytest.mark.parametrize("size", [(224,), (1, 2, 3), (), 24.5, (24, 24.5), "224"])
def test_other_load_sizes_are_refused(size: object) -> None:
    with pytest.raises(InputError, match="expected the shorter side, a pair"):
        check_load_size(size)  # type: ignore[arg-type]


def test_resizing_is_pillows_lanczos() -> None:
    pixels = photo(90, 120)
    loaded = load_image(pixels, 30)
    expected = np.asarray(Image.fromarray(pixels).resize((40, 30), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(loaded.pixels, expected)
    assert loaded.original_size == (90, 120) and loaded.image_size == (30, 40)


def test_paths_pil_images_and_arrays_agree(tmp_path: Path) -> None:
    pixels = photo(40, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels):
        np.testing.assert_array_equal(load_image(image).pixels, pixels)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "YCbCr", "HSV", "LAB"])
def test_convertible_modes(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(photo(20, 30)).convert("L" if mode == "LA" else "RGB").convert(mode)
    loaded = load_image(image)
    assert loaded.pixels.shape == (20, 30, 3) and loaded.pixels.dtype == np.uint8
    np.testing.assert_array_equal(loaded.pixels, np.asarray(image.convert("RGB")))


def test_16_bit_keeps_its_upper_half(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 64, np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(load_image(tmp_path / "deep.png").pixels[..., 0], values >> 8)


def test_floats_have_no_known_range(tmp_path: Path) -> None:
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match="floats per pixel"):
        load_image(tmp_path / "f.tiff")


def test_animations_use_their_first_frame_and_say_so(tmp_path: Path) -> None:
    frames = [Image.fromarray(photo(16, 16, seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="only the first of its 3 frames"):
        loaded = load_image(tmp_path / "a.gif")
    assert loaded.image_size == (16, 16)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown, the picture is rotated by 90° clockwise
    Image.fromarray(photo(20, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").original_size == (40, 20)


def test_missing_empty_truncated_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="is not a file"):
        load_image(tmp_path / "none.png")
    buffer = io.BytesIO()
    Image.fromarray(photo(64, 64)).save(buffer, "PNG")
    contents = {"cut.png": buffer.getvalue()[:900], "empty.jpg": b"", "text.png": b"not an image at all"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            load_image(tmp_path / name)
    buffer = io.BytesIO()
    Image.fromarray(photo(64, 64)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_image(tmp_path / "cut.jpg")


def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (11_000, 60_000):  # above our limit, and above Pillow's own
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(data)
        with pytest.raises(InputError, match="at most 100,000,000 are decoded"):
            load_image(tmp_path / "bomb.png")


def test_resizing_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 10_000)
    with pytest.raises(InputError, match="would become"):
        load_image(photo(2, 90), 100)
    with pytest.raises(InputError, match="10,000"):
        load_image(photo(120, 120))


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8)]
)
def test_arrays_of_other_kinds(array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"expected \(height, width, 3\) uint8 RGB"):
        load_image(array)


def test_anything_that_a_decoder_raises_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(photo(9, 9)).save(tmp_path / "a.png")
    for raised in (struct.error("required argument"), TypeError("Missing dimensions"), KeyError(1)):

        def fail(*arguments: object, error: Exception = raised) -> None:
            raise error

        monkeypatch.setattr(module.ImageOps, "exif_transpose", fail)
        with pytest.raises(InputError, match="is damaged"):
            load_image(tmp_path / "a.png")


def test_half_size_comes_from_the_original() -> None:
    pixels = photo(90, 120)
    loaded = load_image(pixels, 31, half=True)
    assert loaded.image_size == (31, 41)
    expected = np.asarray(Image.fromarray(pixels).resize((20, 15), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(loaded.half, expected)
