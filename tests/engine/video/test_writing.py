from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from clips import moving_pictures

from facetrt.engine.cli.viewers import SAMPLE, spread_sample
from facetrt.engine.drawing.overlays import (
    PcaColours,
    cells_on_pixels,
    mask_overlay,
    object_overlay,
    parts_overlay,
)
from facetrt.engine.drawing.results import palette
from facetrt.engine.engine import Engine
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import Pixels
from facetrt.engine.tasks.pca import fit_pca
from facetrt.engine.video import writing as video
from facetrt.engine.video.sources import Frame, open_source
from facetrt.engine.video.writing import VideoWriter
from facetrt.kernels.errors import InputError, MissingDependencyError, OutputError

FRAMES = moving_pictures(8, (64, 80))


def read(path: Path) -> list[Frame]:
    with open_source(path) as source:
        return list(source)


def difference(a: Pixels, b: Pixels) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_what_was_written_is_read_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    with VideoWriter(path, 20, (64, 80)) as writer:
        for pixels in FRAMES:
            writer.write(pixels)
        assert not path.exists()
    assert (writer.frames, writer.kept, writer.codec) == (8, True, "h264")
    found = read(path)
    assert [frame.size for frame in found] == [(64, 80)] * 8
    times = [frame.timestamp - found[0].timestamp for frame in found]  # AVI's begin with one frame's time
    assert times == pytest.approx([i / 20 for i in range(8)], abs=2e-3)
    for frame, pixels in zip(found, FRAMES, strict=True):
        assert difference(frame.pixels, pixels) < 8  # compressed, but RGB, the right way up and in order
    assert list(tmp_path.iterdir()) == [path]


def test_odd_sizes_get_a_row_and_a_column(tmp_path: Path) -> None:
    path, pixels = tmp_path / "odd.mp4", FRAMES[0][:63, :79]
    with VideoWriter(path, 25, (63, 79)) as writer:
        writer.write(np.asfortranarray(pixels))
    (frame,) = read(path)
    assert frame.size == (64, 80)
    assert difference(frame.pixels, np.pad(pixels, ((0, 1), (0, 1), (0, 0)), mode="edge")) < 8


