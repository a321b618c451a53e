"""Dense CRF: the lattice against exact Gaussians and against the authors' implementation."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from facetrt.kernels.dense_crf import dense_crf, dense_crf_reference
from facetrt.kernels.errors import InputError

module = importlib.import_module("facetrt.kernels.dense_crf")

PHOTOGRAPHS = Path(__file__).parents[2].parent / "shared" / "images"
SOFT: dict[str, Any] = {"position_weight": 1.0, "colour_weight": 1.0}  # keeps marginals away from 0 and 1


def scene(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Discs on a gradient with sensor noise: flat parts, edges and texture."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:height, :width]
    image = np.stack([xs * 120 / width, ys * 120 / height, np.full((height, width), 60.0)], axis=2)
    for _ in range(6):
        centre, radius = rng.uniform(0, [height, width]), rng.uniform(0.1, 0.35) * min(height, width)
        image[(ys - centre[0]) ** 2 + (xs - centre[1]) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def coarse_energy(image: NDArray[np.uint8], labels: int, seed: int = 0, stride: int = 4) -> NDArray[np.float32]:
    """Colour distances to random prototypes on a coarse grid, in [-1.5, 0], enlarged by nearest neighbour."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    grid = (max(1, width // stride), max(1, height // stride))
    colours = cv2.resize(image, grid, interpolation=cv2.INTER_AREA).astype(np.float64) / 255
    distances = ((colours[None] - rng.uniform(0, 1, (labels, 1, 1, 3))) ** 2).sum(axis=3)
    distances += rng.normal(0, 0.05, distances.shape)
    distances -= distances.max(axis=0)
    distances *= 1.5 / max(1e-9, -distances.min())
    enlarged = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_NEAREST) for plane in distances]
    return np.stack(enlarged).astype(np.float32)


def agreement(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float((first.argmax(axis=0) == second.argmax(axis=0)).mean())


def authors_marginals(image: NDArray[np.uint8], energy: NDArray[np.float32]) -> NDArray[np.float32]:
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    labels, height, width = energy.shape
    model = densecrf.DenseCRF2D(width, height, labels)
    model.setUnaryEnergy(np.ascontiguousarray(energy.reshape(labels, -1)))
    options = {"kernel": densecrf.DIAG_KERNEL, "normalization": densecrf.NORMALIZE_SYMMETRIC}
    model.addPairwiseGaussian(sxy=3, compat=50, **options)
    model.addPairwiseBilateral(sxy=5, srgb=13, rgbim=image, compat=15, **options)
    return np.array(model.inference(10), np.float32).reshape(energy.shape)


@pytest.mark.parametrize("labels", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (17, 1), (13, 29), (24, 24), (31, 18)])
def test_fast_is_close_to_exact_gaussians(shape: tuple[int, int], labels: int) -> None:
    image = scene(*shape)
    energy = coarse_energy(image, labels)
    fast, exact = dense_crf(image, energy, **SOFT), dense_crf_reference(image, energy, **SOFT)
    assert fast.shape == exact.shape == energy.shape
    assert fast.dtype == exact.dtype == np.float32
    assert np.abs(fast - exact).max() < 0.03
    assert np.abs(fast - exact).mean() < 0.003


@pytest.mark.parametrize("labels", [2, 5, 9])
@pytest.mark.parametrize("shape", [(23, 37), (32, 32)])
def test_labels_agree_with_exact_gaussians_at_full_weights(shape: tuple[int, int], labels: int) -> None:
    image = scene(*shape)
    energy = coarse_energy(image, labels)
    assert agreement(dense_crf(image, energy), dense_crf_reference(image, energy)) >= 0.97


