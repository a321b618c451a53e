from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import PAPER_COSEGMENT, Engine, Features, InputError, Refinement, cluster_elbow
from facetrt.engine.features.collection import LazySequence
from facetrt.engine.tasks.descriptors import normalise
from facetrt.engine.tasks.masks import bilateral_mask
from facetrt.engine.tasks.refinement import enlarge_mask, grabcut
from facetrt.kernels import assign, kmeans, parallel


@pytest.fixture(scope="module")
def features(tiny_engine: Engine) -> list[Features]:
    """Three encoded images whose central disc is made salient by hand."""
    found = tiny_engine.encode([photo(64, 72, seed) for seed in range(3)], load_size=None)
    y, x = np.indices(found[0].grid)
    disc = ((y - y.mean()) ** 2 + (x - x.mean()) ** 2 < 16).astype(np.float32)
    return [replace(item, attention=disc + 0.001 * y) for item in found]


def test_masks_have_the_documented_shapes(tiny_engine: Engine, features: list[Features]) -> None:
    masks = tiny_engine.cosegment(features, sample_interval=5, saliency_threshold=0.3)
    assert len(masks) == 3 and [m.name for m in masks] == ["image 0", "image 1", "image 2"]
    for mask, item in zip(masks, features, strict=True):
        assert mask.cells.shape == mask.labels.shape == item.grid
        assert mask.loaded_mask.shape == item.image_size and mask.mask.shape == item.original_size
        assert mask.mask.dtype == np.bool_
        np.testing.assert_array_equal(mask.cells, np.isin(mask.labels, mask.salient_labels))
    assert masks.clustering.tried_k == list(range(1, len(masks.clustering.objectives) + 1))
    assert masks[:2] == [masks[0], masks[1]]


def test_elbow_uses_the_clustering_that_stopped_it(features: list[Features]) -> None:
    rows = [normalise(item["key@2"]) for item in features]
    found = cluster_elbow(rows, elbow=0.8, sample_interval=3)
    ratios = np.array(found.objectives[1:]) / found.objectives[:-1]
    assert (ratios[:-1] <= 0.8).all() and (ratios[-1] > 0.8 or len(found.tried_k) == 14)
    samples = np.concatenate([r[::3] for r in rows])
    expected = kmeans(samples, found.tried_k[-1])
    np.testing.assert_array_equal(found.centroids, expected.centroids)
    np.testing.assert_array_equal(found.labels[1], assign(rows[1], expected.centroids).labels)


