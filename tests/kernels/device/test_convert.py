"""Conversions against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from facetrt.kernels import InputError
from facetrt.kernels.device import Device, convert


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (23, 29)])
def test_place_copies_the_upper_left_corner_into_its_batch(device: Device, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, shape[0] + 3, shape[1] + 2, 3), np.uint8)
    batch = device.zeros((3, *shape, 3), np.uint8)
    for number, image in enumerate(images):
        convert.place(device, device.upload(image), batch, number)
    np.testing.assert_array_equal(device.download(batch), images[:, : shape[0], : shape[1]])


def test_place_refuses_a_small_image(device: Device) -> None:
    with pytest.raises(InputError, match="at least"):
        convert.place(device, device.zeros((4, 9, 3), np.uint8), device.zeros((1, 5, 9, 3), np.uint8), 0)


def test_to_half_saturates(device: Device) -> None:
    values = np.array([0, 1e-3, -70000, 65504, 1e9, 3.14159], np.float32)
    found = device.download(convert.to_half(device, device.upload(values)))
    np.testing.assert_array_equal(found, np.clip(values, -65504, 65504).astype(np.float16))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("count", [1, 1500])
def test_take_marks_what_is_not_there(device: Device, count: int, dtype: type) -> None:
    random = np.random.default_rng(count)
    values = random.integers(0, 1000, 70).astype(dtype)
    indices = random.integers(-1, 70, count).astype(np.int32)
    found = device.download(convert.take(device, device.upload(values), device.upload(indices)))
    missing = 0 if dtype is np.float32 else -1
    np.testing.assert_array_equal(found, np.where(indices < 0, missing, values[indices]))


def test_add_taken(device: Device) -> None:
    a, b = np.arange(5, dtype=np.float32), 10 * np.arange(7, dtype=np.float32)
    cells = np.array([4, 0, -1], np.int32), np.array([6, 1, -1], np.int32)
    found = convert.add_taken(device, *(device.upload(v) for v in (a, cells[0], b, cells[1])))
    np.testing.assert_array_equal(device.download(found), [64, 10, 0])


@pytest.mark.parametrize("widths", [(16, 32), (1040, 2048)])
def test_joined_rows_have_unit_length_up_to_the_count(device: Device, widths: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(4, width)).astype(np.float32) for width in widths)
    a[1], b[1] = 0, 0
    count = device.upload(np.array([3], np.int32))
    found = device.download(convert.join_rows(device, device.upload(a), device.upload(b), count))
    joined = np.concatenate([a, b], axis=1)
    expected = joined / np.maximum(np.linalg.norm(joined, axis=1, keepdims=True), 1e-30)
    expected[3] = 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