@pytest.mark.parametrize("labels", range(2, 10))
def test_labels_agree_with_the_authors_implementation(labels: int) -> None:
    image = scene(96, 131, seed=labels)
    energy = coarse_energy(image, labels, seed=labels)
    assert agreement(dense_crf(image, energy), authors_marginals(image, energy)) >= 0.997


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png"])
def test_labels_agree_with_the_authors_implementation_on_photographs(name: str) -> None:
    if not (PHOTOGRAPHS / name).exists():
        pytest.skip(f"photograph {name} is not in {PHOTOGRAPHS}")
    with Image.open(PHOTOGRAPHS / name) as photograph:
        image = np.array(photograph.convert("RGB").reduce(2))  # a copy: pydensecrf takes no read-only array
    energy = coarse_energy(image, 5)
    assert agreement(dense_crf(image, energy), authors_marginals(image, energy)) >= 0.997


@pytest.mark.parametrize("labels", [1, 2, 5, 8])
def test_marginals_sum_to_one(labels: int) -> None:
    image = scene(96, 131)  # more pixels than fit int16 once multiplied by a rank
    marginals = dense_crf(image, coarse_energy(image, labels))
    assert marginals.min() >= 0
    np.testing.assert_allclose(marginals.sum(axis=0), 1, atol=1e-6)


def test_one_label_takes_everything() -> None:
    image = scene(9, 7)
    assert (dense_crf(image, coarse_energy(image, 1)) == 1).all()


@pytest.mark.parametrize("options", [{"iterations": 0}, {"position_weight": 0.0, "colour_weight": 0.0}])
def test_without_iterations_or_weights_the_result_is_the_softmax(options: dict[str, Any]) -> None:
    image = scene(12, 19)
    energy = coarse_energy(image, 4)
    softmax = np.exp(-energy) / np.exp(-energy).sum(axis=0)
    np.testing.assert_allclose(dense_crf(image, energy, **options), softmax, rtol=1e-5)
    np.testing.assert_allclose(dense_crf_reference(image, energy, **options), softmax, rtol=1e-5)


@pytest.mark.parametrize("left_out", ["position_weight", "colour_weight"])
def test_each_kernel_alone_is_close_to_exact_gaussians(left_out: str) -> None:
    image = scene(21, 26)
    energy = coarse_energy(image, 3)
    options = SOFT | {left_out: 0.0}
    difference = dense_crf(image, energy, **options) - dense_crf_reference(image, energy, **options)
    assert np.abs(difference).max() < 0.03


@pytest.mark.parametrize("scales", [(1.5, 2.5, 8.0), (8.0, 15.0, 30.0), (40.0, 60.0, 200.0)])
def test_other_scales_are_close_to_exact_gaussians(scales: tuple[float, float, float]) -> None:
    """The lattice is coarsest, against the pixels, for small scales: errors up to 0.05 are its own, not a defect."""
    image = scene(21, 26)
    energy = coarse_energy(image, 3)
    names = ("position_scale", "colour_position_scale", "colour_scale")
    options = SOFT | dict(zip(names, scales, strict=True))
    difference = dense_crf(image, energy, **options) - dense_crf_reference(image, energy, **options)
    assert np.abs(difference).max() < 0.07


def test_settled_pixels_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    image = scene(60, 81)
    energy = coarse_energy(image, 5)
    usual = dense_crf(image, energy)
    monkeypatch.setattr(module, "_SETTLED", 0.0)
    exact = dense_crf(image, energy)
    assert agreement(usual, exact) >= 0.9995
    assert np.abs(usual - exact).max() < 0.02


def test_same_input_gives_the_same_bits_and_is_left_alone() -> None:
    image = scene(40, 53)
    energy = coarse_energy(image, 5)
    image_before, energy_before = image.copy(), energy.copy()
    first, second = dense_crf(image, energy), dense_crf(image, energy)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(image, image_before)
    np.testing.assert_array_equal(energy, energy_before)


def test_views_give_the_same_bits_as_contiguous_arrays() -> None:
    image = scene(40, 53)
    energy = coarse_energy(image, 5)
    strided = dense_crf(image[:, ::-1][:, ::-1], np.asfortranarray(energy))
    np.testing.assert_array_equal(strided, dense_crf(image, energy))


