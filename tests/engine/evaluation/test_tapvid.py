"""Points followed through TAP-Vid's videos: queries, directions, what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facetrt.engine import Engine, Features, InputError
from facetrt.engine.evaluation import evaluate, open_evaluation
from facetrt.engine.evaluation.tapvid import QueryMode, TapVid
from facetrt.engine.samples import sample_images
from facetrt.engine.video.tracking import Tracker

COUNT, HEIGHT, WIDTH = 7, 112, 140
STEP = np.array([4, 2])  # pixels that the picture moves from frame to frame
QUICK = {"load_size": "112"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.open("builtin", threads=1) as opened:
        yield opened


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A photograph that moves to the lower right; the last point is not annotated before the fourth frame."""
    scene = np.asarray(sample_images()["astronaut"])[100:, 120:]
    corners = [(STEP * (COUNT - t)).tolist() for t in range(COUNT)]
    video = np.stack([scene[y : y + HEIGHT, x : x + WIDTH] for x, y in corners])
    starts = np.array([[40, 30], [70, 40], [90, 60], [50, 70], [100, 40], [30, 50]])
    places = starts[:, None] + STEP * np.arange(COUNT)[:, None]
    occluded = np.zeros(places.shape[:2], bool)
    occluded[5, :3] = True
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "scene.npz", video=video, points=places / [WIDTH, HEIGHT], occluded=occluded)
    return folder


def run(data: Path, engine: Engine | None, out: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    evaluation = open_evaluation("tapvid-davis", data, QUICK | options)
    steps: list[tuple[int, int]] = []
    outcome = evaluate(evaluation, engine, out, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (sum(evaluation.steps(key) for key in evaluation.keys),) * 2
    return outcome.summary, json.loads((out / "results.json").read_text())


def test_points_are_taken_up_where_they_are_visible_first() -> None:
    visible = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]) > 0
    queries = QueryMode.FIRST.queries(visible)
    assert (queries.points.tolist(), queries.frames.tolist()) == ([0, 2], [1, 0])
    assert QueryMode.FIRST.scored(queries, 4).astype(int).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


def test_strided_points_are_taken_up_in_every_fifth_frame() -> None:
    visible = np.ones((2, 7), np.bool_)
    visible[0, 0] = False
    queries = QueryMode.STRIDED.queries(visible)
    assert (queries.points.tolist(), queries.frames.tolist()) == ([1, 0, 1], [0, 5, 5])
    assert QueryMode.STRIDED.scored(queries, 7)[1].astype(int).tolist() == [1, 1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(("mode", "queries"), [("first", 6), ("strided", 11)])
def test_a_moving_picture_is_followed(data: Path, engine: Engine, tmp_path: Path, mode: str, queries: int) -> None:
    """In both directions; points that stay lose sight of theirs."""
    summary, results = run(data, engine, tmp_path / "out", queries=mode)
    assert summary.overall.figures["delta_4"] == 1
    assert summary.overall.figures["delta_avg"] > summary.baselines[0].figures["delta_avg"] + 0.5
    assert summary.overall.figures["OA"] > 0.9
    assert summary.counts == {"videos": 1, "queries": queries}
    assert [row["name"] for row in results["categories"]] == ["scene"]
    assert results["options"]["facet"] == "key@3+2*query@3"
    saved = np.load(tmp_path / "out" / "pictures" / "scene.npz")
    assert saved["tracks"].shape == (queries, COUNT, 2) and saved["occluded"].shape == (queries, COUNT)
    first = saved["query_points"][0]
    np.testing.assert_allclose(saved["tracks"][0, int(first[0])], first[:0:-1])
    compared = Image.open(tmp_path / "out" / "pictures" / "compared" / "scene" / "00003.jpg")
    assert compared.size == (3 * 300 + 2 * 8, 24 + 240)


@pytest.mark.parametrize(("alone", "expected"), [("no", [5, 1]), ("yes", [1] * 6)])
def test_points_of_a_frame_share_a_tracker_or_none(
    data: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: str, expected: list[int]
) -> None:
    shared: list[int] = []
    start = Tracker.start

    def count(tracker: Tracker, features: Features, points_xy: Any) -> Any:
        shared.append(len(points_xy))
        return start(tracker, features, points_xy)

    monkeypatch.setattr(Tracker, "start", count)
    run(data, engine, tmp_path / "out", alone=alone, load_size="64")
    assert shared == expected


def test_points_that_stay_are_the_trivial_baseline(data: Path, tmp_path: Path) -> None:
    summary, results = run(data, None, tmp_path / "out")
    assert summary.overall is None
    moved = np.hypot(*(STEP * 256 / [WIDTH, HEIGHT])) * np.arange(1, COUNT)
    shares = [(5 * (moved < t).sum() + (moved[: COUNT - 4] < t).sum()) / (6 * COUNT - 9) for t in (1, 2, 4, 8, 16)]
    assert summary.baselines[0].figures["delta_avg"] == pytest.approx(np.mean(shares))
    assert summary.baselines[0].figures["OA"] == 1
    assert results["data"]["sizes"] == {"scene": [HEIGHT, WIDTH]}


def test_every_facet_of_a_blend_must_have_been_exported(data: Path, engine: Engine) -> None:
    evaluation = open_evaluation("tapvid-davis", data, {"facet": "key@3 + 2*token@1"})
    assert isinstance(evaluation, TapVid)
    with pytest.raises(InputError, match=r"token@1 was not exported: this bundle has key@3.*another with --facet"):
        evaluation.resolve(engine.manifest)


def test_frames_have_one_size(data: Path, engine: Engine, tmp_path: Path) -> None:
    with np.load(data / "scene.npz") as arrays:
        given = dict(arrays)
    np.savez(data / "scene.npz", points=given["points"], occluded=given["occluded"])
    folder = data / "JPEGImages" / "480p" / "scene"
    folder.mkdir(parents=True)
    for index, frame in enumerate(given["video"]):
        Image.fromarray(frame[: HEIGHT - 8 * (index == 2)]).save(folder / f"{index}.jpg")
    with pytest.raises(InputError, match=r"2\.jpg has 140×104 pixels and the first frame 140×112"):
        run(data, engine, tmp_path / "out")
