"""``engine.discover``: what all methods have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo
from numpy.testing import assert_array_equal

from facetrt.engine import Discovery, Engine, FacetrtError, Features, Geometry, InputError, Objects
from facetrt.engine.images.fitting import Fit
from facetrt.engine.tasks.descriptors import normalise
from facetrt.engine.tasks.discovery.catalogue import METHODS, make_method
from facetrt.engine.tasks.discovery.discovering import boxes_on_original
from facetrt.engine.tasks.discovery.fusing import Term, fuse, parse_terms
from facetrt.engine.tasks.discovery.tokencut import TokenCut
from facetrt.kernels.components import extent

SIZE: dict[str, Any] = {"load_size": 72}
NAMES = [name for name in METHODS if name != "maskcut"]  # which has a size of its own
PHOTO = photo(90, 123, 1)


@pytest.fixture(scope="module")
def builtin() -> Iterator[Engine]:
    with Engine.open("builtin", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def features(builtin: Engine) -> Features:
    return builtin.encode([PHOTO], fit="pad", stride=8, **SIZE)[0]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_something_on_the_original_pixels(builtin: Engine, name: str) -> None:
    size = {"load_size": (80, 96)} if name == "maskcut" else SIZE
    found = builtin.discover([PHOTO], name, **size)
    assert len(found) == 1 and isinstance(found[0], Objects) and found[0].method == name
    objects = found[0]
    assert len(objects) > 0 and objects.why_empty is None
    assert objects.masks.shape == (len(objects), 90, 123) and objects.masks.dtype == np.bool_
    assert objects.boxes.shape == (len(objects), 4) and objects.boxes.dtype == np.float64
    assert objects.cells.shape == (len(objects), *objects.geometry.grid)
    assert (objects.boxes >= 0).all() and (objects.boxes[:, 2:] <= (123, 90)).all()
    assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()


@pytest.mark.parametrize("name", ["tokencut", "lost", "spectral", "found", "selfmask"])
def test_a_disc_on_plain_ground_is_found(builtin: Engine, name: str) -> None:
    rows, columns = np.indices((112, 144))
    disc = (rows - 60) ** 2 + (columns - 80) ** 2 < 30**2
    picture = np.where(disc[..., None], (200, 60, 40), (120, 140, 120)) + (rows % 3 * 4)[..., None]
    mask = builtin.discover([picture.astype(np.uint8)], name, load_size=None)[0].masks[0]
    assert (mask & disc).sum() / (mask | disc).sum() > 0.6


@pytest.mark.parametrize("name", NAMES)
def test_features_are_taken_as_they_were_encoded(builtin: Engine, features: Features, name: str) -> None:
    given, encoded = builtin.discover([features], name)[0], builtin.discover([PHOTO], name, fit="pad", **SIZE)[0]
    assert_array_equal(given.masks, encoded.masks)
    assert_array_equal(given.boxes, encoded.boxes)
    assert given.geometry == features.geometry


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_shows_nothing_has_no_objects_and_says_why(builtin: Engine, name: str) -> None:
    flat = np.full((64, 80, 3), 90, np.uint8)
    empty = builtin.discover([flat, PHOTO], name, refine="grabcut", **SIZE)[0]
    assert len(empty) == 0 and "featureless" in (empty.why_empty or "")
    assert empty.masks.shape == (0, 64, 80) and empty.boxes.shape == (0, 4)


def test_images_keep_their_order_and_broken_ones_are_told(builtin: Engine, tmp_path: Path) -> None:
    told: list[str] = []
    images = [photo(64, 80, 2), tmp_path / "nothing.png", PHOTO, photo(72, 72, 3)]

    def broken(image: Any, error: FacetrtError) -> None:
        told.append(str(image))

    found = builtin.discover(images, "lost", on_broken=broken, load_size=None)
    assert [objects.geometry.original_size for objects in found] == [(64, 80), (90, 123), (72, 72)]
    assert told == [str(tmp_path / "nothing.png")]


def test_an_iterator_is_read_as_results_are_asked_for(builtin: Engine) -> None:
    read: list[int] = []

    def endless() -> Iterator[Any]:
        while True:
            read.append(len(read))
            yield PHOTO

    found = builtin.discover_iter(endless(), "lost", **SIZE)
    next(found), next(found)
    found.close()  # type: ignore[attr-defined]
    assert 2 <= len(read) <= 80


@pytest.mark.parametrize("refine", ["grabcut", "crf", "bilateral"])
def test_refined_masks_and_their_boxes_agree(builtin: Engine, refine: str) -> None:
    plain, refined = (builtin.discover([PHOTO], refine=each, **SIZE)[0] for each in ("none", refine))
    assert refined.refinement == refine and len(refined) == 1
    assert tuple(refined.boxes[0]) == extent(refined.masks[0])
    assert (refined.masks != plain.masks).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tokencat"}, "no method 'tokencat': expected one of tokencut, lost"),
        ({"tua": 1}, "no option 'tua' here: expected one of form=box, tau=0.2"),
        ({"tau": 2.0}, "tau=2.0: expected 0 to 1"),
        ({"method": TokenCut(), "tau": 0.3}, "options tau were given with a method that has its own"),
        ({"facet": "key@3", "fuse": "key@3,query@3"}, "exclude each other"),
        ({"facet": "key@1"}, "key@1 was not exported: this bundle has key@3, value@3, query@3"),
        ({"fuse": "key@3,key@3"}, "expected facets joined by"),
        ({"fuse": "0*key@3"}, "is no weight"),
        ({"fit": "stretch"}, "fit 'stretch': expected one of none, crop, pad"),
        ({"refine": "pydensecrf"}, "co-segmentation's"),
        ({"method": "dino-seg", "head": 6}, "this bundle has heads 0 to 5"),
        ({"method": "found", "form": "head"}, "this bundle holds no head of FOUND"),
        ({"method": "selfmask", "generator": "segmenter"}, "this bundle holds no segmenter"),
    ],
)
def test_what_cannot_be_is_an_error(builtin: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        builtin.discover([PHOTO], **{**SIZE, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_size": 64}, "load_size=64 was given with features"),
        ({"fit": "pad"}, "features were given"),
        ({"stride": 8}, "features were given"),
    ],
)
def test_features_are_not_loaded_again(
    builtin: Engine, features: Features, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        builtin.discover([features], **options)


def test_images_and_features_together_are_refused(builtin: Engine, features: Features) -> None:
    with pytest.raises(InputError, match="given together"):
        builtin.discover([features, PHOTO])  # type: ignore[list-item]


def test_features_of_another_bundle_are_refused(tiny_engine: Engine, features: Features) -> None:
    with pytest.raises(InputError, match="come from another bundle"):
        tiny_engine.discover([features])


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_are_not_finite_are_an_error(builtin: Engine, name: str) -> None:
    item = builtin.encode([PHOTO], stride=8, **SIZE)[0]
    for rows in item.tokens.values():
        rows.flags.writeable = True
        rows[3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        builtin.discover([item], name)


@pytest.mark.parametrize(("name", "fit"), [("tokencut", Fit.PAD), ("spectral", Fit.CROP), ("maskcut", Fit.RESIZE)])
def test_images_are_encoded_as_published_unless_one_says_otherwise(builtin: Engine, name: str, fit: Fit) -> None:
    method = make_method(name, {})
    published = method.encoding(builtin.manifest)
    assert published.fit is fit and published.stride == 8
    assert method.encoding(builtin.manifest, 72, "none", 4) == type(published)(72, stride=4)
    assert make_method("tokencut", {"form": "mask"}).fit is Fit.RESIZE


def test_boxes_end_with_the_picture() -> None:
    geometry = Geometry((100, 60), (56, 32), 8, 8, resized=(50, 30))
    boxes = boxes_on_original(np.array([[0.0, 8, 32, 56]]), geometry)
    assert_array_equal(boxes, [[0, 16, 60, 100]])


def test_terms_are_written_as_they_are_read() -> None:
    assert parse_terms("key@3, 2*query@3-mean") == (Term("key@3"), Term("query@3", 2.0, True))
    assert parse_terms(["key@3", "value@3"]) == parse_terms("key@3+value@3")
    assert "+".join(map(str, parse_terms("key@3+0.5*value@3-mean"))) == "key@3+0.5*value@3-mean"


def test_fused_rows_average_cosines(features: Features) -> None:
    terms = parse_terms("key@3+3*query@3-mean")
    parts = [term.rows(features) for term in terms]
    rows = fuse(terms, parts).astype(np.float64)
    units = [normalise(part).astype(np.float64) for part in parts]
    expected = (units[0] @ units[0].T + 3 * (units[1] @ units[1].T)) / 4
    np.testing.assert_allclose(rows @ rows.T, expected, atol=1e-6)
    assert fuse(terms[:1], parts[:1]) is parts[0]
    np.testing.assert_allclose(parts[1].mean(axis=0), 0, atol=1e-4)


def test_a_discovery_is_made_once_and_used_often(builtin: Engine, features: Features) -> None:
    discovery = builtin.discovery("tokencut", fuse="key@3,query@3")
    assert isinstance(discovery, Discovery) and discovery.name == "key@3+query@3"
    first, second = discovery.find(features), discovery.find(features)
    assert first.facet == "key@3+query@3"
    assert_array_equal(first.masks, second.masks)
