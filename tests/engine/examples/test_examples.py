from __future__ import annotations

import array
import asyncio
import os
import runpy
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clips import moving_pictures, write_clip

from facetrt.engine import Engine
from facetrt.engine.examples import control_loop, rerun_viewer, ros2_node
from facetrt.engine.video.sources import open_source
from facetrt.kernels.errors import InputError, MissingDependencyError

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


class Message:
    """Stands for sensor_msgs/Image."""

    def __init__(self, **fields: Any) -> None:
        self.header = SimpleNamespace(stamp=SimpleNamespace(sec=12, nanosec=500_000_000), frame_id="camera")
        self.__dict__ |= fields


def message(rows: Any, encoding: str, padding: int = 0) -> Message:
    height, width = rows.shape[:2]
    padded = np.pad(rows.reshape(height, -1), ((0, 0), (0, padding)), constant_values=255)
    data = array.array("B", padded.tobytes())
    return Message(height=height, width=width, encoding=encoding, step=padded.shape[1], data=data)


ALPHA = np.full((2, 3, 1), 77, np.uint8)
ENCODED = {
    "rgb8": PIXELS,
    "bgr8": PIXELS[..., ::-1],
    "rgba8": np.concatenate([PIXELS, ALPHA], axis=2),
    "bgra8": np.concatenate([PIXELS[..., ::-1], ALPHA], axis=2),
}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ENCODED)
def test_messages_become_pixels(encoding: str, padding: int) -> None:
    pixels = ros2_node.to_pixels(message(ENCODED[encoding], encoding, padding))
    assert np.array_equal(pixels, PIXELS) and pixels.flags.c_contiguous
    grey = ros2_node.to_pixels(message(PIXELS[..., 0], "mono8", padding))
    assert np.array_equal(grey, np.repeat(PIXELS[..., :1], 3, axis=2))


def test_pixels_become_messages() -> None:
    colour = ros2_node.fill_message(Message(), PIXELS)
    assert (colour.height, colour.width, colour.step, colour.encoding) == (2, 3, 9, "rgb8")
    assert np.array_equal(ros2_node.to_pixels(colour), PIXELS)
    grey = ros2_node.fill_message(Message(), PIXELS[..., 1])
    assert (grey.step, grey.encoding, bytes(grey.data)) == (3, "mono8", PIXELS[..., 1].tobytes())
    with pytest.raises(InputError, match=r"expected \(H, W\)"):
        ros2_node.fill_message(Message(), PIXELS.astype(np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoding": "yuv422"}, "expected rgb8"),
        ({"step": 8}, "at least 9 bytes"),
        ({"height": 3}, "expected 3 rows"),
        ({"width": 0}, "0×2 pixels"),
    ],
)
def test_messages_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    given = message(PIXELS, "rgb8")
    given.__dict__ |= changes
    with pytest.raises(InputError, match=said):
        ros2_node.to_pixels(given)


@pytest.mark.parametrize("seconds", [0.0, 12.5, 1_700_000_000.123456])
def test_stamps(seconds: float) -> None:
    stamp = SimpleNamespace(sec=0, nanosec=0)
    ros2_node.fill_stamp(stamp, seconds)
    assert isinstance(stamp.sec, int) and 0 <= stamp.nanosec < 10**9
    assert ros2_node.seconds_of(stamp) == pytest.approx(seconds, abs=1e-6)


class Ros:
    """Stands for rclpy: one node, whose ``spin`` sends it images until it has answered."""

    def __init__(self, images: list[Message]) -> None:
        self.images, self.published, self.warnings, self.ended = images, [], [], []  # type: ignore[var-annotated]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rclpy, messages = ModuleType("rclpy"), ModuleType("sensor_msgs.msg")
        rclpy.__dict__.update(
            init=lambda args: None, create_node=lambda name: self, spin=self.spin, try_shutdown=lambda: self.end("ros")
        )
        messages.__dict__["Image"] = Message
        monkeypatch.setitem(sys.modules, "rclpy", rclpy)
        monkeypatch.setitem(sys.modules, "sensor_msgs", ModuleType("sensor_msgs"))
        monkeypatch.setitem(sys.modules, "sensor_msgs.msg", messages)

    def create_publisher(self, kind: Any, topic: str, depth: int) -> Any:
        return SimpleNamespace(publish=self.published.append)

    def create_subscription(self, kind: Any, topic: str, callback: Any, depth: int) -> None:
        self.callback = callback

    def get_logger(self) -> Any:
        return SimpleNamespace(warning=self.warnings.append)

    def end(self, what: str) -> None:
        self.ended.append(what)

    def destroy_node(self) -> None:
        self.end("node")

    def spin(self, node: Any) -> None:
        for image in self.images:
            before = len(self.published) + len(self.warnings)
            self.callback(image)
            end = time.monotonic() + 10
            while len(self.published) + len(self.warnings) == before and time.monotonic() < end:
                time.sleep(0.002)
        raise KeyboardInterrupt


