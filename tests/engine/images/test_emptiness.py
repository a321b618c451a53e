"""Pictures without anything in them give no results, and results say how sure they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facetrt.engine import Engine, learn_cosegmentation, learn_parts
from facetrt.engine.images.emptiness import MIN_DETAIL, detail_of
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.samples import sample_images, second_view
from facetrt.engine.tasks.cosegmentation import contrast
from facetrt.engine.tasks.matching import agreement_of, confidence_of

SIZE = (112, 144)
COARSE = {"load_size": 112, "sample_interval": 10}


def grey(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(np.broadcast_to(values, SIZE)[..., None], 3, axis=2).astype(np.uint8)


ramp = np.linspace(0, 255, SIZE[1])
random = np.random.default_rng(0)
EMPTY = {
    "black": grey(np.zeros(1)),
    "white": grey(np.full(1, 255)),
    "constant": np.full((*SIZE, 3), (200, 30, 60), np.uint8),
    "dithered": random.integers(0, 3, (*SIZE, 3)).astype(np.uint8),
    "gradient": grey(ramp),
    "diagonal": grey((ramp + np.linspace(255, 0, SIZE[0])[:, None]) / 2),
    "8 pixels": random.integers(0, 256, (8, 8, 3)).astype(np.uint8),
    "a strip": random.integers(0, 256, (8, 200, 3)).astype(np.uint8),
}
NOISE = [random.integers(0, 256, (*SIZE, 3)).astype(np.uint8) for _ in range(2)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.open("builtin", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def photos() -> dict[str, NDArray[np.uint8]]:
    return {name: np.asarray(image) for name, image in sample_images().items()}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_match_in_an_empty_picture(engine: Engine, photos: dict[str, Any], name: str) -> None:
    for pair in ((EMPTY[name], EMPTY[name]), (photos["cat"], EMPTY[name])):
        found = engine.match(*pair, load_size=(48, 64), saliency_threshold=-1.0)
        assert len(found) == len(found.cells_a) == found.confidence == 0
        assert found.why_empty is not None and "image 1 is" in found.why_empty


def test_a_little_contrast_is_enough(photos: dict[str, NDArray[np.uint8]]) -> None:
    for name, photo in photos.items():
        geometry = Geometry(photo.shape[:2], photo.shape[:2], 8, 4)
        assert detail_of(photo // 6, geometry) > MIN_DETAIL, name  # as dark as night
    dot = EMPTY["black"].copy()
    dot[50:58, 60:68] = 255
    assert detail_of(dot, Geometry(SIZE, SIZE, 8, 4)) > MIN_DETAIL


def test_confidence_of_matches_tells_views_of_a_thing_from_unlike_pictures(
    engine: Engine, photos: dict[str, NDArray[np.uint8]]
) -> None:
    alike = engine.match(photos["coffee"], second_view(photos["coffee"])[0], load_size=112)
    unlike = engine.match(photos["astronaut"], photos["rocket"], load_size=112)
    noise = engine.match(*NOISE, load_size=112)
    assert alike.confidence > 0.7 > 0.33 > max(unlike.confidence, noise.confidence)
    assert alike.agreement.shape == alike.similarity.shape and np.median(alike.agreement) == 1


def test_agreement_is_the_share_of_the_surroundings_that_go_along() -> None:
    grid = (12, 12)
    same = np.arange(144)
    cells = np.array([0, 6 * 12 + 6])
    np.testing.assert_array_equal(agreement_of(cells, same, grid, grid), [1, 1])
    scattered = same.copy()
    scattered[3 * 12 + 3] = 143  # one of the eight around the second cell, and of the three around the first
    np.testing.assert_allclose(agreement_of(cells, scattered, grid, grid), [2 / 3, 7 / 8])
    assert confidence_of(np.array([0.5, 1], np.float32), 3) == 0.5 and confidence_of(np.empty(0, np.float32), 0) == 0


def test_two_black_images_get_no_masks(engine: Engine) -> None:
    masks = engine.cosegment([EMPTY["black"], EMPTY["white"]], **COARSE)
    assert not any(mask.mask.any() or mask.inlier or mask.confidence for mask in masks)
    assert not masks.clustering.tried_k and all("featureless" in str(mask.why_empty) for mask in masks)
    parts = engine.segment_parts([EMPTY["black"]], **COARSE)
    assert parts.num_parts == 0 and (parts[0].labels == -1).all() and parts[0].why_empty is not None


def test_an_empty_image_takes_no_part(engine: Engine, photos: dict[str, NDArray[np.uint8]], tmp_path: Path) -> None:
    some = [photos["cat"], photos["ibex"]]
    mixed = [photos["cat"], EMPTY["black"], photos["ibex"]]
    for remove in (False, True):
        options = COARSE | {"remove_outliers": remove, "outlier_threshold": -1.0}
        alone, masks = engine.cosegment(some, **options), engine.cosegment(mixed, **options)
        for one, other in zip(alone, (masks[0], masks[2]), strict=True):
            np.testing.assert_array_equal(one.mask, other.mask)
            assert one.confidence == other.confidence and one.confidence > 0.6
        assert not masks[1].mask.any() and masks[1].confidence == 0
    few = {"sample_interval": 5, "num_parts": 2, "flip_augmentation": True, "refine": "none"}
    alone_parts, parts = (engine.segment_parts(images, load_size=112, **few) for images in (some, mixed))
    np.testing.assert_array_equal(alone_parts[1].labels, parts[2].labels)
    assert (parts[1].labels == -1).all() and parts[0].confidence > 0.6
    pytest.importorskip("zarr", reason="the extra cpu is not complete")
    store = engine.extract(mixed, tmp_path / "store", load_size=112, saliency="low_resolution")
    stored = engine.cosegment(store, sample_interval=10)
    assert [mask.why_empty for mask in stored] == [mask.why_empty for mask in masks]
    np.testing.assert_array_equal(stored[2].mask, masks[2].mask)


def test_noise_is_doubtful(engine: Engine) -> None:
    assert all(mask.confidence < 0.5 for mask in engine.cosegment(NOISE, **COARSE))


def test_a_model_finds_nothing_in_an_empty_frame(engine: Engine, photos: dict[str, NDArray[np.uint8]]) -> None:
    features = engine.encode([photos["cat"], photos["ibex"]], load_size=112)
    model = learn_cosegmentation(engine, features, sample_interval=10)
    assert engine.apply(model, features[0]).mask.any()
    assert not engine.apply(model, EMPTY["black"]).mask.any()
    parts = learn_parts(engine, features, sample_interval=5, num_parts=2)
    assert (engine.apply(parts, EMPTY["gradient"]).labels == -1).all()


def test_contrast_is_that_of_the_means() -> None:
    saliency = np.array([0.9, 0.3, 0.1, 0.1], np.float32)
    assert contrast(saliency, np.array([True, True, False, False])) == pytest.approx(0.5 / 0.7)
    assert contrast(saliency, np.array([False, False, True, True])) == 0
    assert contrast(saliency, np.ones(4, np.bool_)) == contrast(saliency, np.zeros(4, np.bool_)) == 0
