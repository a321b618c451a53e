"""The engine on a GPU from end to end, on a fake one: real launches and copies, kernels in the interpreter."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import export_tiny, photo
from helpers_gpu import FakeGpu, add_kernels

from facetrt.engine import Engine, Features, SegmentationModel
from facetrt.engine.tasks import clustering, cosegmentation
from facetrt.kernels import InputError
from facetrt.kernels.device import kmeans
from facetrt.kernels.errors import BackendError
from facetrt.kernels.kmeans import kmeans_each

MATCH = {"facet": "key@1", "load_size": 24, "num_pairs": 2, "hierarchy": 1}


@pytest.fixture
def bundle(planned_bundle: Path, tmp_path: Path, fake_gpu: FakeGpu) -> Path:
    """With a plan and kernels for the fake GPU."""
    return add_kernels(Path(shutil.copytree(planned_bundle, tmp_path / "bundle")), fake_gpu)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_match_gives_the_cpus_pairs(tiny_engine: Engine, bundle: Path, fake_gpu: FakeGpu, backend: str) -> None:
    a, b = photo(40, 40), photo(44, 40, seed=1)
    expected = tiny_engine.match(a, b, **MATCH)
    with Engine.open(bundle, device="cuda", backend=backend) as engine:
        found = engine.match(a, b, **MATCH)
        mixed = engine.match(engine.encode([a], load_size=24)[0], b, **MATCH)
        assert (engine.backend, engine.precision) == (backend, "fp32")
    for result in (found, mixed):
        np.testing.assert_array_equal(result.cells_a, expected.cells_a)
        np.testing.assert_array_equal(result.cells_b, expected.cells_b)
        np.testing.assert_allclose(result.points_b_xy, expected.points_b_xy)
    launched = {name for name, _, _ in fake_gpu.gpu.launches}
    assert any(name.startswith("best_buddies") for name in launched) and "kmeans_lloyd" in launched


def test_cosegment_on_two_streams_gives_the_cpus_masks(
    tiny_engine: Engine, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cosegmentation, "MAX_CLUSTERS", 2)
    monkeypatch.setattr(clustering, "kmeans_each", partial(kmeans_each, restarts=1, iterations=3))
    monkeypatch.setattr(kmeans, "kmeans_each", partial(kmeans.kmeans_each, restarts=1, iterations=3))
    images = [photo(24, 28, seed=i) for i in range(3)] + [photo(26, 24, seed=5)]
    options = {"facet": "key@1", "load_size": 24, "sample_interval": 5, "refine": "none"}
    options |= {"saliency": "full"}
    expected = tiny_engine.cosegment(images, **options)
    with Engine.open(bundle, device="cuda", backend="tensorrt", streams=2) as engine:
        masks = engine.cosegment(images, **options)
        again = engine.cosegment(iter(images), **options)
    for mine, repeated, theirs in zip(masks, again, expected, strict=True):
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        np.testing.assert_array_equal(mine.loaded_mask, theirs.loaded_mask)
        np.testing.assert_array_equal(mine.labels, repeated.labels)


def test_objects_are_those_of_the_cpu(tiny_engine: Engine, bundle: Path, fake_gpu: FakeGpu) -> None:
    options = {"facet": "key@1-mean", "load_size": (24, 28), "fit": "none", "stride": 4, "tau": 0.3, "crf": False}
    image = photo(24, 28, seed=3)
    (expected,) = tiny_engine.discover([image], "maskcut", **options)
    with Engine.open(bundle, device="cuda", backend="onnxruntime") as engine:
        (found,) = engine.discover([image], "maskcut", **options)
    launched = {name for name, _, _ in fake_gpu.gpu.launches}
    assert {"graph_strong_edges", "graph_product", "graph_keep_edges"} <= launched and len(expected)
    np.testing.assert_array_equal(found.cells, expected.cells)
    np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_descriptors_stay_on_the_device(tiny_engine: Engine, bundle: Path) -> None:
    image = photo(40, 52)
    with Engine.open(bundle, device="cuda", backend="onnxruntime") as engine:
        features = engine.encode_on_device([image], facets=["key@1"], load_size=24)[0]
        rows = features["key@1"]
        assert rows.__dlpack_device__() == (2, 0) and rows.__cuda_array_interface__["shape"] == rows.shape
        down = rows.device.download(rows)
        with pytest.raises(InputError, match="key@1 on the device, and key@2 was asked for"):
            features["key@2"]
    np.testing.assert_allclose(down, tiny_engine.encode([image], load_size=24)[0]["key@1"], atol=1e-5)


def test_a_model_is_applied_to_what_lies_on_the_device(tiny_engine: Engine, bundle: Path, fake_gpu: FakeGpu) -> None:
    image = photo(40, 52)
    model = model_of(tiny_engine.encode([image], load_size=24)[0])
    expected = tiny_engine.apply(model, image)
    with Engine.open(bundle, device="cuda", backend="onnxruntime", streams=2) as engine:
        features = engine.encode_on_device([image, image], load_size=24)
        found = [engine.apply(model, item) for item in features]  # on both lanes
    assert "kmeans_unit_distances" in {name for name, _, _ in fake_gpu.gpu.launches}
    for mask in found:
        np.testing.assert_array_equal(mask.labels, expected.labels)
        np.testing.assert_array_equal(mask.loaded_mask, expected.loaded_mask)


def model_of(features: Features) -> SegmentationModel:
    """Its centroids are some of the image's own cells."""
    rows = features["key@1"][::5]
    return SegmentationModel(
        facet="key@1",
        encoder=features.provenance.model,
        encoder_sha256=features.provenance.encoder_sha256,
        stride=features.stride,
        load_size=24,
        options={},
        images=1,
        centroids=rows / np.linalg.norm(rows, axis=1, keepdims=True),
        salient_labels=np.array([0, 2]),
    )


