"""Labels of pixels on a device against the engine's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from facetrt.engine.images.resampling import pillow_nearest, torch_nearest
from facetrt.engine.tasks import refinement
from facetrt.engine.tasks.refinement import Refinement
from facetrt.kernels.device.refine import (
    best_label,
    enlarge_labels,
    enlarge_mask,
    refine_labels,
)
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.errors import InputError
from facetrt.kernels.nearest import centre_indices, corner_indices


def test_both_index_rules_are_those_of_their_libraries() -> None:
    for n_in in range(1, 60):
        line, source = np.arange(n_in, dtype=np.uint8)[:, None], torch.arange(n_in, dtype=torch.float32)[None, None]
        for n_out in (*range(1, 120), 224, 518):
            np.testing.assert_array_equal(centre_indices(n_in, n_out), pillow_nearest(line, (n_out, 1))[:, 0])
            torchs = torch.nn.functional.interpolate(source, size=n_out, mode="nearest")[0, 0].numpy()
            np.testing.assert_array_equal(corner_indices(n_in, n_out), torchs)


@pytest.mark.parametrize(
    ("grid", "size"), [((4, 5), (12, 9)), ((1, 1), (7, 3)), ((3, 5), (1, 2)), ((5, 7), (257, 263))]
)
def test_enlarging_equals_the_engines(device: TritonDevice, grid: tuple[int, int], size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).standard_normal((3, *grid)).astype(np.float32)
    large = enlarge_labels(device, device.upload(values), size)
    np.testing.assert_array_equal(device.download(large), torch_nearest(values, size))
    mask = values[0] > 0
    enlarged = enlarge_mask(device, device.upload(mask.astype(np.uint8)), size)
    np.testing.assert_array_equal(device.download(enlarged), refinement.enlarge_mask(mask, size))
    device.check_canaries(large, enlarged)


def test_enlarging_follows_pillow_at_ties(device: TritonDevice) -> None:
    mask = np.zeros((20, 1), np.uint8)
    mask[9] = 1
    assert device.download(enlarge_mask(device, device.upload(mask), (79, 1)))[39, 0]  # the closed form picks cell 10


def test_labels_of_bytes_are_enlarged_too(device: TritonDevice) -> None:
    labels = np.arange(6, dtype=np.uint8).reshape(1, 2, 3) * 40
    large = device.download(enlarge_labels(device, device.upload(labels), (5, 7)))
    np.testing.assert_array_equal(large, torch_nearest(labels, (5, 7)))


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 5), (4, 1), (3, 17, 19), (7, 5, 5)])
def test_the_first_of_equal_scores_wins(device: TritonDevice, shape: tuple[int, ...], smallest: bool) -> None:
    scores = np.random.default_rng(0).integers(-2, 2, shape).astype(np.float32)
    found = best_label(device, device.upload(scores), smallest=smallest)
    expected = scores.argmin(axis=0) if smallest else scores.argmax(axis=0)
    np.testing.assert_array_equal(device.download(found), expected)
    assert found.dtype == np.int32
    device.check_canaries(found)


def test_refined_labels_are_the_engines(device: TritonDevice) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((13, 17, 3), 40, np.uint8)
    pixels[:, 7:] = (220, 80, 60)
    pixels += rng.integers(0, 12, pixels.shape, np.uint8)
    energy = rng.uniform(-1, 0, (3, 3, 4)).astype(np.float32)
    energy[0, :, :2] -= 2  # these cells end at column 8.5, and the colour at column 7
    energy[2, :, 2:] -= 2
    given = device.upload(energy)
    first, second = (refine_labels(device, pixels, given) for _ in range(2))
    expected = refinement.refine_labels(pixels, energy, Refinement.CRF)
    np.testing.assert_array_equal(device.download(first), expected)
    assert len(np.unique(expected)) > 1
    assert (expected != refinement.refine_labels(pixels, energy, Refinement.NONE)).any()
    assert device.download(first).tobytes() == device.download(second).tobytes()
    device.check_canaries(first, given)


def test_bad_input_is_named(device: TritonDevice) -> None:
    flat = device.upload(np.zeros((4, 5), np.float32))
    with pytest.raises(InputError, match=r"energy is float32 \(4, 5\): expected \(labels, grid_h, grid_w\)"):
        refine_labels(device, np.zeros((4, 5, 3), np.uint8), flat)
    with pytest.raises(
        InputError, match=r"values are int32 \(1, 2, 2\): expected \(planes, grid_h, grid_w\) float32 or"
    ):
        enlarge_labels(device, device.upload(np.zeros((1, 2, 2), np.int32)), (4, 4))
    with pytest.raises(InputError, match=r"scores are float64"):
        best_label(device, device.upload(np.zeros((4, 5))))
