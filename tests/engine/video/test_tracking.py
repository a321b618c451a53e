from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cv2
import numpy as np
import pytest
from helpers import photo
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine import Engine, Features, InputError
from facetrt.engine.drawing.tracks import draw_trails
from facetrt.engine.samples import sample_images
from facetrt.engine.video import alignment
from facetrt.engine.video.alignment import Patches, Slopes, align
from facetrt.engine.video.descriptor_maps import DescriptorMap, bilinear
from facetrt.engine.video.searching import Window, find
from facetrt.engine.video.tracking import Tracker, Tracks, grid_points
from facetrt.kernels.best_buddies import cosine_similarity
from facetrt.kernels.log_bin import log_bin

SIZE = (112, 140)  # of a frame, height × width
SCALE = 1.25  # frames are so much larger than they are loaded
Pixels = NDArray[np.uint8]
Matrix = NDArray[np.float64]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.open("builtin", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def still(engine: Engine) -> list[Features]:
    """A clip that moves by a few pixels, for what does not need a long one."""
    frames, _ = moving("astronaut", "shift", count=3)
    return engine.encode(frames, load_size=112)


def moving(name: str, kind: str, count: int = 8) -> tuple[list[Pixels], list[Matrix]]:
    """A still photograph as a video, and the ``(2, 3)`` matrices from points of the first frame to points of each.

    ``shift``: 4 loaded pixels per frame, not whole cells; ``rotate``: 3° per frame; ``zoom``: 2.5 % per frame.
    """
    scene = sample_images()[name]
    height, width = (round(side * SCALE) for side in SIZE)
    grow = max(1.4 * height / scene.height, 1.4 * width / scene.width)
    scene = scene.resize((round(scene.width * grow), round(scene.height * grow)), Image.Resampling.LANCZOS)
    views = []
    for t in range(count):
        turn = np.deg2rad(3 * t) if kind == "rotate" else 0.0
        zoom = 1.025**t if kind == "zoom" else 1.0
        shift = np.array([4.4, 2.4]) * (t - (count - 1) / 2) if kind == "shift" else np.zeros(2)
        linear = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        views.append((linear, np.array([width, height]) / 2 - linear @ (np.array(scene.size) / 2 + shift)))
    frames = [view(np.asarray(scene), linear, move, (width, height)) for linear, move in views]
    first, start = views[0]
    back = [linear @ np.linalg.inv(first) for linear, _ in views]
    return frames, [np.column_stack([b, move - b @ start]) for b, (_, move) in zip(back, views, strict=True)]


def view(scene: Pixels, linear: Matrix, move: Matrix, size: tuple[int, int]) -> Pixels:
    """The part of a scene that points ``linear · (x, y) + move`` show; (0.5, 0.5) is the first pixel's centre."""
    corners = (np.array([[0, 0], [size[0], 0], [0, size[1]], size]) - move) @ np.linalg.inv(linear).T
    assert (corners >= 0).all() and (corners <= scene.shape[1::-1]).all(), "the frame shows more than the photograph"
    matrix = np.column_stack([linear, move + linear @ [0.5, 0.5] - 0.5])
    return np.asarray(cv2.warpAffine(scene, matrix, size, flags=cv2.INTER_LINEAR), np.uint8)


def follow(tracker: Tracker, clip: list[Features], count: int = 16) -> list[Tracks]:
    start = tracker.start(clip[0], grid_points(clip[0], count, tracker.facet))
    return [start, *(tracker.step(features) for features in clip[1:])]


@pytest.mark.parametrize(("kind", "least_visible"), [("shift", 0.9), ("rotate", 0.8), ("zoom", 0.9)])
def test_points_follow_a_known_motion(engine: Engine, kind: str, least_visible: float) -> None:
    """Within half a stride of the loaded image on at least 95 % of the visible points."""
    errors, visible = [], []
    for name in ("astronaut", "chelsea", "coffee"):
        frames, matrices = moving(name, kind)
        clip = engine.encode(frames, load_size=112)
        tracks = follow(engine.tracker(), clip)
        half_a_stride = clip[0].stride / 2 * clip[0].geometry.scale_xy
        limits = np.array(clip[0].original_size[::-1])
        for found, matrix in list(zip(tracks, matrices, strict=True))[1:]:
            expected = tracks[0].points_xy @ matrix[:, :2].T + matrix[:, 2]
            off = np.linalg.norm((found.points_xy - expected) / half_a_stride, axis=1)
            errors.append(off[found.visible])
            visible.append(found.visible[((expected > 0) & (expected < limits)).all(axis=1)])
    assert np.mean(np.concatenate(errors) <= 1) >= 0.95
    assert np.mean(np.concatenate(visible)) >= least_visible


def test_same_input_same_bytes(engine: Engine, still: list[Features]) -> None:
    clip = [*still, still[-1], still[-1]]
    tracks, again = follow(engine.tracker(), clip), follow(engine.tracker(), clip)
    for a, b in zip(tracks, again, strict=True):
        assert a.points_xy.tobytes() == b.points_xy.tobytes() and a.confidence.tobytes() == b.confidence.tobytes()
    for repeated in tracks[-2:]:
        assert repeated.points_xy.tobytes() == tracks[2].points_xy.tobytes()
        assert repeated.visible.tobytes() == tracks[2].visible.tobytes()
    assert not np.array_equal(tracks[1].points_xy, tracks[2].points_xy)
    unmoved = follow(engine.tracker(), [still[0]] * 3)
    assert all(t.visible.all() and t.points_xy.tobytes() == unmoved[0].points_xy.tobytes() for t in unmoved)


def test_an_occluded_point_is_lost_and_found_again(engine: Engine) -> None:
    frames, matrices = moving("astronaut", "shift", count=6)
    start = engine.encode(frames[:1], load_size=112)[0]
    points = grid_points(start, 16)
    x, y = (int(v) for v in points[0])
    covered = [frame.copy() for frame in frames]
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    for t in (2, 3):
        place = covered[t][max(y - 30, 0) : y + 30, max(x - 30, 0) : x + 30]
        place[:] = noise[: place.shape[0], : place.shape[1]]
    tracker = engine.tracker()
    tracker.start(start, points)
    tracks = [tracker.step(f) for f in engine.encode(covered[1:], load_size=112)]
    hidden = (np.abs(points - (x, y)) < 15).all(axis=1)
    assert tracks[0].visible[hidden].all()
    assert not tracks[1].visible[hidden].any() and not tracks[2].visible[hidden].any()
    np.testing.assert_array_equal(tracks[2].points_xy[hidden], tracks[0].points_xy[hidden])
    assert tracks[-1].visible[hidden].all()
    expected = points @ matrices[-1][:, :2].T + matrices[-1][:, 2]
    assert np.abs(tracks[-1].points_xy - expected)[hidden].max() <= 2 * SCALE


def test_a_point_that_leaves_the_image_is_not_visible(engine: Engine) -> None:
    frames, matrices = moving("chelsea", "shift")
    clip = engine.encode(frames, load_size=112)
    tracker = engine.tracker()
    tracker.start(clip[0], [(9.0, 60.0), (100.0, 70.0)])
    last = [tracker.step(features) for features in clip[1:]][-1]
    assert matrices[-1][0, 2] + 9 < 0  # the frames move on by 31 pixels
    assert not last.visible[0] and last.confidence[0] < 0.6


def test_frames_that_change_size(engine: Engine, still: list[Features]) -> None:
    """The same scene in frames twice as large, loaded larger: points are in the new frame's pixels."""
    small = moving("astronaut", "shift", count=3)[0]
    large = cv2.resize(small[1], None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    tracker = engine.tracker()
    points = grid_points(still[0], 8)
    tracker.start(still[0], points)
    before = tracker.step(still[1])
    after = tracker.step(engine.encode([np.asarray(large, np.uint8)], load_size=136)[0])
    both = before.visible & after.visible
    assert both.mean() >= 0.7
    off = np.linalg.norm(after.points_xy / 2 - before.points_xy, axis=1)[both]
    assert np.mean(off <= 2 * SCALE) >= 0.85
    again = tracker.step(still[2])
    assert again.visible.mean() >= 0.7


def test_memory_does_not_grow(engine: Engine, still: list[Features]) -> None:
    """After any number of steps the state holds what it held after the first, whatever became the keyframe."""
    tracker = engine.tracker()
    tracker.start(still[0], grid_points(still[0], 4))
    sizes = set()
    for _ in range(10):
        for features in still:
            tracker.step(features)
            state = tracker._state
            assert state is not None
            views = (state.first, state.key, state.previous)
            sizes.add(tuple((len(v.positions), v.map.grid) for v in views))
            assert len(state.shapes) == len(state.in_key) == 4
    assert len(sizes) == 1


def test_results_may_be_written_into(engine: Engine, still: list[Features]) -> None:
    points = grid_points(still[0], 6)
    kept, changed = engine.tracker(), engine.tracker()
    results = [[tracker.start(still[0], points)] for tracker in (kept, changed)]
    for features in (still[1], still[1], still[2]):
        results[0].append(kept.step(features))
        results[1][-1].points_xy[:], results[1][-1].visible[:], results[1][-1].confidence[:] = -5, False, 0
        results[1].append(changed.step(features))
    for name in ("points_xy", "visible", "confidence"):
        np.testing.assert_array_equal(getattr(results[0][-1], name), getattr(results[1][-1], name))
        np.testing.assert_array_equal(getattr(results[0][1], name), getattr(results[0][2], name))


def test_a_frame_with_nan_is_refused_and_leaves_nothing_behind(engine: Engine, still: list[Features]) -> None:
    points = grid_points(still[0], 6)
    broken = replace(still[1], tokens={f: rows.copy() for f, rows in still[1].tokens.items()})
    broken.tokens["key@3"][40] = np.nan
    tracker, other = engine.tracker(), engine.tracker()
    with pytest.raises(InputError, match="NaN or infinite descriptors"):
        tracker.start(broken, points)
    tracker.start(still[0], points)
    other.start(still[0], points)
    with pytest.raises(InputError, match="NaN or infinite descriptors"):
        tracker.step(broken)
    np.testing.assert_array_equal(tracker.step(still[2]).points_xy, other.step(still[2]).points_xy)


def test_many_points_are_aligned_a_few_at_a_time(
    engine: Engine, still: list[Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = grid_points(still[0], 12)
    found = []
    for limit in (alignment.CHUNK_BYTES, 1):
        monkeypatch.setattr(alignment, "CHUNK_BYTES", limit)
        tracker = engine.tracker()
        tracker.start(still[0], points)
        found.append(tracker.step(still[1]))
    np.testing.assert_allclose(found[0].points_xy, found[1].points_xy, atol=1e-3)
    np.testing.assert_array_equal(found[0].visible, found[1].visible)


@pytest.mark.parametrize("size", [(8, 8), (8, 64), (64, 8)])
def test_images_of_a_row_of_cells_have_no_grid_points(engine: Engine, size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="stands out"):
        grid_points(engine.encode([photo(*size)], load_size=None)[0], 4)


def test_grid_points_are_spread_and_inside(still: list[Features]) -> None:
    points = grid_points(still[0], 16)
    assert points.shape == (16, 2) and points.dtype == np.float64
    still[0].geometry.cells_at(points)
    apart = np.linalg.norm(points[:, None] - points, axis=2)[~np.eye(16, dtype=bool)]
    assert apart.min() >= 0.35 * np.sqrt(np.prod(still[0].original_size) / 16) / 1.4
    np.testing.assert_array_equal(grid_points(still[0], 5, "key@3"), grid_points(still[0], 5))
    flat = replace(still[0], tokens={"key@3": np.ones_like(still[0].tokens["key@3"])})
    with pytest.raises(InputError, match="stands out"):
        grid_points(flat, 5)
    with pytest.raises(InputError, match="count=0"):
        grid_points(still[0], 0)


def test_bad_input(engine: Engine, tiny_engine: Engine, still: list[Features]) -> None:
    tracker = engine.tracker()
    with pytest.raises(InputError, match="a step before the start"):
        tracker.step(still[0])
    for points, message in [
        ([], "no points were given"),
        ([1.0, 2.0], r"shape \(2,\): expected \(N, 2\)"),
        ([[1.0, 2.0, 3.0]], r"shape \(1, 3\): expected \(N, 2\)"),
        ([[10.0, 500.0]], r"point \(10, 500\) lies outside the image of 175×140"),
        ([[np.nan, 1.0]], "NaN or infinite"),
    ]:
        with pytest.raises(InputError, match=message):
            tracker.start(still[0], points)
    tracker.start(still[0], [[30.0, 40.0]])
    with pytest.raises(InputError, match="another bundle"):
        tracker.step(tiny_engine.encode([photo(140, 175)], load_size=112)[0])
    with pytest.raises(InputError, match="stride 8 and the first frame 4"):
        tracker.step(engine.encode([photo(140, 175)], load_size=112, stride=8)[0])
    with pytest.raises(InputError, match="value@9 was not exported"):
        Tracker("value@9").start(still[0], [[30.0, 40.0]])
    with pytest.raises(InputError, match="search_radius=0"):
        engine.tracker(search_radius=0)
    with pytest.raises(InputError, match="min_confidence=2"):
        engine.tracker(min_confidence=2)
    with pytest.raises(InputError, match=r"expected \(N, 2\)"):
        Tracks(np.zeros((2, 2)), np.zeros(3, np.bool_), np.zeros(2, np.float32))


def test_similarity_is_the_cosine_of_binned_descriptors() -> None:
    values = np.random.default_rng(0).normal(size=(7, 9, 5)).astype(np.float32)
    other = np.random.default_rng(1).normal(size=(6, 8, 5)).astype(np.float32)
    a, b = (DescriptorMap.of(v) for v in (values, other))
    rows, columns = np.divmod(np.arange(63), 9)
    binned = a.binned(np.stack([columns, rows], axis=1).astype(float))
    everywhere = np.indices((6, 8)).reshape(2, 1, 48).repeat(63, axis=1)
    found = b.similarity(binned, *everywhere).reshape(63, 6, 8)
    inner = (rows > 2) & (rows < 4) & (columns > 2) & (columns < 6)  # bins between cells' centres on both sides
    expected = cosine_similarity(values, other, 2).reshape(63, 6, 8)
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-5)
    plain = log_bin(values, 2)[inner]
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(binned[inner].reshape(len(plain), -1), plain, atol=1e-5)


def rough_map(seed: int, grid: tuple[int, int], channels: int = 24) -> NDArray[np.float32]:
    """Noise that is about as rough as descriptors are."""
    noise = np.random.default_rng(seed).normal(size=(*grid, channels)).astype(np.float32)
    return np.stack([cv2.GaussianBlur(noise[..., i], (0, 0), 1.2) for i in range(channels)], axis=2)


@pytest.mark.parametrize("expected", ["nothing", "something else", "the place"])
def test_what_is_found_is_the_best_of_all_cells(expected: str) -> None:
    scene = rough_map(0, (40, 46))
    a, b = DescriptorMap.of(scene[:31, :37]), DescriptorMap.of(scene[5:36, 7:44])
    at = np.stack(np.meshgrid(np.arange(11, 33, 3), np.arange(9, 28, 3)), axis=-1).reshape(-1, 2).astype(float)
    binned = a.binned(at)
    cells = np.indices(b.grid).reshape(2, 1, -1).repeat(len(at), axis=1)
    exact = b.similarity(binned, *cells)
    rows, columns = np.divmod(exact.argmax(axis=1), b.grid[1])
    guess = {"nothing": None, "something else": at[::-1], "the place": at - [7, 5]}[expected]
    found = find(b, binned, Window.whole(len(at), b.grid), guess)
    assert (np.abs(found - np.stack([columns, rows], axis=1)) <= 0.5).all()
    np.testing.assert_allclose(np.stack([columns, rows], axis=1), at - [7, 5])


def test_a_search_keeps_to_its_window() -> None:
    scene = rough_map(1, (40, 40))
    a, b = DescriptorMap.of(scene[:30, :30]), DescriptorMap.of(scene[6:36, 6:36])
    at = np.array([[15.0, 16.0], [8.0, 20.0]])
    there = find(b, a.binned(at), Window.near(at, 8, b.grid), at)
    np.testing.assert_allclose(there, at - 6, atol=0.5)
    kept = find(b, a.binned(at), Window.near(at, 3, b.grid), at)
    assert (np.abs(kept - at) <= 3.5).all()
    outside = Window.near(np.array([[-20.0, 50.0]]), 2.5, b.grid)  # as near as the grid reaches
    np.testing.assert_array_equal([*outside.low, *outside.high], [[27, 0], [29, 2]])


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (2, 5), (13, 4)])
def test_flat_and_narrow_maps_have_a_finite_answer(grid: tuple[int, int]) -> None:
    flat = DescriptorMap.of(np.ones((*grid, 3), np.float32))
    at = np.array([[0.0, 0.0], [grid[1] - 1.0, grid[0] - 1.0]])
    for expected in (at, None):
        found = find(flat, flat.binned(at), Window.whole(2, grid), expected)
        assert ((found >= -0.5) & (found <= np.array(grid[::-1]) - 0.5)).all()
    aligned = align(Patches.around(flat, at), Slopes.of(flat), at, np.tile(np.eye(2), (2, 1, 1)))
    np.testing.assert_allclose(aligned.positions, at)


def test_alignment_finds_move_turn_and_zoom() -> None:
    """A smooth map sampled on a turned and zoomed grid, so that the answer is known."""
    y, x = np.indices((40, 40))
    waves = [(0.3, 0.1, 0), (0.1, -0.35, 1), (-0.2, 0.25, 2), (0.4, 0.3, 0.5)]
    values = np.stack([np.sin(a * x + b * y + c) for a, b, c in waves], axis=2).astype(np.float32)
    turn, zoom = np.deg2rad(8), 1.1
    shape = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle, move = np.array([19.5, 19.5]), np.array([0.7, -0.4])
    cells = np.stack([x, y], axis=-1).astype(float)
    moved = bilinear(values, (cells - middle - move) @ np.linalg.inv(shape).T + middle)
    a, b = (DescriptorMap.of(v) for v in (values, moved + np.float32(0.3)))  # and lit evenly
    at = np.array([[19.0, 20.0], [15.3, 22.6]])
    found = align(Patches.around(a, at), Slopes.of(b), at + 0.5, np.tile(np.eye(2), (2, 1, 1)))
    np.testing.assert_allclose(found.positions, (at - middle) @ shape.T + middle + move, atol=0.1)
    np.testing.assert_allclose(found.shapes, np.broadcast_to(shape, (2, 2, 2)), atol=0.05)


def test_trails() -> None:
    pixels = np.zeros((60, 80, 3), np.uint8)
    history = np.array([[[10.0, 10.0], [10.0, 40.0]], [[30.0, 10.0], [30.0, 40.0]], [[50.0, 10.0], [50.0, 40.0]]])
    visible = np.array([[True, True], [True, True], [True, False]])
    drawn = draw_trails(pixels, history, visible)
    assert drawn.shape == pixels.shape and drawn.dtype == np.uint8 and not pixels.any()
    assert drawn[9, 49].any() and drawn[9, 40].any() and drawn[9, 20].any()
    assert drawn[39, 20].any() and not drawn[36:43, 45:55].any() and not drawn[39, 40].any()
    assert drawn[9, 40].sum() > drawn[9, 20].sum()
    assert not draw_trails(pixels, history, np.zeros(2, np.bool_)).any()
    outside = draw_trails(pixels, history + 1000, visible)
    assert not outside.any()
    with pytest.raises(InputError, match=r"expected \(T, N, 2\)"):
        draw_trails(pixels, history[0], visible)


def test_facets_are_blended_by_weight(still: list[Features]) -> None:
    """One facet with any weight tracks as it does alone; a blend gives its own results."""
    first, second = still[0], still[1]
    points = grid_points(first, 6, "key@3")
    tracks = {}
    for facet in ("key@3", "3*key@3", "key@3+2*query@3"):
        tracker = Tracker(facet)
        tracker.start(first, points)
        tracks[facet] = tracker.step(second).points_xy
    np.testing.assert_allclose(tracks["3*key@3"], tracks["key@3"], atol=1e-4)
    assert np.abs(tracks["key@3+2*query@3"] - tracks["key@3"]).max() > 1e-3


@pytest.mark.parametrize("facet", ["0*key@3", "x*key@3", "-1*key@3+query@3"])
def test_a_weight_that_is_none(still: list[Features], facet: str) -> None:
    with pytest.raises(InputError, match="is no weight"):
        Tracker(facet).start(still[0], [[20.0, 20.0]])
