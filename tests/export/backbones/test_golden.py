"""The publishers' own numbers, on deterministic weights under the publishers' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_backbones import GOLDEN, published_weights
from helpers import HERE, facets, require_openvino
from numpy.typing import NDArray

from facetrt.engine import Engine
from facetrt.engine.bundle.manifest import MANIFEST
from facetrt.engine.bundle.positional import Cells
from facetrt.export import exporting
from facetrt.export.export_options import ExportOptions
from facetrt.export.models import find_model

TOLERANCE = 2e-5  # of an array's deviation
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def golden_backbones() -> Arrays:
    with np.load(HERE / "golden" / "backbones.npz") as arrays:
        return dict(arrays)


def expected_of(golden: Arrays, name: str) -> Arrays:
    outputs = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}
    return {key: value for key, value in outputs.items() if "@" in key and not key.endswith("deviation")}


def setting(name: str, golden: Arrays, folder: Path) -> tuple[Any, ...]:
    spec = find_model(GOLDEN[name].model)
    np.savez(folder / "weights.npz", **published_weights(name))
    vit, checkpoint = exporting.load_model(spec, folder / "weights.npz")
    wanted = [key for key in expected_of(golden, name) if not key.startswith("cls_attention")]
    asked = ExportOptions(stride=spec.patch, facets=facets(",".join(wanted)))
    options = exporting.resolve_options(spec, asked)
    return spec, vit, options, exporting._manifest(spec, options, checkpoint), golden[f"pixels{spec.patch}"]


def check(got: Arrays, golden: Arrays, name: str) -> None:
    for key, expected in expected_of(golden, name).items():
        if key == "cls_attention@11":
            values, deviation = got["cls_attention"].ravel(), expected.std()
        else:
            values, deviation = got[key][golden["rows"]], golden[f"{name}.{key}.deviation"]
        assert np.abs(values - expected).max() < TOLERANCE * deviation, key


@pytest.mark.parametrize("name", GOLDEN)
def test_the_network_gives_the_publishers_numbers(golden_backbones: Arrays, name: str, tmp_path: Path) -> None:
    spec, vit, options, manifest, pixels = setting(name, golden_backbones, tmp_path)
    network = exporting.make_encoder(vit, spec, options, manifest)
    cells = Cells(pixels.shape[:2], spec.patch, spec.patch)
    tables = {n: torch.from_numpy(v) for n, v in exporting.position_tables(vit, manifest).positions(cells).items()}
    grid = (torch.arange(count) for count in cells.grid)
    with torch.no_grad():
        outputs = network(torch.from_numpy(pixels)[None], tables["positional"], *grid, tables.get("rotation"))
    got = {n: output[0].numpy() for n, output in zip(manifest.outputs, outputs, strict=True)}
    check(got, golden_backbones, name)


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16_qkvb"])
def test_bundles_give_the_publishers_numbers(golden_backbones: Arrays, name: str, tmp_path: Path) -> None:
    require_openvino()
    spec, vit, options, manifest, pixels = setting(name, golden_backbones, tmp_path)
    folder = tmp_path / "bundle"
    folder.mkdir()
    manifest = exporting.write_files(folder, vit, spec, options, manifest)
    (folder / MANIFEST).write_text(manifest.to_json())
    for backend in ("onnxruntime", "openvino"):
        with Engine.open(folder, backend=backend, precision="fp32") as engine:
            features = engine.encode([pixels], load_size=None)[0]
        assert features.attention is not None
        check({**features.tokens, "cls_attention": features.attention}, golden_backbones, name)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16"])
def test_tables_are_the_publishers(golden_backbones: Arrays, name: str, tmp_path: Path) -> None:
    spec, vit, _, manifest, pixels = setting(name, golden_backbones, tmp_path)
    tables = exporting.position_tables(vit, manifest).positions(Cells(pixels.shape[:2], spec.patch, spec.patch))
    if f"{name}.positional" in golden_backbones:
        rows = tables["positional"].reshape(-1, spec.dim)[[0, 9, 27]]
        np.testing.assert_allclose(rows, golden_backbones[f"{name}.positional"], atol=1e-5)  # torch's are of float32
    else:
        for part, key in zip(tables["rotation"], ("sine", "cosine"), strict=True):
            expected = golden_backbones[f"{name}.{key}"]
            np.testing.assert_allclose(np.tile(part.reshape(len(expected), -1), 2), expected, atol=1e-6)