def test_the_node_answers_images(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    good = message(moving_pictures(1, (32, 40))[0], "rgb8")
    ros = Ros([good, message(PIXELS, "yuv422"), good])
    ros.install(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ros2_node.main(["--bundle", str(tiny_bundle), "--load-size", "32"])
    assert [m.encoding for m in ros.published] == ["mono8", "mono8"] and len(ros.warnings) == 1
    first = ros.published[0]
    assert first.header.frame_id == "camera" and ros2_node.seconds_of(first.header.stamp) == 12.5
    assert max(first.data) == 255 and first.height * first.width == len(first.data)
    assert ros.ended == ["node", "ros"]


def test_the_node_goes_on_after_a_frame_that_cannot_be_encoded(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    good = message(moving_pictures(1, (32, 40))[0], "rgb8")
    thin = message(np.zeros((1, 4000, 3), np.uint8), "rgb8")
    ros = Ros([good, thin])
    ros.install(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ros2_node.main(["--bundle", str(tiny_bundle), "--load-size", "4"])
    assert all("patch" in warning for warning in ros.warnings) and len(ros.warnings) == 2


def test_without_ros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(MissingDependencyError, match="ROS 2"):
        ros2_node.main([])


def test_the_control_loop_acts_on_the_newest_frames(tiny_engine: Engine) -> None:
    source = open_source(moving_pictures(8, (32, 40)))
    acted: list[float] = []
    loop = control_loop.run(tiny_engine, source, rate=1000, deadline=30, load_size=32, act=acted.append)
    outcome = asyncio.run(loop)
    assert 1 <= len(outcome.commands) <= 8 and acted == outcome.commands and outcome.missed == 0
    last = tiny_engine.encode([moving_pictures(8, (32, 40))[-1]], load_size=32)[0]
    assert outcome.commands[-1] == control_loop.steer(last)  # the newest frame is never the one that is dropped


def test_the_control_loop_tells_of_missed_deadlines(tiny_engine: Engine) -> None:
    source = open_source(moving_pictures(3, (32, 40)))
    acted: list[float] = []
    loop = control_loop.run(tiny_engine, source, rate=20, deadline=0.001, load_size=32, act=acted.append)
    outcome = asyncio.run(loop)
    assert outcome.missed >= 1 and len(acted) == outcome.missed + len(outcome.commands)


def test_the_control_loop_passes_errors_on(tiny_engine: Engine) -> None:
    source = open_source([moving_pictures(1)[0], np.zeros((4, 4), np.uint8)])
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(control_loop.run(tiny_engine, source, rate=100, load_size=32))
    assert caught.group_contains(InputError, match="frame 1")


def test_the_control_loop_from_the_command_line(
    tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_clip(tmp_path / "clip.avi", moving_pictures(6, (32, 40)))
    control_loop.main(
        [str(clip), "--bundle", str(tiny_bundle), "--load-size", "32", "--frames", "2", "--deadline", "9"]
    )
    assert "deadlines missed" in capsys.readouterr().out


@pytest.mark.parametrize("example", [control_loop, rerun_viewer, ros2_node])
def test_as_programs_examples_end_with_the_message_alone(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if example is rerun_viewer:
        pytest.importorskip("rerun", reason="the extra viz is not installed")
    monkeypatch.setitem(sys.modules, "rclpy", None)
    given = {control_loop: ["missing.mp4"], rerun_viewer: ["missing.mp4", "--save", os.devnull], ros2_node: []}
    monkeypatch.setattr(sys, "argv", ["example", *given[example]])
    with pytest.raises(SystemExit, match=r"missing\.mp4 does not exist|ROS 2"):
        runpy.run_path(str(example.__file__), run_name="__main__")


@pytest.mark.parametrize("option", [["--rate", "0"], ["--frames", "-1"]])
def test_options_of_the_control_loop_that_cannot_be(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        control_loop.main(["clip.mp4", *option])
    assert "expected a rate above 0" in capsys.readouterr().err


def test_steering_is_relative_to_the_middle(tiny_engine: Engine) -> None:
    features = tiny_engine.encode([moving_pictures(1, (32, 40))[0]], load_size=None)[0]
    column = np.unravel_index(features.saliency.argmax(), features.grid)[1]
    assert control_loop.steer(features) == pytest.approx((column + 0.5) / features.grid[1] * 2 - 1)


def test_colours_mean_the_same_in_all_frames(tiny_engine: Engine) -> None:
    first, second = tiny_engine.encode(moving_pictures(2, (32, 40)), load_size=None)
    colour = rerun_viewer.colouring(first, "key@1")
    assert colour(first).shape == (*first.grid, 3) and colour(first).dtype == np.uint8
    assert (colour(first).reshape(-1, 3).max(axis=0) == 255).all() and (colour(first).min(axis=(0, 1)) == 0).all()
    assert not np.array_equal(colour(first), colour(second))


class Rerun:
    """Stands for the library, and keeps what is logged."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.logged: list[tuple[str, Any]] = []
        self.Image = self.Scalars = lambda value: value

    def set_time(self, timeline: str, *, duration: float) -> None:
        self.times.append(duration)

    def log(self, path: str, value: Any) -> None:
        self.logged.append((path, value))


def test_the_viewer_gets_every_frame(tiny_engine: Engine) -> None:
    rerun, pictures = Rerun(), moving_pictures(5, (32, 40))
    with tiny_engine.stream(pictures, load_size=None) as stream:
        rerun_viewer.show(rerun, stream, "key@1", limit=3)
    assert rerun.times == [0.0, 1.0, 2.0]
    assert [path for path, _ in rerun.logged[:5]] == ["frame", "descriptors", "saliency", "latency_ms", "dropped"]
    assert np.array_equal(rerun.logged[5][1], pictures[1])


def test_a_recording(tmp_path: Path, tiny_bundle: Path) -> None:
    pytest.importorskip("rerun", reason="the extra viz is not installed")
    clip = write_clip(tmp_path / "clip.avi", moving_pictures(3, (32, 40)))
    out = tmp_path / "out.rrd"
    rerun_viewer.main([str(clip), "--bundle", str(tiny_bundle), "--load-size", "32", "--save", str(out)])
    assert out.stat().st_size > 3 * 32 * 40 * 3


def test_without_rerun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(MissingDependencyError, match=r"facetrt\[viz\]"):
        rerun_viewer.main(["clip.mp4"])
