"""``facetrt video`` on small clips, called in this process."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import moving_pictures, write_clip
from helpers import photo
from PIL import Image
from typer.testing import CliRunner, Result

from facetrt.engine.cli import video as command
from facetrt.engine.cli import viewers as video_tasks
from facetrt.engine.cli.main import program
from facetrt.engine.cli.viewers import PcaViewer
from facetrt.engine.encoding.encoder import Encoder
from facetrt.engine.engine import Engine
from facetrt.engine.learning import learn_cosegmentation
from facetrt.engine.tasks.masks import refine_objects
from facetrt.engine.tasks.models import load_model
from facetrt.engine.tasks.refinement import Refinement
from facetrt.engine.video import sources
from facetrt.engine.video.sources import open_source
from facetrt.kernels.errors import (
    BackendError,
    FacetrtError,
    InputError,
    MissingDependencyError,
    OutputError,
    SourceError,
)

COUNT, SIZE = 10, (72, 96)
MODEL_OPTIONS = {"saliency_threshold": 0.0, "sample_interval": 3, "votes_percentage": 0.0}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph that moves two pixels to the left with every frame."""
    wide = photo(SIZE[0], SIZE[1] + 2 * COUNT, 0)
    pictures = [np.ascontiguousarray(wide[:, 2 * i : 2 * i + SIZE[1]]) for i in range(COUNT)]
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", pictures)


@pytest.fixture(scope="module")
def first_mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = np.zeros(SIZE, np.uint8)
    labels[20:50, 40:70], labels[55:68, 5:25] = 1, 2
    path = tmp_path_factory.mktemp("mask") / "first.png"
    Image.fromarray(labels).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.npz"
    with Engine.open("builtin", threads=1) as engine, open_source(clip) as source:
        features = engine.encode([frame.pixels for frame in source][:3], load_size=64)
        learn_cosegmentation(engine, features, **MODEL_OPTIONS).save(path)  # type: ignore[arg-type]
    return path


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # unless a test expects it
        yield tmp_path / "out.mp4"


def video(source: Path | str | None, task: str, out: Path, *options: object) -> Result:
    given = [] if source is None else [source]
    arguments = ["video", *given, "--task", task, "-b", "builtin", "--threads", 1, "-o", out, *options]
    return CliRunner().invoke(program(), [str(argument) for argument in arguments], catch_exceptions=False)


