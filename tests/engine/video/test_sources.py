from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from clips import damaged, moving_pictures, turned, write_clip
from PIL import Image
from rtsp import camera

from facetrt.engine.video import sources
from facetrt.engine.video.sources import (
    CameraSource,
    FileSource,
    Frame,
    NetworkSource,
    Source,
    as_frame,
    open_source,
)
from facetrt.engine.video.writing import VideoWriter
from facetrt.kernels.errors import InputError, MissingDependencyError, MissingFileError, SourceError


def read(source: Source) -> list[Frame]:
    with source:
        return list(source)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", moving_pictures(12))


@pytest.fixture(scope="module")
def avi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.avi", moving_pictures(12))


@pytest.mark.parametrize("clip", ["mp4", "avi"])
def test_frames_are_those_that_another_decoder_gives(clip: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(clip)
    frames, other = read(FileSource(path)), cv2.VideoCapture(str(path))
    assert [f.index for f in frames] == list(range(12))
    assert [f.timestamp for f in frames] == pytest.approx([i / 25 for i in range(12)])
    for frame, true in zip(frames, moving_pictures(12), strict=True):
        assert np.array_equal(frame.pixels, other.read()[1][..., ::-1])
        assert np.abs(frame.pixels.astype(int) - true).mean() < 8  # compressed, but RGB and not BGR


def test_what_decodes_is_known(mp4: Path) -> None:
    with open_source(mp4) as source:
        assert (source.decoder, source.live, source.fps, source.frame_count) == ("pyav", False, 25, 12)
        assert source.name == str(mp4)


@pytest.mark.parametrize("kind", ["file", "address", "written"])
def test_without_pyav_the_extras_are_named(kind: str, mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"facetrt\[cpu\].*facetrt\[gpu\]"):
        if kind == "written":
            VideoWriter(mp4.with_name("written.mp4"), 25, (64, 80))
        else:
            open_source(mp4 if kind == "file" else "rtsp://127.0.0.1/1")
    assert len(read(open_source(moving_pictures(3)))) == 3


@pytest.mark.parametrize(("degrees", "quarters"), [(90, 3), (180, 2), (270, 1)])
def test_rotation_metadata_turns_frames(mp4: Path, degrees: int, quarters: int) -> None:
    upright = read(open_source(mp4))[3].pixels
    frame = read(open_source(turned(mp4, degrees)))[3]
    assert np.array_equal(frame.pixels, np.rot90(upright, quarters))  # counter-clockwise
    assert frame.pixels.flags.c_contiguous


def test_a_variable_frame_rate_gives_the_files_own_times(tmp_path: Path) -> None:
    import av

    path, times = tmp_path / "variable.mp4", [0, 40, 100, 300, 310, 700]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, pixels in zip(times, moving_pictures(6), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = read(open_source(path))
    assert [f.timestamp for f in frames] == pytest.approx([t / 1000 for t in times])
    assert [f.index for f in frames] == list(range(6))


@pytest.mark.parametrize(("clip", "junk"), [("mp4", b"\xff"), ("avi", b"\0")])
def test_corrupt_packets_are_skipped_and_counted(clip: str, junk: bytes, request: pytest.FixtureRequest) -> None:
    path = damaged(request.getfixturevalue(clip), [5], junk)
    with open_source(path) as source:
        frames = list(source)
    assert source.skipped == 1
    assert [f.index for f in frames] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert frames[5].timestamp == pytest.approx(6 / 25)


def test_a_file_that_was_cut_gives_what_is_there(avi: Path, tmp_path: Path) -> None:
    data = avi.read_bytes()
    path = tmp_path / "cut.avi"
    path.write_bytes(data[: len(data) * 6 // 10])
    frames = read(open_source(path))
    assert 4 <= len(frames) <= 8
    whole = read(open_source(avi))
    for frame in frames[:-1]:
        assert np.array_equal(frame.pixels, whole[frame.index].pixels)


def test_a_video_of_corrupt_packets_alone_is_an_error(mp4: Path) -> None:
    with pytest.raises(InputError, match="no frame that can be decoded"):
        read(open_source(damaged(mp4, list(range(12)))))


@pytest.mark.parametrize("name", ["text.mp4", "text.txt", "text"])
def test_what_is_no_video_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("no video\n" * 50)
    with pytest.raises(InputError, match=f"{name} is not a video"):
        open_source(tmp_path / name)


def test_a_file_without_pictures_is_an_error(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match="no video in it"):
        open_source(path)


def test_paths_that_give_no_frames(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        open_source(tmp_path / "missing.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(InputError, match="is empty"):
        open_source(tmp_path / "empty.mp4")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        open_source(tmp_path / "folder")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="one image"):
        open_source(tmp_path / "one.png")


def test_a_folder_is_read_in_natural_order_without_its_damaged_images(tmp_path: Path) -> None:
    for number in (1, 2, 10, 11):
        Image.new("RGB", (9, 7), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "frame3.png").write_bytes((tmp_path / "frame2.png").read_bytes()[:40])
    with open_source(tmp_path) as source:
        frames = list(source)
    assert [int(f.pixels[0, 0, 0]) for f in frames] == [1, 2, 10, 11]
    assert [(f.index, f.timestamp) for f in frames] == [(0, 0.0), (1, 1.0), (3, 3.0), (4, 4.0)]
    assert (source.skipped, source.frame_count, source.decoder) == (1, 5, "pillow")


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (31, 33)])
def test_odd_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (open_source([pixels]), open_source(tmp_path), open_source([tmp_path / "a.png"])):
        (frame,) = read(source)
        assert np.array_equal(frame.pixels, pixels) and frame.size == size


def test_given_arrays_are_copied_and_frames_pass() -> None:
    buffer = np.zeros((4, 5, 3), np.uint8)

    def reused() -> Iterator[Any]:
        for value in (1, 2):
            buffer[:] = value
            yield buffer
        yield Frame(buffer, 7, 0.25)
        yield buffer[:, ::-1]

    frames = list(open_source(reused()))
    assert [int(f.pixels[0, 0, 0]) for f in frames] == [1, 2, 2, 2]
    assert [(f.index, f.timestamp) for f in frames] == [(0, 0.0), (1, 1.0), (7, 0.25), (8, 8.0)]
    assert frames[2].pixels is buffer and frames[3].pixels.flags.c_contiguous


class Device:
    """An array that lies on a device, as DLPack tells it."""

    def __init__(self, pixels: Any, kind: int = 2) -> None:
        self.pixels, self.kind = pixels, kind

    def __dlpack__(self, **options: Any) -> Any:
        return self.pixels.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0


class WithGet(Device):
    def get(self) -> Any:
        return self.pixels


class WithCpu(Device):
    def cpu(self) -> Any:
        return Device(self.pixels, 1)


def test_dlpack_arrays() -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    for given in (Device(pixels, 1), WithGet(pixels), WithCpu(pixels)):
        frame = as_frame(given, 0)
        assert np.array_equal(frame.pixels, pixels) and not np.shares_memory(frame.pixels, pixels)
    with pytest.raises(InputError, match=r"on a device .* copy it"):
        as_frame(Device(pixels), 0)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        5,
        None,
    ],
)
def test_frames_of_another_kind_are_errors(bad: Any) -> None:
    with pytest.raises(InputError, match=r"frame 1 is .*expected .*\(height, width, 3\) uint8 RGB"):
        list(open_source([np.zeros((4, 5, 3), np.uint8), bad]))


def test_frames_are_checked() -> None:
    with pytest.raises(InputError, match="finite time"):
        Frame(np.zeros((4, 5, 3), np.uint8), 0, float("nan"))
    with pytest.raises(InputError, match="index from 0"):
        Frame(np.zeros((4, 5, 3), np.uint8), -1, 0.0)


@pytest.mark.parametrize("given", [None, 1.5, b"clip.mp4", np.zeros((4, 5, 3), np.uint8), True, ""])
def test_what_is_no_source(given: Any) -> None:
    with pytest.raises(InputError, match="expected a video file"):
        open_source(given)


def test_a_damaged_image_of_a_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad\.png"):
        list(open_source([tmp_path / "bad.png"]))
    with pytest.raises(MissingFileError):
        list(open_source([tmp_path / "missing.png"]))


def test_reopening(mp4: Path) -> None:
    source = open_source(mp4)
    first = next(source)
    again = source.reopen()
    assert list(source) == []
    assert np.array_equal(next(again).pixels, first.pixels)
    again.close()
    pictures = moving_pictures(3)
    assert len(list(open_source(pictures).reopen())) == 3
    with pytest.raises(InputError, match="only once"):
        open_source(iter(pictures)).reopen()


class Camera:
    """What OpenCV shows of a camera: ``good`` frames come, None stands for a failure; then it was unplugged."""

    def __init__(self, script: list[int | None], *, opens: bool = True) -> None:
        self.script, self.opens, self.released = script, opens, False
        self.value = 0

    def isOpened(self) -> bool:
        return self.opens

    def set(self, *setting: Any) -> bool:
        return True

    def get(self, setting: int) -> float:
        return 30.0 if setting == cv2.CAP_PROP_FPS else 0.0

    def grab(self) -> bool:
        value = self.script.pop(0) if self.script else None
        self.value = self.value if value is None else value
        return value is not None

    def retrieve(self) -> tuple[bool, Any]:
        return True, np.full((4, 6, 3), (0, 0, self.value), np.uint8)  # BGR

    def release(self) -> None:
        self.released = True


def plug_in(monkeypatch: pytest.MonkeyPatch, camera: Camera) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: camera)
    monkeypatch.setattr(sources, "PATIENCE", 0.05)


