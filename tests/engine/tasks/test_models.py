"""Models: what learning gave is what applying gives, files that are whole or refused, smoothing over frames."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import (
    Engine,
    Features,
    InputError,
    MissingFileError,
    OutputError,
    PartsModel,
    SegmentationModel,
    Smoother,
    learn_cosegmentation,
    learn_parts,
    load_model,
)
from facetrt.engine.tasks import model_files
from facetrt.engine.tasks.models import parts_model
from facetrt.engine.tasks.parts import PartsOptions
from facetrt.engine.tasks.refinement import Refinement

OPTIONS: dict[str, Any] = {"sample_interval": 5, "saliency_threshold": 0.3}
PARTS: dict[str, Any] = OPTIONS | {"num_parts": 3}


@pytest.fixture(scope="module")
def features(tiny_engine: Engine) -> list[Features]:
    """Three encoded images whose central disc is made salient by hand."""
    found = tiny_engine.encode([photo(64, 72, seed) for seed in range(3)], load_size=56)
    y, x = np.indices(found[0].grid)
    disc = ((y - y.mean()) ** 2 + (x - x.mean()) ** 2 < 16).astype(np.float32)
    return [replace(item, attention=disc + 0.001 * y) for item in found]


@pytest.fixture(scope="module")
def segmentation(tiny_engine: Engine, features: list[Features]) -> SegmentationModel:
    return learn_cosegmentation(tiny_engine, features, **OPTIONS)


@pytest.fixture(scope="module")
def parts(tiny_engine: Engine, features: list[Features]) -> PartsModel:
    return learn_parts(tiny_engine, features, **PARTS)


@pytest.mark.parametrize("refine", ["none", "grabcut", "crf", "bilateral"])
def test_on_the_learned_images_masks_are_those_of_cosegmentation(
    tiny_engine: Engine, features: list[Features], segmentation: SegmentationModel, refine: str
) -> None:
    masks = tiny_engine.cosegment(features, refine=refine, **OPTIONS)
    assert 0 < np.mean([mask.cells.mean() for mask in masks]) < 1
    for item, mask in zip(features, masks, strict=True):
        found = tiny_engine.apply(segmentation, item, refine=refine)
        np.testing.assert_array_equal(found.labels, mask.labels)
        np.testing.assert_array_equal(found.cells, mask.cells)
        np.testing.assert_array_equal(found.loaded_mask, mask.loaded_mask)
        assert found.refinement is mask.refinement and found.inlier and found.name == mask.name


@pytest.mark.parametrize("three_stages", [False, True])
@pytest.mark.parametrize("refine", ["none", "crf"])
def test_on_the_learned_images_parts_are_those_of_part_cosegmentation(
    tiny_engine: Engine, features: list[Features], refine: str, three_stages: bool
) -> None:
    options = PARTS | {"three_stages": three_stages}
    maps = tiny_engine.segment_parts(features, refine=refine, **options)
    model = parts_model(maps, features, PartsOptions("key@2", refine=Refinement(refine), **options))
    if refine == "none":
        np.testing.assert_array_equal(learn_parts(tiny_engine, features, **options).centroids, model.centroids)
    assert {-1, 0, 1, 2} <= set(np.unique([item.cells for item in maps]))
    for item, expected in zip(features, maps, strict=True):
        found = tiny_engine.apply(model, item, refine=refine)
        np.testing.assert_array_equal(found.cells, expected.cells)
        np.testing.assert_array_equal(found.loaded_labels, expected.loaded_labels)
        assert found.refinement is Refinement(refine) and model.num_parts == 3


def test_images_are_loaded_as_the_learned_ones_were(tiny_engine: Engine, segmentation: SegmentationModel) -> None:
    image = photo(90, 60, 7)
    assert (segmentation.load_size, segmentation.stride, segmentation.facet) == (56, 4, "key@2")
    found = tiny_engine.apply(segmentation, image)
    assert found.geometry.image_size == (84, 56) and found.mask.shape == (90, 60)
    same = tiny_engine.apply(segmentation, tiny_engine.encode([image], load_size=56)[0])
    np.testing.assert_array_equal(found.cells, same.cells)
    assert tiny_engine.apply(segmentation, image, load_size=32).geometry.image_size == (48, 32)


def test_another_encoder_is_refused(
    tiny_engine: Engine, features: list[Features], segmentation: SegmentationModel, parts: PartsModel
) -> None:
    with Engine.open("builtin", threads=1) as other:
        for model in (segmentation, parts):
            with pytest.raises(InputError, match=r"another encoder \(tiny, .*bundle's \(builtin, .*learn it again"):
                other.apply(model, photo(64, 64))
        foreign = other.encode([photo(64, 64)], load_size=None)[0]
    with pytest.raises(InputError, match=r"come from another bundle \(builtin\)"):
        tiny_engine.apply(segmentation, foreign)
    tokens = {"key@2": np.full_like(features[0].tokens["key@2"], np.nan)}
    with pytest.raises(InputError, match="NaN or infinite descriptors"):
        tiny_engine.apply(segmentation, replace(features[0], tokens=tokens))
    short = {name: getattr(parts, name)[:, :7].copy() for name in ("centroids", "background_centroids")}
    for model in (replace(segmentation, centroids=segmentation.centroids[:, :7].copy()), replace(parts, **short)):
        with pytest.raises(InputError, match="centroids have 7 numbers and key@2 has"):
            tiny_engine.apply(model, features[0])
    with pytest.raises(InputError, match="refine 'sharp': expected one of"):
        tiny_engine.apply(segmentation, features[0], refine="sharp")
    with pytest.raises(InputError, match="grabcut separates"):
        tiny_engine.apply(parts, features[0], refine="grabcut")


def test_nothing_salient_is_no_model(tiny_engine: Engine, features: list[Features]) -> None:
    nothing = {"sample_interval": 5, "saliency_threshold": 1.0}
    with pytest.raises(InputError, match=r"no cluster was salient .* lower saliency_threshold"):
        learn_cosegmentation(tiny_engine, features, **nothing)
    with pytest.raises(InputError, match=r"everything was background.* lower saliency_threshold"):
        learn_parts(tiny_engine, features, **nothing)
    with pytest.raises(TypeError, match="elbows"):
        learn_cosegmentation(tiny_engine, features, elbows=1)


def test_files_bring_back_everything(
    tiny_engine: Engine, features: list[Features], segmentation: SegmentationModel, parts: PartsModel, tmp_path: Path
) -> None:
    for model, kind in ((segmentation, SegmentationModel), (parts, PartsModel)):
        path = tmp_path / "made" / f"{model.kind}.model"
        model.save(path)
        again = kind.load(path)
        assert type(load_model(path)) is kind
        for name, value in vars(model).items():
            np.testing.assert_array_equal(getattr(again, name), value)
            assert type(getattr(again, name)) is type(value)
        for a, b in ((model, again),):
            found = [tiny_engine.apply(m, features[0]) for m in (a, b)]
            np.testing.assert_array_equal(found[0].cells, found[1].cells)
    assert segmentation.options["saliency_threshold"] == 0.3 and parts.options["num_parts"] == 3
    assert sorted(p.name for p in path.parent.iterdir()) == ["parts.model", "segmentation.model"]
    with pytest.raises(InputError, match="holds a parts model: expected a segmentation model"):
        SegmentationModel.load(path)
    with pytest.raises(MissingFileError, match=r"none\.npz does not exist"):
        load_model(tmp_path / "none.npz")
    pair = replace(segmentation, load_size=(48, 64))
    pair.save(tmp_path / "pair.npz")
    assert load_model(tmp_path / "pair.npz").load_size == (48, 64)


def test_saving_replaces_only_models_and_only_when_told(segmentation: SegmentationModel, tmp_path: Path) -> None:
    path, photograph = tmp_path / "m.npz", tmp_path / "photo.jpg"
    segmentation.save(path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        segmentation.save(path)
    replace(segmentation, images=9).save(path, force=True)
    assert load_model(path).images == 9 and path.read_bytes() != before
    photograph.write_bytes(b"mine")
    with pytest.raises(OutputError, match="no model of facetrt, so --force does not replace it"):
        segmentation.save(photograph, force=True)
    assert photograph.read_bytes() == b"mine"
    with pytest.raises(OutputError, match="cannot be written"):
        segmentation.save(photograph / "m.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.npz", "photo.jpg"]


def test_a_failed_save_keeps_the_old_file(
    segmentation: SegmentationModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.npz"
    segmentation.save(path)
    before = path.read_bytes()

    def full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match="No space left on device"):
        segmentation.save(path, force=True)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.npz"]


def rewrite(path: Path, **changes: Any) -> None:
    """The file with other arrays, or without those that are None; ``metadata`` is a dict of changes."""
    with np.load(path) as file:
        arrays = dict(file)
    metadata = json.loads(arrays["metadata"].tobytes()) | changes.pop("metadata", {})
    text = json.dumps({key: value for key, value in metadata.items() if value is not ...})
    arrays |= {"metadata": np.frombuffer(text.encode(), np.uint8)} | changes
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centroids": np.zeros((3, 4))}, r"centroids is float64 .* expected <f4"),
        ({"centroids": np.zeros(4, np.float32)}, r"centroids are float32 of shape \(4,\)"),
        ({"centroids": np.full((9, 4), np.nan, np.float32)}, "centroids hold NaN"),
        ({"centroids": np.asfortranarray(np.ones((3, 4), np.float32))}, "row by row"),
        ({"centroids": np.array([[{}]])}, r"centroids is object"),
        ({"salient_labels": np.array([2, 1])}, "ascending"),
        ({"salient_labels": np.array([99])}, "numbers of some of the"),
        ({"salient_labels": np.array([], np.int64)}, "at least one"),
        ({"salient_labels": None}, r"missing or unknown members: salient_labels\.npy"),
        ({"more": np.zeros(3)}, r"missing or unknown members: more\.npy"),
        ({"metadata": {"more": 1}}, "missing or unknown fields: more"),
        ({"metadata": {"facet": ...}}, "missing or unknown fields: facet"),
        ({"metadata": {"schema": 2}}, "schema 2: this version of facetrt reads segmentation and parts of schema 1"),
        ({"metadata": {"kind": "pca"}}, "kind 'pca'"),
        ({"metadata": {"tool": "other"}}, "facetrt did not write it"),
        ({"metadata": {"stride": "4"}}, "stride is '4': expected a positive number"),
        ({"metadata": {"load_size": [1, 2, 3]}}, "load_size="),
        ({"metadata": {"options": {"elbow": "1"}}}, "options is"),
        ({"metadata": {"options": {"elbow": float("nan")}}}, "finite numbers by name"),
    ],
)
def test_files_that_say_something_else_are_refused(
    segmentation: SegmentationModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "m.npz"
    segmentation.save(path)
    rewrite(path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_damaged_and_hostile_files_are_refused(
    segmentation: SegmentationModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.npz"
    segmentation.save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):  # any other exception fails the test; harmless changes load
        changed = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.3 else data)
        for place in rng.integers(0, len(changed), rng.integers(0, 4)):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            load_model(path)
        except InputError as error:
            assert "model" in str(error)
    with np.load(_file(path, data)) as arrays:
        np.savez_compressed(path, **arrays)
    with pytest.raises(InputError, match="members are compressed, repeated"):
        load_model(path)
    _file(path, data)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("centroids.npy", b"")
    with pytest.raises(InputError, match="members are compressed, repeated"):
        load_model(path)
    monkeypatch.setattr(model_files, "MAX_BYTES", len(data) - 1)
    with pytest.raises(InputError, match="expected a file of at most"):
        load_model(_file(path, data))
    with pytest.raises(InputError, match="is not a model"):
        load_model(tmp_path)


def test_a_header_is_believed_only_as_far_as_there_are_bytes() -> None:
    """Ten terabytes are promised: without the check this would be a MemoryError, or worse."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2500000000, 1000)}".ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    with pytest.raises(InputError, match=r"shape \(2500000000, 1000\) in 64 bytes"):
        model_files.parse_array("centroids", {"centroids.npy": member}, "<f4")


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def noisy(features: Features, seed: int, scale: float = 0.6) -> Features:
    """The frame as a poor camera sees it: descriptors with noise."""
    noise = np.random.default_rng(seed).standard_normal(features.tokens["key@2"].shape).astype(np.float32)
    rows = features.tokens["key@2"]
    return replace(features, tokens={"key@2": rows + scale * rows.std() * noise})