def test_times_are_kept(tmp_path: Path) -> None:
    times = [7.0, 7.04, 7.5, 7.5, 8.25]  # a camera's clock; one frame is not later than the one before
    with VideoWriter(tmp_path / "clip.mp4", 25, (64, 80)) as writer:
        assert writer.keeps_time
        for pixels, when in zip(FRAMES, times, strict=False):
            writer.write(pixels, when)
    found = [frame.timestamp for frame in read(tmp_path / "clip.mp4")]
    assert found == pytest.approx([0, 0.04, 0.5, 0.5, 1.25], abs=1e-3)
    assert found == sorted(set(found))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_video_is_playable(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with (
        pytest.warns(UserWarning, match=r"clip\.mp4 ends early: 3 frames, playable"),
        pytest.raises(error),
        VideoWriter(path, 25, (64, 80)) as writer,
    ):
        for pixels in FRAMES[:3]:
            writer.write(pixels)
        raise error
    assert len(read(path)) == 3 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_without_a_frame_nothing_is_left(error: type[BaseException] | None, tmp_path: Path) -> None:
    def run() -> VideoWriter:
        with VideoWriter(tmp_path / "clip.mp4", 25, (64, 80)) as writer:
            if error is not None:
                raise error
        return writer

    if error is None:
        assert not run().kept
    else:
        with pytest.raises(error):
            run()
    assert not list(tmp_path.iterdir())


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="expected"), VideoWriter(path, 25, (64, 80)) as writer:
        writer.write(np.zeros((10, 10, 3), np.uint8))
    assert path.read_bytes() == b"old"
    with VideoWriter(path, 25, (64, 80)) as writer:
        writer.write(FRAMES[0])
    assert len(read(path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as only Linux does")
def test_a_full_disk(tmp_path: Path) -> None:
    import resource
    import signal

    noise = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError), VideoWriter(tmp_path / "clip.mp4", 25, (64, 80)) as writer:
            for shift in range(100):
                writer.write(np.roll(noise, 7 * shift, axis=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_file_without_its_end_is_found(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, 25, (64, 80)) as writer:
        writer.write(FRAMES[0])
    video.check_playable(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(OutputError, match="cannot be read back"):
        video.check_playable(path)
    with pytest.raises(OutputError, match="cannot be read back"):
        video.check_playable(tmp_path / "missing.mp4")


def test_a_pyav_without_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "H264", ("h264_of_nobody",))
    with pytest.raises(MissingDependencyError, match="without an H"):
        VideoWriter(tmp_path / "clip.mp4", 25, (64, 80))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: VideoWriter(folder / "clip.gif", 25, (64, 80)), r"does not end in \.mp4, \.mkv, \.avi"),
        (lambda folder: VideoWriter(folder / "clip.mp4", 0, (64, 80)), "fps=0"),
        (lambda folder: VideoWriter(folder / "clip.mp4", float("nan"), (64, 80)), "fps=nan"),
        (lambda folder: VideoWriter(folder / "clip.mp4", 25, (0, 80)), "80×0"),
        (lambda folder: VideoWriter(folder / "clip.mp4", 25, (64, 80)).write(FRAMES[0]), "not open"),
    ],
)
def test_what_cannot_be_written(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write to"), VideoWriter(tmp_path / "file" / "clip.mp4", 25, (64, 80)):
        pytest.fail("it was opened")


def test_objects_keep_their_colours() -> None:
    grey = np.full((40, 60, 3), 100, np.uint8)
    labels = np.zeros((40, 60), np.int64)
    labels[5:35, 5:25] = 2
    one = object_overlay(grey, labels)
    labels[5:35, 35:55] = 300  # more than there are colours
    both = object_overlay(grey, labels)
    expected = (100 * 0.55 + palette(2)[1] * 0.45).astype(int)
    assert np.abs(one[20, 15].astype(int) - expected).max() <= 1
    assert np.array_equal(one[:, :30], both[:, :30])
    assert np.array_equal(both[20, 30], [100, 100, 100]) and not np.array_equal(both[20, 45], [100, 100, 100])
    assert (grey == 100).all()  # the frame itself stays
    assert np.array_equal(object_overlay(grey, np.zeros_like(labels)), grey)


def test_masks_and_parts_darken_the_background() -> None:
    pixels = np.full((40, 60, 3), (200, 100, 50), np.uint8)
    mask = np.zeros((40, 60), np.bool_)
    mask[10:30, 10:30] = True
    found = mask_overlay(pixels, mask)
    assert np.array_equal(found[20, 20], [200, 100, 50])
    assert len(set(found[5, 50].tolist())) == 1 and found[5, 50, 0] < 60
    parts = parts_overlay(pixels, np.where(mask, 1, -1))
    assert np.abs(parts[20, 20].astype(int) - (0.45 * pixels[20, 20] + 0.55 * palette(2)[1])).max() <= 1
    assert np.array_equal(parts[5, 50], found[5, 50])
    with pytest.raises(InputError, match="expected one for a pixel"):
        mask_overlay(pixels, mask[:10])


def test_cells_lie_where_their_centres_are() -> None:
    geometry = Geometry((80, 96), (40, 48), patch=8, stride=4)
    cells = np.full(geometry.grid, -1, np.int16)
    cells[2:5, 3:] = 7
    labels = cells_on_pixels(cells, geometry)
    assert labels.shape == (80, 96) and set(np.unique(labels)) == {-1, 7}
    for cell in range(cells.size):
        x, y = geometry.points_xy(np.array([cell]))[0].astype(int)
        assert labels[y, x] == cells.flat[cell]


def test_colours_mean_the_same_in_every_frame() -> None:
    with Engine.open("builtin", threads=1) as engine:
        features = engine.encode(FRAMES[:3], load_size=None)
    colours = PcaColours.fitted(fit_pca(features[:2], "key@3", 3), features[:2])
    projected = [colours.pca.project(item) for item in features]
    pictures = [colours.picture(rows, features[0].geometry) for rows in projected]
    assert [picture.shape for picture in pictures] == [(64, 80, 3)] * 3
    assert pictures[0].min() == 0 and pictures[0].max() == 255
    whole = np.concatenate([p.ravel() for p in pictures])
    assert 50 < whole.mean() < 205
    twice = colours.picture(projected[0], features[0].geometry)
    assert np.array_equal(twice, pictures[0])
    with pytest.raises(InputError, match="2 components"):
        PcaColours.fitted(fit_pca(features, "key@3", 2), features)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40, 64, 65])
def test_samples_are_spread_evenly(count: int) -> None:
    frames = [Frame(np.zeros((8, 8, 3), np.uint8), i, float(i)) for i in range(count)]
    found = [frame.index for frame in spread_sample(iter(frames), SAMPLE)]
    every = next(n for n in (1, 2, 4, 8) if len(range(0, count, n)) <= SAMPLE)
    assert found == list(range(0, count, every))