def test_an_unplugged_camera_is_an_error_after_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, unplugged := Camera([10, 20, None, 30]))
    frames = []
    with open_source(0) as source, pytest.raises(SourceError, match="camera 0 gives no frames any more"):
        for frame in source:
            frames.append(frame)
    assert [(f.index, int(f.pixels[0, 0, 0])) for f in frames] == [(0, 10), (1, 20), (3, 30)]
    assert source.skipped == 1 and source.live and source.fps == 30 and unplugged.released
    times = [f.timestamp for f in frames]
    assert times == sorted(times) and times[0] >= 0


def test_a_frame_without_pixels_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn(Camera):
        def retrieve(self) -> tuple[bool, Any]:
            return (True, None) if self.value == 66 else super().retrieve()

    plug_in(monkeypatch, Torn([10, 66, 30]))
    frames = []
    with open_source(0) as source, pytest.raises(SourceError):
        frames += source
    assert [f.index for f in frames] == [0, 2] and source.skipped == 1


def test_a_stream_of_the_network() -> None:
    pictures, frames = moving_pictures(40), []
    with camera(pictures, damaged=[17]) as address, open_source(address) as source:
        assert isinstance(source, NetworkSource) and source.live and source.frame_count is None
        assert source.decoder == "pyav" and source.fps == 25 and "secret" not in source.name
        with pytest.raises(SourceError, match="stream gives no frames any more, after 40"):
            frames += source
    assert [f.index for f in frames] == [i for i in range(40) if i != 17] and source.skipped == 1
    for frame in (*frames[:17], *frames[19:]):  # 18 and 19 build upon 17
        assert np.abs(frame.pixels.astype(int) - pictures[frame.index]).mean() < 8
    times = [f.timestamp for f in frames]
    assert times == sorted(times) and times[0] >= 0


