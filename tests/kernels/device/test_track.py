"""Steps of point tracking on a device against the host's, :mod:`facetrt.engine.video`."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.engine.video.alignment import Patches as HostPatches
from facetrt.engine.video.alignment import Slopes
from facetrt.engine.video.alignment import align as align_host
from facetrt.engine.video.descriptor_maps import DescriptorMap
from facetrt.engine.video.searching import NINE_COLUMNS, NINE_ROWS, Window, _peak
from facetrt.kernels.device.runtime.base import DeviceArray
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.device.track import Part, TrackMap, align, binned, patches, prepare, search
from facetrt.kernels.errors import InputError
from facetrt.kernels.products import first_largest

Float = NDArray[np.float32]
GRIDS = [(11, 7), (1, 9), (5, 1)]


def smooth(grid: tuple[int, int], channels: int = 16, seed: int = 0) -> Float:
    noise = np.random.default_rng(seed).normal(size=(*grid, channels)).astype(np.float32)
    return np.stack([cv2.GaussianBlur(noise[..., i], (0, 0), 1.2) for i in range(channels)], axis=2)


def on_device(device: TritonDevice, *values: Float, **options: Any) -> TrackMap:
    """Maps as they are: without a mean, side by side."""
    parts = [Part(device.upload(v), device.upload(np.zeros(v.shape[2], np.float32)), 1.0) for v in values]
    return prepare(device, parts, device.zeros((2,), np.int32), **options)


def points_of(grid: tuple[int, int]) -> NDArray[np.float64]:
    """Within cells, on one, at a corner and outside."""
    height, width = grid
    return np.array([[width / 3, height / 2.3], [width // 2, height // 2], [0, 0], [width + 1.5, -1.2]])


def put(device: TritonDevice, values: NDArray[Any]) -> DeviceArray:
    return device.upload(np.asarray(values, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_prepare(device: TritonDevice, dtype: type) -> None:
    facets = [smooth((11, 7), channels, seed).astype(dtype) for seed, channels in enumerate((16, 144))]
    means = [facet.mean(axis=(0, 1), dtype=np.float32) for facet in facets]
    parts = [Part(device.upload(f), device.upload(m), w) for f, m, w in zip(facets, means, (1.0, 0.3), strict=True)]
    flags = device.zeros((2,), np.int32)
    seen = prepare(device, parts, flags)
    device.check_canaries(seen.levels, seen.norms)
    values = [
        (f.astype(np.float32) - m) * w for f, m, w in zip(facets, means, (np.float32(1), np.float32(0.3)), strict=True)
    ]
    expected = DescriptorMap.of(np.concatenate(values, axis=2))
    np.testing.assert_allclose(device.download(seen.levels), expected.levels, atol=1e-6)
    np.testing.assert_allclose(device.download(seen.norms).reshape(11, 7), expected.norms, rtol=1e-5)
    assert not device.download(flags).any()


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_flags_of_a_frame(device: TritonDevice) -> None:
    values = smooth((4, 5), 32)
    first = on_device(device, values)

    def flags(changed: Float) -> list[int]:
        found = device.zeros((2,), np.int32)
        part = Part(device.upload(changed), device.upload(np.zeros(32, np.float32)), 1.0)
        prepare(device, [part], found, first)
        return list(device.download(found))

    assert flags(values) == [0, 0]
    other = values.copy()
    other[3, 4, 31] += 1e-3
    assert flags(other) == [0, 1]
    for broken in (np.nan, np.inf):
        other[0, 1, 2] = broken
        assert flags(other) == [1, 1]


@pytest.mark.parametrize("grid", GRIDS)
def test_binned(device: TritonDevice, grid: tuple[int, int]) -> None:
    values, at = smooth(grid, 80), points_of(grid)
    host, seen = DescriptorMap.of(values), on_device(device, values)
    shapes = np.random.default_rng(1).normal(np.eye(2), 0.2, (len(at), 2, 2))
    plain = binned(device, seen, put(device, at))
    device.check_canaries(plain)
    np.testing.assert_allclose(device.download(plain), host.binned(at), atol=2e-6)
    turned = binned(device, seen, put(device, at), put(device, shapes), plain)
    expected = (host.binned(at) + host.binned(at, shapes)) / 2
    np.testing.assert_allclose(device.download(turned), expected, atol=2e-6)


def corners(window: Window) -> NDArray[np.int32]:
    return np.concatenate([window.low, window.high], axis=1).astype(np.int32)


def exhaustive(seen: DescriptorMap, queries: Float, window: Window) -> NDArray[np.float64]:
    """The definition: all cells of the window are compared."""
    (height, width), found = seen.grid, []
    for i in range(len(queries)):
        rows, columns = np.indices(seen.grid).reshape(2, 1, -1)
        cosines = seen.similarity(queries[i : i + 1], rows, columns).reshape(seen.grid)
        (top, left), (bottom, right) = window.low[i], window.high[i]
        outside = np.full((height + 2, width + 2), -np.inf, np.float32)
        outside[top + 1 : bottom + 2, left + 1 : right + 2] = cosines[top : bottom + 1, left : right + 1]
        (best,), _ = first_largest(outside.reshape(1, -1))
        row, column = divmod(int(best), width + 2)
        nine = outside[row + NINE_ROWS, column + NINE_COLUMNS]
        found.append(_peak(nine[None])[0] + [column - 1, row - 1])
    return np.array(found)


@pytest.mark.parametrize(("grid", "count"), [((12, 13), 18), ((1, 9), 2), ((5, 1), 2)])
def test_search(device: TritonDevice, grid: tuple[int, int], count: int) -> None:
    values, other, at = smooth(grid, 48), smooth(grid, 48, 1), points_of(grid)[np.arange(count) % 4]
    at += np.random.default_rng(2).uniform(0, 0.4, at.shape)
    host, seen = DescriptorMap.of(other), on_device(device, other)
    queries = DescriptorMap.of(values).binned(at)
    for window in (Window.near(at, 2.5, grid), Window.whole(len(at), grid)):
        found = search(device, seen, device.upload(queries), device.upload(corners(window)))
        device.check_canaries(found)
        np.testing.assert_allclose(device.download(found), exhaustive(host, queries, window), atol=1e-4)


def test_the_first_of_equal_cells_is_found(device: TritonDevice) -> None:
    """A map that repeats itself, and a flat one: rounding chooses nothing."""
    values, grid = np.tile(smooth((4, 4)), (3, 3, 1)), (12, 12)
    host, seen = DescriptorMap.of(values), on_device(device, values)
    queries, window = host.binned(np.array([[6.0, 5.0], [5.0, 7.0]])), Window.whole(2, grid)
    found = device.download(search(device, seen, device.upload(queries), device.upload(corners(window))))
    np.testing.assert_allclose(found, exhaustive(host, queries, window), atol=1e-4)
    flat = on_device(device, np.ones((5, 6, 16), np.float32))
    query = binned(device, flat, put(device, [[3.0, 2.0]]))
    window = device.upload(np.array([[1, 2, 3, 5]], np.int32))
    np.testing.assert_allclose(device.download(search(device, flat, query, window)), [[2.5, 1.5]], atol=1e-6)


@pytest.mark.parametrize("grid", [(12, 13), (1, 9)])
def test_align(device: TritonDevice, grid: tuple[int, int]) -> None:
    """Different sizes; points that move, that turn, that are the very same, at borders."""
    scene = smooth((14, 15), 48)
    values, other = scene[: grid[0], : grid[1]], scene[1 : grid[0], 1:15] if grid[0] > 1 else scene[:1, 1:9]
    at = points_of(grid)
    starts = at - [1.2, 0.8 if grid[0] > 1 else 0] + np.array([[0, 0], [0.3, -0.2], [2.5, 0], [0.5, 0.5]])
    shapes = np.tile(np.eye(2), (4, 1, 1))
    shapes[1] = [[1.3, -0.6], [0.6, 1.3]]  # far off: steps are clipped
    rows = np.array([2, 0, 1, 3, 0])
    expected = align_host(
        HostPatches.around(DescriptorMap.of(values), at).only(rows),
        Slopes.of(DescriptorMap.of(other)),
        starts[rows],
        shapes[rows],
    )
    around = patches(device, on_device(device, values), put(device, at))
    given = device.upload(rows.astype(np.int32)), on_device(device, other), put(device, starts[rows])
    found = align(device, around, *given, put(device, shapes[rows]))
    device.check_canaries(around.samples, found.positions, found.shapes, found.similarity)
    np.testing.assert_allclose(device.download(found.positions), expected.positions, atol=1e-4)
    np.testing.assert_allclose(device.download(found.shapes), expected.shapes, atol=1e-4)
    np.testing.assert_allclose(device.download(found.similarity), expected.similarity, atol=1e-5)


def test_flat_surroundings_make_no_step(device: TritonDevice) -> None:
    flat = on_device(device, np.ones((5, 6, 16), np.float32))
    at, shapes = np.array([[2.5, 1.0]]), np.eye(2)[None]
    around = patches(device, flat, put(device, at))
    found = align(device, around, device.upload(np.int32([0])), flat, put(device, at), put(device, shapes))
    np.testing.assert_allclose(device.download(found.positions), at)
    np.testing.assert_allclose(device.download(found.shapes), shapes)
    np.testing.assert_allclose(device.download(found.similarity), [1], atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_maps_with_nan_are_read_no_further_than_they_reach(device: TritonDevice) -> None:
    broken = on_device(device, np.full((3, 3, 16), np.nan, np.float32))
    at, shapes = put(device, [[2.5, 1.0]]), put(device, np.eye(2)[None])
    window = device.upload(np.array([[0, 0, 2, 2]], np.int32))
    start = search(device, broken, binned(device, broken, at), window)
    found = align(device, patches(device, broken, start), device.upload(np.int32([0])), broken, start, shapes)
    assert not np.isfinite(device.download(found.similarity)).any()


def test_bad_input_is_named(device: TritonDevice) -> None:
    values, mean = device.upload(smooth((4, 5))), device.upload(np.zeros(16, np.float32))
    flags, seen = device.zeros((2,), np.int32), on_device(device, smooth((4, 5)))
    at, other = put(device, [[1.0, 1.0]]), device.upload(smooth((4, 6)))
    with pytest.raises(InputError, match=r"expected the grid \(4, 5\) of the first"):
        prepare(device, [Part(values, mean, 1.0), Part(other, mean, 1.0)], flags)
    with pytest.raises(InputError, match="0 facets were given"):
        prepare(device, [], flags)
    with pytest.raises(InputError, match=r"previous is a map \(4, 5, 16\): expected \(4, 6, 16\)"):
        prepare(device, [Part(other, mean, 1.0)], flags, seen)
    with pytest.raises(InputError, match=r"positions \(1, 3\): expected"):
        binned(device, seen, put(device, [[1.0, 1.0, 1.0]]))
    with pytest.raises(InputError, match=r"mixed_with has shape \(1, 2\)"):
        binned(device, seen, at, None, at)
    with pytest.raises(InputError, match=r"windows \(1, 2\): expected"):
        search(device, seen, binned(device, seen, at), at)
    with pytest.raises(InputError, match=r"rows of shape \(1, 2\)"):
        align(device, patches(device, seen, at), at, seen, at, put(device, np.eye(2)[None]))
