from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from facetrt.kernels import InputError, cosine_similarity
from facetrt.kernels.best_buddies import best_buddies_reference
from facetrt.kernels.device import best_buddies as module
from facetrt.kernels.device.best_buddies import DeviceBuddies, Method, best_buddies, choose_method
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.triton_device import TritonDevice

CASES = [
    ((1, 1), (1, 1), 2),
    ((1, 1), (4, 3), 0),
    ((5, 7), (3, 11), 0),
    ((5, 7), (3, 11), 1),
    ((5, 7), (3, 11), 2),
    ((2, 23), (13, 1), 3),
]
METHODS = ["direct", "identity"]


def maps(grid: tuple[int, int], channels: int = 16, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*grid, channels)).astype(dtype)


def margin(similarity: np.ndarray) -> np.ndarray:
    """By how much the best of each row beats the second."""
    if similarity.shape[1] < 2:
        return np.full(len(similarity), np.inf)
    best = np.sort(similarity, axis=1)
    return best[:, -1] - best[:, -2]


def found(device: TritonDevice, a: np.ndarray, b: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    got = best_buddies(device, device.upload(a), device.upload(b), **options)
    arrays = {name: getattr(got, name) for name in ("nn_ab", "nn_ba", "sim_ab", "sim_ba")}
    device.check_canaries(*arrays.values())
    return {name: device.download(array) for name, array in arrays.items()}


@pytest.mark.parametrize(("grid_a", "grid_b", "hierarchy"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_definition(
    device: TritonDevice, grid_a: tuple[int, int], grid_b: tuple[int, int], hierarchy: int, method: str
) -> None:
    a, b = maps(grid_a, seed=1), maps(grid_b, seed=2)
    got, expected = found(device, a, b, hierarchy=hierarchy, method=method), best_buddies_reference(a, b, hierarchy)
    similarity = cosine_similarity(a, b, hierarchy)
    for ends, cosines in (("ab", similarity), ("ba", similarity.T)):
        clear = margin(cosines) > 1e-5
        assert clear.any()
        np.testing.assert_array_equal(got[f"nn_{ends}"][clear], getattr(expected, f"nn_{ends}")[clear])
        np.testing.assert_allclose(got[f"sim_{ends}"], getattr(expected, f"sim_{ends}"), rtol=0, atol=1e-5)
    assert got["nn_ab"].dtype == np.int32 and got["sim_ab"].dtype == np.float32


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_agrees_where_the_margin_is_clear(device: TritonDevice, method: str) -> None:
    """Descriptors with a common part, as encoders make them, which brings all cosines close together."""
    a, b = maps((5, 9), 48, 3, np.float16) + np.float16(1), maps((7, 6), 48, 4, np.float16) + np.float16(1)
    got = found(device, a, b, method=method)
    expected = best_buddies_reference(a, b)
    similarity = cosine_similarity(a, b)
    for ends, cosines in (("ab", similarity), ("ba", similarity.T)):
        clear = margin(cosines) > 1e-3
        assert clear.sum() > 20
        assert (got[f"nn_{ends}"] == getattr(expected, f"nn_{ends}"))[clear].mean() >= 0.98
        np.testing.assert_allclose(got[f"sim_{ends}"], getattr(expected, f"sim_{ends}"), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_of_any_magnitude(device: TritonDevice, method: str) -> None:
    a, b = maps((3, 4)), maps((4, 3), seed=1)
    expected = best_buddies_reference(a, b, 1)
    scaled_a, scaled_b = (a * np.float32(1e-2)).astype(np.float16), (b * np.float32(1e4)).astype(np.float16)
    got = found(device, scaled_a, scaled_b, hierarchy=1, method=method)
    np.testing.assert_allclose(got["sim_ab"], expected.sim_ab, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("hierarchy", "bytes_allowed", "bands"), [(1, 512, 3), (2, 1, 5)])
def test_bands_change_nothing(
    monkeypatch: pytest.MonkeyPatch, device: TritonDevice, hierarchy: int, bytes_allowed: int, bands: int
) -> None:
    a, b = maps((5, 2), seed=1), maps((2, 3), seed=2)
    whole = found(device, a, b, hierarchy=hierarchy, method="identity")
    monkeypatch.setattr(module, "SCRATCH_BYTES", bytes_allowed)
    assert len(module.Bands.plan((5, 2), (2, 3), hierarchy).spans) == bands
    for name, values in found(device, a, b, hierarchy=hierarchy, method="identity").items():
        np.testing.assert_array_equal(values, whole[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("grid", "hierarchy"), [((3, 9), 2), ((1, 150), 0)])  # borders at both levels; several tiles
def test_equal_cells_tie(device: TritonDevice, method: str, dtype: type, grid: tuple[int, int], hierarchy: int) -> None:
    same = np.full((*grid, 16), 0.7, dtype)
    got = found(device, same, same, hierarchy=hierarchy, method=method)
    assert not got["nn_ab"].any() and not got["nn_ba"].any()
    np.testing.assert_allclose(got["sim_ab"], 1, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_zero_descriptors(device: TritonDevice, method: str) -> None:
    zeros = np.zeros((3, 5, 16), np.float32)
    got = found(device, zeros, maps((4, 4)), hierarchy=1, method=method)
    np.testing.assert_array_equal(got["nn_ab"], np.zeros(15))
    np.testing.assert_array_equal(got["sim_ba"], np.zeros(16))


@pytest.mark.parametrize("method", METHODS)
def test_small_norms_are_floored_as_in_the_reference(device: TritonDevice, method: str) -> None:
    a, b = maps((2, 3)) * np.float32(1e-5), maps((3, 2), seed=1) * np.float32(1e-5)
    got, expected = found(device, a, b, hierarchy=0, method=method), best_buddies_reference(a, b, 0)
    np.testing.assert_allclose(got["sim_ab"], expected.sim_ab, atol=1e-5)
    assert abs(expected.sim_ab).max() < 0.5  # or the floor was not needed


@pytest.mark.parametrize("method", METHODS)
def test_a_map_that_is_not_finite_gives_indices_inside(device: TritonDevice, method: str) -> None:
    got = found(device, np.full((2, 3, 16), np.nan, np.float32), maps((3, 3)), hierarchy=1, method=method)
    assert got["nn_ab"].min() >= 0 and got["nn_ab"].max() < 9
    assert got["nn_ba"].min() >= 0 and got["nn_ba"].max() < 6


def test_more_cells_than_half_precision_can_count(device: TritonDevice) -> None:
    a, b = maps((1, 131), seed=5), maps((1, 503), seed=6)  # 65,893 pairs; neither fills its last tile
    got = found(device, a, b, hierarchy=0, method="direct")
    similarity = cosine_similarity(a, b, 0)
    np.testing.assert_array_equal(got["nn_ab"], similarity.argmax(axis=1))
    np.testing.assert_array_equal(got["nn_ba"], similarity.argmax(axis=0))


def test_empty_maps(device: TritonDevice) -> None:
    got = found(device, maps((2, 3)), np.zeros((0, 3, 16), np.float32))
    np.testing.assert_array_equal(got["nn_ab"], np.full(6, -1))
    assert np.isnan(got["sim_ab"]).all() and got["nn_ba"].shape == got["sim_ba"].shape == (0,)


def test_auto_weighs_products_against_sums() -> None:
    grid, half, single = (55, 55), np.dtype(np.float16), np.dtype(np.float32)
    assert choose_method(grid, grid, 384, 0, half) is Method.DIRECT
    assert choose_method(grid, grid, 384, 2, half) is Method.IDENTITY
    assert choose_method(grid, grid, 64, 2, half) is Method.DIRECT
    assert choose_method(grid, grid, 64, 2, single) is Method.IDENTITY
    assert choose_method((20, 2000), (2000, 2000), 384, 2, half) is Method.DIRECT  # a single row takes 28 GB


class _Counting(Device):
    """Allocates nothing and counts what is held at the most, as each array lives until the operation ends."""

    def __init__(self) -> None:
        self.total = 0

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        array = DeviceArray(256, shape, np.dtype(dtype), None, self)
        self.total += array.nbytes
        return array

    zeros = empty

    def upload(self, values: NDArray[Any]) -> DeviceArray:
        return self.empty(values.shape, values.dtype)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        raise NotImplementedError

    def copy(self, source: DeviceArray, target: DeviceArray) -> None: ...

    def synchronize(self) -> None: ...

    def _launch(self, program: object, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None: ...


@pytest.mark.parametrize("method", METHODS)
def test_memory_stays_below_a_gigabyte(method: str) -> None:
    """12,321 × 12,321 similarities would take 607 MB in float32 at each level."""
    device = _Counting()
    key_map = device.empty((111, 111, 384), np.float16)
    assert isinstance(best_buddies(device, key_map, key_map, method=method), DeviceBuddies)
    assert device.total < 700 << 20


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (maps((2, 2)), maps((2, 2), 32), {}, "16 channels of type float32 and map_b 32"),
        (maps((2, 2)), maps((2, 2), dtype=np.float16), {}, "map_b 16 of float16"),
        (maps((2, 2), 24), maps((2, 2), 24), {}, "24 channels"),
        (maps((2, 2))[0], maps((2, 2)), {}, r"shape \(2, 16\)"),
        (maps((2, 2)), maps((2, 2)), {"method": "fast"}, "expected one of auto, direct, identity"),
        (maps((2, 2)), maps((2, 2)), {"hierarchy": 7}, "hierarchy 7"),
    ],
)
def test_bad_input(device: TritonDevice, a: np.ndarray, b: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        best_buddies(device, device.upload(a), device.upload(b), **options)
