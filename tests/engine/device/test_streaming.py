"""Streams whose features stay on a fake GPU: real launches and copies, kernels in the interpreter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import photo
from helpers_gpu import FakeGpu, add_kernels
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from facetrt.engine import Engine
from facetrt.engine.cli.main import program
from facetrt.engine.images.loading import Pixels
from facetrt.kernels.errors import BackendError, InputError

POINTS = [[14.0, 18.0], [25.0, 20.0]]


@pytest.fixture
def bundle(planned_bundle: Path, tmp_path: Path, fake_gpu: FakeGpu) -> Path:
    """With a plan and kernels for the fake GPU."""
    return add_kernels(Path(shutil.copytree(planned_bundle, tmp_path / "bundle")), fake_gpu)


@pytest.fixture(scope="module")
def frames() -> list[Pixels]:
    wide = photo(36, 48)
    return [np.ascontiguousarray(wide[:, 2 * i : 2 * i + 36]) for i in range(4)]


@pytest.fixture
def mask() -> NDArray[np.bool_]:
    inside = np.zeros((36, 36), np.bool_)
    inside[8:28, 8:28] = True
    return inside


def attach(engine: Engine, stream: Any, mask: NDArray[np.bool_]) -> None:
    stream.attach("track", engine.tracker("key@1", search_radius=2).following(POINTS))
    stream.attach("mask", engine.propagator(facet="key@2", radius=3).following(mask))


@pytest.mark.parametrize("policy", ["block", "latest"])
def test_heads_find_what_they_find_on_the_host(
    tiny_engine: Engine, bundle: Path, frames: list[Pixels], mask: NDArray[np.bool_], policy: str
) -> None:
    """Of two facets, from one pass; ``latest`` loses the frames that are there before they are asked for."""
    with tiny_engine.stream(frames, load_size=None) as stream:
        attach(tiny_engine, stream, mask)
        expected = {result.frame.index: result.found for result in stream}
    with (
        Engine.open(bundle, device="cuda", backend="tensorrt") as engine,
        engine.stream_on_device(frames, facets=["key@1", "key@2"], load_size=None, policy=policy) as stream,
    ):
        attach(engine, stream, mask)
        results = list(stream)
        down = engine.to_host(results[-1].features)
    assert [result.frame.index for result in results] == [0, 1, 2, 3] or policy == "latest"
    if policy == "block":
        for result in results:
            wanted = expected[result.frame.index]
            np.testing.assert_allclose(result.found["track"].points_xy, wanted["track"].points_xy, atol=0.05)
            np.testing.assert_array_equal(result.found["mask"], wanted["mask"])
    (alone,) = tiny_engine.encode(frames[-1:], load_size=None)
    assert down.facets == ["key@1", "key@2"]
    np.testing.assert_allclose(down["key@2"], alone["key@2"], atol=1e-5)
    np.testing.assert_allclose(down.saliency, alone.saliency, atol=1e-5)
    np.testing.assert_array_equal(down.pixels, frames[-1])


def test_ways_to_the_gpu_and_back_are_counted_while_it_runs(
    bundle: Path, frames: list[Pixels], mask: NDArray[np.bool_]
) -> None:
    with Engine.open(bundle, device="cuda", backend="tensorrt") as engine:
        engine.encode(frames[:1], load_size=None)  # not the stream's
        stream = engine.stream_on_device(frames, load_size=None)
        assert (stream.report.upload, stream.report.download) == (0, 0)
        with stream:
            silent = list(stream)
            assert stream.report.upload > 0 == stream.report.download  # nothing waits for an encoder
        stream.restart()
        with stream:
            attach(engine, stream, mask)
            assert len(list(stream)) == len(silent)
        report = stream.report
        engine.encode(frames[:1], load_size=None)
        assert 0 < report.download <= report.head + report.encode
        assert stream.report == report
        with engine.stream(frames, load_size=None) as plain:
            list(plain)
            assert min(plain.report.upload, plain.report.download) > 0


def test_an_engine_closes_when_a_head_is_done_with_it(bundle: Path, frames: list[Pixels]) -> None:
    engine = Engine.open(bundle, device="cuda", backend="tensorrt")
    backend: Any = engine._encoder.backend
    features = engine.encode_on_device(frames[:1], load_size=None)[0]
    with backend.stream() as device:
        engine.close()
        device.download(features["key@1"].device is device or device.adopt(features["key@1"]))
    assert device.closed
    with pytest.raises(BackendError, match="closed"):
        engine.to_host(features)


def test_frames_must_fit(bundle: Path, frames: list[Pixels]) -> None:
    with Engine.open(bundle, device="cuda", backend="tensorrt") as engine:
        with engine.stream_on_device([frames[0], np.zeros((4, 4, 3), np.uint8)], load_size=None) as stream:
            next(stream)
            with pytest.raises(InputError, match="frame 1"):
                next(stream)
        features = engine.encode_on_device(frames[:1], facets=["key@2"], load_size=None)[0]
        with pytest.raises(InputError, match="key@2 on the device, and key@1 was asked for"):
            engine.tracker("key@1").start(features, POINTS)


def test_the_command_leaves_them_there(bundle: Path, tmp_path: Path, frames: list[Pixels], fake_gpu: FakeGpu) -> None:
    """Unless a task needs them on the host."""
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    common = ["--bundle", str(bundle), "--device", "cuda", "--backend", "tensorrt", "--load-size", "none"]
    common += ["--point", "14,18"]
    for tasks, there in (("track", True), ("track,pca", False)):
        fake_gpu.gpu.launches.clear()
        out = tmp_path / f"{there}.mp4"
        arguments = ["video", str(tmp_path / "frames"), "--task", tasks, "--out", str(out), *common]
        CliRunner().invoke(program(), arguments, catch_exceptions=False)
        assert ("track_align" in {name for name, _, _ in fake_gpu.gpu.launches}) == there
        record = json.loads(out.with_suffix(".json").read_text())
        assert record["report"]["frames"] == 4 and record["report"]["upload"] > 0