def test_lazy_descriptors_are_read_twice_and_cluster_alike(features: list[Features]) -> None:
    rows = [normalise(item["key@2"]) for item in features]
    reads = []

    def read(number: int) -> np.ndarray:
        reads.append(number)
        return rows[number]

    lazy = cluster_elbow(LazySequence(3, read), elbow=0.9, sample_interval=3)
    assert sorted(reads) == [0, 0, 1, 1, 2, 2]  # for the samples, and for all k together
    held = cluster_elbow(rows, elbow=0.9, sample_interval=3)
    assert lazy.tried_k == held.tried_k and 1 < len(held.tried_k) < 14
    np.testing.assert_allclose(lazy.objectives, held.objectives, rtol=1e-6)
    np.testing.assert_array_equal(lazy.centroids, held.centroids)
    for a, b in zip(lazy.labels, held.labels, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.int64


@pytest.mark.parametrize("refine", ["grabcut", "crf", "bilateral"])
def test_threads_change_nothing(
    tiny_engine: Engine, features: list[Features], monkeypatch: pytest.MonkeyPatch, refine: str
) -> None:
    many = features * 3
    results = []
    for count in (1, 4):
        monkeypatch.setattr(parallel, "processors", lambda count=count: count)
        results.append(tiny_engine.cosegment(many, sample_interval=5, saliency_threshold=0.3, refine=refine))
    for a, b, item in zip(*results, many, strict=True):
        assert a.refinement is Refinement(refine) and a.name == b.name == item.name
        np.testing.assert_array_equal(a.loaded_mask, b.loaded_mask)
        if refine == "grabcut":
            np.testing.assert_array_equal(a.loaded_mask, grabcut(item.pixels, enlarge_mask(a.cells, item.image_size)))
        if refine == "bilateral":
            solved = bilateral_mask(item.pixels, enlarge_mask(a.cells, item.image_size))[0]
            np.testing.assert_array_equal(a.loaded_mask, solved)


def test_progress_counts_encoding_and_then_refinement(tiny_engine: Engine) -> None:
    calls: list[tuple[int, int | None]] = []
    images = [photo(64, 72, seed) for seed in range(3)]
    tiny_engine.cosegment(images, load_size=None, sample_interval=5, progress=lambda *done: calls.append(done))
    assert calls[-4:] == [(3, 3), (1, 3), (2, 3), (3, 3)]


def test_an_error_while_refining_reaches_the_caller(
    tiny_engine: Engine, features: list[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("facetrt.engine.tasks.cosegmentation.grabcut", fail)
    with pytest.raises(MemoryError, match="too large"):
        tiny_engine.cosegment(features, sample_interval=5, saliency_threshold=0.3)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("facetrt_")]


def test_too_few_descriptors(tiny_engine: Engine) -> None:
    tiny = [photo(16, 16, seed) for seed in range(2)]
    with pytest.raises(InputError, match="the images give 2 sampled descriptors, too few for 3 clusters"):
        tiny_engine.cosegment(tiny, load_size=8, saliency="full", elbow=10.0 - 9.9999)


def test_outliers_are_left_out_and_results_stay_in_place(tiny_engine: Engine, features: list[Features]) -> None:
    odd = features[1]
    flipped = {name: -rows if name == "key@2" else rows for name, rows in odd.tokens.items()}
    group = [features[0], replace(odd, tokens=flipped), features[2]]
    masks = tiny_engine.cosegment(group, remove_outliers=True, sample_interval=5, saliency_threshold=0.3)
    assert [m.inlier for m in masks] == [True, False, True]
    assert not masks[1].mask.any() and (masks[1].labels == -1).all() and masks[1].mask.shape == (64, 72)
    assert masks.inlier_similarity is not None and masks.inlier_similarity[1] < 0 < masks.inlier_similarity[0]
    without = tiny_engine.cosegment([features[0], features[2]], sample_interval=5, saliency_threshold=0.3)
    np.testing.assert_array_equal(masks[2].loaded_mask, without[1].loaded_mask)
    with pytest.raises(InputError, match="leaves 0 of 3 images"):
        tiny_engine.cosegment(group, remove_outliers=True, outlier_threshold=1.1)


def test_zero_foreground_gives_empty_masks(tiny_engine: Engine, features: list[Features]) -> None:
    masks = tiny_engine.cosegment(features, sample_interval=5, saliency_threshold=2.0)
    assert all(not m.mask.any() and m.refinement is Refinement.NONE for m in masks)


def test_a_crf_refines_as_well(tiny_engine: Engine, features: list[Features]) -> None:
    options = {"sample_interval": 5, "saliency_threshold": 0.3}
    plain = tiny_engine.cosegment(features, **options, refine="none")
    smooth = tiny_engine.cosegment(features, **options, refine="crf")
    for a, b in zip(plain, smooth, strict=True):
        assert a.refinement is Refinement.NONE and b.refinement is Refinement.CRF
        np.testing.assert_array_equal(a.cells, b.cells)
        assert 0.5 < (a.loaded_mask == b.loaded_mask).mean() < 1
    pytest.importorskip("pydensecrf", reason="the extra 'crf' is not installed")
    for a, b in zip(smooth, tiny_engine.cosegment(features, **options, refine="pydensecrf"), strict=True):
        assert (a.loaded_mask == b.loaded_mask).mean() >= 0.99


def test_repeated_runs_are_equal(tiny_engine: Engine, features: list[Features]) -> None:
    first, second = (tiny_engine.cosegment(features, sample_interval=5, saliency_threshold=0.3) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.loaded_mask, b.loaded_mask)


def test_saliency_modes(tiny_engine: Engine) -> None:
    images = [photo(64, 72, seed) for seed in range(2)]
    encoded = tiny_engine.encode(images, load_size=None)
    with pytest.raises(InputError, match="have full saliency and low_resolution was asked"):
        tiny_engine.cosegment(encoded, saliency="low_resolution", sample_interval=5)
    low = tiny_engine.encode(images, load_size=None, saliency="low_resolution")
    by_images = tiny_engine.cosegment(images, load_size=None, sample_interval=5)
    by_features = tiny_engine.cosegment(low, sample_interval=5)
    for a, b in zip(by_images, by_features, strict=True):
        np.testing.assert_array_equal(a.loaded_mask, b.loaded_mask)


def test_bad_options(tiny_engine: Engine, features: list[Features]) -> None:
    with pytest.raises(InputError, match="needs at least 2"):
        tiny_engine.cosegment([photo(40, 40)])
    with pytest.raises(InputError, match="expected one of grabcut, crf, pydensecrf, bilateral, none"):
        tiny_engine.cosegment(features, refine="magic")
    for name, value in (("elbow", np.nan), ("elbow", 0), ("saliency_threshold", np.inf), ("outlier_threshold", np.nan)):
        with pytest.raises(InputError, match=name):
            tiny_engine.cosegment(features, **{name: value})
    with pytest.raises(InputError, match="sample_interval=0"):
        tiny_engine.cosegment(features, sample_interval=0)
    with pytest.raises(InputError, match="votes_percentage=120"):
        tiny_engine.cosegment(features, votes_percentage=120)


def test_the_papers_preset_is_accepted(tiny_engine: Engine) -> None:
    assert PAPER_COSEGMENT["load_size"] == 320
    options = {**PAPER_COSEGMENT, "load_size": 64}
    assert len(tiny_engine.cosegment([photo(64, 64), photo(64, 64, 1)], sample_interval=5, **options)) == 2


def test_enlarging_follows_pillow_at_ties() -> None:
    mask = np.zeros((20, 1), np.bool_)
    mask[9] = True
    assert enlarge_mask(mask, (79, 1))[39, 0]  # the closed form would pick cell 10


def test_grabcut_follows_colour_edges_and_knows_its_limits() -> None:
    pixels = np.full((60, 60, 3), 40, np.uint8)
    pixels[20:40, 20:40] = (220, 80, 60)
    pixels += np.random.default_rng(0).integers(0, 12, pixels.shape, np.uint8)
    coarse = np.zeros((60, 60), np.bool_)
    coarse[18:42, 18:42] = True  # the band of 3 pixels on both sides of its border is free to move
    refined = grabcut(pixels, coarse)
    assert refined is not None
    truth = np.zeros_like(coarse)
    truth[20:40, 20:40] = True
    assert (refined & truth).sum() / (refined | truth).sum() > 0.95
    assert grabcut(pixels, np.ones_like(coarse)) is None
