"""Mask propagation frame by frame: the protocol's rules, what is kept and refused, and that objects are followed."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import photo
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine import Engine, Features, Geometry, InputError, MaskPropagator, Provenance, SaliencyMode
from facetrt.engine.video.propagation import enlarge_labels, one_hot, reduce_labels
from facetrt.kernels.propagate import propagate

SIZE = (64, 96)


@pytest.fixture(scope="module")
def builtin() -> Iterator[Engine]:
    with Engine.open("builtin", threads=1) as engine:
        yield engine


def scene(i: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Two textured squares that move apart over a smooth background, and their labels 3 and 40."""
    pixels, labels = photo(*SIZE, seed=9) // 2, np.zeros(SIZE, np.int64)
    for label, (top, left) in ((3, (6 + 2 * i, 12 + 4 * i)), (40, (34, 60 - 4 * i))):
        texture = photo(24, 24, seed=label)
        pixels[top:, left:][:24, :24], labels[top:, left:][:24, :24] = texture, label
    return pixels, labels


def made(rows: NDArray[np.floating], *, sha: str = "a" * 64, original: tuple[int, int] = (32, 40)) -> Features:
    """Features ``(grid_h, grid_w, C)`` of a frame that is 32 × 40 pixels when loaded."""
    tokens = np.concatenate([np.zeros((1, rows.shape[2])), rows.reshape(-1, rows.shape[2])]).astype(np.float32)
    return Features(
        tokens={"key@0": tokens},
        attention=None,
        saliency_mode=SaliencyMode.FULL,
        geometry=Geometry(original, (32, 40), 8, 8),
        pixels=np.zeros((32, 40, 3), np.uint8),
        name="frame",
        provenance=Provenance("made", sha, "none", "cpu", "fp32"),
    )


def random_frames(count: int, seed: int = 0) -> list[Features]:
    rng = np.random.default_rng(seed)
    return [made(rng.standard_normal((4, 5, 6))) for _ in range(count)]


LABELS = np.repeat([0, 0, 1, 2], 8)[:, None] + np.zeros((1, 40), int)  # (32, 40): rows of 0, 1 and 2


