"""Co-segmentation, parts and PCA of log-binned descriptors equal those of descriptors that were binned beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import Engine, Features, fit_pca, learn_cosegmentation, learn_parts, load_model
from facetrt.engine.device.running import DeviceRunner
from facetrt.engine.tasks.descriptors import BinnedRows, normalise
from facetrt.kernels import log_bin
from facetrt.kernels.errors import InputError

FACET = "key@2"
OPTIONS = {"facet": FACET, "sample_interval": 3, "saliency_threshold": 0.0, "refine": "crf"}


@pytest.fixture(scope="module")
def features(tiny_engine: Engine) -> list[Features]:
    images = [photo(48, 64, seed) for seed in range(3)]
    return tiny_engine.encode(images, load_size=None, saliency="low_resolution")


def binned(item: Features) -> Features:
    rows = log_bin(item.map(FACET), 2)
    return replace(item, tokens={FACET: np.concatenate([np.zeros((1, rows.shape[1]), np.float32), rows])})


def test_rows_are_made_as_they_are_asked_for(features: list[Features], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, expected = BinnedRows(features[0], FACET, 2), normalise(binned(features[0])[FACET])
    assert rows.shape == expected.shape
    mask = np.arange(len(expected)) % 3 == 1
    for index in (slice(None, None, 7), slice(3, 9), np.array([5, 2]), mask):
        np.testing.assert_array_equal(rows[index], expected[index])
    np.testing.assert_array_equal(rows.only(mask)[1:4], expected[mask][1:4])


def test_cosegmentation(
    tiny_engine: Engine, features: list[Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("facetrt.engine.tasks.descriptors.BLOCK_CELLS", 50)
    expected = tiny_engine.cosegment([binned(item) for item in features], **OPTIONS)
    found = tiny_engine.cosegment(features, hierarchy=2, **OPTIONS)
    plain = tiny_engine.cosegment(features, **OPTIONS)
    assert found.clustering.centroids.shape[1] == 17 * plain.clustering.centroids.shape[1]
    np.testing.assert_allclose(found.clustering.objectives, expected.clustering.objectives, rtol=1e-5)
    with tiny_engine.collect([photo(48, 64, seed) for seed in range(3)], load_size=None, memory_limit=0,
                             saliency="low_resolution") as collected:  # fmt: skip
        spilled = tiny_engine.cosegment(collected, hierarchy=2, **OPTIONS)
    for one, other, third in zip(found, expected, spilled, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.labels, third.labels)
        np.testing.assert_array_equal(one.loaded_mask, third.loaded_mask)
    model = learn_cosegmentation(
        tiny_engine, features, hierarchy=2, **{k: v for k, v in OPTIONS.items() if k != "refine"}
    )
    model.save(tmp_path / "model.npz")
    loaded = load_model(tmp_path / "model.npz")
    assert loaded.hierarchy == 2
    np.testing.assert_array_equal(tiny_engine.apply(loaded, features[1]).labels, found[1].labels)


def test_parts(tiny_engine: Engine, features: list[Features]) -> None:
    for three in (False, True):
        options = OPTIONS | {"num_parts": 2, "three_stages": three, "refine": "none", "sample_interval": 2}
        expected = tiny_engine.segment_parts([binned(item) for item in features], **options)
        found = tiny_engine.segment_parts(features, hierarchy=2, **options)
        assert found.num_parts == expected.num_parts
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.cells, other.cells)
    learning = {name: value for name, value in options.items() if name != "refine"}
    model = learn_parts(tiny_engine, features, hierarchy=2, **learning)
    np.testing.assert_array_equal(tiny_engine.apply(model, features[0]).cells, found[0].cells)


def test_pca(features: list[Features]) -> None:
    found = fit_pca(features, FACET, 3, hierarchy=1)
    rows = [replace(item, tokens={FACET: np.pad(log_bin(item.map(FACET), 1), ((1, 0), (0, 0)))}) for item in features]
    expected = fit_pca(rows, FACET, 3)
    np.testing.assert_allclose(found.explained_variance_ratio, expected.explained_variance_ratio, rtol=1e-9)
    np.testing.assert_allclose(found.project(features[0]), expected.project(rows[0]), atol=1e-5)


def test_what_cannot_be(tiny_engine: Engine, features: list[Features], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = (
        lambda: tiny_engine.cosegment(features, hierarchy=7),
        lambda: tiny_engine.segment_parts(features, hierarchy=-1),
        lambda: fit_pca(features, FACET, 3, hierarchy=7),
    )
    for call in calls:
        with pytest.raises(InputError, match=r"expected 0 .* to 6"):
            call()
    monkeypatch.setattr("facetrt.engine.tasks.pca.fits", lambda needed: False)
    with pytest.raises(InputError, match="use a smaller hierarchy"):
        fit_pca(features, FACET, 3, hierarchy=2)
    monkeypatch.setattr(tiny_engine, "_runner", DeviceRunner(None, None))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kernels=host"):
        tiny_engine.cosegment(features, hierarchy=2)
