"""Every family against timm's own forward, on every runtime of a processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import facets, photo, registered, require_openvino
from helpers_backbones import DEPTH, NAMES, all_facets, tiny, weights
from numpy.typing import NDArray

from facetrt.engine import Engine, Features, InputError
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.graph import OPERATORS
from facetrt.export.backbones.parts import read_network
from facetrt.export.export_options import ExportOptions, Facet, GraphPrecision
from facetrt.export.exporting import export_bundle, resolve_options
from facetrt.export.models import find_model
from facetrt.kernels.errors import ParityError

Get = Callable[[str], tuple[Any, Path, Any]]


def error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def timm_tokens(spec: Any, vit: Any, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Every block's result, by timm's own forward."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in spec.normalisation)
    images = ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]
    with torch.no_grad():
        found = vit.forward_intermediates(images, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True)
    pairs = [(prefix, cells) if isinstance(found[0], tuple) else (None, cells) for cells, prefix in pairs_of(found)]
    return [(cells if prefix is None else torch.cat([prefix, cells], dim=1))[0].numpy() for prefix, cells in pairs]


def pairs_of(found: Any) -> list[tuple[Any, Any]]:
    return [each if isinstance(each, tuple) else (each, None) for each in found]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_every_layer_are_timms(family: Get, name: str) -> None:
    spec, bundle, vit = family(name)
    patch, side = spec.patch, spec.trained_grid
    size = (5 * patch + 3, 7 * patch + 1)
    if spec.table_rule.value in ("scale-centres", "size-centres"):  # elsewhere timm brings tables to other grids
        size = (side * patch, side * patch)
    pixels = photo(*size)
    with Engine.open(bundle, threads=1, max_cells=None) as engine:
        features = engine.encode([pixels], load_size=None, stride=patch)[0]
    whole = pixels[: size[0] // patch * patch, : size[1] // patch * patch]
    for layer, expected in enumerate(timm_tokens(spec, vit, whole)):
        assert error(features.tokens[f"token@{layer}"], expected) < 1e-5
    if "normed@2" in features.facets:
        with torch.no_grad():
            assert error(features.tokens["normed@2"], vit.norm(torch.from_numpy(expected)).numpy()) < 1e-5
    assert features.prefix == spec.prefix == len(expected) - len(features["key@2"])


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16plus", "siglip2_so400m16_256", "eva02_vitb14"])
def test_openvino_batches_and_other_strides(family: Get, name: str) -> None:
    require_openvino()
    _, bundle, _ = family(name)
    images = [photo(83, 97, seed) for seed in range(3)]
    with Engine.open(bundle, backend="onnxruntime") as one, Engine.open(bundle, backend="openvino") as other:
        batch = one.encode(images, load_size=None)
        assert_alike(batch[1], one.encode([images[1]], load_size=None)[0], 1e-5)
        assert_alike(batch[2], other.encode([images[2]], load_size=None)[0], 2e-5)


def assert_alike(got: Features, expected: Features, tolerance: float) -> None:
    for facet, rows in expected.tokens.items():
        assert error(got.tokens[facet], rows) < tolerance, facet


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov3_vits16", "pe_spatial_vits16"])
def test_a_fixed_size_has_the_numbers_of_any_size(family: Get, name: str, tmp_path: Path) -> None:
    spec, bundle, _ = family(name)
    size = (4 * spec.patch, 5 * spec.patch + 2)
    options = ExportOptions(facets=all_facets(spec), measure=False, size=size)
    export_bundle(spec.name, tmp_path / "fixed", options, weights=weights(spec, tmp_path))
    pixels = photo(*size)
    with Engine.open(tmp_path / "fixed") as fixed, Engine.open(bundle) as free:
        assert_alike(fixed.encode([pixels], load_size=None)[0], free.encode([pixels], load_size=None)[0], 1e-5)


def test_the_operators_that_are_allowed_are_those_written(family: Get) -> None:
    written: set[str] = set()
    for name in NAMES:
        model = onnx.load(family(name)[1] / "encoder.onnx")
        nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        written |= {node.op_type for node in nodes if not node.domain}
    assert written == OPERATORS


def test_graphs_of_models_that_rotate(family: Get) -> None:
    """One difference for queries and keys together; a sum would count as a residual addition."""
    graph = onnx.load(family("dinov3_vits16")[1] / "encoder.onnx").graph
    assert sum(node.op_type == "Sub" for node in graph.node) == DEPTH
    assert not {"If", "Tile", "RotaryEmbedding", "Resize"} & {node.op_type for node in graph.node}


def test_what_a_family_says_of_its_rotation_is_what_its_network_does(family: Get) -> None:
    for name in NAMES:
        spec, bundle, vit = family(name)
        parts = read_network(vit)
        assert (None if parts.rotation is None else parts.rotation[0]) == spec.family.rotation
        assert parts.prefix.shape[1] == spec.prefix and Bundle.open(bundle).manifest.family == spec.family.name


def test_facets_that_a_family_lacks() -> None:
    with pytest.raises(InputError, match="queries and keys of dino_vits8 do not rotate"):
        resolve_options(find_model("dino_vits8"), ExportOptions(facets=(Facet.parse("rotated_key@3"),)))
    with pytest.raises(InputError, match=r"normed@2: eva02_vits14 has no final norm"):
        resolve_options(find_model("eva02_vits14"), ExportOptions(facets=(Facet.parse("normed@2"),)))
    with pytest.raises(InputError, match="siglip_vitb16_224 has no such token"):
        resolve_options(find_model("siglip_vitb16_224"), ExportOptions(saliency_heads=(0,)))


def test_an_unknown_part_is_refused_by_its_name(family: Get) -> None:
    _, _, vit = family("dinov2_vits14")
    vit.blocks[1].attn.q_norm = torch.nn.LayerNorm(16)
    try:
        with pytest.raises(InputError, match="its attention has q_norm, which is not supported"):
            read_network(vit)
    finally:
        vit.blocks[1].attn.q_norm = torch.nn.Identity()


def test_a_graph_that_one_file_cannot_hold(family: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _, _ = family("dinov2_vits14")
    monkeypatch.setattr("facetrt.export.exporting.MAX_GRAPH_BYTES", 100_000)
    with pytest.raises(InputError, match=r"take 0\.\d GB in fp32.*export with --precision bf16 or fp16, or facets"):
        export_bundle(spec.name, tmp_path / "out", ExportOptions(measure=False), weights=weights(spec, tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_model_of_a_newer_timm(tmp_path: Path) -> None:
    spec = replace(find_model("dinov2_vits14"), architecture="vit_of_tomorrow")
    with pytest.raises(ImportError, match=r"timm .* does not know vit_of_tomorrow, .* dinov2_vits14: pip install"):
        spec.build()


def test_a_model_whose_logits_overflow_is_not_exported_in_fp16(tmp_path: Path) -> None:
    """Published logits of DINOv3 reach two millions."""
    spec = replace(tiny("dinov3_vits16"), name="loud")
    state = torch.load(weights(spec, tmp_path), weights_only=True)
    for layer in range(DEPTH):
        thirds = state[f"blocks.{layer}.attn.qkv.weight"]
        thirds[:96] *= 200
    torch.save(state, tmp_path / "loud.pth")
    options = ExportOptions(facets=facets("key@1,token@2"), saliency=False, measure=False, size=(48, 48))
    with registered(spec):
        with pytest.raises(ParityError, match="fp16 misses its contract"):
            half = replace(options, precision=GraphPrecision.FP16)
            export_bundle("loud", tmp_path / "half", half, weights=tmp_path / "loud.pth")
        auto = replace(options, precision=GraphPrecision.AUTO)
        manifest = export_bundle("loud", tmp_path / "auto", auto, weights=tmp_path / "loud.pth")
    assert max(manifest.ranges.logits) > 65504 and manifest.precision != "fp16"