def check(out: Path, task: str, count: int = COUNT, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """The video plays and the record tells of it; the record."""
    with open_source(out) as source:
        frames = list(source)
    assert [frame.size for frame in frames] == [size] * count
    record: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    assert (record["tool"], record["command"], record["task"]) == ("facetrt", "video", task)
    assert record["video"]["frames"] == count and record["video"]["size"] == list(size)
    assert record["report"]["frames"] >= count and record["report"]["latency_p99"] > 0
    assert record["first_frame"]["model"] == "builtin" and record["first_frame"]["grid"]
    return record


def data_of(out: Path, index: int) -> dict[str, Any]:
    with np.load(out.with_suffix(".frames") / f"{index:06}.npz") as arrays:
        return dict(arrays)


def test_tracks_follow_the_picture(clip: Path, out: Path) -> None:
    points = ("--point", "60,30", "--point", "70.5,44", "--load-size", 72)
    result = video(clip, "track", out, *points)
    assert result.exit_code == 0 and "10 frames" in result.stdout
    record = check(out, "track")
    assert record["result"]["points_xy"] == [[60, 30], [70.5, 44]] and not record["interrupted"]
    assert record["source"]["fps"] == 25 and record["options"]["point"] == ["60,30", "70.5,44"]
    for index in range(COUNT):
        found = data_of(out, index)
        assert found["index"] == index and found["timestamp"] == pytest.approx(index / 25)
        expected = np.array([[60 - 2 * index, 30], [70.5 - 2 * index, 44]])
        assert np.abs(found["points_xy"][found["visible"]] - expected[found["visible"]]).max(initial=0) < 2.5
        assert found["visible"].any() and found["confidence"].shape == (2,)


def test_points_are_chosen(clip: Path, out: Path) -> None:
    video(clip, "track", out, "--points", 3, "--load-size", 72, "--limit", 2, "--no-data")
    assert 1 <= len(check(out, "track", 2)["result"]["points_xy"]) <= 3
    assert not out.with_suffix(".frames").exists()


def test_several_tasks_share_one_encode(
    clip: Path, first_mask: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gives what it gives alone; overlays lie on one picture, what hides it stands beside."""
    given = ("--point", "60,30", "--load-size", 72, "--first-mask", first_mask)
    encoded = []
    encode = Encoder.encode_loaded
    monkeypatch.setattr(Encoder, "encode_loaded", lambda self, *args: encoded.append(1) or encode(self, *args))
    assert video(clip, "track, mask,pca", out, *given).exit_code == 0
    assert len(encoded) == COUNT
    record = check(out, "track,mask,pca", size=(SIZE[0], 2 * SIZE[1]))
    assert record["result"]["mask"]["objects"] == [1, 2] and record["result"]["track"]["points_xy"] == [[60, 30]]
    for task, options in (("track", given[:4]), ("mask", given[2:]), ("pca", given[2:4])):
        alone = tmp_path / f"{task}.mp4"
        video(clip, task, alone, *options)
        for index in (0, 4, COUNT - 1):
            together = data_of(out, index)
            for name, values in data_of(alone, index).items():
                shared = together[name if name in ("index", "timestamp") else f"{task}.{name}"]
                np.testing.assert_array_equal(shared, values)


def test_tasks_that_do_not_go_together(clip: Path, out: Path, model: Path) -> None:
    for task, options, message in [
        ("track,dance", (), "task 'dance': expected one of track, mask"),
        ("pca,pca", (), "each task once"),
        ("pca,track", ("--model", model), "--model has no meaning for --task pca,track"),
        ("cosegment,discover", ("--model", model), "load size 64, stride 4, .* and one at load size 224, stride"),
    ]:
        with pytest.raises(InputError, match=message):
            video(clip, task, out, *options)
    assert not out.exists()


@pytest.mark.parametrize("method", ["tokencut", "spectral"])
def test_objects_of_each_frame_by_itself(clip: Path, out: Path, method: str) -> None:
    result = video(clip, "discover", out, "--method", method, "--load-size", 72, "--limit", 3)
    assert result.exit_code == 0
    record = check(out, "discover", 3)
    assert record["result"]["method"] == method and record["options"]["method"] == method
    assert record["result"]["facet"] == "value@3-mean" and record["result"]["frames"] == 3
    objects = 0
    with Engine.open("builtin", threads=1) as engine, open_source(clip) as source:
        for frame, data in zip(source, map(partial(data_of, out), range(3)), strict=False):
            expected = engine.discover([frame.pixels], method, load_size=72)[0]
            np.testing.assert_array_equal(data["masks"], expected.masks)
            np.testing.assert_array_equal(data["boxes"], expected.boxes)
            objects += len(expected)
    assert record["result"]["objects"] == objects > 0


def test_a_method_needs_its_task_and_a_name(clip: Path, out: Path) -> None:
    with pytest.raises(InputError, match="--method has no meaning for --task pca"):
        video(clip, "pca", out, "--method", "lost")
    with pytest.raises(InputError, match="no method 'loost': expected one of tokencut"):
        video(clip, "discover", out, "--method", "loost")
    assert not out.exists()


def test_masks_follow_the_picture(clip: Path, first_mask: Path, out: Path) -> None:
    video(clip, "mask", out, "--first-mask", first_mask, "--load-size", 72, "--limit", 6)
    record = check(out, "mask", 6)
    assert record["result"] == {"objects": [1, 2], "lost": []} and record["data"] == "out.frames"
    given = np.asarray(Image.open(first_mask))
    assert np.array_equal(data_of(out, 0)["labels"], given)
    moved, found = np.roll(given, -10, axis=1) == 1, data_of(out, 5)["labels"] == 1
    assert (moved & found).sum() / (moved | found).sum() > 0.7


def test_a_saved_model_is_applied(clip: Path, model: Path, out: Path) -> None:
    video(clip, "cosegment", out, "--model", model, "--limit", 3)
    record = check(out, "cosegment", 3)
    assert record["first_frame"]["loaded_size"] == [64, 85]  # as the model was learned
    assert record["result"]["model"]["images"] == 3
    mask = data_of(out, 2)["mask"]
    assert mask.dtype == np.bool_ and mask.shape == SIZE and mask.any()


@pytest.mark.parametrize("task", ["cosegment", "parts"])
def test_a_model_is_learned_from_the_video(task: str, clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("learn_cosegmentation", "learn_parts"):  # the photograph's saliency is no test's business
        learn = getattr(video_tasks, name)
        monkeypatch.setattr(video_tasks, name, lambda e, f, learn=learn: learn(e, f, **MODEL_OPTIONS))
    video(clip, task, out, "--load-size", 64, "--limit", 4)
    record = check(out, task, 4)
    assert record["result"]["model"]["images"] == 4
    assert data_of(out, 3)["mask" if task == "cosegment" else "labels"].shape == SIZE


@pytest.mark.parametrize("refine", ["bilateral", "crf", "grabcut"])
def test_followed_masks_are_refined_on_each_frame(clip: Path, first_mask: Path, out: Path, refine: str) -> None:
    given = np.asarray(Image.open(first_mask))
    video(clip, "mask", out, "--first-mask", first_mask, "--load-size", 72, "--limit", 3, "--refine", refine)
    with Engine.open("builtin", threads=1) as engine, open_source(clip) as source:
        frames = [frame.pixels for frame, _ in zip(source, range(3), strict=False)]
        features = engine.encode(frames, load_size=72)
        propagator = engine.propagator()
        propagator.start(features[0], given)
        plain = [propagator.step(item) for item in features[1:]]
    assert np.array_equal(data_of(out, 0)["labels"], given)
    changed = 0
    for number, (pixels, labels) in enumerate(zip(frames[1:], plain, strict=True), 1):
        expected = refine_objects(pixels, labels, Refinement(refine))
        np.testing.assert_array_equal(data_of(out, number)["labels"], expected)
        changed += int((expected != labels).sum())
    assert changed > 0 and check(out, "mask", 3)["options"]["refine"] == refine


def test_a_model_is_applied_with_refinement(clip: Path, model: Path, out: Path) -> None:
    video(clip, "cosegment", out, "--model", model, "--limit", 1, "--refine", "bilateral")
    with Engine.open("builtin", threads=1) as engine, open_source(clip) as source:
        expected = engine.apply(load_model(model), next(iter(source)).pixels, refine="bilateral")
    np.testing.assert_array_equal(data_of(out, 0)["mask"], expected.mask)


def test_components_of_a_folder(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(moving_pictures(PCA_COUNT, (71, 95))):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    video(folder, "pca", out, "--load-size", 64)
    record = check(out, "pca", PCA_COUNT, (72, 96))  # sizes are even
    assert record["first_frame"]["original_size"] == [71, 95]
    assert len(record["result"]["explained_variance_ratio"]) == 3 and record["video"]["fps"] == 25
    assert data_of(out, PCA_COUNT - 1)["components"].shape[2] == 3


PCA_COUNT = 9  # one more than components are fitted on


def interrupted(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    feed, seen = command.TrackViewer.feed, []

    def failing(self: Any, result: Any) -> Any:
        seen.append(result)
        if len(seen) > after:
            raise error
        return feed(self, result)

    monkeypatch.setattr(command.TrackViewer, "feed", failing)


def test_ctrl_c_leaves_a_video(clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, KeyboardInterrupt(), 4)
    with pytest.warns(UserWarning, match=r"out\.mp4 ends early: 4 frames, playable"):
        result = video(clip, "track", out, "--load-size", 64)
    assert result.exit_code == 130
    record = check(out, "track", 4)
    assert record["interrupted"] and record["stopped_by"] == "KeyboardInterrupt"
    assert len(list(out.with_suffix(".frames").glob("*.npz"))) == 4
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.frames", "out.json", "out.mp4"]


def test_a_source_that_fails_leaves_a_video(clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, SourceError("camera 0 was unplugged"), 2)
    with pytest.warns(UserWarning, match="ends early"), pytest.raises(SourceError, match="unplugged"):
        video(clip, "track", out, "--load-size", 64)
    assert check(out, "track", 2)["stopped_by"] == "camera 0 was unplugged"


def test_a_disk_that_is_full_for_the_record_is_said(clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "write_json", full)
    with pytest.raises(OutputError, match=r"out\.json cannot be written: No space left"):
        video(clip, "track", out, "--load-size", 64, "--limit", 1, "--no-data")
    assert [path.name for path in out.parent.iterdir()] == ["out.mp4"]


def test_before_the_first_frame_nothing_is_left(clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, KeyboardInterrupt(), 0)
    assert video(clip, "track", out, "--load-size", 64).exit_code == 130
    assert not list(out.parent.iterdir())


def test_force_replaces_only_what_facetrt_wrote(clip: Path, out: Path) -> None:
    options = ("--load-size", 64, "--limit", 1)
    out.write_bytes(b"holidays")
    with pytest.raises(OutputError, match="exists already"):
        video(clip, "pca", out, *options)
    with pytest.raises(OutputError, match="not written by facetrt"):
        video(clip, "pca", out, *options, "--force")
    assert out.read_bytes() == b"holidays"
    out.unlink()
    video(clip, "pca", out, *options)
    video(clip, "pca", out, "--load-size", 64, "--limit", 2, "--force")
    check(out, "pca", 2)
    out.with_suffix(".frames").joinpath("results.json").unlink()
    with pytest.raises(OutputError, match=r"out\.frames was not written by facetrt"):
        video(clip, "pca", out, *options, "--force")


def test_sizes_that_change_are_fitted(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = tmp_path / "images", []
    folder.mkdir()
    for i, size in enumerate([(72, 96), (72, 96), (90, 72)]):
        Image.fromarray(photo(*size, i)).save(folder / f"{i}.png")
    monkeypatch.setattr(command, "note", said.append)
    video(folder, "pca", out, "--load-size", 64)
    check(out, "pca", 3)
    assert len(said) == 1 and "size of the frames changes" in said[0]


def test_without_pyav_nothing_begins(clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"facetrt\[cpu\]"):
        video(clip, "pca", out, "--load-size", 64, "--limit", 3)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("mask", (), "add --first-mask"),
        ("track", ("--first-mask", "FIRST"), "--first-mask has no meaning for --task track"),
        ("pca", ("--points", 5), "--points has no meaning"),
        ("pca", ("--point", "1,2"), "--point has no meaning"),
        ("track", ("--model", "model.npz"), "--model has no meaning"),
        ("track", ("--points", 5, "--point", "1,2"), "use one of the two"),
        ("track", ("--point", "1;2"), "expected X,Y"),
        ("track", ("--point", "500,2", "--load-size", 64), "lies outside the image"),
        ("parts", ("--model", "MODEL"), "holds a segmentation model"),
        ("pca", ("--refine", "crf"), "--refine has no meaning for --task pca"),
        ("parts", ("--refine", "grabcut"), "--refine grabcut does not fit --task parts: expected one of crf, pyd"),
        ("discover", ("--refine", "pydensecrf"), "expected one of grabcut, crf, bilateral, none"),
        ("pca", ("--latency-budget", 0), "more than 0 milliseconds"),
        ("pca", ("--camera", 0), "either IN"),
    ],
)
def test_options_that_do_not_fit(
    task: str, options: tuple[object, ...], message: str, clip: Path, first_mask: Path, model: Path, out: Path
) -> None:
    named = {"FIRST": first_mask, "MODEL": model}
    with pytest.raises(InputError, match=message):
        video(clip, task, out, *(named.get(str(option), option) for option in options))
    assert not list(out.parent.iterdir())


def test_masks_that_do_not_fit(clip: Path, tmp_path: Path, out: Path) -> None:
    mask = tmp_path / "mask.png"
    for size, value, message in ((SIZE, 0, "no object"), ((30, 40), 1, "first mask has shape")):
        Image.fromarray(np.full(size, value, np.uint8)).save(mask)
        with pytest.raises(InputError, match=message):
            video(clip, "mask", out, "--first-mask", mask, "--load-size", 64)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]


def test_sources_and_places_that_do_not_fit(clip: Path, out: Path, tmp_path: Path) -> None:
    for source, options, message in (
        (None, (), "either IN"),
        (tmp_path / "none.mp4", (), "does not exist"),
        (None, ("--camera", 97), "camera 97 cannot be opened"),
    ):
        with pytest.raises(FacetrtError, match=message):
            video(source, "pca", out, *options)
    for task in ("cosegment", "parts"):
        with pytest.raises(InputError, match="on a live source needs --model"):
            video("rtsp://host/stream", task, out)
    with pytest.raises(InputError, match=r"does not end in \.mp4"):
        video(clip, "pca", out.with_suffix(".gif"))
    with pytest.raises(InputError, match="read and would be overwritten"):
        video(clip, "pca", clip, "--force")


def test_a_preview_needs_a_display(clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command.sys, "platform", "linux")
    with pytest.raises(BackendError, match="--preview needs a display"):
        video(clip, "pca", out, "--preview")
    monkeypatch.setenv("DISPLAY", ":0")

    def headless(*arguments: object) -> None:
        raise command.cv2.error("not implemented")

    monkeypatch.setattr(command.cv2, "namedWindow", headless)
    with pytest.raises(BackendError, match="headless"):
        video(clip, "pca", out, "--preview")


def test_a_key_in_the_window_ends_it(clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([-1, -1, ord("q")])
    monkeypatch.setattr(command, "check_display", lambda: None)
    monkeypatch.setattr(command.cv2, "imshow", lambda *arguments: None)
    monkeypatch.setattr(command.cv2, "waitKey", lambda wait: next(keys))
    monkeypatch.setattr(command.cv2, "getWindowProperty", lambda *arguments: 1.0)
    assert video(clip, "track", out, "--load-size", 64, "--preview").exit_code == 0
    assert not check(out, "track", 3)["interrupted"]


def test_frames_held_back_are_shown_at_the_end(clip: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    feed = PcaViewer.feed
    monkeypatch.setattr(PcaViewer, "feed", lambda self, r: shown.append(len(drawn := feed(self, r))) or drawn)
    video(clip, "pca", out, "--load-size", 64)
    assert shown == [0] * 7 + [8, 1, 1]
    check(out, "pca")


def test_times_that_cannot_be_kept_are_said_once(
    tmp_path: Path, out: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(command, "note", said.append)
    seconds = sources.FileSource._seconds
    monkeypatch.setattr(sources.FileSource, "_seconds", lambda self, d, i: 5 + (i > 2) + seconds(self, d, i))
    avi = out.with_suffix(".avi")
    video(clip, "pca", avi, "--load-size", 64, "--limit", 5)
    check(avi, "pca", 5)
    assert len(said) == 1 and "the time between frames varies: out.avi shows 25 a second" in said[0]
    video(clip, "pca", out.with_name("kept.mp4"), "--load-size", 64, "--limit", 5)
    monkeypatch.undo()
    with open_source(out.with_name("kept.mp4")) as source:
        times = [frame.timestamp for frame in source]
    assert times == pytest.approx([0, 0.04, 0.08, 1.12, 1.16], abs=1e-3) and len(said) == 1
