from __future__ import annotations

import numpy as np
import pytest

from facetrt.kernels import InputError
from facetrt.kernels.device.log_bin import gather_log_bin, log_bin
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.log_bin import log_bin_reference

GRIDS = [(1, 1), (1, 7), (5, 3), (5, 7)]


def maps(grid: tuple[int, int], batch: int = 1, channels: int = 16, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, *grid, channels)).astype(dtype)


def expected(values: np.ndarray, hierarchy: int) -> np.ndarray:
    return np.stack([log_bin_reference(value, hierarchy) for value in values])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("hierarchy", [0, 1, 2, 3])
def test_equals_the_definition(device: TritonDevice, grid: tuple[int, int], hierarchy: int) -> None:
    values = maps(grid, batch=2)
    out = log_bin(device, device.upload(values), hierarchy)
    np.testing.assert_allclose(device.download(out), expected(values, hierarchy), rtol=0, atol=1e-6)
    device.check_canaries(out)


@pytest.mark.parametrize("hierarchy", [1, 2, 3])
def test_half_precision_rounds_once(device: TritonDevice, hierarchy: int) -> None:
    values = maps((5, 7), dtype=np.float16)
    out = log_bin(device, device.upload(values), hierarchy)
    assert out.dtype == np.float16
    np.testing.assert_allclose(device.download(out), expected(values, hierarchy), rtol=2**-11, atol=1e-6)
    device.check_canaries(out)


@pytest.mark.parametrize("channels", [48, 144])
def test_channels_that_leave_a_block_unfilled(device: TritonDevice, channels: int) -> None:
    values = maps((2, 3), channels=channels)
    out = log_bin(device, device.upload(values))
    np.testing.assert_allclose(device.download(out), expected(values, 2), rtol=0, atol=1e-6)
    device.check_canaries(out)


def test_large_half_precision_values_do_not_overflow(device: TritonDevice) -> None:
    values = np.full((1, 3, 3, 16), 60_000, np.float16)
    np.testing.assert_array_equal(device.download(log_bin(device, device.upload(values))), 60_000)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_equal_cells_keep_their_value_at_every_level(device: TritonDevice, dtype: type) -> None:
    values = np.full((1, 4, 9, 16), 0.7, dtype)
    np.testing.assert_array_equal(device.download(log_bin(device, device.upload(values), 3)), dtype(0.7))


def test_images_do_not_depend_on_their_batch(device: TritonDevice) -> None:
    values = maps((3, 4), batch=3, dtype=np.float16)
    together = device.download(log_bin(device, device.upload(values)))
    for i in range(3):
        alone = device.download(log_bin(device, device.upload(values[i : i + 1])))
        np.testing.assert_array_equal(together[i], alone[0])


def test_more_elements_than_half_precision_can_count(device: TritonDevice) -> None:
    values = maps((1, 31), channels=128)
    found = device.download(log_bin(device, device.upload(values)))  # 67,456 elements
    np.testing.assert_allclose(found, expected(values, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("hierarchy", "count"), [(1, 11), (2, 0), (2, 5), (3, 11)])
def test_gather_equals_the_rows_of_all(device: TritonDevice, dtype: type, hierarchy: int, count: int) -> None:
    values = maps((5, 7), dtype=dtype)
    cells = np.array([34, 0, 17, 17, 6, 28, 3, 9, 33, 1, 2], np.int32)
    out = gather_log_bin(
        device,
        device.upload(values[0]),
        device.upload(cells),
        device.upload(np.array([count], np.int32)),
        hierarchy,
    )
    rows = log_bin_reference(values[0], hierarchy)[cells]
    rows[count:] = 0
    np.testing.assert_allclose(device.download(out), rows, rtol=0, atol=1e-6)
    device.check_canaries(out)


def test_gather_does_not_read_outside_the_map(device: TritonDevice) -> None:
    values = maps((2, 3))
    cells = device.upload(np.array([-1, 5, 6, 2**31 - 1], np.int32))
    found = device.download(gather_log_bin(device, device.upload(values[0]), cells, device.upload(np.int32([9]))))
    np.testing.assert_allclose(found[1], log_bin_reference(values[0])[5], atol=1e-6)
    assert not found[[0, 2, 3]].any()


def test_nothing_to_do(device: TritonDevice) -> None:
    assert log_bin(device, device.upload(maps((2, 3), batch=0))).shape == (0, 6, 17 * 16)
    assert log_bin(device, device.upload(maps((0, 3)))).shape == (1, 0, 17 * 16)
    nothing = device.upload(np.zeros(0, np.int32))
    found = gather_log_bin(device, device.upload(maps((2, 3))[0]), nothing, device.upload(np.int32([0])))
    assert found.shape == (0, 17 * 16)


@pytest.mark.parametrize(
    ("values", "hierarchy", "message"),
    [
        (np.zeros((3, 4, 16), np.float32), 2, r"shape \(3, 4, 16\)"),
        (np.zeros((1, 3, 4, 16), np.float64), 2, "float64"),
        (np.zeros((1, 3, 4, 24), np.float32), 2, "24 channels"),
        (np.zeros((1, 3, 4, 16), np.float32), 9, "hierarchy 9"),
    ],
)
def test_bad_input(device: TritonDevice, values: np.ndarray, hierarchy: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        log_bin(device, device.upload(values), hierarchy)


def test_bad_input_of_gather(device: TritonDevice) -> None:
    key_map, cells = device.upload(maps((2, 3))[0]), device.upload(np.int32([0, 1]))
    with pytest.raises(InputError, match="hierarchy 0"):
        gather_log_bin(device, key_map, cells, device.upload(np.int32([1])), 0)
    with pytest.raises(InputError, match=r"count of shape \(2,\)"):
        gather_log_bin(device, key_map, cells, cells)
