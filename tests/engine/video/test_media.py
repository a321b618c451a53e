"""Clips as cameras, phones and editors write them: ``tests/cases`` and others of their kinds, made here."""

from __future__ import annotations

import itertools
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import moving_pictures
from helpers import HERE
from PIL import Image

from facetrt.engine.images.finding import find_images
from facetrt.engine.images.first_mask import read_first_mask
from facetrt.engine.images.loading import load_image
from facetrt.engine.video import sources
from facetrt.engine.video.clock import JUMP_OF_BROADCAST, Clock
from facetrt.engine.video.decoded import square_size, turned_by
from facetrt.engine.video.sources import Frame, open_source
from facetrt.engine.video.writing import VideoWriter
from facetrt.kernels.errors import InputError

CASES = HERE / "cases"
PLAIN = CASES / "v_plain.mp4"


def frames_of(source: Any) -> list[Frame]:
    with open_source(source) as opened:
        return list(opened)


def far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def written(
    path: Path,
    pictures: list[np.ndarray],
    stamps: list[int] | None = None,
    base: Fraction = Fraction(1, 25),
    **tags: Any,
) -> Path:
    """H.264 with these time stamps, without reordering; ``tags`` are set on the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "crf": "8"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        stream.codec_context.time_base = base
        for stamp, pixels in zip(stamps, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["exif_ori6.jpg", "exif_ori6_ascii_in_width.jpg", "phone_mpo_ori6.jpg"])
def test_pictures_are_turned(name: str, recwarn: pytest.WarningsRecorder) -> None:
    assert load_image(CASES / name).original_size == (160, 120)
    assert not recwarn.list


def test_a_picture_without_its_last_two_bytes() -> None:
    assert load_image(CASES / "trunc_last2.jpg").original_size == (120, 160)


def test_folders() -> None:
    with pytest.warns(UserWarning, match=r"1 ending in \.heic, IMG_4\.heic the first"):
        found = find_images([CASES / "mixed_folder"])
    names = ["photo.jfif", "photo.jpe", "plain0.jpg", "plain1.jpg"]
    assert [path.name for path in found] in (["IMG_3.avif", *names], names)  # where Pillow reads AVIF
    numbered = [path.stem for path in find_images([CASES / "apple_folder"])]
    assert numbered == ["frame_1", "frame_2", "frame_10"]
    assert len(frames_of(CASES / "apple_folder")) == 3


@pytest.mark.filterwarnings("ignore:.*shades of grey")
@pytest.mark.parametrize("name", ["m_alpha_white.png", "m_white.jpg"])
def test_one_object(name: str) -> None:
    expected = np.zeros((120, 160), int)
    expected[30:80, 10:60] = 1
    np.testing.assert_array_equal(read_first_mask(CASES / name), expected)


@pytest.mark.filterwarnings("ignore:.*each colour is an object")
def test_two_objects_of_equal_grey() -> None:
    values, counts = np.unique(read_first_mask(CASES / "m_two_colours_equal_grey.png"), return_counts=True)
    assert values.tolist() == [0, 1, 2] and counts.tolist() == [16700, 1250, 1250]


def test_the_film_is_read_and_not_the_thumbnail() -> None:
    plain, beside = frames_of(PLAIN), frames_of(CASES / "v_thumb0.mp4")
    assert len(beside) == len(plain) == 10
    assert far(beside[5].pixels, plain[5].pixels) == 0


def test_a_file_with_a_cover_alone_has_no_video(tmp_path: Path) -> None:
    with av.open(str(CASES / "v_thumb0.mp4")) as source, av.open(str(tmp_path / "cover.mp4"), "w") as target:
        cover = source.streams.video[0]
        copied = target.add_stream_from_template(cover)
        copied.disposition = cover.disposition
        for packet in source.demux(cover):
            if packet.size:
                packet.stream = copied
                target.mux(packet)
    with pytest.raises(InputError, match="no video in it but a cover"):
        open_source(tmp_path / "cover.mp4")


def test_mirrored_turned_and_stretched() -> None:
    plain = frames_of(PLAIN)[0].pixels
    assert far(frames_of(CASES / "v_hflip.mp4")[0].pixels, plain[:, ::-1]) == 0
    assert far(frames_of(CASES / "v_rot90.mp4")[0].pixels, np.rot90(plain, -1)) == 0
    assert far(frames_of(CASES / "v_sar2.mp4")[0].pixels, np.repeat(plain, 2, axis=1)) < 4


@pytest.mark.parametrize(("swap", "to_x", "to_y"), list(itertools.product((False, True), (1, -1), (1, -1))))
def test_all_eight_ways_to_lay_a_picture(swap: bool, to_x: int, to_y: int) -> None:
    """A matrix sends (x, y) to ``(a·x + c·y, b·x + d·y)``."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    matrix = np.array([[0, to_x], [to_y, 0]] if swap else [[to_x, 0], [0, to_y]]) << 16
    shown = turned_by(pixels, matrix)
    corners = matrix @ np.array([(0, 0, 5, 5), (0, 3, 0, 3)]) >> 16
    corners -= corners.min(axis=1, keepdims=True)
    for (x, y), (row, column) in zip(corners.T, ((0, 0), (3, 0), (0, 5), (3, 5)), strict=True):
        np.testing.assert_array_equal(shown[y, x], pixels[row, column])


