"""SelfMask's segmenter: its layers are torch's own, and a checkpoint's parts come to lie in a bundle."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, deterministic_weights, photo
from numpy.typing import NDArray
from torch import nn

from facetrt.engine import Engine
from facetrt.engine.bundle.manifest import SEGMENTER
from facetrt.engine.bundle.positional import TableRule
from facetrt.engine.tasks.discovery.segmenter import Segmenter, _shapes
from facetrt.export.backbones.dino import SELFMASK
from facetrt.export.export_options import ExportOptions, GraphPrecision
from facetrt.export.exporting import export_bundle
from facetrt.export.models import MODELS
from facetrt.export.segmenter import read_segmenter
from facetrt.kernels.errors import BundleError, InputError

QUERIES, WIDTH, HIDDEN, LAYERS, CELLS = 3, 128, 48, 2, 11


class Layer(nn.Module):
    """A DETR-style layer of torch's parts: places are added to what is looked from, and to the keys among queries."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, WIDTH // 64)
        self.multihead_attn = nn.MultiheadAttention(WIDTH, WIDTH // 64)
        self.linear1, self.linear2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, queries: Any, places: Any, memory: Any) -> Any:
        here = queries + places
        queries = self.norm1(queries + self.self_attn(here, here, queries)[0])
        queries = self.norm2(queries + self.multihead_attn(queries + places, memory, memory)[0])
        return self.norm3(queries + self.linear2(torch.relu(self.linear1(queries))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)


class Published(nn.Module):
    """The published model without its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.query_embed = Decoder(), nn.Parameter(torch.zeros(QUERIES, WIDTH))
        self.ffn = nn.Module()
        self.ffn.layers = nn.ModuleList(nn.Linear(WIDTH, out) for out in (WIDTH, WIDTH, 1))

    def forward(self, memory: Any) -> tuple[Any, Any]:
        queries = torch.zeros_like(self.query_embed)
        for layer in self.decoder.layers:
            queries = layer(queries, self.query_embed, memory)
        queries = found = self.decoder.norm(queries)
        for number, linear in enumerate(self.ffn.layers):
            found = linear(found) if number == 0 else linear(torch.relu(found))
        return queries, found[:, 0].sigmoid()


@pytest.fixture(scope="module")
def published() -> Published:
    torch.manual_seed(0)
    model = Published().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def weights(published: Published) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in published.state_dict().items()}


def test_queries_and_objectness_are_those_of_torch(published: Published, weights: dict[str, NDArray[Any]]) -> None:
    tokens = np.random.default_rng(1).normal(size=(CELLS, WIDTH)).astype(np.float32)
    with torch.no_grad():
        queries, objectness = published(torch.from_numpy(tokens))
    decoded = Segmenter.of(weights, "weights").decode(tokens)
    np.testing.assert_allclose(decoded.queries, queries.numpy(), atol=2e-5)
    np.testing.assert_allclose(decoded.objectness, objectness.numpy(), atol=1e-6)


def test_a_segmenter_is_read_from_a_checkpoint_and_back(
    tmp_path: Path, published: Published, weights: dict[str, NDArray[Any]]
) -> None:
    encoder = {f"encoder.{name}": torch.zeros(1) for name in ("cls_token", "blocks.0.norm1.weight")}
    torch.save({"model": {**encoder, **published.state_dict()}}, tmp_path / "selfmask.pt")
    segmenter = read_segmenter(tmp_path / "selfmask.pt")
    again = Segmenter.read(segmenter.to_bytes(), "segmenter.npz")
    assert again.layers == LAYERS and again.width == WIDTH
    assert set(again.weights) == set(weights)
    assert all(np.array_equal(again.weights[name], weights[name]) for name in weights)


def test_a_checkpoint_without_a_segmenter_says_so(tmp_path: Path) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "dino.pt")
    with pytest.raises(InputError, match=r"holds no segmenter.*selfmask_nq20"):
        read_segmenter(tmp_path / "dino.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn.layers.2.bias": None}, "ffn.layers.2.bias is missing"),
        ({"ffn.layers.3.bias": np.zeros(1, np.float32)}, "ffn.layers.3.bias is no part"),
        ({"decoder.norm.bias": np.zeros(2, np.float32)}, r"decoder.norm.bias has shape \(2,\): expected \(128,\)"),
        ({"decoder.norm.bias": np.full(WIDTH, np.nan, np.float32)}, "not finite"),
        ({"query_embed": np.zeros((3, 100), np.float32)}, "multiple of 64"),
    ],
)
def test_other_tensors_are_refused(weights: dict[str, NDArray[Any]], change: dict[str, Any], message: str) -> None:
    changed = {name: values for name, values in {**weights, **change}.items() if values is not None}
    with pytest.raises(BundleError, match=message):
        Segmenter.of(changed, "weights")


def test_what_is_no_plain_npz_is_refused(weights: dict[str, NDArray[Any]]) -> None:
    packed, wide = io.BytesIO(), io.BytesIO()
    np.savez_compressed(packed, zeros=np.zeros(10**6, np.float32))
    np.savez(wide, query_embed=np.zeros((3, 128)))
    for data, message in ((packed.getvalue(), "compressed"), (wide.getvalue(), "float64"), (b"PK", "cut off")):
        with pytest.raises(BundleError, match=message):
            Segmenter.read(data, "segmenter.npz")


def test_a_checkpoint_becomes_a_bundle_that_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder interpolates its table to a size, as its publishers' does; the export compares both with torch."""
    spec = replace(
        TINY,
        name="tinymask",
        dim=64,
        heads=1,
        default_facets=("key@2", "normed@2"),
        segmenter=True,
        family=SELFMASK,
    )
    monkeypatch.setitem(MODELS, "tinymask", spec)
    random = np.random.default_rng(0)
    decoder = {name: random.normal(size=shape).astype("f4") for name, shape in _shapes(3, 64, 1, 32).items()}
    encoder = {f"encoder.{name}": values for name, values in deterministic_weights(spec).items()}
    np.savez(tmp_path / "weights.npz", **encoder, **decoder)
    options = ExportOptions(stride=8, precision=GraphPrecision.FP32, measure=False)
    manifest = export_bundle("tinymask", tmp_path / "bundle", options, weights=tmp_path / "weights.npz")
    assert manifest.positional_rule == TableRule.SIZE and SEGMENTER in manifest.files
    with Engine.open(tmp_path / "bundle") as engine:
        found = engine.discover([photo(60, 76)], "selfmask")[0]
        assert found.facts["generator"] == "segmenter" if len(found) else "segmenter" in str(found.why_empty)
        voted = engine.discover([photo(60, 76)], "selfmask", generator="voting")[0]
        assert voted.facts["generator"] == "voting"
    (tmp_path / "bundle" / SEGMENTER).write_bytes(b"x" * manifest.files[SEGMENTER].bytes)
    with Engine.open(tmp_path / "bundle") as engine:  # what nobody asks for is not read
        assert len(engine.encode([photo(60, 76)])) == 1
        with pytest.raises(BundleError, match="sha256"):
            engine.discover([photo(60, 76)], "selfmask")
