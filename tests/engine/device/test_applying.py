"""Models applied on a device against the host; kernels in the interpreter, features from the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import Engine, InputError, PartsModel, SegmentationModel, Smoother
from facetrt.engine.device.running import DeviceRunner
from facetrt.engine.device.transfer import to_device
from facetrt.engine.features.features import Features
from facetrt.engine.features.on_device import DeviceFeatures, FacetRows
from facetrt.engine.tasks import refinement
from facetrt.engine.tasks.descriptors import unit_rows
from facetrt.kernels.device import Device, refine

FACET = "key@1"
Model = SegmentationModel | PartsModel


@pytest.fixture(scope="module")
def clip(tiny_engine: Engine) -> list[Features]:
    wide = photo(64, 100)
    return tiny_engine.encode([np.ascontiguousarray(wide[:, 8 * i : 8 * i + 72]) for i in range(3)], load_size=32)


def learned(kind: type[Model], features: Features, hierarchy: int) -> Model:
    """Centroids are cells of the first frame, so that labels are many and distances of all sizes."""
    own, rows = features.provenance, np.asarray(unit_rows(features, FACET, hierarchy)[::4])[:9]
    shared = {
        "facet": FACET,
        "encoder": own.model,
        "encoder_sha256": own.encoder_sha256,
        "stride": 4,
        "load_size": 32,
        "options": {"hierarchy": hierarchy},
        "images": 1,
    }
    if kind is SegmentationModel:
        return SegmentationModel(**shared, centroids=rows, salient_labels=np.array([1, 4, 5]))
    return PartsModel(**shared, centroids=rows[:4], background_centroids=rows[4:])


@pytest.fixture
def engine(tiny_engine: Engine, device: Device) -> Engine:
    """The tiny engine, whose runner has a stream of the device."""

    @contextmanager
    def stream() -> Iterator[Device]:
        yield device

    engine = Engine(tiny_engine._encoder)
    engine._runner = DeviceRunner(tiny_engine._encoder, SimpleNamespace(stream=stream))  # type: ignore[arg-type]
    return engine


def on_device(features: Features, device: Device) -> DeviceFeatures:
    return replace(to_device(device, features, [FACET]), pixels=device.upload(features.pixels))


@pytest.mark.parametrize("kind", [SegmentationModel, PartsModel])
@pytest.mark.parametrize("hierarchy", [0, 1])
@pytest.mark.parametrize("decay", [None, 0.6])
def test_results_are_the_hosts(
    engine: Engine, clip: list[Features], device: Device, kind: type[Model], hierarchy: int, decay: float | None
) -> None:
    model = learned(kind, clip[0], hierarchy)
    smoothers = [None if decay is None else Smoother(decay) for _ in range(2)]
    for frame in clip[: 1 if decay is None else 3]:
        expected = engine.apply(model, frame, smoother=smoothers[0])
        found = engine.apply(model, on_device(frame, device), smoother=smoothers[1])
        np.testing.assert_array_equal(found.cells, expected.cells)
        assert found.confidence == pytest.approx(expected.confidence, abs=1e-6)
        assert (found.geometry, found.name) == (expected.geometry, expected.name)
        if isinstance(model, SegmentationModel):
            np.testing.assert_array_equal(found.labels, expected.labels)
            np.testing.assert_array_equal(found.loaded_mask, expected.loaded_mask)
        else:
            np.testing.assert_array_equal(found.loaded_labels, expected.loaded_labels)


@pytest.mark.parametrize(
    ("kind", "how"), [(SegmentationModel, "grabcut"), (SegmentationModel, "crf"), (PartsModel, "crf")]
)
def test_refined_as_on_the_host(
    engine: Engine, clip: list[Features], device: Device, monkeypatch: pytest.MonkeyPatch, kind: type[Model], how: str
) -> None:
    monkeypatch.setattr(refinement, "dense_crf", partial(refinement.dense_crf, iterations=1))
    monkeypatch.setattr(refine, "mean_field", partial(refine.mean_field, iterations=1))
    model = learned(kind, clip[0], 0)
    found, expected = (engine.apply(model, item, refine=how) for item in (on_device(clip[1], device), clip[1]))
    pixels = "loaded_mask" if kind is SegmentationModel else "loaded_labels"
    assert found.refinement == expected.refinement == how
    np.testing.assert_array_equal(getattr(found, pixels), getattr(expected, pixels))


@pytest.mark.parametrize("kind", [SegmentationModel, PartsModel])
def test_only_distances_and_saliency_come_down(
    engine: Engine, clip: list[Features], device: Device, monkeypatch: pytest.MonkeyPatch, kind: type[Model]
) -> None:
    model, frame = learned(kind, clip[0], 0), on_device(clip[1], device)
    down, real = [], device.download
    monkeypatch.setattr(device, "download", lambda array: down.append(array.shape) or real(array))
    engine.apply(model, frame)
    cells = len(frame[FACET])
    assert down == [(9, cells), (cells,)]


@pytest.mark.parametrize("kind", [SegmentationModel, PartsModel])
def test_featureless_frames_show_nothing(
    engine: Engine, clip: list[Features], device: Device, kind: type[Model]
) -> None:
    frame = on_device(clip[0], device)
    black = replace(frame, record=replace(frame.record, detail=0.0))
    smoother = Smoother()
    found = engine.apply(learned(kind, clip[0], 0), black, smoother=smoother)
    assert found.why_empty is not None and (found.cells <= 0).all() and not found.cells.clip(0).any()
    assert smoother._mean is None  # it would count as a frame


def test_frames_that_do_not_fit(engine: Engine, tiny_engine: Engine, clip: list[Features], device: Device) -> None:
    model, frame = learned(SegmentationModel, clip[0], 0), on_device(clip[0], device)
    with pytest.raises(InputError, match=r"lie on a device, and this engine is on cpu.*open it with"):
        tiny_engine.apply(model, frame)
    with pytest.raises(InputError, match="on the device, and key@1 was asked for: encode it with facets="):
        engine.apply(model, replace(to_device(device, clip[0], ["key@2"]), pixels=frame.pixels))
    with pytest.raises(InputError, match="no pixels on the device"):
        engine.apply(model, replace(frame, pixels=None))
    with pytest.raises(InputError, match="was given with features"):
        engine.apply(model, frame, load_size=32)
    foreign = replace(frame.record, provenance=replace(frame.record.provenance, encoder_sha256="0" * 64))
    with pytest.raises(InputError, match="come from another bundle"):
        engine.apply(model, replace(frame, record=foreign))
    narrow = replace(model, centroids=np.ascontiguousarray(model.centroids[:, :16]))
    with pytest.raises(InputError, match="the model's centroids have 16 numbers"):
        engine.apply(narrow, frame)
    for value in (np.nan, np.inf):
        broken = clip[0][FACET].copy()
        broken[3, 2] = value
        with pytest.raises(InputError, match="NaN or infinite descriptors"):
            rows = FacetRows(frame.prefix(FACET), device.upload(broken))
            engine.apply(model, replace(frame, facets={FACET: rows}))