def test_a_stream_that_stalls_is_an_error_and_one_that_is_stopped_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "NETWORK_TIMEOUT", 0.5)
    frames = []
    with camera(moving_pictures(40), stalls=True) as address:
        with open_source(address) as source, pytest.raises(SourceError, match="no frames any more"):
            frames += source
        assert len(frames) >= 38
    with camera(moving_pictures(40)) as address, open_source(address) as source:
        next(source)
        source.stop()
        assert list(source) == []


def test_a_stream_that_cannot_be_decoded_for_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_LOST", 3)
    with camera(moving_pictures(40), damaged=range(20, 40)) as address, open_source(address) as source:
        with pytest.raises(SourceError, match="no frames any more"):
            list(source)
        assert 3 <= source.skipped < 10


@pytest.mark.parametrize("error", ["OSError", "IndexError"])
def test_what_pyav_cannot_convert_or_find_is_skipped(mp4: Path, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged headers name pixel formats that do not exist, and packets streams that do not."""
    import av

    def fail(*given: Any, **options: Any) -> Any:
        raise av.error.OSError(95, "not supported") if error == "OSError" else IndexError("list index out of range")

    source = FileSource(mp4)
    frames = list(source._decoded())
    broken = SimpleNamespace(is_corrupt=False, width=96, height=80, colorspace=2, reformat=fail, decode=fail)
    if error == "OSError":
        monkeypatch.setattr(source, "_decoded", lambda: iter([frames[0], broken, frames[2]]))
    else:
        whole = [SimpleNamespace(decode=lambda i=i: [frames[i]]) for i in (0, 2)]
        packets = iter([whole[0], broken, whole[1]])
        source._container.close()
        source._container = SimpleNamespace(demux=lambda stream: packets, close=lambda: None)
    assert [f.index for f in source] == [0, 2] and source.skipped == 1
    source.close()


def test_cameras_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, Camera([], opens=False))
    with pytest.raises(SourceError, match="camera 3 cannot be opened"):
        open_source(3)
    address = f"rtsp://user:{'hushhush'[4:]}@127.0.0.1:9/1"
    with pytest.raises(SourceError, match=r"^rtsp://127\.0\.0\.1:9/1 cannot be opened") as error:
        open_source(address)
    assert "hush@" not in "".join(traceback.format_exception(error.value))  # its password
    with pytest.raises(InputError, match="from 0"):
        CameraSource(-1)
    with pytest.raises(InputError, match="rtsp://"):
        open_source("http://camera.lan/1")
