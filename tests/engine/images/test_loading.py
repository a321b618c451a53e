from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import photo
from PIL import Image, ImageFile

from facetrt.engine import InputError, MissingFileError
from facetrt.engine.encoding.encoder import EncodeOptions
from facetrt.engine.images import loading as module
from facetrt.engine.images.loading import LoadSize, check_load_size, conversion, load_image, loaded_size


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


RGB = photo(6, 8)
WRONG = {
    "transpose(1, 2, 0)": (RGB.transpose(2, 0, 1), RGB),
    "(255 * array)": (RGB / 255, RGB),
    "round()": (RGB.astype(np.float32) + 0.2, RGB),
    "(255 * array.transpose": ((RGB / 255).transpose(2, 0, 1).astype(np.float32), RGB),
    "array[..., :3]": (np.dstack([RGB, RGB[..., :1]]), RGB),
    "array[:3].transpose": (np.dstack([RGB, RGB[..., :1]]).transpose(2, 0, 1), RGB),
    "array.repeat(3": (RGB[..., :1], RGB[..., [0, 0, 0]]),
    "array[[0, 0, 0]]": (RGB[..., 0][None], RGB[..., [0, 0, 0]]),
    ">> 8": (RGB.astype(">u2") * 257, RGB),
    "clip(0, 255)": (RGB.astype(np.int64), RGB),
    "* 255": (RGB > 99, (RGB > 99) * np.uint8(255)),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_array_says_how_it_is_converted(how: str) -> None:
    array, right = WRONG[how]
    with pytest.raises(InputError, match=r"expected \(height, width, 3\) uint8 RGB") as caught:
        load_image(array)
    assert how in str(caught.value) and "\n" not in str(caught.value)
    expression = conversion(array)
    assert expression is not None
    np.testing.assert_array_equal(load_image(eval(expression, {"array": array})).pixels, right)


@pytest.mark.parametrize(
    "array",
    [np.zeros((0, 4, 3), np.uint8), np.array(["a"]), np.zeros((5, 5, 9), np.uint8), -np.ones((4, 4, 3)), 5, None],
)
def test_what_cannot_be_converted(array: object) -> None:
    with pytest.raises(InputError, match=r"\(height, width, 3\) uint8 RGB"):
        load_image(array)  # type: ignore[arg-type]


def test_batches_and_encoded_bytes_in_an_array_say_what_to_give() -> None:
    with pytest.raises(InputError, match=r"each of list\(array\)"):
        load_image(RGB[None])
    with pytest.raises(InputError, match=r"array.tobytes\(\)"):
        load_image(np.frombuffer(encoded(RGB, "PNG"), np.uint8))


class Subclass(np.ndarray):
    pass


class Tensor:
    """What PyTorch's offer, without PyTorch."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def test_arrays_of_any_layout_and_library(tmp_path: Path) -> None:
    frozen = RGB.copy()
    frozen.flags.writeable = False
    wide = np.repeat(RGB, 2, axis=1)[:, ::2]
    for array in (frozen, wide, RGB[::-1][::-1], RGB.copy().view(Subclass), Tensor(RGB.copy()), np.asfortranarray(RGB)):
        np.testing.assert_array_equal(load_image(array).pixels, RGB)
    with pytest.raises(InputError, match=r"tensor.cpu\(\).numpy\(\).transpose"):
        load_image(Tensor(RGB.transpose(2, 0, 1).copy()))


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(load_image(torch.from_numpy(RGB.copy())).pixels, RGB)
    with pytest.raises(InputError, match="255 \\* tensor"):
        load_image(torch.from_numpy(RGB / np.float32(255)))


def test_bytes_and_file_objects(tmp_path: Path) -> None:
    data = encoded(RGB, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    written = io.BytesIO(data)
    written.seek(0, io.SEEK_END)  # as after writing: it is read from its beginning
    with (tmp_path / "a.png").open("rb") as opened:
        for image in (data, bytearray(data), memoryview(data), written, written, opened, tmp_path / "a.png"):
            np.testing.assert_array_equal(load_image(image).pixels, RGB)
        assert load_image(opened).name == str(tmp_path / "a.png")
    with (tmp_path / "a.png").open(encoding="latin-1") as text, pytest.raises(InputError, match="mode 'rb'"):
        load_image(text)  # type: ignore[arg-type]
    for broken in (b"", b"none", io.BytesIO()):
        with pytest.raises(InputError, match="not an image that can be read"):
            load_image(broken)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("value", range(10))
def test_all_orientations(name: str, value: int) -> None:
    """0 and 9 are none."""
    shown = photo(48, 32)
    undone = {
        2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: shown.transpose(1, 0, 2),
        6: np.rot90(shown), 7: np.rot90(shown, 2).transpose(1, 0, 2), 8: np.rot90(shown, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(name, {})
    data = encoded(undone.get(value, shown), name, exif=exif, **options)
    pixels = load_image(data).pixels
    assert np.abs(pixels.astype(int) - shown).mean() < (4 if name == "JPEG" else 1e-9)


def exif_block(*entries: bytes, count: int | None = None) -> bytes:
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries) if count is None else count)
    return head + b"".join(entries)


TURNED = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
BAD = {
    "text for a width": exif_block(struct.pack("<HHI4s", 0x0100, 2, 4, b"640\0"), TURNED),
    "text far away": exif_block(TURNED, struct.pack("<HHII", 0x010F, 2, 99, 9999)),
    "type unknown": exif_block(struct.pack("<HHII", 0x010F, 77, 1, 0), TURNED),
    "ends early": exif_block(TURNED, count=9),
    "directory far away": exif_block(TURNED, struct.pack("<HHII", 0x8769, 4, 1, 1 << 30)),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
def test_a_bad_tag_that_nobody_needs_changes_nothing(kind: str, name: str) -> None:
    assert load_image(encoded(photo(32, 48), name, exif=BAD[kind])).image_size == (48, 32)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40, b"Exif\0\0MM\0*"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
def test_exif_that_is_none(exif: bytes) -> None:
    assert load_image(encoded(photo(32, 48), "JPEG", exif=exif)).image_size == (32, 48)


def test_a_phones_two_pictures_are_not_animated(recwarn: pytest.WarningsRecorder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    second = [Image.fromarray(photo(8, 8))]
    data = encoded(photo(32, 48), "MPO", save_all=True, append_images=second, exif=exif)
    assert load_image(data).image_size == (48, 32)
    assert not recwarn.list


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
@pytest.mark.parametrize("lost", [1, 2, 3, 20])
@pytest.mark.filterwarnings("ignore:.*lacks its end")
def test_a_jpeg_without_its_last_bytes(lost: int, options: dict[str, object]) -> None:
    data = encoded(photo(120, 160), "JPEG", **options)
    whole, cut = load_image(data).pixels, load_image(data[:-lost]).pixels
    np.testing.assert_array_equal(cut[:96], whole[:96])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # the caller's


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16"])
@pytest.mark.parametrize("lost", [1, 12, 14, 30])
@pytest.mark.filterwarnings("ignore:.*lacks its end")
def test_a_png_without_its_last_bytes(lost: int, mode: str) -> None:
    image = Image.fromarray(photo(120, 160)).convert("L" if mode == "I;16" else "RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    whole, cut = (load_image(data).pixels for data in (buffer.getvalue(), buffer.getvalue()[:-lost]))
    np.testing.assert_array_equal(cut[:100], whole[:100])


def test_what_is_missing_is_said_and_not_too_much() -> None:
    for name in ("JPEG", "PNG"):
        data = encoded(photo(160, 120), name)
        with pytest.warns(UserWarning, match=r"lacks its end: about \d+% of its rows"):
            load_image(data[: len(data) * 9 // 10])
        with pytest.raises(InputError, match="damaged"):
            load_image(data[: len(data) // 2])


def test_formats_that_nobody_asked_for_are_not_tried() -> None:
    for name in ("EPS", "PDF", "ICO", "TGA", "PCX"):
        with pytest.raises(InputError, match="not an image that can be read"):
            load_image(encoded(photo(32, 32), name))


def encoded(pixels: np.ndarray, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, name, **options)
    return buffer.getvalue()


def test_anything_that_a_decoder_raises_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(photo(9, 9)).save(tmp_path / "a.png")
    for raised in (struct.error("required argument"), TypeError("Missing dimensions"), KeyError(1)):

        def fail(*arguments: object, error: Exception = raised) -> None:
            raise error

        monkeypatch.setattr(module, "turned", fail)
        with pytest.raises(InputError, match="is damaged"):
            load_image(tmp_path / "a.png")


def test_half_size_comes_from_the_original() -> None:
    pixels = photo(90, 120)
    loaded = load_image(pixels, 31, half=True)
    assert loaded.image_size == (31, 41)
    expected = np.asarray(Image.fromarray(pixels).resize((20, 15), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(loaded.half, expected)
