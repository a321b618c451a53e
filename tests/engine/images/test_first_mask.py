"""Masks as annotation tools, paint programs and cut-out services write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo
from PIL import Image

from facetrt.engine import InputError, MissingFileError
from facetrt.engine.images.first_mask import read_first_mask
from facetrt.engine.images.label_images import read_labels, voc_palette

SIZE = (48, 64)
OBJECT = np.zeros(SIZE, np.bool_)
OBJECT[8:40, 10:30] = True
OTHER = np.zeros(SIZE, np.bool_)
OTHER[8:40, 34:60] = True
TWO = OBJECT + 2 * OTHER.astype(np.int64)


def saved(tmp_path: Path, pixels: np.ndarray, name: str = "mask.png", **options: Any) -> Path:
    Image.fromarray(pixels).save(tmp_path / name, **options)
    return tmp_path / name


def with_palette(tmp_path: Path, indices: np.ndarray, palette: np.ndarray, **options: Any) -> Path:
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.reshape(-1).tolist())
    image.putpalette(palette.astype(np.uint8).reshape(-1).tolist())
    image.save(tmp_path / "mask.png", **options)
    return tmp_path / "mask.png"


def painted(
    colours: dict[tuple[int, int, int], np.ndarray], background: tuple[int, int, int] = (0, 0, 0)
) -> np.ndarray:
    pixels = np.full((*SIZE, 3), background, np.uint8)
    for colour, where in colours.items():
        pixels[where] = colour
    return pixels


def smoothed(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((256, 192)).resize(SIZE[::-1], Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 255], [0, 1]),
        ([0, 3], [0, 3]),
        ([0, 1, 2], [0, 1, 2]),
        ([0, 128, 255], [0, 128, 255]),
        ([0, 7, 9], [0, 7, 9]),
    ],
)
def test_grey_values_are_labels(tmp_path: Path, values: list[int], expected: list[int]) -> None:
    path = saved(tmp_path, np.array([values], np.uint8))
    assert read_first_mask(path).tolist() == [expected]


def test_255_beside_numbered_labels_is_void_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="255 is taken for void, as the other labels are 1 to 2"):
        assert read_first_mask(saved(tmp_path, np.array([[0, 1, 2, 255]], np.uint8))).tolist() == [[0, 1, 2, 0]]


def test_depths_of_one_and_of_16_bits(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_first_mask(saved(tmp_path, OBJECT)), OBJECT)
    for white in (255, 65535):
        np.testing.assert_array_equal(read_first_mask(saved(tmp_path, OBJECT.astype(np.uint16) * white)), OBJECT)
    np.testing.assert_array_equal(read_first_mask(saved(tmp_path, TWO.astype(np.uint16) * 1001)), TWO * 1001)


def test_palettes_keep_their_indices_and_void(tmp_path: Path) -> None:
    indices = TWO.copy()
    indices[0, :5] = 255
    np.testing.assert_array_equal(read_first_mask(with_palette(tmp_path, indices, voc_palette())), TWO)
    np.testing.assert_array_equal(read_first_mask(with_palette(tmp_path, OBJECT * 255, voc_palette())), OBJECT)
    np.testing.assert_array_equal(read_first_mask(with_palette(tmp_path, 5 * TWO, voc_palette())), 5 * TWO)


def test_a_palette_whose_first_colour_is_the_object(tmp_path: Path) -> None:
    """As programs that count colours write it."""
    palette = np.array([(255, 255, 255), (0, 0, 0)])
    np.testing.assert_array_equal(read_first_mask(with_palette(tmp_path, ~OBJECT, palette)), OBJECT)


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    palette = np.array([(255, 255, 255), (255, 255, 255)])
    path = with_palette(tmp_path, OBJECT, palette, transparency=0)
    np.testing.assert_array_equal(read_first_mask(path), OBJECT)


def test_the_palettes_colours_in_rgb_are_its_indices(tmp_path: Path) -> None:
    indices = TWO.copy()
    indices[0, :5] = 255
    path = saved(tmp_path, voc_palette()[indices].astype(np.uint8))
    np.testing.assert_array_equal(read_first_mask(path), TWO)
    np.testing.assert_array_equal(read_labels(path), indices)


@pytest.mark.parametrize("colour", [(255, 255, 255), (1, 1, 1), (255, 0, 0), (0, 200, 31)])
def test_one_colour_is_one_object(tmp_path: Path, colour: tuple[int, int, int], recwarn: Any) -> None:
    np.testing.assert_array_equal(read_first_mask(saved(tmp_path, painted({colour: OBJECT}))), OBJECT)


def test_colours_of_equal_grey_are_two_objects(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="each colour is an object: 1 is #0000ff, 2 is #610000"):
        labels = read_first_mask(saved(tmp_path, painted({(0, 0, 255): OBJECT, (97, 0, 0): OTHER})))
    np.testing.assert_array_equal(labels, TWO)
    codes = read_labels(tmp_path / "mask.png")
    assert sorted(np.unique(codes)) == [0, 0x0000FF, 0x610000]


@pytest.mark.filterwarnings("ignore:.*each colour is an object")
def test_without_black_the_colour_around_the_edge_is_the_background(tmp_path: Path) -> None:
    path = saved(tmp_path, painted({(0, 0, 255): OBJECT, (99, 0, 0): OTHER}, background=(255, 255, 255)))
    with pytest.warns(UserWarning, match="no black: #ffffff"):
        np.testing.assert_array_equal(read_first_mask(path), TWO)


@pytest.mark.filterwarnings("ignore:.*each colour is an object")
def test_smoothed_edges_of_colours_go_to_the_nearest(tmp_path: Path) -> None:
    path = saved(tmp_path, smoothed(painted({(0, 0, 255): OBJECT, (199, 0, 0): OTHER})))
    with pytest.warns(UserWarning, match="smoothed edges"):
        assert (read_first_mask(path) != TWO).mean() < 0.02


@pytest.mark.filterwarnings("ignore:.*each colour is an object")
def test_alpha_that_varies_carries_the_object(tmp_path: Path) -> None:
    opaque = (OBJECT * 255).astype(np.uint8)
    for colour in (0, 255, 90):  # constant
        pixels = np.dstack([np.full((*SIZE, 3), colour, np.uint8), opaque])
        np.testing.assert_array_equal(read_first_mask(saved(tmp_path, pixels)), OBJECT)
    grey = Image.merge("LA", [Image.new("L", SIZE[::-1], 255), Image.fromarray(opaque)])
    grey.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_first_mask(tmp_path / "grey.png"), OBJECT)
    both = painted({(0, 0, 255): OBJECT, (199, 0, 0): OTHER}, background=(255, 255, 255))
    path = saved(tmp_path, np.dstack([both, ((TWO > 0) * 255).astype(np.uint8)]))
    np.testing.assert_array_equal(read_first_mask(path), TWO)


def test_a_cut_out_photo_is_one_object(tmp_path: Path) -> None:
    path = saved(tmp_path, np.dstack([photo(*SIZE), (OBJECT * 255).astype(np.uint8)]))
    with pytest.warns(UserWarning, match="one object"):
        np.testing.assert_array_equal(read_first_mask(path), OBJECT)


def test_alpha_that_is_constant_says_nothing(tmp_path: Path) -> None:
    pixels = np.dstack([painted({(255, 255, 255): OBJECT}), np.full(SIZE, 255, np.uint8)])
    np.testing.assert_array_equal(read_first_mask(saved(tmp_path, pixels)), OBJECT)


@pytest.mark.parametrize(("name", "options"), [("m.jpg", {"quality": 60}), ("m.webp", {"quality": 50}), ("m.png", {})])
def test_lossy_and_smoothed_masks_are_cut_at_half(tmp_path: Path, name: str, options: dict[str, int]) -> None:
    pixels = (OBJECT * 255).astype(np.uint8)
    path = saved(tmp_path, smoothed(pixels) if name == "m.png" else pixels, name, **options)
    with pytest.warns(UserWarning, match="shades of grey: above half"):
        assert (read_first_mask(path) != OBJECT).mean() < 0.02


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    for path in (
        saved(tmp_path, photo(*SIZE), "photo.png"),
        saved(tmp_path, photo(*SIZE), "photo.jpg"),
        saved(tmp_path, painted({(0, 0, 255): OBJECT, (199, 0, 0): OTHER}), "colours.jpg"),
        saved(tmp_path, np.linspace(0, 255, 48 * 64).reshape(SIZE).astype(np.uint8), "ramp.jpg"),
        saved(tmp_path, smoothed(np.array([0, 120, 255], np.uint8)[TWO]), "levels.png"),
        saved(tmp_path, OBJECT.astype(np.float32), "floats.tiff"),
    ):
        with pytest.raises(InputError, match="save it as PNG") as caught:
            read_first_mask(path)
        assert path.name in str(caught.value)


def test_no_object_no_file_no_image(tmp_path: Path) -> None:
    for name in ("none.png", "none.jpg"):
        with pytest.raises(InputError, match="shows no object"):
            read_first_mask(saved(tmp_path, np.zeros(SIZE, np.uint8), name))
    with pytest.raises(MissingFileError):
        read_first_mask(tmp_path / "other.png")
    (tmp_path / "text.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="not an image"):
        read_first_mask(tmp_path / "text.png")