def test_the_first_frame_and_the_last_few_are_listened_to() -> None:
    frames, options = random_frames(6), {"radius": 1, "topk": 3, "temperature": 0.2}
    propagator = MaskPropagator("key@0", queue=2, **options)  # type: ignore[arg-type]
    propagator.start(frames[0], LABELS)
    seen = [(frames[0].map("key@0"), one_hot(reduce_labels(LABELS, (4, 5)), 3))]
    for frame in frames[1:]:
        context = [seen[0], *seen[1:][-2:]]
        soft = propagate(frame.map("key@0"), [c[0] for c in context], [c[1] for c in context], **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(propagator.step(frame), enlarge_labels(soft, (32, 40), (32, 40)))
        seen.append((frame.map("key@0"), soft))
    assert len(np.unique([s[1] for s in seen[1:]])) > 3  # soft labels, not decisions, are handed on


def test_identical_frames_keep_the_first_mask(builtin: Engine) -> None:
    pixels, labels = scene(1)
    frame = builtin.encode([pixels], load_size=None)[0]
    propagator = builtin.propagator()
    propagator.start(frame, labels)
    found = [propagator.step(frame) for _ in range(6)]
    assert found[0].dtype == np.int64 and min((item == labels).mean() for item in found) > 0.94
    for label in (3, 40):  # at cells of 8 pixels; and it does not wear off
        overlaps = [iou(item == label, labels == label) for item in found]
        assert min(overlaps) > 0.74 and overlaps[-1] > overlaps[0] - 0.02


def test_moving_squares_are_followed_under_their_own_labels(builtin: Engine) -> None:
    frames = [builtin.encode([scene(i)[0]], load_size=None)[0] for i in range(5)]
    propagator = builtin.propagator()
    assert propagator.facet == builtin.manifest.defaults["propagate"] and propagator.objects == []
    propagator.start(frames[0], scene(0)[1])
    assert propagator.objects == [3, 40]
    found = [propagator.step(frame) for frame in frames[1:]]
    assert set(np.unique(found)) == {0, 3, 40}
    for label in (3, 40):
        last, first, truth = (item == label for item in (found[-1], scene(0)[1], scene(4)[1]))
        assert iou(last, truth) > 0.6 > 0.3 > iou(first, truth)


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_blocks_and_batches_change_nothing(builtin: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, labels = [scene(i)[0] for i in range(4)], scene(0)[1]
    results = []
    for tile, frames in (
        (12, builtin.encode(pictures, load_size=None)),
        (5, [builtin.encode([picture], load_size=None)[0] for picture in pictures]),
    ):
        monkeypatch.setattr(importlib.import_module("facetrt.kernels.propagate"), "TILE", tile)
        propagator = builtin.propagator(radius=4)
        propagator.start(frames[0], labels)
        results.append([propagator.step(frame) for frame in frames[1:]])
    np.testing.assert_array_equal(*results)


def test_nothing_but_copies_of_one_facet_is_kept() -> None:
    propagator = MaskPropagator("key@0", queue=3)
    frames = random_frames(3)
    propagator.start(frames[0], LABELS)
    for frame in frames[1:]:
        propagator.step(frame)
    arrays = [weakref.ref(frame.tokens["key@0"]) for frame in frames]
    frames.clear()
    del frame
    assert [array() for array in arrays] == [None] * 3


def test_start_begins_anew() -> None:
    frames = random_frames(4)
    used, fresh = MaskPropagator("key@0"), MaskPropagator("key@0")
    used.start(frames[3], LABELS)
    used.step(frames[2])
    for propagator in (used, fresh):
        propagator.start(frames[0], LABELS == 2)
    np.testing.assert_array_equal(used.step(frames[1]), fresh.step(frames[1]))
    assert used.objects == [1]


def test_an_object_that_fills_the_frame_is_not_background() -> None:
    everything = MaskPropagator("key@0")
    frames = random_frames(2)
    everything.start(frames[0], np.full((32, 40), 7))
    assert (everything.step(frames[1]) == 7).all()


def test_labels_come_at_the_original_size() -> None:
    frames = [replace(item, geometry=replace(item.geometry, original_size=(70, 81))) for item in random_frames(2)]
    propagator = MaskPropagator("key@0")
    propagator.start(frames[0], np.pad(LABELS, ((0, 38), (0, 41)), mode="edge").astype(np.uint8))
    assert propagator.step(frames[1]).shape == (70, 81)


def test_labels_are_reduced_by_pillows_rule_and_encoded() -> None:
    labels = np.arange(23 * 6).reshape(23, 6) % 3
    expected = Image.fromarray(labels.astype(np.uint8)).resize((6, 11), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(reduce_labels(labels, (11, 6)), expected)
    np.testing.assert_array_equal(one_hot(np.array([[0, 2]]), 3), [[[1, 0, 0], [0, 0, 1]]])


def test_soft_labels_are_scaled_per_channel_before_the_largest_wins() -> None:
    soft = np.zeros((2, 4, 2), np.float32)
    soft[..., 0] = [[1, 1, 0.9, 0.9]] * 2
    soft[..., 1] = [[0, 0, 0.1, 0.1]] * 2
    np.testing.assert_array_equal(enlarge_labels(soft, (2, 4), (2, 4)), [[0, 0, 1, 1]] * 2)
    assert enlarge_labels(soft, (16, 32), (10, 21)).shape == (10, 21)
    assert (enlarge_labels(np.ones((2, 2, 1), np.float32), (4, 4), (4, 4)) == 0).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], r"shape \(31, 40\): expected \(32, 40\), .* of frame before loading; as it is shown"),
        (np.dstack([LABELS] * 3), r"shape \(32, 40, 3\): .* not colours"),
        (LABELS.astype(float), "type float64: expected integers"),
        (LABELS - 1, "labels from -1 to 1"),
        (LABELS * (1 << 24), "labels from 0 to 33554432"),
        (LABELS * 0, "shows no object"),
        (np.eye(32, 40, 1, dtype=int), r"0 objects .* are left on the grid of 4×5 cells: .* larger load size"),
    ],
)
def test_first_masks_that_cannot_be(labels: NDArray[Any], message: str) -> None:
    propagator = MaskPropagator("key@0")
    with pytest.raises(InputError, match=message):
        propagator.start(random_frames(1)[0], labels)
    with pytest.raises(InputError, match="step was called before start"):
        propagator.step(random_frames(1)[0])


def test_frames_that_do_not_fit_the_first() -> None:
    first, second = random_frames(2)
    propagator = MaskPropagator("key@0")
    propagator.start(first, LABELS)
    wide = replace(second, geometry=replace(second.geometry, original_size=(64, 80)))
    with pytest.raises(InputError, match=r"has 80×64 pixels .* and the first frame 40×32 .*: all frames .* call start"):
        propagator.step(wide)
    foreign = replace(second, provenance=replace(second.provenance, encoder_sha256="b" * 64))
    with pytest.raises(InputError, match="encoded by another bundle"):
        propagator.step(foreign)
    with pytest.raises(InputError, match="value@0 was not exported: this bundle has key@0"):
        MaskPropagator("value@0").start(first, LABELS)
    damaged = made(np.full((4, 5, 6), np.nan))
    with pytest.raises(InputError, match="NaN"):
        propagator.step(damaged)
    np.testing.assert_array_equal(propagator.step(first).shape, (32, 40))  # a refused frame leaves nothing behind
    with pytest.raises(InputError, match="frame has NaN"):
        propagator.start(damaged, LABELS)


def test_a_radius_beyond_the_grid_takes_no_more_memory() -> None:
    frames, found = random_frames(4), []
    for radius in (5, 10**6):
        propagator = MaskPropagator("key@0", radius=radius)
        propagator.start(frames[0], LABELS)
        found.append([propagator.step(frame) for frame in frames[1:]])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    "option", [{"queue": -1}, {"radius": -1}, {"topk": 0}, {"temperature": 0}, {"temperature": float("nan")}]
)
def test_options_out_of_range(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        MaskPropagator("key@0", **option)
