from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_discovery import MANIFEST, make_scene
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import LinearHead, Manifest
from facetrt.engine.tasks.discovery.discovering import Discovery, boxes_on_original
from facetrt.engine.tasks.discovery.found import FoundMethod, apply_head, background_of
from facetrt.engine.tasks.discovery.fusing import Term
from facetrt.engine.tasks.discovery.heads import read_head, write_head
from facetrt.engine.tasks.refinement import Refinement
from facetrt.kernels.errors import BundleError, InputError

Golden = dict[str, NDArray[Any]]
EXPECTED = "found.chelsea.trained."


@pytest.fixture(scope="module")
def head(objects: Golden) -> LinearHead:
    weight, bias = (objects[f"found.head.trained.{name}"] for name in ("weight", "bias"))
    return LinearHead("key@3", [float(value) for value in weight], float(bias[0]), "published")


@pytest.fixture(scope="module")
def scene(objects: Golden, head: LinearHead) -> Any:
    wide = replace(MANIFEST, architecture=replace(MANIFEST.architecture, dim=384), found_head=head)
    made = make_scene(objects["pad.dino_vits8.chelsea.keys"], (13, 19), original=(98, 147), padded=True)
    made.features.pixels[:98, :147] = objects["image.chelsea"]
    return replace(made, manifest=wide)


def test_the_heads_masks_and_box_are_the_published_ones(objects: Golden, head: LinearHead, scene: Any) -> None:
    np.testing.assert_allclose(apply_head(scene.rows, head).reshape(13, 19), objects[f"{EXPECTED}logits"], atol=2e-5)
    multi, single = (FoundMethod(extent=extent).find(scene) for extent in ("multi", "single"))
    geometry = scene.features.geometry
    np.testing.assert_array_equal(geometry.on_picture(multi.loaded_masks[0]), objects[f"{EXPECTED}mask"])
    np.testing.assert_array_equal(geometry.on_picture(single.loaded_masks[0]), objects[f"{EXPECTED}single"])
    np.testing.assert_array_equal(boxes_on_original(single.boxes, geometry)[0], objects[f"{EXPECTED}box"])


@pytest.mark.parametrize("extent", ["single", "multi"])
def test_the_solvers_masks_are_the_published_ones(objects: Golden, scene: Any, extent: str) -> None:
    discovery = Discovery(FoundMethod(extent=extent), (Term("key@3"),), scene.manifest, Refinement.BILATERAL)
    found = discovery.find(scene.features)
    np.testing.assert_array_equal(found.masks[0], objects[f"{EXPECTED}{extent}_solver"])


def test_the_background_is_the_published_one(objects: Golden) -> None:
    expected = "found.struct.chelsea."
    rows = objects["struct.pad.chelsea.features"]
    stage = background_of(rows.reshape(len(rows), 6, -1), objects[f"{expected}attention"])
    np.testing.assert_allclose(stage.weights, objects[f"{expected}head_weight"], rtol=1e-5)
    assert stage.seed == objects[f"{expected}seed"]
    np.testing.assert_allclose(stage.maps["seed_cosine"], objects[f"{expected}seed_cosine"], atol=1e-5)
    np.testing.assert_array_equal(stage.background, objects[f"{expected}background"].ravel())
    plain = background_of(rows.reshape(len(rows), 6, -1), objects[f"{expected}attention"], weighted=False)
    np.testing.assert_array_equal(plain.background, objects[f"{expected}background_unweighted"].ravel())


def test_each_piece_can_be_an_object() -> None:
    rows = np.zeros((20, 144))
    rows[[0, 1, 13, 18]] = 1
    wide = replace(MANIFEST, found_head=LinearHead("key@3", [1.0] * 144, -1.0, "test"))
    scene = replace(make_scene(rows, (4, 5)), manifest=wide)
    found = FoundMethod(extent="each").find(scene)
    assert [int(cells.sum()) for cells in found.cells] == [2, 2]
    assert found.boxes[0].tolist() == [0, 0, 16, 8]
    assert not len(FoundMethod().find(replace(scene, rows=scene.rows * 0)).boxes)


def test_a_head_goes_through_a_file_and_the_manifest(tmp_path: Path) -> None:
    head = LinearHead("value@3-mean", [0.5] * 144, -0.25, "trained")
    write_head(head, tmp_path / "head.json")
    assert read_head(tmp_path / "head.json") == head
    manifest = replace(MANIFEST, found_head=head)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert FoundMethod().facet(manifest) == "value@3-mean"
    assert FoundMethod(head=tmp_path / "head.json").facet(MANIFEST) == "value@3-mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": []}, "0 weights"),
        ({"weight": [float("inf")] * 144}, "finite"),
        ({"facet": "nose"}, "facet 'nose'"),
        ({"bias": "much"}, "found_head.bias"),
    ],
)
def test_what_is_no_head_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    plain = {"facet": "key@3", "weight": [1.0] * 144, "bias": 0.0, "source": "test"}
    (tmp_path / "head.json").write_text(json.dumps({**plain, **change}))
    with pytest.raises(InputError, match=message):
        read_head(tmp_path / "head.json")


def test_heads_that_do_not_fit_are_named() -> None:
    with pytest.raises(BundleError, match="3 weights: expected 144"):
        replace(MANIFEST, found_head=LinearHead("key@3", [1.0] * 3, 0.0, "test"))
    with pytest.raises(InputError, match="takes 3 channels of key@3: these descriptors have 4"):
        apply_head(np.ones((2, 4), np.float32), LinearHead("key@3", [1.0] * 3, 0.0, "test"))
    with pytest.raises(InputError, match="holds no head"):
        FoundMethod(form="head").facet(MANIFEST)
