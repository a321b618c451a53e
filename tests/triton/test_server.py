"""The models in Triton itself, over the wire, asked by NVIDIA's own client. ``tests/serve.sh`` makes an environment.

It needs no torch, so nothing here comes from the other tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not (find_spec("pytriton") or shutil.which("tritonserver")) or int(np.__version__.partition(".")[0]) > 1:
    pytest.skip("there is no Triton that fits this environment: bash tests/serve.sh", allow_module_level=True)

import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from facetrt.engine import Engine, learn_cosegmentation
from facetrt.engine.images.loading import load_image
from facetrt.engine.samples import sample_paths
from facetrt.engine.serving.tasks import TaskOptions, read_tasks
from facetrt.engine.serving.triton_config import EncoderPlatform, RepositoryOptions
from facetrt.engine.serving.triton_repository import write_repository
from facetrt.engine.serving.triton_server import ServerOptions, TritonServer

SIDE = 64
PHOTOS = list(sample_paths().values())
INSIDE = EncoderPlatform.INSIDE
STAND_IN = """
import numpy as np
import triton_python_backend_utils as server
from facetrt.engine import Engine

class TritonPythonModel:
    def initialize(self, args):
        self.backend = Engine.open("builtin", backend="onnxruntime")._encoder.backend

    def execute(self, requests):
        found = []
        for request in requests:
            outputs = self.backend.run({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
            found.append(server.InferenceResponse([server.Tensor(name, values) for name, values in outputs.items()]))
        return found
"""


def ports() -> ServerOptions:
    """Three that are free."""
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    numbers = [each.getsockname()[1] for each in found]
    for each in found:
        each.close()
    return ServerOptions(http_port=numbers[0], grpc_port=numbers[1], metrics_port=numbers[2], response_cache=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.open("builtin") as engine:
        yield engine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[ServerOptions]:
    work, where = tmp_path_factory.mktemp("triton"), ports()
    features = engine.encode(PHOTOS[:2], load_size=SIDE)
    learn_cosegmentation(engine, features, sample_interval=5).save(work / "learned.npz")
    names = read_tasks("match,cosegment,apply,discover,track")
    tasks = TaskOptions(names, load_size=SIDE, learned=work / "learned.npz", method="lost")
    write_repository("builtin", work / "models", tasks, RepositoryOptions(encoder=INSIDE, waiting=200))
    with TritonServer(work / "models", where, work / "log"):
        yield where


def client(module: Any, where: ServerOptions) -> Any:
    port = where.http_port if module is http else where.grpc_port
    more = {"concurrency": 4, "network_timeout": 120.0} if module is http else {}
    return module.InferenceServerClient(f"127.0.0.1:{port}", **more)


def files(module: Any, name: str, paths: Sequence[Path | bytes]) -> Any:
    contents = [[each if isinstance(each, bytes) else each.read_bytes()] for each in paths]
    tensor = module.InferInput(name, [len(paths), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(contents, np.object_))
    return tensor


def pair(module: Any, a: Path | bytes, b: Path | bytes) -> list[Any]:
    return [files(module, "image_a", [a]), files(module, "image_b", [b])]


@pytest.mark.parametrize("module", [http, grpc])
def test_results_over_the_wire_are_the_engines(served: ServerOptions, engine: Engine, module: Any) -> None:
    ask = client(module, served).infer
    a, b = PHOTOS[:2]
    found, expected = ask("match", pair(module, a, b)), engine.match(a, b, load_size=SIDE)
    np.testing.assert_allclose(found.as_numpy("points_b_xy")[0], expected.points_b_xy, rtol=1e-6)
    masks = ask("cosegment", [files(module, "image", [a, b])]).as_numpy("mask")[:, 0]
    for data, mask in zip(masks, engine.cosegment([a, b], load_size=SIDE, refine="none"), strict=True):
        np.testing.assert_array_equal(load_image(data).pixels[..., 0] == 255, mask.mask)
    boxes = ask("discover", [files(module, "image", [a])]).as_numpy("boxes")[0]
    np.testing.assert_allclose(boxes, engine.discover([a], "lost", load_size=SIDE)[0].boxes, rtol=1e-6)
    assert ask("apply", [files(module, "image", [a, b])]).as_numpy("mask").shape == (2, 1)


def test_a_video_is_a_sequence(served: ServerOptions, engine: Engine) -> None:
    points = np.array([[[200.0, 200.0], [240.0, 180.0]]], np.float32)
    given = grpc.InferInput("points_xy", [1, 2, 2], "FP32")
    given.set_data_from_numpy(points)
    ask, tracker = client(grpc, served).infer, engine.tracker()
    for number, path in enumerate([PHOTOS[0], PHOTOS[0], PHOTOS[1]]):
        features = engine.encode([path], load_size=SIDE)[0]
        expected = tracker.step(features) if number else tracker.start(features, points[0])
        inputs = [files(grpc, "image", [path]), *([] if number else [given])]
        found = ask("track", inputs, sequence_id=7, sequence_start=not number, sequence_end=number == 2)
        np.testing.assert_allclose(found.as_numpy("tracked_xy")[0], expected.points_xy, rtol=1e-5)
        np.testing.assert_array_equal(found.as_numpy("visible")[0], expected.visible)
    with pytest.raises(InferenceServerException, match="START flag"):
        ask("track", inputs, sequence_id=8)


def test_many_clients_get_their_own_results_and_a_broken_image_costs_one(served: ServerOptions, engine: Engine) -> None:
    pairs = [(a, b) for a in PHOTOS[:4] for b in PHOTOS[:4]]
    expected = {pair: engine.match(*pair, load_size=SIDE).points_a_xy for pair in pairs}

    def ask(number: int) -> None:
        a, b = pairs[number % len(pairs)]
        with client(grpc, served) as asking:
            if number % 8 == 5:
                with pytest.raises(InferenceServerException, match="image_b is not an image"):
                    asking.infer("match", pair(grpc, a, b"broken"))
            else:
                found = asking.infer("match", pair(grpc, a, b)).as_numpy("points_a_xy")[0]
                np.testing.assert_allclose(found, expected[a, b], rtol=1e-6)

    with ThreadPoolExecutor(64) as clients:
        list(clients.map(ask, range(64)))
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{served.metrics_port}/metrics").read().decode()
    answered = int(re.search(r'nv_inference_request_success\{model="match",version="1"\} (\d+)', metrics)[1])  # type: ignore[index]
    run = int(re.search(r'nv_inference_exec_count\{model="match",version="1"\} (\d+)', metrics)[1])  # type: ignore[index]
    assert 0 < run < answered  # batches, and the cache


def test_what_names_files_and_memory_is_closed(served: ServerOptions) -> None:
    for module in (http, grpc):
        asking = client(module, served)
        assert asking.is_server_ready() and asking.is_model_ready("match")
        for call in (
            lambda asking=asking: asking.register_system_shared_memory("mine", "/mine", 8),
            lambda asking=asking: asking.load_model("match"),
            lambda asking=asking: asking.update_trace_settings("match", {"trace_file": "/tmp/trace"}),
        ):
            with pytest.raises(InferenceServerException, match=r"restrict|This API|401|403|UNAVAILABLE"):
                call()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerOptions, TritonServer]]:
    """One request at a time, two that wait, models to load, and an encoder that is a model of the server."""
    work = tmp_path_factory.mktemp("narrow")
    options = RepositoryOptions(batch=1, waiting=2)
    write_repository("builtin", work / "models", TaskOptions(read_tasks("match"), load_size=224), options)
    encoder, match = work / "models" / "encoder", work / "models" / "match" / "config.pbtxt"
    (encoder / "1").rename(work / "bundle")  # where no other file may lie; this Triton has no ONNX Runtime
    (encoder / "1").mkdir()
    (encoder / "1" / "model.py").write_text(STAND_IN)
    match.write_text(match.read_text().replace("../../encoder/1", str(work / "bundle")))
    text = (encoder / "config.pbtxt").read_text().replace('platform: "onnxruntime_onnx"', 'backend: "python"')
    text = text.replace("KIND_AUTO", "KIND_CPU").replace('default_model_filename: "encoder.onnx"', "")
    (encoder / "config.pbtxt").write_text(text)
    where = ServerOptions(**{**vars(ports()), "response_cache": False, "model_control": True})
    with TritonServer(work / "models", where, work / "log") as server:
        yield where, server


@pytest.mark.parametrize("module", [http, grpc])
def test_too_many_requests_are_refused_and_the_others_answered(
    narrow: tuple[ServerOptions, TritonServer], engine: Engine, module: Any
) -> None:
    a, b = PHOTOS[:2]
    expected = engine.match(a, b, load_size=224).points_b_xy

    def ask(number: int) -> str:
        try:
            found = client(module, narrow[0]).infer("match", pair(module, a, b))
        except InferenceServerException as error:
            return str(error.status())
        np.testing.assert_allclose(found.as_numpy("points_b_xy")[0], expected, atol=0.01)
        return "answered"

    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(ask, range(16)))
    refused = "503" if module is http else "StatusCode.UNAVAILABLE"
    assert set(found) == {"answered", refused} and found.count("answered") >= 2


def test_models_are_loaded_and_unloaded_where_that_was_asked(narrow: tuple[ServerOptions, TritonServer]) -> None:
    asking = client(http, narrow[0])
    assert {model["name"] for model in asking.get_model_repository_index()} == {"match", "encoder"}
    asking.unload_model("match")
    until = time.monotonic() + 30
    while asking.is_model_ready("match") and time.monotonic() < until:
        time.sleep(0.1)
    assert not asking.is_model_ready("match")
    asking.load_model("match")
    assert asking.is_model_ready("match")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_when_requests_under_way_are_answered(number: signal.Signals) -> None:
    where = ports()
    chosen = [f"--{name}-port={getattr(where, f'{name}_port')}" for name in ("http", "grpc", "metrics")]
    program = [sys.executable, "-c", "from facetrt.engine.cli.main import main; main()"]
    command = [*program, "serve", "builtin", "--load-size", "448", *chosen]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("serving match: HTTP at 127.0.0.1:")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client(grpc, where).infer, "match", pair(grpc, *PHOTOS[:2]))
            time.sleep(0.5)
            os.kill(running.pid, number)
            assert len(asked.result(60).as_numpy("points_a_xy")[0])
        assert running.wait(60) == 128 + number


def test_a_model_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    from facetrt.kernels.errors import BackendError

    write_repository("builtin", tmp_path / "models", TaskOptions(), RepositoryOptions(encoder=INSIDE))
    config = tmp_path / "models" / "match" / "config.pbtxt"
    config.write_text(re.sub(r'bundle\\": \\"[^"]*\\"', r'bundle\\": \\"/nowhere\\"', config.read_text()))
    server = TritonServer(tmp_path / "models", ports(), tmp_path / "log")
    with pytest.raises(BackendError, match=r"match: .*nowhere"), server:
        pass
