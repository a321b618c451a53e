"""Choosing cells and rows on a device against what the engine does in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from facetrt.engine.tasks.descriptors import normalise
from facetrt.engine.tasks.matching import keep_salient
from facetrt.kernels import BestBuddies, InputError
from facetrt.kernels.device import select
from facetrt.kernels.device.runtime.triton_device import TritonDevice


@pytest.mark.parametrize("shape", [(1, 1), (3, 35), (2, 2049)])
def test_saliency_is_scaled_within_each_image(device: TritonDevice, shape: tuple[int, int]) -> None:
    attention = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    attention[-1] = 0.25  # flat
    found = select.normalise_saliency(device, device.upload(attention))
    low, high = attention.min(axis=1, keepdims=True), attention.max(axis=1, keepdims=True)
    expected = np.where(high > low, (attention - low) / np.where(high > low, high - low, 1), 0)
    np.testing.assert_array_equal(device.download(found), expected)
    device.check_canaries(found)


def buddies(size_a: int, size_b: int, random: np.random.Generator) -> BestBuddies:
    """Neighbours of which many are mutual."""
    nn_ab = random.integers(0, size_b, size_a)
    nn_ba = random.integers(0, size_a, size_b)
    chosen = random.random(size_a) < 0.6
    nn_ba[nn_ab[chosen]] = np.flatnonzero(chosen)
    return BestBuddies(nn_ab, nn_ba, np.zeros(size_a, np.float32), np.zeros(size_b, np.float32))


def keep(device: TritonDevice, pair: BestBuddies, saliency_a: np.ndarray, saliency_b: np.ndarray, threshold: float):
    neighbours = (device.upload(nn.astype(np.int32)) for nn in (pair.nn_ab, pair.nn_ba))
    kept = select.keep_salient(device, *neighbours, device.upload(saliency_a), device.upload(saliency_b), threshold)
    device.check_canaries(kept.cells, kept.count)
    return device.download(kept.cells), int(device.download(kept.count)[0])


@pytest.mark.parametrize("threshold", [0.05, 2.0, -1.0])
@pytest.mark.parametrize("sizes", [(1, 1), (35, 31), (1030, 1024)])
def test_salient_best_buddies_equal_the_engines(device: TritonDevice, sizes: tuple[int, int], threshold: float) -> None:
    random = np.random.default_rng(sum(sizes))
    pair = buddies(*sizes, random)
    saliencies = [random.random(size, np.float32) for size in sizes]
    cells, count = keep(device, pair, *saliencies, threshold)
    expected = keep_salient(pair, *saliencies, threshold)
    assert count == len(expected) and (threshold > 1 or sizes == (1, 1) or count)
    np.testing.assert_array_equal(cells, np.concatenate([expected, np.full(sizes[0] - count, -1)]))


def test_many_blocks_of_cells(device: TritonDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {name: getattr(select, name) for name in ("REACH", "COUNT_KEPT", "STORE_KEPT")}
    for name, program in programs.items():
        monkeypatch.setattr(select, name, type(program)(program.name, program.source, program.arguments, {"BLOCK": 16}))
    monkeypatch.setattr(select, "BLOCK", 16)
    random = np.random.default_rng(1)
    pair, saliencies = buddies(599, 600, random), [random.random(size, np.float32) for size in (599, 600)]
    cells, count = keep(device, pair, *saliencies, 0.1)
    np.testing.assert_array_equal(cells[:count], keep_salient(pair, *saliencies, 0.1))
    assert (cells[count:] == -1).all()


@pytest.mark.parametrize("sizes", [(3, 0), (0, 3)])
def test_without_neighbours_nothing_is_kept(device: TritonDevice, sizes: tuple[int, int]) -> None:
    pair = BestBuddies(*(np.full(size, -1) for size in sizes), *(np.zeros(size, np.float32) for size in sizes))
    cells, count = keep(device, pair, *(np.ones(size, np.float32) for size in sizes), 0.5)
    assert count == 0 and (cells == -1).all() and cells.size == sizes[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 16), (13, 48), (35, 144), (519, 128)])
def test_rows_of_unit_length(device: TritonDevice, shape: tuple[int, int], dtype: type) -> None:
    rows = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    rows[-1] = 0
    found = select.normalise_rows(device, device.upload(rows))
    np.testing.assert_allclose(device.download(found), normalise(rows.astype(np.float32)), rtol=1e-6)
    device.check_canaries(found)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("channels", [16, 144])
def test_gathered_rows(device: TritonDevice, channels: int, dtype: type) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((41, channels)).astype(dtype)
    indices = random.integers(-1, 41, 29).astype(np.int32)
    found = select.gather_rows(device, device.upload(rows), device.upload(indices))
    np.testing.assert_array_equal(device.download(found), np.where(indices[:, None] < 0, 0, rows[indices]))
    device.check_canaries(found)


@pytest.mark.parametrize("rows", [np.zeros((3, 15), np.float32), np.zeros((3, 16), np.float64)])
def test_rows_that_do_not_fit(device: TritonDevice, rows: np.ndarray) -> None:
    with pytest.raises(InputError, match="multiple of 16"):
        select.normalise_rows(device, device.upload(rows))


@pytest.mark.parametrize(("size", "count"), [(1, 1), (50, 41), (2100, 2001), (5, 0)])
def test_best_of_each_cluster(device: TritonDevice, size: int, count: int) -> None:
    random = np.random.default_rng(size)
    clusters, rank = random.integers(0, 7, size).astype(np.int32), random.integers(0, 9, size).astype(np.float32)
    clusters[clusters == 3] = 2  # an empty one
    arrays = (device.upload(clusters), device.upload(rank), device.upload(np.array([count], np.int32)))
    found = select.best_of_clusters(device, *arrays, 7)
    members = [np.flatnonzero(clusters[:count] == k) for k in range(7)]
    expected = [m[rank[m].argmax()] if m.size else -1 for m in members]
    np.testing.assert_array_equal(device.download(found), expected)
    device.check_canaries(found)
