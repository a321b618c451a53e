"""Images fitted to whole patches: sizes, geometry, and padding that is exactly zero behind normalisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, export_tiny, photo

from facetrt.engine import Engine
from facetrt.engine.features.store import FeatureStore
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.geometry import Geometry
from facetrt.export.weights import load_strictly, load_weights
from facetrt.kernels.errors import InputError, OutputError


@pytest.mark.parametrize(
    ("fit", "resized", "fitted"),
    [
        (Fit.NONE, (98, 147), (98, 147)),
        (Fit.CROP, (98, 147), (98, 147)),
        (Fit.PAD, (98, 147), (104, 152)),
        (Fit.RESIZE, (96, 144), (96, 144)),
    ],
)
def test_sizes(fit: Fit, resized: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit.resized((98, 147), 8) == resized
    assert fit.fitted(resized, 8) == fitted
    assert Fit.RESIZE.resized((60, 68), 8) == (64, 64)  # halves to even
    assert Fit.RESIZE.resized((3, 68), 8) == (8, 64)


def test_padding_does_not_move_points() -> None:
    padded = Geometry((196, 294), (104, 152), 8, 8, (98, 147))
    assert padded.points_xy(np.array([0])).tolist() == [[8, 8]]
    values = np.arange(104 * 152).reshape(104, 152)
    np.testing.assert_array_equal(padded.on_picture(values), values[:98, :147])


def test_a_cropped_square_is_encoded_as_a_square(tiny_engine: Engine) -> None:
    """With as many cells as the trained table has, that table is used untouched for squares alone."""
    side, patch = 6 * 8, 8
    pixels = photo(side, side + patch - 1)
    square = tiny_engine.encode([pixels[:, :side]], load_size=None, stride=patch)[0]
    cropped = tiny_engine.encode([pixels], load_size=None, stride=patch, fit="crop")[0]
    plain = tiny_engine.encode([pixels], load_size=None, stride=patch)[0]
    facet = square.facets[0]
    np.testing.assert_allclose(cropped[facet], square[facet], atol=1e-5)
    assert np.abs(plain[facet] - square[facet]).max() > 1e-3
    assert cropped.image_size == (side, side + patch - 1)


@pytest.mark.parametrize("stride", [4, 8])
def test_padding_is_zero_behind_normalisation(tiny_engine: Engine, tiny_weights: Path, stride: int) -> None:
    """The embeddings of torch, which pads the normalised image, are those of bytes and the table."""
    spec, pixels = TINY, photo(51, 70)
    vit = spec.build()
    load_strictly(vit, load_weights(spec, tiny_weights)[0], "weights")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in spec.normalisation)
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    image = torch.nn.functional.pad(image, (0, 2, 0, 5))
    facet = tiny_engine.manifest.facets[0]
    with torch.no_grad():
        expected = torch.nn.functional.conv2d(
            image[None], vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=stride
        )[0]
    encoder = tiny_engine._encoder
    features = tiny_engine.encode([pixels], load_size=None, fit="pad", stride=stride)[0]
    assert features.image_size == (56, 72) and features.original_size == (51, 70)
    assert features.geometry.resized == (51, 70)
    plain = encoder.grid_inputs((56, 72), step=stride // encoder.manifest.stride)["positional"]
    padded = encoder.grid_inputs((56, 72), step=stride // encoder.manifest.stride, picture=(51, 70))["positional"]
    normalised = (torch.from_numpy(features.pixels.copy()).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        rounded = torch.nn.functional.conv2d(
            normalised[None], vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=stride
        )[0]
    missing = (expected - rounded).permute(1, 2, 0).numpy()
    assert np.abs(missing).max() > 1e-4
    np.testing.assert_allclose((padded - plain)[0], missing, atol=2e-6)
    assert features[facet].shape[0] == features.grid[0] * features.grid[1]


def test_images_with_other_borders_are_not_encoded_together(tiny_engine: Engine) -> None:
    images = [photo(51, 70), photo(52, 70, seed=1), photo(51, 70, seed=2)]
    together = tiny_engine.encode(images, load_size=None, fit="pad")
    for image, item in zip(images, together, strict=True):
        alone = tiny_engine.encode([image], load_size=None, fit="pad")[0]
        facet = item.facets[0]
        np.testing.assert_allclose(item[facet], alone[facet], atol=1e-4)
        assert item.geometry == alone.geometry


def test_a_store_keeps_the_border(tiny_engine: Engine, tmp_path: Path) -> None:
    tiny_engine.extract([photo(51, 70)], tmp_path / "store", load_size=None, fit="pad")
    stored = FeatureStore.open(tmp_path / "store")
    assert stored[0].geometry.resized == (51, 70) and stored.settings.fit is Fit.PAD
    with pytest.raises(OutputError, match="fit is pad there"):
        tiny_engine.extract([photo(51, 70)], tmp_path / "store", load_size=None)


@pytest.fixture(scope="module")
def fixed(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one size that is no multiple of its patch."""
    return export_tiny(tiny_weights, tmp_path_factory.mktemp("fixed") / "bundle", size=(51, 70), measure=False)


def test_what_cannot_be_padded_says_so(tiny_engine: Engine, fixed: Path) -> None:
    with pytest.raises(InputError, match="exclude each other"):
        tiny_engine.encode([photo(51, 70)], fit="pad", saliency="low_resolution")
    with pytest.raises(InputError, match="fit 'fill'"):
        tiny_engine.encode([photo(51, 70)], fit="fill")
    with Engine.open(fixed) as engine, pytest.raises(InputError, match="has one fixed size"):
        engine.encode([photo(51, 70)], load_size=None, fit="pad")


def test_a_fixed_size_that_is_no_multiple_needs_no_crop(fixed: Path) -> None:
    with Engine.open(fixed) as engine:
        plain, cropped = (engine.encode([photo(51, 70)], load_size=None, fit=fit)[0] for fit in ("none", "crop"))
    np.testing.assert_array_equal(cropped[cropped.facets[0]], plain[plain.facets[0]])


def test_tasks_leave_an_added_border_out(tiny_engine: Engine) -> None:
    """Masks and maps of parts come to lie on the photograph; labels that need whole frames refuse it."""
    features = tiny_engine.encode([photo(51, 70), photo(51, 70, seed=1)], load_size=None, fit="pad", stride=8)
    masks = tiny_engine.cosegment(features, refine="none", sample_interval=1)
    for mask in masks:
        np.testing.assert_array_equal(mask.mask, mask.loaded_mask[:51, :70])
    parts = tiny_engine.segment_parts(features, refine="none", sample_interval=1, num_parts=2)
    for part in parts:
        np.testing.assert_array_equal(part.labels, part.loaded_labels[:51, :70])
    labels = np.zeros((51, 70), np.int64)
    labels[16:32, 16:40] = 1
    with pytest.raises(InputError, match="was padded"):
        tiny_engine.propagator(facet="key@2").start(features[0], labels)