@pytest.mark.parametrize("kind", ["segmentation", "parts"])
def test_smoothing_takes_flicker_out_of_a_still_scene(
    tiny_engine: Engine, features: list[Features], kind: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    frames = [noisy(features[0], seed) for seed in range(30)]
    smoother = Smoother(0.9)
    alone = np.array([tiny_engine.apply(model, frame).cells for frame in frames])[10:]
    steady = np.array([tiny_engine.apply(model, frame, smoother=smoother).cells for frame in frames])[10:]
    changes = [(item[1:] != item[:-1]).mean() for item in (alone, steady)]
    assert changes[0] > 0.05 and changes[1] < changes[0] / 4
    truth = tiny_engine.apply(model, features[0]).cells
    assert (steady == truth).mean() > (alone == truth).mean()


@pytest.mark.parametrize("refine", ["none", "grabcut", "crf", "bilateral"])
def test_smoothing_one_scene_changes_nothing(
    tiny_engine: Engine, features: list[Features], segmentation: SegmentationModel, refine: str
) -> None:
    smoother = Smoother()
    alone = tiny_engine.apply(segmentation, features[0], refine=refine)
    for _ in range(3):
        found = tiny_engine.apply(segmentation, features[0], refine=refine, smoother=smoother)
        np.testing.assert_array_equal(found.labels, alone.labels)
        np.testing.assert_array_equal(found.loaded_mask, alone.loaded_mask)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.6, 0.8, 0.95])
