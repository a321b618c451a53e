from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers_discovery import MANIFEST, make_features, make_scene, two_sides
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.resampling import bilinear
from facetrt.engine.tasks.discovery.method import Scene
from facetrt.engine.tasks.discovery.segmenter import Decoded
from facetrt.engine.tasks.discovery.selfmask import SelfMask, vote
from facetrt.kernels.affinity import StretchedGraph
from facetrt.kernels.eigenvectors import smallest_eigenvectors
from facetrt.kernels.errors import InputError
from facetrt.kernels.partition import partition

Golden = dict[str, NDArray[Any]]


def test_eigenvectors_and_clusters_are_the_exact_ones(objects: Golden) -> None:
    rows, expected = objects["struct.pad.chelsea.features"], "selfmask.struct.chelsea."
    large = bilinear(rows.reshape(13, 19, -1).transpose(2, 0, 1), (26, 38), corners=True)
    found = smallest_eigenvectors(StretchedGraph(large.reshape(len(large), -1).T.copy()), 4)
    for own, vector in zip(found.vectors.T, objects[f"{expected}eigenvectors_exact"], strict=True):
        np.testing.assert_allclose(own * np.sign(own @ vector), vector, atol=1e-5 * np.abs(vector).max())
    for count in (2, 3, 4):
        labels, _ = partition(found.vectors[:, :count], count)
        assert adjusted_rand_score(labels, objects[f"{expected}k{count}.labels_exact"].ravel()) > 0.99


@pytest.mark.parametrize("case", ["chelsea", "all_filtered"])
def test_votes_are_the_published_ones(objects: Golden, case: str) -> None:
    expected = f"selfmask.vote.{case}."
    kept, scores = vote(objects[f"{expected}candidates"])
    np.testing.assert_array_equal(kept, objects[f"{expected}kept"])
    np.testing.assert_allclose(scores, objects[f"{expected}scores"], atol=1e-6)
    assert kept[scores.argmax()] == objects[f"{expected}winner"]


def test_clusters_vote_for_the_object() -> None:
    grid = (12, 14)
    found = SelfMask(generator="voting").find(make_scene(two_sides(grid, np.s_[4:9, 4:10]), grid))
    inside = np.zeros((96, 112), np.bool_)
    inside[32:72, 32:80] = True
    assert (found.loaded_masks[0] & inside).sum() / (found.loaded_masks[0] | inside).sum() > 0.8
    assert found.facts["candidates"] == 9 and found.scores is not None and 0 < found.scores[0] <= 1


class Likeliest:
    """A segmenter whose second query is the likeliest, and asks for the first channel."""

    width = MANIFEST.architecture.dim

    def decode(self, tokens: NDArray[np.float32]) -> Decoded:
        queries = np.zeros((2, self.width), np.float32)
        queries[1, 0] = 1
        return Decoded(queries, np.array([0.1, 0.9], np.float32))


def test_the_segmenters_likeliest_query_makes_the_mask() -> None:
    grid, manifest = (4, 5), replace(MANIFEST, facets=["normed@3"])
    tokens = np.zeros((21, Likeliest.width))
    tokens[1:, 0] = -9
    tokens[1:, 0].reshape(grid)[1:3, 1:4] = 9
    features = make_features({"normed@3": tokens}, Geometry((30, 38), (32, 40), 8, 8, (30, 38)))
    scene = Scene(features, [features["normed@3"]], features["normed@3"], "normed@3", manifest, Likeliest())  # type: ignore[arg-type]
    found = SelfMask().find(scene)
    assert found.facts["query"] == 1 and found.scores == pytest.approx([0.9])
    assert found.soft is not None and found.soft[0, 12, 20] > 0.99 and found.soft[0, 2, 2] < 0.01
    assert found.boxes[0].tolist() == [8, 8, 32, 24]
    assert SelfMask().facet(manifest) == "normed@3"


def test_what_is_missing_is_named() -> None:
    scene = make_scene(np.ones((4, 4)), (2, 2))
    with pytest.raises(InputError, match="holds no segmenter"):
        SelfMask(generator="segmenter").find(scene)
    assert SelfMask(generator="voting").find(make_scene(np.ones((1, 4)), (1, 1))).why_empty is not None