def test_a_facet_that_was_not_exported_is_named(bundle: Path) -> None:
    images = [photo(40, 40), photo(44, 40, seed=1)]
    options = {"facet": "key@7", "load_size": 24}
    with Engine.open(bundle, device="cuda", backend="onnxruntime") as engine:
        features = engine.encode(images, load_size=24)
        for call in (
            lambda: engine.match(*images, **options),
            lambda: engine.match(*features, facet="key@7"),
            lambda: engine.cosegment(images, **options),
            lambda: engine.encode_on_device(images, facets=["key@1", "key@7"], load_size=24),
            lambda: engine.stream_on_device(images, facets="key@7"),
        ):
            with pytest.raises(InputError, match="key@7 was not exported"):
                call()


def test_a_bundle_without_saliency_is_named(tiny_weights: Path, tmp_path: Path, fake_gpu: FakeGpu) -> None:
    bundle = add_kernels(export_tiny(tiny_weights, tmp_path / "plain", saliency=False), fake_gpu)
    images = [photo(40, 40), photo(44, 40, seed=1)]
    with Engine.open(bundle, device="cuda", backend="onnxruntime") as engine:
        with pytest.raises(InputError, match="no saliency"):
            engine.match(*images, load_size=24)
        with pytest.raises(InputError, match="no saliency"):
            engine.match(*engine.encode(images, load_size=24))


def test_kernels_on_the_host_beside_an_encoder_on_the_gpu(
    tiny_engine: Engine, planned_bundle: Path, fake_gpu: FakeGpu
) -> None:
    a, b = photo(40, 40), photo(44, 40, seed=1)
    with Engine.open(planned_bundle, device="cuda", backend="tensorrt", kernels="host") as engine:
        np.testing.assert_array_equal(engine.match(a, b, **MATCH).cells_a, tiny_engine.match(a, b, **MATCH).cells_a)
        with pytest.raises(InputError, match="kernels on the host"):
            engine.encode_on_device([a])
        with pytest.raises(InputError, match="kernels on the host"):
            engine.stream_on_device([a])
    assert not fake_gpu.gpu.launches


def test_a_bundle_without_kernels_says_both_remedies(planned_bundle: Path, fake_gpu: FakeGpu) -> None:
    with pytest.raises(BackendError, match=r"--kernels sm_90.*kernels host"):
        Engine.open(planned_bundle, device="cuda", backend="tensorrt")


def test_kernels_need_a_gpu(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="needs a GPU"):
        Engine.open(tiny_bundle, kernels="device")


def test_points_are_followed_on_two_streams(bundle: Path, fake_gpu: FakeGpu) -> None:
    wide = photo(36, 48)
    frames = [np.ascontiguousarray(wide[:, 2 * i : 2 * i + 36]) for i in range(3)]
    found = []
    with Engine.open(bundle, device="cuda", backend="tensorrt", streams=2) as engine:
        for encode in (engine.encode, engine.encode_on_device):
            tracker = engine.tracker("key@1", search_radius=2)
            first, *others = encode(frames, load_size=None)
            tracker.start(first, [[14.0, 18.0]])
            found.append([tracker.step(features).points_xy for features in others])
    np.testing.assert_allclose(found[1], found[0], atol=0.05)
    assert {"track_centre_fp32", "track_scores", "track_align"} <= {name for name, _, _ in fake_gpu.gpu.launches}
