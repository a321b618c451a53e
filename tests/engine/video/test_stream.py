from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import Pixels, damaged, moving_pictures, write_clip

from facetrt.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.video import stream as streaming
from facetrt.engine.video.propagation import MaskPropagator
from facetrt.engine.video.sources import Frame, Source, open_source
from facetrt.engine.video.stream import LATENCIES, Policy, StreamResult
from facetrt.engine.video.tracking import Tracker
from facetrt.kernels.errors import BackendError, InputError, MissingFileError, SourceError

PATIENCE = 10.0  # seconds until a test gives up on a thread


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("facetrt-")]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            pytest.fail("this never happened")
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    wait_until(lambda: not our_threads())


@pytest.fixture
def pictures() -> list[Pixels]:
    return moving_pictures(6, (32, 40))


def assert_equal(a: Features, b: Features) -> None:
    assert list(a.tokens) == list(b.tokens) and a.geometry == b.geometry and a.provenance == b.provenance
    for facet, rows in a.tokens.items():
        assert np.array_equal(rows, b.tokens[facet])
    assert a.attention is not None and b.attention is not None
    assert np.array_equal(a.attention, b.attention) and np.array_equal(a.pixels, b.pixels)


class Gate(Source):
    """A live source whose frames the test lets through, and which counts what was read of it."""

    decoder, live = "given", True

    def __init__(self, pictures: list[Pixels]) -> None:
        super().__init__(pictures, "gate")
        self.pictures, self.open, self.read, self.released = pictures, threading.Semaphore(0), 0, False

    def _frames(self) -> Any:
        for index, pixels in enumerate(self.pictures):
            while not self.open.acquire(timeout=0.01):
                if self._closed or self.released:
                    return
            self.read += 1
            yield Frame(pixels, index, index / 10)

    def _release(self) -> None:
        self.released = True

    def let(self, count: int) -> None:
        for _ in range(count):
            self.open.release()


@pytest.mark.parametrize("saliency", ["full", "low_resolution"])
@pytest.mark.parametrize("policy", ["block", "latest"])
def test_a_stream_gives_what_encode_gives(
    tiny_engine: Engine, pictures: list[Pixels], saliency: str, policy: str
) -> None:
    options: dict[str, Any] = {"load_size": 48, "saliency": saliency, "stride": 8}

    def slow() -> Iterator[Pixels]:
        for pixels in pictures:
            yield pixels
            taken.acquire(timeout=PATIENCE)  # so that ``latest`` drops none

    taken = threading.Semaphore(0)
    results = []
    with tiny_engine.stream(slow(), policy=policy, **options) as stream:
        for result in stream:
            results.append(result)
            taken.release()
    assert [r.frame.index for r in results] == list(range(6)) and stream.policy == policy
    for result, pixels in zip(results, pictures, strict=True):
        assert np.array_equal(result.frame.pixels, pixels) and result.dropped == 0 and result.latency > 0
        assert_equal(result.features, tiny_engine.encode([pixels], **options)[0])


