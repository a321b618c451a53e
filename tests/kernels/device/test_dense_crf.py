"""The dense CRF on a device against the host's, on scenes of a few pixels."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.kernels.dense_crf import dense_crf as dense_crf_host
from facetrt.kernels.dense_crf import lattices
from facetrt.kernels.device import dense_crf as module
from facetrt.kernels.device.dense_crf import dense_crf, mean_field, upload_lattices
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.errors import InputError

SOFT: dict[str, Any] = {"position_weight": 1.0, "colour_weight": 1.0}  # keeps marginals away from 0 and 1
TOLERANCE = 1e-5  # float32 sums in another order, over four rounds; 4.5e-6 was the largest difference seen


def scene(height: int, width: int, labels: int, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Two flat colours with noise, and energies that favour one label on each, with mistakes."""
    rng = np.random.default_rng(seed)
    side = (np.add.outer(np.arange(height), np.arange(width)) * 2 > height + width).astype(np.int64)
    image = np.array([[40, 60, 90], [200, 160, 80]])[side] + rng.normal(0, 5, (height, width, 3))
    energy = rng.uniform(0, 3, (labels, height, width))
    energy[0] += 2 * side
    energy[1:] += 2 * (1 - side)
    return np.clip(image, 0, 255).astype(np.uint8), energy.astype(np.float32)


def on_device(
    device: TritonDevice, image: NDArray[np.uint8], energy: NDArray[np.float32], **options: Any
) -> NDArray[np.float32]:
    return device.download(dense_crf(device, image, device.upload(energy), **options))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((12, 9, 3), {}),
        ((12, 9, 2), SOFT),
        ((1, 1, 2), {}),
        ((7, 1, 3), SOFT),
        ((9, 11, 5), {"position_weight": 0.0}),
        ((5, 13, 2), {"colour_weight": 0.0, "position_scale": 1.5}),
    ],
)
def test_marginals_and_labels_are_those_of_the_host(
    device: TritonDevice, shape: tuple[int, int, int], options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, energy = scene(*shape)
    labels = dense_crf_host(image, energy, iterations=4, **options).argmax(axis=0)
    # As it stands the host lets changes of a marginal below 1e-5 gather, which kernels of weight 50 amplify.
    monkeypatch.setattr(import_module("facetrt.kernels.dense_crf"), "_SETTLED", 0.0)
    expected = dense_crf_host(image, energy, iterations=4, **options)
    found = on_device(device, image, energy, iterations=4, **options)
    assert found.dtype == np.float32 and found.shape == energy.shape
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(found.argmax(axis=0), labels)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)


def test_the_scene_is_changed_by_its_neighbourhood(device: TritonDevice) -> None:
    image, energy = scene(9, 11, 5)
    found = on_device(device, image, energy, iterations=4, **SOFT).argmax(axis=0)
    assert (found != energy.argmin(axis=0)).mean() > 0.1
    assert len(np.unique(found)) == 5


def test_one_label_is_certain_and_no_kernel_leaves_the_softmax(device: TritonDevice) -> None:
    image, energy = scene(3, 4, 2)
    assert (on_device(device, image, energy[:1], iterations=1) == 1).all()
    alone = on_device(device, image, energy, position_weight=0.0, colour_weight=0.0)
    weights = np.exp(-energy)
    np.testing.assert_allclose(alone, weights / weights.sum(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(on_device(device, image, energy, iterations=0), alone)


def test_repeated_runs_give_the_same_bytes_and_stay_inside_their_arrays(device: TritonDevice) -> None:
    image, energy = scene(7, 11, 3)
    given = device.upload(energy.reshape(3, -1))
    built = upload_lattices(device, image)
    first, second = (mean_field(device, given, built, iterations=2) for _ in range(2))
    assert device.download(first).tobytes() == device.download(second).tobytes()
    np.testing.assert_array_equal(device.download(given), energy.reshape(3, -1))
    device.check_canaries(first, second, given, *(lattice.roots for lattice in built))


def test_a_label_does_not_depend_on_what_else_is_in_memory(device: TritonDevice) -> None:
    """Labels swapped are marginals swapped, bit for bit: planes do not touch each other."""
    image, energy = scene(7, 5, 2)
    found = on_device(device, image, energy, iterations=2, **SOFT)
    np.testing.assert_array_equal(on_device(device, image, energy[::-1].copy(), iterations=2, **SOFT), found[::-1])


def test_vertices_list_every_pixel_once_per_corner(device: TritonDevice) -> None:
    image, _ = scene(6, 7, 2)
    for lattice, uploaded in zip(lattices(image), upload_lattices(device, image), strict=True):
        starts, pixels = device.download(uploaded.starts), device.download(uploaded.list_pixels)
        weights = device.download(uploaded.list_weights)
        dense = np.zeros((uploaded.num_vertices, uploaded.num_pixels), np.float32)
        for corner, weight in zip(lattice.corners, lattice.weights, strict=True):
            dense[corner, np.arange(uploaded.num_pixels)] = weight
        for vertex, (start, end) in enumerate(pairwise(starts)):
            assert (np.diff(pixels[start:end]) > 0).all()
            np.testing.assert_array_equal(dense[vertex, pixels[start:end]], weights[start:end])
        assert starts[-1] == lattice.corners.size == np.count_nonzero(dense) + np.count_nonzero(weights == 0)


def test_more_pixels_than_a_grid_dimension_holds(device: TritonDevice) -> None:
    """65,536 pixels and more, without lattices: only the softmax runs."""
    energy = np.random.default_rng(0).random((2, 66_001), np.float32)
    found = device.download(mean_field(device, device.upload(energy), [], iterations=1))
    np.testing.assert_allclose(found, np.exp(-energy) / np.exp(-energy).sum(axis=0), rtol=1e-6)


def test_bad_input_is_named(device: TritonDevice) -> None:
    image, energy = scene(4, 5, 2)
    with pytest.raises(InputError, match=r"energy has shape \(2, 5, 4\) and image \(4, 5, 3\)"):
        dense_crf(device, image, device.upload(energy.transpose(0, 2, 1).copy()))
    with pytest.raises(InputError, match=r"20 pixels and a lattice 6"):
        mean_field(device, device.upload(energy.reshape(2, -1)), upload_lattices(device, image[:2, :3]))
    with pytest.raises(InputError, match=r"float64 \(2, 20\): expected \(labels, pixels\) float32"):
        mean_field(device, device.upload(energy.reshape(2, -1).astype(np.float64)), [])
    with pytest.raises(InputError, match="iterations is -1"):
        mean_field(device, device.upload(energy.reshape(2, -1)), [], iterations=-1)
    with pytest.raises(InputError, match=r"image has shape \(0, 5, 3\)"):
        upload_lattices(device, image[:0])
    with pytest.raises(InputError, match="colour_scale is 0"):
        upload_lattices(device, image, colour_scale=0.0)


def test_too_many_lattice_entries_are_refused(device: TritonDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 50)
    with pytest.raises(InputError, match="an image of 20 pixels: expected at most 16 here"):
        upload_lattices(device, scene(4, 5, 2)[0])