def test_an_angle_that_is_no_quarter_is_said() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    slanted = (np.array([[0.87, -0.5], [0.5, 0.87]]) * 65536).astype(int)
    with pytest.warns(UserWarning, match="no quarter"):
        assert turned_by(pixels, slanted).shape == (4, 6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert turned_by(pixels, np.array([[100, -65536], [65536, 90]])).shape == (6, 4, 3)
        assert turned_by(pixels, np.zeros((2, 2), int)).shape == (4, 6, 3)


def test_pixels_that_are_not_square() -> None:
    assert square_size(720, 576, Fraction(64, 45)) == (1024, 576)
    assert square_size(100, 50, Fraction(1, 2)) == (100, 100)
    for nothing in (None, Fraction(0), Fraction(1), Fraction(900)):
        assert square_size(100, 50, nothing) == (100, 50)


def test_joined_files_go_on() -> None:
    times = [frame.timestamp for frame in frames_of(CASES / "v_concat_same.ts")]
    assert times == pytest.approx([i / 25 for i in range(12)], abs=1e-6)


@pytest.mark.parametrize("jump", [3600, -5, 95443.7])
def test_broadcast_time_that_jumps_goes_on_by_one_frame(tmp_path: Path, jump: float) -> None:
    pieces = []
    for name, begin in (("a", 10.0), ("b", 10.0 + jump)):
        stamps = [round((begin + i / 25) * 90_000) % (1 << 33) for i in range(5)]
        made = written(tmp_path / f"{name}.ts", moving_pictures(5), stamps, Fraction(1, 90_000))
        pieces.append(made.read_bytes())
    (tmp_path / "joined.ts").write_bytes(b"".join(pieces))
    times = [frame.timestamp for frame in frames_of(tmp_path / "joined.ts")]
    assert times == pytest.approx([i / 25 for i in range(10)], abs=1e-4)


def test_the_clock() -> None:
    clock = Clock(0.04)
    given = [0, 0.04, 0.5, 0.54, 0.54, 0.3, None, 0.42, 500, 500.1]
    assert [clock.at(i, raw) for i, raw in enumerate(given)] == pytest.approx(
        [0, 0.04, 0.5, 0.54, 0.58, 0.62, 0.66, 0.70, 0.74, 0.84]
    )
    slow = Clock(1.0)
    assert [slow.at(i, 300.0 * i, 300.0) for i in range(3)] == [0, 300, 600]  # a picture every five minutes, as it says
    assert Clock(0.04, JUMP_OF_BROADCAST).at(3, 1e6) == pytest.approx(0.12)


def test_variable_frame_rates_keep_their_times(tmp_path: Path) -> None:
    stamps = [0, 40, 100, 300, 310, 9000]
    path = written(tmp_path / "v.mkv", moving_pictures(6), stamps, Fraction(1, 1000))
    assert [frame.timestamp for frame in frames_of(path)] == pytest.approx([t / 1000 for t in stamps])


@pytest.mark.parametrize("name", ["2024-05-01T12:30:00.mp4", "-first.mp4", "100%03d.mp4", "pipe:0", "rtsp:x.mp4"])
def test_any_name_is_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(PLAIN.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(frames_of(name)) == len(frames_of(tmp_path / name)) == 10


def test_a_file_that_looks_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rtsp:").mkdir()
    (tmp_path / "rtsp:" / "x.mp4").write_bytes(PLAIN.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(frames_of("rtsp://x.mp4")) == 10


def test_colours_are_those_of_an_hd_player() -> None:
    for name in ("v_709_tagged.mp4", "v_709_untagged.mp4"):
        assert np.abs(frames_of(CASES / name)[0].pixels[360, 640].astype(int) - (200, 40, 30)).max() <= 3


@pytest.mark.parametrize(("size", "matrix"), [((720, 1280), 1), ((64, 96), 5)])
def test_what_is_written_is_tagged_with_its_colours(size: tuple[int, int], matrix: int, tmp_path: Path) -> None:
    pixels = np.full((*size, 3), (200, 40, 30), np.uint8)
    with VideoWriter(tmp_path / "out.mp4", 25, size) as writer:
        writer.write(pixels)
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (matrix, 1)
        if matrix == 1:
            assert (context.color_primaries, context.color_trc) == (1, 1)
    assert far(frames_of(tmp_path / "out.mp4")[0].pixels, pixels) < 3


def test_full_range_colours(tmp_path: Path) -> None:
    """A telephone's: the pixels use all values and say so."""
    pixels = np.full((64, 96, 3), (200, 40, 30), np.uint8)
    path = tmp_path / "full.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.color_range = 2
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", src_color_range=2, dst_color_range=2
        )
        frame.color_range = 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert far(frames_of(path)[0].pixels, pixels) < 4


@pytest.mark.parametrize("name", ["v_anim.gif", "v_anim.webp"])
def test_animated_pictures_are_clips(name: str) -> None:
    with open_source(CASES / name) as source:
        frames = list(source)
        assert (source.frame_count, len(frames), source.skipped, source.live) == (6, 6, 0, False)
    assert frames[0].size == (120, 160)
    assert far(frames[0].pixels, frames[-1].pixels) > 1


@pytest.mark.parametrize(("suffix", "options"), [(".gif", {}), (".png", {}), (".webp", {"lossless": True})])
def test_animations_keep_their_durations(suffix: str, options: dict[str, Any], tmp_path: Path) -> None:
    first, *rest = (Image.fromarray(pixels) for pixels in moving_pictures(4))
    path = tmp_path / f"clip{suffix}"
    first.save(path, save_all=True, append_images=rest, duration=[100, 300, 40, 100], **options)
    with open_source(path) as source:
        assert [frame.timestamp for frame in source] == pytest.approx([0, 0.1, 0.4, 0.44])
        assert source.fps == pytest.approx(4 / 0.54)


def test_the_default_picture_of_an_animated_png_is_no_frame(tmp_path: Path) -> None:
    default, *rest = (Image.fromarray(pixels) for pixels in moving_pictures(4))
    default.save(tmp_path / "a.png", save_all=True, default_image=True, append_images=rest, duration=50)
    frames = frames_of(tmp_path / "a.png")
    assert len(frames) == 3 and far(frames[0].pixels, np.asarray(rest[0])) == 0


@pytest.mark.parametrize("name", ["exif_ori6.jpg", "phone_mpo_ori6.jpg", "m_white.jpg", "m_alpha_white.png"])
def test_one_picture_is_no_clip(name: str) -> None:
    with pytest.raises(InputError, match="is one image"):
        open_source(CASES / name)


def with_sound(path: Path, codec: str, delay: float = 0.0) -> Path:
    """30 frames of a film and a tone that begins after ``delay`` seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 80, 96, "yuv420p"
        audio = container.add_stream(codec, rate=48_000, layout="mono")
        for number, pixels in enumerate(moving_pictures(30)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        silent = np.arange(57_600) < delay * 48_000
        tone = np.where(silent, 0, np.sin(np.arange(57_600) / 10)).astype(np.float32)[None]
        given = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        given.sample_rate, given.pts = 48_000, 0
        context = audio.codec_context
        resampler = av.AudioResampler(context.format.name, "mono", 48_000, frame_size=context.frame_size or 1024)
        for part in resampler.resample(given) + resampler.resample(None):
            container.mux(audio.encode(part))
        container.mux(audio.encode())
    return path


def onset(path: Path) -> float:
    """Seconds after which the sound is loud."""
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            values = np.abs(frame.to_ndarray().astype(np.float64)).reshape(-1)
            loud = values > (0.2 if values.max() <= 2 else 6000)
            if loud.any():
                return float(frame.time) + int(loud.argmax()) / 48_000
    raise AssertionError("there is no sound")


def copied(source: Path, out: Path, first: int = 0) -> None:
    with open_source(source) as opened:
        frames = list(opened)
        with VideoWriter(out, 25, frames[0].size, sound=opened.sound) as writer:
            for frame in frames[first:]:
                writer.write(frame.pixels, frame.timestamp)


@pytest.mark.parametrize(
    ("source", "codec"), [("a.mp4", "aac"), ("a.ts", "aac"), ("a.mkv", "libopus"), ("a.ts", "ac3")]
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_copied_beside_the_frames(source: str, codec: str, suffix: str, tmp_path: Path) -> None:
    given, out = with_sound(tmp_path / source, codec, delay=0.6), tmp_path / f"out{suffix}"
    copied(given, out)
    with av.open(str(out)) as container:
        assert len(container.streams.audio) == 1
    assert len(frames_of(out)) == 30
    assert onset(out) == pytest.approx(0.6, abs=0.05)
    copied(given, out, first=10)  # what begins later takes its sound with it
    assert onset(out) == pytest.approx(0.2, abs=0.05)


def test_sound_that_cannot_be_copied_is_said(tmp_path: Path) -> None:
    given = with_sound(tmp_path / "a.avi", "adpcm_ima_wav")
    with pytest.warns(UserWarning, match=r"\.mp4 cannot hold its sound \(adpcm_ima_wav\)"):
        copied(given, tmp_path / "out.mp4")
    with pytest.warns(UserWarning, match="gets no sound"):
        copied(with_sound(tmp_path / "b.mp4", "aac"), tmp_path / "out.avi")
    assert len(frames_of(tmp_path / "out.mp4")) == len(frames_of(tmp_path / "out.avi")) == 30


def test_reordered_frames_of_avi_are_in_time(tmp_path: Path) -> None:
    times = [frame.timestamp for frame in frames_of(with_sound(tmp_path / "a.avi", "pcm_s16le"))]
    assert times == pytest.approx([i / 25 for i in range(30)], abs=1e-6)


def test_of_two_films_the_larger_one_is_read(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = []
        for size in ((48, 64), (80, 96)):
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            streams.append((stream, moving_pictures(3, size)))
        for stream, pictures in streams:
            for number, pixels in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    assert frames_of(tmp_path / "two.mkv")[0].size == (80, 96)


def test_an_address_is_one_only_where_no_file_has_its_name(tmp_path: Path) -> None:
    assert sources.is_address("rtsp://camera/1") and sources.is_address("rtsp://" + "x" * 9000)
    assert not sources.is_address(str(tmp_path))
