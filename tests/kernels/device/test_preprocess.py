from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from facetrt.engine.images.loading import resize as resize_on_host
from facetrt.kernels import InputError
from facetrt.kernels.device.preprocess import (
    Resizer,
    lanczos_weights,
    normalisation_table,
    normalise,
    preprocess,
    resize,
)
from facetrt.kernels.device.runtime.triton_device import TritonDevice

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SIZES = [
    ((37, 53), (16, 24)),  # down
    ((13, 11), (29, 47)),  # up
    ((40, 9), (7, 31)),  # one side down, the other up
    ((9, 97), (9, 20)),  # horizontal pass only
    ((61, 12), (23, 12)),  # vertical pass only
    ((10, 14), (10, 14)),  # neither
    ((1, 17), (5, 1)),
    ((19, 1), (1, 6)),
    ((1, 1), (3, 2)),
    ((64, 5), (3, 90)),  # more than one block of columns
    ((2, 300), (3, 7)),  # many taps
    ((50, 20), (9, 7)),  # the height shrinks by more than twice as many pixels, and by no more
    ((50, 20), (24, 7)),
    ((50, 20), (23, 7)),
]


def pictures(size: tuple[int, int], batch: int = 2, seed: int = 0) -> np.ndarray:
    """Noise and full-contrast blocks, whose overshoot both clips."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (batch, *size, 3), dtype=np.uint8)
    noise[:1] = np.where(noise[:1] > 128, 255, 0)
    return noise


def by_pillow(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    resized = [Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image) for image in resized])


@pytest.mark.parametrize(("original", "size"), SIZES)
def test_equals_pillow(device: TritonDevice, original: tuple[int, int], size: tuple[int, int]) -> None:
    images = pictures(original)
    out = resize(device, device.upload(images), size)
    np.testing.assert_array_equal(device.download(out), by_pillow(images, size))
    device.check_canaries(out)


def test_equals_the_loaded_image(device: TritonDevice) -> None:
    image = pictures((33, 45), batch=1)
    out = resize(device, device.upload(image), (14, 19))
    np.testing.assert_array_equal(device.download(out)[0], resize_on_host(Image.fromarray(image[0]), (14, 19)))


@pytest.mark.parametrize("size", [*range(1, 60), 127, 224, 641, 1080, 4001])
def test_weights_are_pillows(size: int) -> None:
    """Every input size has roundings of its own: a row of noise, resized by the weights alone."""
    out_size = 31
    weights = lanczos_weights(size, out_size)
    assert weights.starts.min() >= 0 and (weights.starts + weights.counts).max() <= size
    assert abs(weights.weights.sum(axis=0) - (1 << 22)).max() <= len(weights.weights)
    row = np.random.default_rng(size).integers(0, 256, (1, size, 3), dtype=np.uint8)
    total = np.full((out_size, 3), 1 << 21)
    for tap, by_output in enumerate(weights.weights):
        source = np.minimum(weights.starts + tap, size - 1)
        total += row[0, source].astype(np.int64) * by_output[:, None]
    expected = np.asarray(Image.fromarray(row).resize((out_size, 1), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(np.clip(total >> 22, 0, 255), expected[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("original", "size"), [*SIZES[:6], SIZES[-1]])
def test_fused_equals_resize_then_normalise(
    device: TritonDevice, original: tuple[int, int], size: tuple[int, int], dtype: type
) -> None:
    images = pictures(original)
    out = preprocess(device, device.upload(images), size, MEAN, STD, dtype)
    pixels = by_pillow(images, size).astype(np.float32) / np.float32(255)
    expected = ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2).astype(dtype)
    np.testing.assert_array_equal(device.download(out), expected)
    assert out.dtype == dtype
    device.check_canaries(out)


def test_normalise(device: TritonDevice) -> None:
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 8, 32, 3)
    out = device.download(normalise(device, device.upload(images), MEAN, STD, np.float32))
    expected = (images.astype(np.float64) / 255 - MEAN) / STD
    np.testing.assert_allclose(out, expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_a_resizer_is_reused_and_images_do_not_depend_on_their_batch(device: TritonDevice) -> None:
    resizer = Resizer(device, (21, 30), (8, 11))
    table = device.upload(normalisation_table(MEAN, STD, np.float16))
    images = pictures((21, 30), batch=3)
    together = device.download(resizer.normalised(device.upload(images), table))
    for i in range(3):
        alone = device.download(resizer.normalised(device.upload(images[i : i + 1]), table))
        np.testing.assert_array_equal(together[i], alone[0])


def test_no_images(device: TritonDevice) -> None:
    assert resize(device, device.upload(pictures((5, 6), batch=0)), (3, 3)).shape == (0, 3, 3, 3)


def test_bad_input(device: TritonDevice) -> None:
    images = device.upload(pictures((5, 6)))
    with pytest.raises(InputError, match=r"\(2, 5, 6\)"):
        resize(device, device.upload(np.zeros((2, 5, 6), np.uint8)), (3, 3))
    with pytest.raises(InputError, match=r"from \(5, 6\) to \(0, 3\)"):
        resize(device, images, (0, 3))
    with pytest.raises(InputError, match=r"expected \(B, 4, 6, 3\)"):
        Resizer(device, (4, 6), (3, 3)).resize(images)
    with pytest.raises(InputError, match="deviations positive"):
        normalise(device, images, MEAN, (1, 0, 1), np.float32)
    with pytest.raises(InputError, match="int8"):
        normalise(device, images, MEAN, STD, np.int8)