def test_labels_snap_to_the_colour_edge() -> None:
    """Energies that put the border 3 pixels beside the colour edge are corrected, and uniform colour is not."""
    energy = np.zeros((2, 24, 40), np.float32)
    energy[0, :, 23:] = energy[1, :, :23] = 0.3
    edge = np.full((24, 40, 3), 60, np.uint8)
    edge[:, 20:] = 200
    options: dict[str, Any] = {"position_weight": 0.0, "colour_position_scale": 8.0, "colour_weight": 15.0}
    snapped = dense_crf(edge, energy, **options).argmax(axis=0)
    kept = dense_crf(np.full_like(edge, 60), energy, **options).argmax(axis=0)
    np.testing.assert_array_equal(snapped, np.broadcast_to(np.arange(40) >= 20, (24, 40)))
    assert np.abs((kept == 0).sum(axis=1) - 23).max() <= 1


def test_smooths_isolated_labels_away() -> None:
    energy = np.zeros((2, 20, 20), np.float32)
    energy[1] = 0.5
    energy[:, 10, 10] = (0.5, 0.0)
    assert (dense_crf(np.full((20, 20, 3), 90, np.uint8), energy).argmax(axis=0) == 0).all()


IMAGE = np.zeros((4, 5, 3), np.uint8)
ENERGY = np.zeros((2, 4, 5), np.float32)
BROKEN = ENERGY.copy()
BROKEN[0, 0, :3] = (np.nan, np.inf, -np.inf)
BAD_INPUTS: list[tuple[Any, Any, dict[str, Any], str]] = [
    (IMAGE[..., 0], ENERGY, {}, r"image has shape \(4, 5\): expected \(H, W, 3\)"),
    (IMAGE[:0], ENERGY[:, :0], {}, "expected .* at least one pixel"),
    (IMAGE.astype(np.float32), ENERGY, {}, "image is float32: expected uint8"),
    (IMAGE, ENERGY[0], {}, r"energy has shape \(4, 5\): expected \(labels, 4, 5\)"),
    (IMAGE, ENERGY.transpose(0, 2, 1), {}, r"energy has shape \(2, 5, 4\): expected \(labels, 4, 5\)"),
    (IMAGE, ENERGY[:0], {}, "no labels: expected at least 1"),
    (IMAGE, ENERGY.astype(np.float64), {}, "energy is float64: expected float32"),
    (IMAGE, BROKEN, {}, "energy has 3 values that are NaN or infinite"),
    (IMAGE, ENERGY, {"position_scale": 0.0}, "position_scale is 0.0: expected"),
    (IMAGE, ENERGY, {"colour_position_scale": -1.0}, "colour_position_scale is -1.0: expected"),
    (IMAGE, ENERGY, {"colour_scale": float("nan")}, "colour_scale is nan: expected"),
    (IMAGE, ENERGY, {"colour_scale": 1e-3}, "colour_scale is 0.001: expected a finite number, at least 0.0039"),
    (IMAGE, ENERGY, {"position_weight": -1.0}, "position_weight is -1.0: expected"),
    (IMAGE, ENERGY, {"colour_weight": float("inf")}, "colour_weight is inf: expected"),
    (IMAGE, ENERGY, {"iterations": -1}, "iterations is -1: expected 0 or more"),
]


@pytest.mark.parametrize("function", [dense_crf, dense_crf_reference])
@pytest.mark.parametrize(("image", "energy", "options", "message"), BAD_INPUTS)
def test_bad_input_is_named(function: Any, image: Any, energy: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        function(image, energy, **options)


def test_scales_that_overflow_the_lattice_are_named() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    with pytest.raises(InputError, match=r"more than 62 bits can number.*give larger ones"):
        dense_crf(image, np.zeros((2, 30, 40), np.float32), colour_position_scale=0.01, colour_scale=0.01)


def test_reference_refuses_large_images() -> None:
    with pytest.raises(InputError, match=r"10100 pixels.* at most 10000: .*call dense_crf"):
        dense_crf_reference(np.zeros((100, 101, 3), np.uint8), np.zeros((2, 100, 101), np.float32))