def test_a_stream_and_a_batch_agree_to_rounding(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    batch = tiny_engine.encode(pictures, load_size=None)
    with tiny_engine.stream(pictures, load_size=None) as stream:
        for result, features in zip(stream, batch, strict=True):
            for facet in features.facets:
                assert np.allclose(result.features[facet], features[facet], atol=1e-4)


def test_results_own_their_arrays(tiny_engine: Engine) -> None:
    buffer = np.zeros((32, 32, 3), np.uint8)

    def reused() -> Iterator[Pixels]:
        for value in (10, 200):
            buffer[:] = value
            yield buffer

    with tiny_engine.stream(reused(), load_size=None) as stream:
        first, second = stream
    assert (first.frame.pixels == 10).all() and (first.features.pixels == 10).all()
    assert (second.frame.pixels == 200).all()
    arrays = [[*r.features.tokens.values(), r.features.attention, r.features.pixels] for r in (first, second)]
    assert not any(np.shares_memory(a, b) for a in arrays[0] for b in arrays[1] if a is not None and b is not None)


def test_a_video_file(tiny_engine: Engine, tmp_path: Path) -> None:
    clip = damaged(write_clip(tmp_path / "clip.mp4", moving_pictures(8)), [4])
    with tiny_engine.stream(clip, load_size=32) as stream:
        assert stream.source is not None and stream.source.fps == 25 and stream.policy is Policy.BLOCK
        results = list(stream)
    assert [r.frame.index for r in results] == [0, 1, 2, 3, 5, 6, 7]
    assert [r.frame.timestamp for r in results] == pytest.approx([i / 25 for i in (0, 1, 2, 3, 5, 6, 7)])
    assert (stream.report.frames, stream.report.skipped, stream.report.dropped) == (7, 1, 0)
    assert results[0].features.name == f"{clip}, frame 0"


def test_frames_may_change_their_size(tiny_engine: Engine) -> None:
    sizes = [(32, 32), (33, 47), (64, 32)]
    frames = [np.full((*size, 3), 9, np.uint8) for size in sizes]
    with tiny_engine.stream(frames, load_size=None) as stream:
        assert [r.features.image_size for r in stream] == sizes


def test_a_frame_that_cannot_be_encoded_comes_in_its_turn(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    results: list[StreamResult[Features]] = []
    stream = tiny_engine.stream([*pictures[:2], pictures[2][:1], pictures[3]], load_size=None)
    with pytest.raises(InputError, match="frame 2: an image of 1×40"):
        results.extend(stream)
    assert len(results) == 2 and list(stream) == [] and not our_threads()


def test_what_a_source_raises_comes_in_its_turn(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    def failing() -> Iterator[Pixels]:
        yield pictures[0]
        raise ZeroDivisionError("of the caller's")

    with tiny_engine.stream(failing(), load_size=None) as stream:
        assert next(stream).frame.index == 0
        with pytest.raises(ZeroDivisionError, match="of the caller's"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_block_reads_a_bounded_number_ahead_and_loses_nothing(tiny_engine: Engine) -> None:
    read: list[int] = []

    def counted() -> Iterator[Pixels]:
        for index in range(30):
            read.append(index)
            yield np.full((32, 32, 3), index, np.uint8)

    ahead = streaming.FRAMES_AHEAD + streaming.RESULTS_AHEAD + 2  # one in each thread's hands
    with tiny_engine.stream(counted(), load_size=None) as stream:
        for number, result in enumerate(stream, start=1):
            time.sleep(0.01)  # a slow consumer
            assert result.frame.index == number - 1 and len(read) <= number + ahead
    assert len(read) == 30 and stream.report.frames == 30 and stream.report.dropped == 0


def test_encoding_goes_on_while_the_consumer_works(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    read = threading.Semaphore(0)

    def counted() -> Iterator[Pixels]:
        for pixels in pictures:
            read.release()
            yield pixels

    with tiny_engine.stream(counted(), load_size=None) as stream:
        next(stream)
        # Without another result being asked for: the second one waits, the third is in the encoder's hands, two frames
        # wait, and the sixth is in the reader's.
        assert all(read.acquire(timeout=PATIENCE) for _ in range(6))


def test_latest_drops_all_but_the_newest(tiny_engine: Engine) -> None:
    gate = Gate(moving_pictures(10, (32, 32)))
    with tiny_engine.stream(gate, load_size=None) as stream:
        assert stream.policy is Policy.LATEST
        gate.let(1)
        first = next(stream)
        gate.let(6)
        wait_until(lambda: gate.read == 7 and stream.report.dropped == 5)
        second = next(stream)
        gate.let(1)
        third = next(stream)
    assert [(r.frame.index, r.dropped) for r in (first, second, third)] == [(0, 0), (6, 5), (7, 0)]
    assert (stream.report.frames, stream.report.dropped) == (3, 5) and gate.released
    assert second.frame.timestamp == pytest.approx(0.6)


def test_latest_gives_the_last_frame_before_it_ends(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    with tiny_engine.stream(pictures, load_size=None, policy="latest") as stream:
        results = list(stream)
    assert results[-1].frame.index == 5
    assert len(results) + stream.report.dropped == 6


def test_put(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    with tiny_engine.stream(load_size=None) as stream:
        assert stream.policy is Policy.LATEST and stream.source is None
        assert not stream.put(pictures[0], 1.5)
        assert stream.put(pictures[1], 2.5) and stream.put(pictures[2].copy(), 3.5)
        result = next(stream)
        assert (result.frame.index, result.frame.timestamp, result.dropped) == (2, 3.5, 2)
        assert_equal(result.features, tiny_engine.encode([pictures[2]], load_size=None)[0])
        with pytest.raises(InputError, match="uint8 RGB"):
            stream.put(pictures[0].astype(np.float32))
        assert not stream.put(pictures[3])
        stream.finish()
        with pytest.raises(InputError, match="finished or closed"):
            stream.put(pictures[4])
        last = next(stream)
        assert last.frame.index == 3 and last.dropped == 0 and last.frame.timestamp > 0
        assert list(stream) == []
    assert stream.report.frames == 2 and stream.report.dropped == 2


def test_put_with_block_waits_for_room_and_loses_nothing(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    def put_all() -> None:
        for pixels in pictures * 5:
            dropped.append(stream.put(pixels))
        stream.finish()

    dropped: list[bool] = []
    with tiny_engine.stream(load_size=None, policy="block") as stream:
        thread = threading.Thread(target=put_all)
        thread.start()
        assert [r.frame.index for r in stream] == list(range(30))
        thread.join(PATIENCE)
    assert dropped == [False] * 30


def test_put_with_block_says_that_nobody_takes(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    with (
        tiny_engine.stream(load_size=None, policy="block", stall_timeout=0.05) as stream,
        pytest.raises(SourceError, match=r"no frame was taken for 0\.05 s"),
    ):
        for pixels in pictures * 3:
            stream.put(pixels)


def test_finish_ends_a_consumer_that_waits(tiny_engine: Engine) -> None:
    with tiny_engine.stream() as stream:
        threading.Timer(0.05, stream.finish).start()
        assert list(stream) == []


def test_putting_and_sources_exclude_each_other(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    with tiny_engine.stream(pictures) as stream:
        with pytest.raises(InputError, match="without a source"):
            stream.put(pictures[0])
        with pytest.raises(InputError, match="ends by itself"):
            stream.finish()


@pytest.mark.parametrize("policy", ["latest", "block"])
def test_a_stalled_live_source_is_an_error(tiny_engine: Engine, pictures: list[Pixels], policy: str) -> None:
    gate = Gate(pictures)
    with tiny_engine.stream(gate, load_size=None, policy=policy, stall_timeout=0.1) as stream:
        gate.let(1)
        assert next(stream).frame.index == 0
        with pytest.raises(SourceError, match=r"no frame was given by gate for 0\.1 s"):
            next(stream)
        assert gate.released and list(stream) == []


@pytest.mark.parametrize("policy", ["latest", "block"])
def test_a_source_that_ends_by_an_error_gives_its_frames_first(
    tiny_engine: Engine, pictures: list[Pixels], policy: str
) -> None:
    def unplugged() -> Iterator[Pixels]:
        yield pictures[0]
        raise SourceError("camera 0 gives no frames any more")

    with tiny_engine.stream(unplugged(), load_size=None, policy=policy) as stream:
        assert next(stream).frame.index == 0
        with pytest.raises(SourceError, match="camera 0"):
            next(stream)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("policy", ["latest", "block"])
def test_an_exception_in_the_consumer_closes_everything(
    tiny_engine: Engine, pictures: list[Pixels], policy: str, kind: type[BaseException]
) -> None:
    gate = Gate(pictures * 10)
    gate.let(8)
    with pytest.raises(kind, match="the consumer's"), tiny_engine.stream(gate, load_size=None, policy=policy) as stream:
        for _ in stream:
            assert our_threads()
            raise kind("the consumer's")
    assert gate.released and not our_threads()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("policy", ["latest", "block"])
def test_ctrl_c_ends_a_consumer_that_waits(tiny_engine: Engine, pictures: list[Pixels], policy: str) -> None:
    gate = Gate(pictures)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), tiny_engine.stream(gate, load_size=None, policy=policy) as stream:
        timer.start()
        next(stream)
    assert gate.released and not our_threads()


def test_a_program_that_ends_with_an_open_stream_ends() -> None:
    code = (
        "import itertools, numpy\n"
        "from facetrt.engine import Engine\n"
        "engine = Engine.open('builtin', threads=1)\n"
        "stream = engine.stream(itertools.repeat(numpy.zeros((32, 32, 3), numpy.uint8)), load_size=None)\n"
        "print(next(stream).frame.index)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


def test_a_loop_that_is_left_ends_the_threads_of_a_forgotten_stream(
    tiny_engine: Engine, pictures: list[Pixels]
) -> None:
    for _ in tiny_engine.stream(pictures * 10, load_size=None):
        break
    gc.collect()
    wait_until(lambda: not our_threads())


@pytest.mark.parametrize("policy", ["latest", "block"])
def test_closing_wakes_a_consumer_that_waits(tiny_engine: Engine, pictures: list[Pixels], policy: str) -> None:
    gate = Gate(pictures)
    with tiny_engine.stream(gate, load_size=None, policy=policy) as stream:
        gate.let(1)
        next(stream)
        timer = threading.Timer(0.05, stream.close)
        timer.start()
        assert list(stream) == [] and gate.released
        timer.join(PATIENCE)
    stream.close()  # twice is allowed


class HeldUp:
    """Gives a frame, and another one only when it is released."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels, self.release = pixels, threading.Event()

    def __iter__(self) -> Iterator[Pixels]:
        yield self.pixels
        self.release.wait(PATIENCE)
        yield self.pixels


def test_closing_does_not_wait_for_a_source_that_is_held_up(
    tiny_engine: Engine, pictures: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "JOIN_SECONDS", 0.05)
    source = HeldUp(pictures[0])
    with tiny_engine.stream(source, load_size=None) as stream:
        next(stream)
    assert our_threads() == ["facetrt-frames"]
    with pytest.raises(SourceError, match="still held up"):
        stream.restart()
    source.release.set()
    wait_until(lambda: not our_threads())
    stream.restart()
    assert len(list(stream)) == 2


def test_a_stream_that_never_began_closes_its_source(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    gate = Gate(pictures)
    with tiny_engine.stream(gate) as stream:
        assert not our_threads()
    assert gate.released and list(stream) == [] and stream.report.seconds == 0


def test_restart(tiny_engine: Engine, tmp_path: Path, pictures: list[Pixels]) -> None:
    clip = write_clip(tmp_path / "clip.mp4", moving_pictures(4))
    with tiny_engine.stream(clip, load_size=32) as stream:
        whole = list(stream)
        stream.restart()
        first = next(stream)
        assert stream.report.frames == 1
        stream.restart()  # in the middle
        again = list(stream)
        assert [r.frame.index for r in again] == [0, 1, 2, 3]
        assert_equal(whole[0].features, first.features)
        clip.unlink()
        with pytest.raises(MissingFileError):
            stream.restart()
    once = tiny_engine.stream(iter(pictures), load_size=None)
    with once, pytest.raises(InputError, match="only once"):
        once.restart()
    with tiny_engine.stream(load_size=None) as stream:
        stream.finish()
        stream.restart()
        stream.put(pictures[0])
        assert next(stream).frame.index == 0


def test_heads_share_one_encode(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    mask = np.zeros(pictures[0].shape[:2], np.int64)
    mask[8:24, 10:30] = 1
    points = np.array([[12.0, 16.0], [25.0, 20.0]])
    facet = tiny_engine.manifest.facets[0]
    encoded = tiny_engine.encode(pictures, load_size=None)
    tracker, propagator = Tracker(facet), MaskPropagator(facet)
    tracks = [tracker.start(encoded[0], points), *(tracker.step(features) for features in encoded[1:])]
    propagator.start(encoded[0], mask)
    masks = [mask, *(propagator.step(features) for features in encoded[1:])]
    with tiny_engine.stream(pictures, load_size=None) as stream:
        stream.attach("track", Tracker(facet).following(points))
        stream.attach("mask", MaskPropagator(facet).following(mask))
        stream.attach("grid", lambda features: features.grid)
        with pytest.raises(InputError, match="'mask' is attached already"):
            stream.attach("mask", lambda features: None)
        results = list(stream)
    for result, track, labels in zip(results, tracks, masks, strict=True):
        np.testing.assert_allclose(result.found["track"].points_xy, track.points_xy, atol=0.1)
        assert (result.found["mask"] == labels).mean() > 0.98
        assert result.found["grid"] == result.features.grid
    report = stream.report
    assert min(report.load, report.encode, report.head) > 0 and report.decode >= 0
    assert report.load + report.encode <= 2 * report.seconds


def test_a_head_that_fails_ends_the_stream(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    with tiny_engine.stream(pictures, load_size=None) as stream:
        stream.attach("broken", lambda features: features["no such facet"])
        with pytest.raises(InputError, match="no such facet"):
            next(stream)
        assert next(stream, None) is None


def test_points_that_are_chosen_and_a_start_that_fails(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    facet = tiny_engine.manifest.facets[0]
    first, second = tiny_engine.encode(pictures[:2], load_size=None)
    follow = Tracker(facet).following([[1e6, 0.0]])
    for features in (first, second):  # it is tried anew
        with pytest.raises(InputError, match="outside the image"):
            follow(features)
    mask = np.zeros((3, 3), np.bool_)
    with pytest.raises(InputError, match="the first mask has shape"):
        MaskPropagator(facet).following(mask)(first)


def test_the_report(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    with tiny_engine.stream(pictures, load_size=None, latency_budget=1e-9) as stream:
        assert stream.report.frames == 0 and stream.report.fps == 0 and stream.report.latency_p99 == 0
        latencies = [result.latency for result in stream]
    report = stream.report
    assert report.late == report.frames == 6
    assert report.latency_max == max(latencies)
    expected = np.percentile(latencies, (50, 95, 99))
    assert [report.latency_p50, report.latency_p95, report.latency_p99] == pytest.approx(expected)
    assert report.fps == pytest.approx(6 / report.seconds)
    assert stream.report == report  # time stands still once it ended
    with tiny_engine.stream(pictures, load_size=None, latency_budget=1000) as stream:
        assert len(list(stream)) == 6 and stream.report.late == 0


def test_latencies_are_kept_in_a_ring() -> None:
    statistics = streaming._Statistics(budget=None)
    statistics.add(1e6)
    for value in range(LATENCIES):
        statistics.add(float(value))
    report = statistics.report(dropped=0, skipped=0)
    assert report.latency_max == 1e6 and report.frames == LATENCIES + 1
    assert report.latency_p50 == pytest.approx((LATENCIES - 1) / 2)  # the first one was overwritten


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "newest"},
        {"latency_budget": 0},
        {"stall_timeout": -1},
        {"stall_timeout": float("inf")},
        {"saliency": "some"},
        {"stride": 3},
        {"load_size": "big"},
    ],
)
def test_options_that_cannot_be(tiny_engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=str(next(iter(options.values())))):
        tiny_engine.stream([], **options)


def test_a_source_that_is_open_already(tiny_engine: Engine, pictures: list[Pixels]) -> None:
    with open_source(pictures) as source, tiny_engine.stream(source, load_size=None) as stream:
        assert stream.source is source and len(list(stream)) == 6


def test_a_closed_engine_is_an_error(tiny_bundle: Path, pictures: list[Pixels]) -> None:
    with Engine.open(tiny_bundle, threads=1) as engine:
        stream = engine.stream(pictures, load_size=None)
        next(stream)
    with pytest.raises(BackendError, match="closed"):
        list(stream)
    with pytest.raises(BackendError, match="closed"):
        next(engine.stream(pictures, load_size=None))
