"""Part co-segmentation against a step-by-step reading of the specification (§10), written independently."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HERE, photo
from PIL import Image

from facetrt.engine import Engine, Features, InputError, MissingDependencyError
from facetrt.engine.images.resampling import torch_nearest
from facetrt.engine.tasks.augmentation import augment, crop_size
from facetrt.engine.tasks.parts import PartsOptions, segment_parts_features
from facetrt.engine.tasks.refinement import Refinement
from facetrt.kernels import dense_crf, parallel
from facetrt.kernels.kmeans import kmeans_reference
from facetrt.kernels.nearest import corner_indices


@pytest.fixture(scope="module")
def features(tiny_engine: Engine) -> list[Features]:
    """Three encoded images whose central disc is made salient by hand."""
    found = tiny_engine.encode([photo(64, 72, seed) for seed in range(3)], load_size=None)
    y, x = np.indices(found[0].grid)
    disc = ((y - y.mean()) ** 2 + (x - x.mean()) ** 2 < 25).astype(np.float32)
    return [replace(item, attention=disc + 0.001 * y) for item in found]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


def nearest(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distances = ((rows[:, None] - centroids) ** 2).sum(axis=2)
    return distances.argmin(axis=1), distances


def cluster(rows: list[np.ndarray], interval: int, parts: int) -> np.ndarray:
    return kmeans_reference(np.concatenate([r[::interval] for r in rows]).astype(np.float32), parts).centroids


def elbow(rows: list[np.ndarray], interval: int, factor: float) -> np.ndarray:
    samples, everything = np.concatenate([r[::interval] for r in rows]), np.concatenate(rows)
    errors: list[float] = []
    for k in range(1, 15):
        centroids = kmeans_reference(samples.astype(np.float32), k, iterations=40).centroids
        errors.append(nearest(everything, centroids)[1].min(axis=1).mean())
        if k > 1 and errors[-1] > factor * errors[-2]:
            break
    return centroids


def specification(
    features: list[Features], augmented: list[Features], facet: str, parts: int, interval: int, threshold: float,
    *, three_stages: bool, smooth: Any, percentage: float = 75,
) -> list[np.ndarray]:  # fmt: skip
    """§10.2 to §10.5 one step after the other; -1 is background."""
    everything = features + augmented
    rows = [unit(item[facet]) for item in everything]
    stage1 = elbow(rows, interval, 0.975)
    labels = [nearest(r, stage1)[0] for r in rows]
    votes = np.zeros(len(stage1))
    for item, own in zip(features, labels, strict=False):
        for k in range(len(stage1)):
            members = item.saliency.ravel()[own == k]
            votes[k] += members.size > 0 and members.mean() > threshold
    salient = [k for k in range(len(stage1)) if votes[k] >= np.ceil(len(features) * percentage / 100)]
    background = np.array([c for k, c in enumerate(stage1) if k not in salient])
    chosen = [r[np.isin(own, salient)] for r, own in zip(rows, labels, strict=True)]

    def segment(item: Features, r: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        energies = np.column_stack([nearest(r, centroids)[1], nearest(r, background)[1].min(axis=1)])
        energies -= energies.max(axis=1, keepdims=True)
        maps = torch.from_numpy(energies.T.reshape(-1, *item.grid))[None]
        large = torch.nn.Upsample(size=item.image_size)(maps)[0].numpy()
        result = smooth(item.pixels, large.astype(np.float32)).argmax(axis=0).astype(float)
        result[result == len(centroids)] = np.nan
        return result

    if not three_stages:
        centroids = cluster(chosen, interval, parts)
    else:
        second = elbow(chosen, interval, 0.94)
        maps = [torch.from_numpy(segment(item, r, second)) for item, r in zip(everything, rows, strict=True)]
        shrink = torch.nn.functional.interpolate
        small = [
            shrink(m[None, None], size=item.grid, mode="nearest")[0, 0].numpy()
            for item, m in zip(everything, maps, strict=True)
        ]
        common = [k for k in range(len(second)) if all((s == k).any() for s in small[: len(features)])]
        if not common:
            return [np.full(item.image_size, -1) for item in features]
        chosen = [r[np.isin(s.ravel(), common)] for r, s in zip(rows, small, strict=True)]
        uncommon = [c for k, c in enumerate(second) if k not in common]
        background = np.concatenate([background, uncommon]) if uncommon else background
        centroids = cluster(chosen, interval, parts)
    maps = [segment(item, r, centroids) for item, r in zip(features, rows, strict=False)]
    return [np.nan_to_num(m, nan=-1).astype(int) for m in maps]


def same_up_to_names(got: np.ndarray, expected: np.ndarray) -> float:
    """Share of equal labels after the best renaming of parts; background keeps its name."""
    renamed = np.full(got.max() + 2, -1)
    for k in range(got.max() + 1):
        own = expected[(got == k) & (expected >= 0)]
        renamed[k] = np.bincount(own).argmax() if own.size else -2
    return float((np.where(got < 0, -1, renamed[got]) == expected).mean())


@pytest.mark.parametrize("three_stages", [False, True])
@pytest.mark.parametrize("with_augmentations", [False, True])
def test_stages_equal_the_specification(
    tiny_engine: Engine, features: list[Features], three_stages: bool, with_augmentations: bool
) -> None:
    augmented: list[Features] = []
    if with_augmentations:
        random = np.random.default_rng(1)
        views = [view for item in features for view in augment(item.pixels, 1, flip=True, random=random)]
        augmented = tiny_engine.encode(views, load_size=64)
    options = PartsOptions("key@2", num_parts=3, sample_interval=5, saliency_threshold=0.4, three_stages=three_stages)
    found = segment_parts_features(features, options, augmented)
    expected = specification(features, augmented, "key@2", 3, 5, 0.4, three_stages=three_stages, smooth=dense_crf)
    got = np.concatenate([part.loaded_labels.ravel() for part in found])
    assert len(found) == 3 and (got >= 0).any() and (got < 0).any()
    assert same_up_to_names(got, np.concatenate([e.ravel() for e in expected])) >= 0.995


@pytest.mark.parametrize("three_stages", [False, True])
def test_the_golden_images(golden_vits8: Engine, three_stages: bool) -> None:
    """ViT-S/8-sized descriptors of two photographs, with a central saliency; labels against the specification."""
    images = [np.asarray(Image.open(HERE / "golden" / f"{name}98.png")) for name in ("chelsea", "cat")]
    found = []
    for item in golden_vits8.encode(images, load_size=None):
        y, x = np.indices(item.grid)
        found.append(replace(item, attention=(np.hypot(y - y.mean(), x - x.mean()) < 7).astype(np.float32) + 0.001 * y))
    # untrained descriptors cluster by image: one vote of two must do
    options = PartsOptions(
        "key@11",
        num_parts=3,
        sample_interval=10,
        saliency_threshold=0.25,
        votes_percentage=50,
        three_stages=three_stages,
    )
    got = segment_parts_features(found, options)
    expected = specification(
        found, [], "key@11", 3, 10, 0.25, three_stages=three_stages, smooth=dense_crf, percentage=50
    )
    labels = np.concatenate([part.loaded_labels.ravel() for part in got])
    assert (labels < 0).any()
    assert same_up_to_names(labels, np.concatenate([e.ravel() for e in expected])) >= 0.995


def test_shapes_and_original_size(tiny_engine: Engine) -> None:
    parts = tiny_engine.segment_parts(
        [photo(96, 120, i) for i in range(2)], load_size=48, num_parts=2, sample_interval=4, saliency_threshold=0.0
    )
    for part in parts:
        assert part.loaded_labels.shape == (48, 60) and part.labels.shape == (96, 120) and part.cells.shape == (11, 14)
        assert part.labels.min() >= -1 and part.labels.max() < parts.num_parts == 2
        assert part.refinement is Refinement.CRF


def test_repeated_runs_and_both_crfs_agree(tiny_engine: Engine, features: list[Features]) -> None:
    pytest.importorskip("pydensecrf", reason="the extra 'crf' is not installed")
    options = {"num_parts": 3, "sample_interval": 5, "saliency_threshold": 0.4}
    first, again = (tiny_engine.segment_parts(features, **options) for _ in range(2))
    theirs = tiny_engine.segment_parts(features, **options, refine="pydensecrf")
    for a, b, c in zip(first, again, theirs, strict=True):
        np.testing.assert_array_equal(a.loaded_labels, b.loaded_labels)
        assert (a.loaded_labels == c.loaded_labels).mean() >= 0.99


def test_threads_change_nothing_and_progress_counts_every_refinement(
    tiny_engine: Engine, features: list[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PartsOptions("key@2", num_parts=2, sample_interval=5, saliency_threshold=0.4, three_stages=True)
    results = []
    for count in (1, 3):
        calls: list[tuple[int, int]] = []
        monkeypatch.setattr(parallel, "processors", lambda count=count: count)
        results.append(
            segment_parts_features(features, options, progress=lambda *done, calls=calls: calls.append(done))
        )
        assert calls == [(1, 3), (2, 3), (3, 3)] * 2
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.loaded_labels, b.loaded_labels)
        np.testing.assert_array_equal(a.cells, b.cells)
        assert a.name == b.name and (a.cells >= 0).any()


def test_no_foreground_and_no_background(tiny_engine: Engine, features: list[Features]) -> None:
    nothing = tiny_engine.segment_parts(features, sample_interval=5, saliency_threshold=2.0)
    assert nothing.num_parts == 0 and all((part.labels == -1).all() for part in nothing)
    everything = tiny_engine.segment_parts(
        features, sample_interval=5, saliency_threshold=-1.0, votes_percentage=0, num_parts=2
    )
    assert all((part.labels >= 0).all() for part in everything)


def test_parts_that_some_image_lacks_are_dropped(tiny_engine: Engine, features: list[Features]) -> None:
    options = {"sample_interval": 5, "saliency_threshold": 0.4, "num_parts": 2, "three_stages": True}
    alien = replace(features[2], tokens={name: -rows for name, rows in features[2].tokens.items()})
    parts = tiny_engine.segment_parts([features[0], features[1], alien], **options, votes_percentage=60)
    assert parts.common_parts is not None and len(parts.common_parts) == 0
    assert parts.num_parts == 0 and all((part.labels == -1).all() for part in parts)


def test_augmentations_are_seeded_and_never_leave(tiny_engine: Engine) -> None:
    options = {"load_size": 48, "num_parts": 2, "sample_interval": 4, "saliency_threshold": 0.0}
    images = [photo(48, 60, i) for i in range(2)]
    runs = [tiny_engine.segment_parts(images, **options, num_crop_augmentations=2, seed=seed) for seed in (3, 3, 4)]
    assert all(len(run) == 2 for run in runs)
    np.testing.assert_array_equal(runs[0].centroids, runs[1].centroids)
    assert not np.array_equal(runs[0].centroids, runs[2].centroids)


@pytest.mark.parametrize(
    ("load_size", "expected"), [(48, (48, 60)), ((48, 61), (48, 61)), (None, (45, 57)), (40, (40, 49))]
)
def test_augmented_views_are_loaded_as_their_originals(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch, load_size: Any, expected: tuple[int, int]
) -> None:
    seen: list[Features] = []
    original = tiny_engine.encode_iter
    monkeypatch.setattr(tiny_engine, "encode_iter", lambda *a, **k: (seen.append(f) or f for f in original(*a, **k)))
    features = tiny_engine.encode([photo(48, 60)], load_size=load_size, stride=8)
    seen.clear()
    tiny_engine.segment_parts(
        features, num_parts=1, sample_interval=1, num_crop_augmentations=1, saliency_threshold=-1, votes_percentage=0
    )
    assert [item.image_size for item in seen] == [expected] * 2 and {item.stride for item in seen} == {8}


def test_crops_follow_the_specification() -> None:
    assert crop_size((96, 123)) == (91, 116)
    pixels = photo(40, 60)
    views = augment(pixels, 2, flip=True, random=np.random.default_rng(0))
    assert [view.shape[:2] for view in views] == [(40, 60)] + [(38, 57)] * 4
    np.testing.assert_array_equal(views[0], pixels[:, ::-1])


def test_torch_nearest_equals_torch() -> None:
    for n_in in range(1, 60):
        for n_out in (*range(1, 130, 7), 224, 255):
            source = torch.arange(n_in, dtype=torch.float32)[None, None]
            expected = torch.nn.functional.interpolate(source, size=n_out, mode="nearest")[0, 0].numpy()
            np.testing.assert_array_equal(corner_indices(n_in, n_out), expected)
    values = np.arange(24).reshape(2, 3, 4)
    assert torch_nearest(values, (5, 9)).shape == (2, 5, 9)


def test_bad_options(tiny_engine: Engine, features: list[Features], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="num_parts=0"):
        tiny_engine.segment_parts(features, num_parts=0)
    for name, value in (
        ("elbow", np.nan),
        ("elbow", -1),
        ("elbow_second_stage", np.inf),
        ("saliency_threshold", np.nan),
    ):
        with pytest.raises(InputError, match=name):
            tiny_engine.segment_parts(features, **{name: value})
    with pytest.raises(InputError, match="seed=-1"):
        tiny_engine.segment_parts(features, seed=-1)
    with pytest.raises(InputError, match="two labels only"):
        tiny_engine.segment_parts(features, refine="grabcut")
    with pytest.raises(InputError, match="no image"):
        tiny_engine.segment_parts([])
    with pytest.raises(InputError, match="too few for 40 parts"):
        tiny_engine.segment_parts(features, sample_interval=20, num_parts=40, saliency_threshold=0.4)
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf.densecrf", None)
    with pytest.raises(MissingDependencyError, match=r"facetrt\[crf\]"):
        tiny_engine.segment_parts(features, refine="pydensecrf")
