"""What tasks, stores and devices make of registers, of rotation, and of models without [CLS]."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo
from helpers_gpu import SIZES, FakeGpu, plan_bundle

from facetrt.engine import BundleError, Engine, FeatureStore, InputError
from facetrt.engine.bundle.bundle import Bundle, read_manifest
from facetrt.engine.device.encoding import DeviceEncoder, decode
from facetrt.engine.device.transfer import to_host
from facetrt.engine.encoding.encoder import EncodeOptions
from facetrt.engine.tasks.discovery.attention import attention_facets, cls_attention
from facetrt.engine.tasks.self_similarity import self_similarity
from facetrt.export.mending import file_entry, write_manifest
from facetrt.kernels.device import Device, DeviceArray

Get = Callable[[str], tuple[Any, Path, Any]]
PHOTOS = [photo(80, 96, seed) for seed in range(3)]


def test_registers_stand_apart(family: Get, tmp_path: Path) -> None:
    with Engine.open(family("dinov3_vits16")[1]) as engine:
        features = engine.encode(PHOTOS[:1], load_size=None)[0]
        stored = engine.extract(PHOTOS[:1], tmp_path / "s.zarr", load_size=None)
    rows, cells = features.tokens["key@2"], features["key@2"]
    assert features.registers("key@2").shape == (4, 48) and len(rows) == 5 + len(cells) == 5 + np.prod(features.grid)
    np.testing.assert_array_equal(np.vstack([features.cls("key@2"), features.registers("key@2"), cells]), rows)
    assert self_similarity(features, "key@2").shape == (1 + len(cells),) * 2
    kept = FeatureStore.open(stored.path)[0]
    assert kept.prefix == 5
    for facet in features.facets:
        np.testing.assert_array_equal(kept.tokens[facet], features.tokens[facet])


def test_attention_of_each_head_is_of_rotated_keys(family: Get) -> None:
    with Engine.open(family("dinov3_vits16")[1]) as engine:
        features, manifest = engine.encode(PHOTOS[:1], load_size=None)[0], engine.manifest
        with pytest.raises(InputError, match=r"query@2 and rotated_key@2 were not exported: .*,query@2,rotated_key@2"):
            attention_facets(manifest)
    # [CLS] does not turn: its rotated query is its query
    tokens = dict(features.tokens) | {"query@2": features.tokens["rotated_query@2"]}
    tokens["rotated_key@2"] = features.tokens["key@2"]  # as if nothing turned
    given = replace(manifest, facets=[*manifest.facets, "query@2", "rotated_key@2"])
    features = features.of(features.record, tokens, features.attention, features.pixels)
    found = cls_attention(features, given)
    assert found.shape == (3, 5 + np.prod(features.grid))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_models_without_cls_refuse_saliency_by_their_name(family: Get, tmp_path: Path) -> None:
    with Engine.open(family("siglip2_so400m16_256")[1]) as engine:
        features = engine.encode(PHOTOS, load_size=None)
        assert features[0].prefix == 0 and features[0].registers("key@2").shape == (0, 48)
        assert len(features[0]["key@2"]) == len(features[0].tokens["key@2"])
        with pytest.raises(InputError, match=r"siglip2_so400m16_256_tiny has no \[CLS\] token"):
            features[0].cls("key@2")
        message = r"no saliency, which is the attention of \[CLS\]: siglip2_so400m16_256"
        with pytest.raises(InputError, match=message):
            engine.cosegment(PHOTOS, load_size=None)
        with pytest.raises(InputError, match=message):
            engine.match(*PHOTOS[:2], load_size=None, facet="key@2")
        kept = engine.extract(PHOTOS[:1], tmp_path / "s.zarr", load_size=None)[0]
    np.testing.assert_array_equal(kept.tokens["key@2"], features[0].tokens["key@2"])


class Lane:
    """Runs the encoder on the host, behind the interface of a lane."""

    def __init__(self, engine: Engine, device: Device) -> None:
        self.device, self._backend = device, engine._encoder.backend

    def run(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        outputs = self._backend.run({name: self.device.download(array) for name, array in inputs.items()})
        return {name: self.device.upload(array) for name, array in outputs.items()}


def test_on_a_device_cells_are_cells(family: Get, device: Device) -> None:
    with Engine.open(family("dinov3_vits16")[1]) as engine:
        expected = engine.encode(PHOTOS[:1], load_size=None)[0]
        encoder = engine._encoder
        options = EncodeOptions(None)
        lane: Any = Lane(engine, device)
        frame = decode(encoder, "photo", PHOTOS[0], options)
        (found,) = DeviceEncoder(encoder, lane).encode([frame], ["key@2"], options)
    np.testing.assert_array_equal(device.download(found["key@2"]), expected["key@2"])
    back = to_host(device, found)  # with registers
    np.testing.assert_array_equal(back.tokens["key@2"], expected.tokens["key@2"])
    np.testing.assert_array_equal(back.attention, expected.attention)
    np.testing.assert_array_equal(back.pixels, expected.pixels)


@pytest.fixture(scope="module")
def planned(family: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a plan, which was built on another machine of fakes."""
    folder = tmp_path_factory.mktemp("plans") / "planned"
    return plan_bundle(family("dinov3_vits16")[1], folder, sizes=replace(SIZES, min_size=(16, 16)))


def test_a_plan_has_the_rotation_for_an_input(planned: Path, fake_gpu: FakeGpu) -> None:
    pixels = photo(48, 64)
    with Engine.open(planned, backend="onnxruntime", device="cpu") as engine:
        expected = engine.encode([pixels], load_size=None)[0]
    with Engine.open(planned, backend="tensorrt", device="cuda", kernels="host") as engine:
        found = engine.encode([pixels], load_size=None)[0]
    for facet in expected.facets:
        np.testing.assert_allclose(found.tokens[facet], expected.tokens[facet], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        (None, r"rotation\.npy is not listed: expected 144 bytes for a table of 4 float32"),
        (np.full(4, np.nan, np.float32), r"rotation\.npy holds numbers that are not finite"),
        (np.float32([1, 2, 0, 3]), r"rotation\.npy holds periods that are not positive"),
        (np.ones(8, np.float32), r"rotation\.npy has 160 bytes: expected 144"),
    ],
)
def test_periods_that_are_none(family: Get, tmp_path: Path, periods: Any, message: str) -> None:
    copy = shutil.copytree(family("dinov3_vits16")[1], tmp_path / "copy")
    manifest = read_manifest(copy)
    files = dict(manifest.files)
    if periods is None:
        (copy / "rotation.npy").unlink()
        del files["rotation.npy"]
    else:
        np.save(copy / "rotation.npy", periods)
        files["rotation.npy"] = file_entry(copy / "rotation.npy")
    write_manifest(copy, replace(manifest, files=files))
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)
