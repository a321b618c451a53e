from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers_discovery import MANIFEST, make_features
from numpy.typing import NDArray

from facetrt.engine.images.geometry import Geometry
from facetrt.engine.tasks.discovery.attention import attention_facets, cls_attention, per_head
from facetrt.engine.tasks.discovery.dino_seg import DinoSeg, _published_component, heaviest
from facetrt.engine.tasks.discovery.grid import boxes_of
from facetrt.engine.tasks.discovery.method import Scene
from facetrt.kernels.errors import InputError

Golden = dict[str, NDArray[Any]]


def test_masks_and_boxes_of_all_heads_are_the_published_ones(objects: Golden) -> None:
    masks, boxes = (objects[f"dinoseg.dino_vits16.chelsea.{name}"] for name in ("masks", "boxes"))
    grid = masks.shape[1:]
    geometry = Geometry((grid[0] * 16, grid[1] * 16), (grid[0] * 16, grid[1] * 16), 16, 16)
    attention = objects["pad.dino_vits16.chelsea.cls_attention"][:, 1:].reshape(-1, *grid)
    for head, mask, box in zip(attention, masks, boxes, strict=True):
        kept = heaviest(head, 0.6)
        np.testing.assert_array_equal(kept, mask)
        np.testing.assert_array_equal(boxes_of(_published_component(kept)[None], geometry)[0], box)


def test_attention_of_each_head_follows_from_query_and_keys() -> None:
    random = np.random.default_rng(0)
    heads, width = MANIFEST.architecture.heads, MANIFEST.architecture.dim
    query, keys = random.normal(size=(1 + 6, width)), random.normal(size=(1 + 6, width))
    features = make_features({"query@3": query, "key@3": keys}, Geometry((16, 24), (16, 24), 8, 8))
    found = cls_attention(features, MANIFEST)
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        logits = keys[:, part] @ query[0, part] / (width // heads) ** 0.5
        np.testing.assert_allclose(found[head], np.exp(logits) / np.exp(logits).sum(), atol=1e-6)


def test_the_last_piece_is_overlooked_as_published_only() -> None:
    mask = np.zeros((4, 6), np.bool_)
    mask[0, 0] = mask[2:, 2:5] = True
    assert _published_component(mask).sum() == 1
    assert np.array_equal(_published_component(mask & (np.arange(6) > 1)), ~(mask & (np.arange(6) > 1)))
    grid, width = (4, 6), MANIFEST.architecture.dim
    keys, query = np.zeros((25, width)), np.zeros((25, width))
    query[0] = 1
    keys[1:][mask.ravel()] = 3
    features = make_features({"query@3": query, "key@3": keys}, Geometry((32, 48), (32, 48), 8, 8))
    scene = Scene(features, [features["key@3"]], features["key@3"], "key@3", MANIFEST)
    assert DinoSeg(head=0, mass=0.95).find(scene).cells.sum() == 6
    assert DinoSeg(head=0, mass=0.95, published=True).find(scene).cells.sum() == 1
    assert DinoSeg(head=0).find(scene).maps["attention"].shape == (MANIFEST.architecture.heads, *grid)


def test_what_the_bundle_lacks_is_named() -> None:
    without = replace(MANIFEST, facets=["key@3"])
    with pytest.raises(InputError, match="query@3 was not exported"):
        attention_facets(without)
    with pytest.raises(InputError, match="head=9: this bundle has heads 0 to 5"):
        DinoSeg(head=9).facets(MANIFEST)
    with pytest.raises(InputError, match="96 channels: expected the 144"):
        per_head(np.zeros((3, 96), np.float32), MANIFEST)
