from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import Engine, FeatureCollection, InputError, OutputError
from facetrt.engine.features import collection as module

IMAGES = [photo(64, 72, seed) for seed in range(5)]


def test_spilled_features_are_the_same(tiny_engine: Engine) -> None:
    options = {"facets": ["key@2"], "load_size": None, "saliency": "low_resolution"}
    with (
        tiny_engine.collect(IMAGES, **options) as kept,
        tiny_engine.collect(IMAGES, **options, memory_limit=1) as spilled,
    ):
        assert spilled.spilled and not kept.spilled and len(spilled) == len(kept) == 5
        for a, b in zip(kept, spilled, strict=True):
            np.testing.assert_array_equal(a["key@2"], b["key@2"])
            np.testing.assert_array_equal(a.saliency, b.saliency)
            np.testing.assert_array_equal(a.pixels, b.pixels)
            assert a.geometry == b.geometry and a.name == b.name and a.facets == b.facets == ["key@2"]
        assert [item.name for item in spilled[1:3]] == ["image 1", "image 2"]
        folder = spilled._folder
        assert folder is not None and len(list(folder.iterdir())) == 5
    assert not folder.exists()
    with pytest.raises(InputError, match="closed"):
        spilled[0]


@pytest.mark.parametrize("task", ["cosegment", "segment_parts"])
def test_tasks_do_not_care_where_features_lie(tiny_engine: Engine, task: str) -> None:
    options = {"sample_interval": 5, "saliency_threshold": 0.0}
    if task == "segment_parts":
        options |= {"num_parts": 2, "num_crop_augmentations": 1, "three_stages": True}
    run = getattr(tiny_engine, task)
    expected = run(IMAGES, load_size=None, **options)
    with tiny_engine.collect(IMAGES, load_size=None, saliency="low_resolution", memory_limit=1) as spilled:
        got = run(spilled, **options)
    for a, b in zip(got, expected, strict=True):
        if task == "cosegment":
            np.testing.assert_array_equal(a.loaded_mask, b.loaded_mask)
        else:
            np.testing.assert_array_equal(a.loaded_labels, b.loaded_labels)


def test_a_full_disk_is_named(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.np, "savez", full)
    with pytest.raises(OutputError, match=r"No space left on device\): point TMPDIR to a larger disk"):
        tiny_engine.collect(IMAGES, load_size=None, memory_limit=1)


def test_facets_are_checked_and_mixtures_refused(tiny_engine: Engine) -> None:
    with pytest.raises(InputError, match="value@0 was not exported"):
        tiny_engine.collect(IMAGES[:1], facets=["value@0"], load_size=None)
    features = tiny_engine.encode(IMAGES[:1], load_size=None)
    with pytest.raises(InputError, match="given together"):
        tiny_engine.cosegment([*features, IMAGES[1]])
    message = r"holds key@1, not key@2: collect it with facets=\['key@2'\]"
    collect = tiny_engine.collect
    with collect(IMAGES[:2], facets=["key@1"], load_size=None) as held, pytest.raises(InputError, match=message):
        tiny_engine.cosegment(held)
    with FeatureCollection(["key@1"]) as collection:
        collection.append(features[0])
        alien = replace(features[0], provenance=replace(features[0].provenance, encoder_sha256="0"))
        with pytest.raises(InputError, match="another bundle or backend"):
            collection.append(alien)
