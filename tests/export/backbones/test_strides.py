"""Overlapping patches: a cell is where its centre is, whatever the stride."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import facets, photo
from numpy.typing import NDArray

from facetrt.engine import Engine
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.positional import Cells, Rotation, TableRule, positional_table, rotation_table
from facetrt.export import exporting
from facetrt.export.export_options import ExportOptions

Get = Callable[[str], tuple[Any, Path, Any]]
ROTATION = Rotation(2.0, 0.0, -1.0, x_first=False)


@pytest.mark.parametrize(("patch", "strides"), [(14, (7, 2, 1)), (16, (8, 4, 2, 1))])
@pytest.mark.parametrize("rule", [rule for rule in TableRule if rule.true_centres])
def test_cells_that_coincide_have_the_same_codes(rule: TableRule, patch: int, strides: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    trained = rng.standard_normal((9, 9, 4)).astype(np.float32)
    periods = rng.uniform(1, 70, 4).astype(np.float32)
    size = (4 * patch, 6 * patch)
    whole = Cells(size, patch, patch)
    for stride in strides:
        fine, step = Cells(size, patch, stride), patch // stride
        table = positional_table(trained, fine, rule)[::step, ::step]
        np.testing.assert_array_equal(table, positional_table(trained, whole, rule))
        turned = rotation_table(periods, fine, ROTATION)[:, ::step, ::step]
        np.testing.assert_array_equal(turned, rotation_table(periods, whole, ROTATION))


@pytest.mark.parametrize("rule", list(TableRule))
@pytest.mark.parametrize("size", [(4, 7), (9, 9), (5, 5), (20, 3), (1, 1)])
def test_tables_of_whole_patches_are_torchs(rule: TableRule, size: tuple[int, int]) -> None:
    trained = np.random.default_rng(1).uniform(-1, 1, (9, 9, 5)).astype(np.float32)
    square = torch.from_numpy(trained).permute(2, 0, 1)[None]
    how: dict[str, Any] = {"size": size, "antialias": rule is TableRule.ANTIALIAS}
    if rule in (TableRule.SCALE, TableRule.SCALE_CENTRES):
        how = {"scale_factor": [(n + 0.1) / 9 for n in size], "recompute_scale_factor": False}
    expected = square if size == (9, 9) else torch.nn.functional.interpolate(square, mode="bicubic", **how)
    got = positional_table(trained, Cells((8 * size[0], 8 * size[1]), 8, 8), rule)
    np.testing.assert_allclose(got, expected[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_a_table_is_not_left_as_it_is_because_overlapping_cells_are_as_many() -> None:
    trained = np.random.default_rng(2).standard_normal((7, 7, 3)).astype(np.float32)
    cells = Cells((32, 32), 8, 4)
    assert cells.grid == (7, 7) and positional_table(trained, cells, TableRule.SCALE) is trained
    assert not np.allclose(positional_table(trained, cells, TableRule.SCALE_CENTRES), trained)


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16"])
def test_the_first_block_sees_what_shifted_images_show(family: Get, name: str) -> None:
    """Images shifted by every stride put together like a checkerboard: the same patches, so the same embeddings."""
    spec, _, vit = family(name)
    patch, stride = spec.patch, spec.patch // 2
    pixels = photo(4 * patch + stride, 5 * patch + stride)
    options = exporting.resolve_options(spec, ExportOptions(stride=stride, facets=facets("token@0")))
    manifest = exporting._manifest(spec, options, None)
    convolution = exporting.make_encoder(vit, spec, options, manifest).patches
    with torch.no_grad():
        fine = convolution(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
        convolution.stride = (patch, patch)
        for y in (0, stride):
            for x in (0, stride):
                shifted = torch.from_numpy(pixels[y : y + 4 * patch, x : x + 5 * patch].copy())
                whole = convolution(shifted.permute(2, 0, 1)[None].float())
                part = fine[:, :, y // stride :: 2, x // stride :: 2][:, :, :4, :5]
                np.testing.assert_allclose(part.numpy(), whole.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov3_vits16", "eva02_vits14"])
def test_every_stride_of_a_bundle(family: Get, name: str) -> None:
    """A bundle runs at multiples of its stride; the reference model has each of them as a model of its own."""
    spec, bundle, vit = family(name)
    own = Bundle.open(bundle).manifest.stride
    pixels = photo(3 * spec.patch + 5, 4 * spec.patch)
    with Engine.open(bundle) as engine:
        for stride in [s for s in spec.strides if s % own == 0]:
            features = engine.encode([pixels], load_size=None, stride=stride)[0]
            model = exporting.ReferenceModel(vit, spec, stride=stride, saliency_heads=[0, 1, 2])
            expected = model.run(pixels, facets("key@2,token@1"))
            for key, values in expected.items():
                got: NDArray[Any] = features.attention.ravel() if key == "cls_attention" else features.tokens[key]
                assert np.linalg.norm(got - values) < 1e-5 * np.linalg.norm(values), (stride, key)


def test_low_resolution_saliency_takes_the_stride_that_comes_closest(family: Get) -> None:
    _, bundle, _ = family("dinov2_vits14_reg")
    pixels = photo(112, 126)
    with Engine.open(bundle) as engine:
        low = engine.encode([pixels], load_size=112, saliency="low_resolution")[0]
        full = engine.encode([pixels], load_size=112)[0]
    assert low.saliency.shape == full.saliency.shape == low.grid
    assert len(np.unique(low.saliency)) < len(np.unique(full.saliency))