def test_a_cut_shows_after_the_documented_lag(decay: float) -> None:
    smoother = Smoother(decay)
    before, after = np.array([[[0.0]], [[1.0]]], np.float32), np.array([[[1.0]], [[0.0]]], np.float32)
    for _ in range(200):
        assert smoother.smooth(before).argmin() == 0
    winners = [int(smoother.smooth(after).argmin()) for _ in range(smoother.lag)]
    assert winners[-1] == 1 and (decay == 0.5 or winners[:-1] == [0] * (smoother.lag - 1))


def test_smoothing_begins_anew_when_told_or_when_the_size_changes(
    tiny_engine: Engine, features: list[Features], segmentation: SegmentationModel
) -> None:
    smoother, fresh = Smoother(0.9), tiny_engine.apply(segmentation, features[1])
    for _ in range(3):
        old = tiny_engine.apply(segmentation, features[0], smoother=smoother)
    lagging = tiny_engine.apply(segmentation, features[1], smoother=smoother)
    assert (lagging.labels == old.labels).mean() > 0.9 > (fresh.labels == old.labels).mean()
    smoother.reset()
    np.testing.assert_array_equal(tiny_engine.apply(segmentation, features[1], smoother=smoother).labels, fresh.labels)
    large = tiny_engine.encode([photo(80, 80, 5)], load_size=None)[0]
    found = tiny_engine.apply(segmentation, large, smoother=smoother)
    np.testing.assert_array_equal(found.labels, tiny_engine.apply(segmentation, large).labels)


def test_one_bad_frame_does_not_spoil_the_rest() -> None:
    smoother, frame = Smoother(), np.ones((2, 1, 1), np.float32)
    smoother.smooth(frame)
    with pytest.raises(InputError, match="NaN or infinite"):
        smoother.smooth(frame * np.float32("nan"))
    np.testing.assert_array_equal(smoother.smooth(frame), frame)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(InputError, match=r"expected 0 \(each frame alone\) to below 1"):
        Smoother(decay)
