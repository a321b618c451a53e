from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fakes_triton
import numpy as np
import pytest
from fakes_triton import InferenceRequest, InferenceResponse, Tensor, files, outputs
from helpers import photo
from PIL import Image
from pycocotools import mask as coco

from facetrt.engine import Engine, learn_cosegmentation, learn_parts
from facetrt.engine.images.loading import load_image
from facetrt.engine.serving import triton_model
from facetrt.engine.serving.tasks import TaskOptions, read_tasks
from facetrt.engine.serving.triton_config import SETTINGS, EncoderPlatform, RepositoryOptions, task_config
from facetrt.engine.serving.triton_model import TritonPythonModel
from facetrt.engine.serving.triton_repository import Wanted, write_repository
from facetrt.kernels.errors import InputError

SIDE = 64
Start = Callable[..., TritonPythonModel]


def png(height: int, width: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo(height, width, seed)).save(file, format="PNG")
    return file.getvalue()


A, B, C = png(70, 80), png(64, 90, 1), png(66, 64, 2)


@pytest.fixture
def start(tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Makes a repository and the model of its one task, as the server would."""
    fakes_triton.install(monkeypatch)

    def make(task: str, encoder: EncoderPlatform = EncoderPlatform.INSIDE, **options: Any) -> TritonPythonModel:
        tasks = TaskOptions(read_tasks(task), load_size=SIDE, **options)
        settings = RepositoryOptions(encoder=encoder)
        write_repository(tiny_bundle, tmp_path / task, tasks, settings)
        wanted = Wanted.of(tiny_bundle, tasks, settings, triton_model.RunOptions())
        model = TritonPythonModel()
        parameters = {SETTINGS: json.dumps(wanted.settings(tasks.tasks[0]))}
        model.initialize(fakes_triton.arguments(tmp_path / task, task, parameters))
        return model

    return make


def ask(model: TritonPythonModel, *inputs: Tensor, **sequence: int) -> InferenceResponse:
    (response,) = model.execute([InferenceRequest(inputs=inputs, **sequence)])
    return response  # type: ignore[no-any-return]


def decoded(data: bytes) -> np.ndarray:
    return load_image(data).pixels


def message(response: InferenceResponse) -> str:
    error = response.error()
    assert error is not None and error.code == "invalid argument"
    return error.message()


def test_pairs_of_several_requests_are_the_engines(start: Start, tiny_engine: Engine) -> None:
    """A broken image costs its own request alone."""
    model = start("match", num_pairs=4)
    requests = [
        InferenceRequest(inputs=[files("image_a", [A, B]), files("image_b", [B, C])]),
        InferenceRequest(inputs=[files("image_a", [b"no image"]), files("image_b", [B])]),
        InferenceRequest(inputs=[files("image_a", [C]), files("image_b", [A])]),
    ]
    both, broken, one = model.execute(requests)
    assert "image_a is not an image" in message(broken)
    first, second = outputs(both), outputs(one)
    for row, (a, b) in ((0, (A, B)), (1, (B, C))):
        expected = tiny_engine.match(decoded(a), decoded(b), num_pairs=4, load_size=SIDE)
        count = int(first["count"][row, 0])
        assert count == len(expected) > 0
        np.testing.assert_allclose(first["points_b_xy"][row, :count], expected.points_b_xy, rtol=1e-6)
        assert np.isnan(first["points_b_xy"][row, count:]).all()
        assert first["confidence"][row, 0] == pytest.approx(expected.confidence)
    expected = tiny_engine.match(decoded(C), decoded(A), num_pairs=4, load_size=SIDE)
    np.testing.assert_allclose(second["points_a_xy"][0], expected.points_a_xy, rtol=1e-6)
    model.finalize()


@pytest.mark.parametrize("how", ["png", "rle"])
def test_masks_of_one_request_are_the_engines(start: Start, tiny_engine: Engine, how: str) -> None:
    found = outputs(ask(start("cosegment", masks=how), files("image", [A, B])))
    expected = tiny_engine.cosegment([decoded(A), decoded(B)], load_size=SIDE, refine="none")
    assert found["mask"].shape == found["confidence"].shape == (2, 1)
    for data, mask in zip(found["mask"][:, 0], expected, strict=True):
        if how == "png":
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))) == 255, mask.mask)
        else:
            np.testing.assert_array_equal(coco.decode(json.loads(data)).astype(bool), mask.mask)


@pytest.mark.parametrize("learn", [learn_cosegmentation, learn_parts])
def test_a_learned_model_finds_what_it_finds_in_the_engine(
    start: Start, tiny_engine: Engine, tmp_path: Path, learn: Callable[..., Any]
) -> None:
    features = tiny_engine.encode([decoded(A), decoded(B)], load_size=SIDE)
    learned = learn(tiny_engine, features, sample_interval=5, saliency_threshold=0, votes_percentage=30)
    learned.save(tmp_path / "learned.npz")
    found = outputs(ask(start("apply", learned=tmp_path / "learned.npz"), files("image", [C, A])))
    for data, image in zip(found["mask"][:, 0], (C, A), strict=True):
        expected = tiny_engine.apply(learned, decoded(image), refine="none")
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        wanted = expected.labels + 1 if learn is learn_parts else expected.mask * 255
        np.testing.assert_array_equal(pixels, wanted)


def test_objects_are_the_engines(start: Start, tiny_engine: Engine) -> None:
    model = start("discover", method="lost")
    good, broken = model.execute([InferenceRequest(inputs=[files("image", images)]) for images in ([A, B], [b"x"])])
    found = outputs(good)
    expected = tiny_engine.discover([decoded(A), decoded(B)], "lost", load_size=SIDE)
    assert "is not an image" in message(broken) and max(map(len, expected)) > 0
    for row, objects in enumerate(expected):
        count = len(objects)
        assert found["count"][row, 0] == count
        np.testing.assert_allclose(found["boxes"][row, :count], objects.boxes)
        masks = [np.asarray(Image.open(io.BytesIO(data))) == 255 for data in found["masks"][row, :count]]
        np.testing.assert_array_equal(masks, objects.masks)


def test_points_are_followed_through_sequences(start: Start, tiny_engine: Engine) -> None:
    wide = photo(64, 76)
    frames = [np.ascontiguousarray(wide[:, 2 * i : 2 * i + 64]) for i in range(3)]
    points = np.array([[30.0, 30.0], [40.0, 36.0]], np.float32)
    model, tracker = start("track"), tiny_engine.tracker()
    for number, frame in enumerate(frames):
        features = tiny_engine.encode([frame], load_size=SIDE)[0]
        expected = tracker.step(features) if number else tracker.start(features, points)
        file = io.BytesIO()
        Image.fromarray(frame).save(file, format="PNG")
        inputs = [files("image", [file.getvalue()])] + ([Tensor("points_xy", points[None])] if not number else [])
        for video in (1, 2):  # side by side
            found = outputs(ask(model, *inputs, correlation_id=video, flags=(not number) + 2 * (number == 2)))
            np.testing.assert_allclose(found["tracked_xy"][0], expected.points_xy, atol=1e-4)
            np.testing.assert_array_equal(found["visible"][0], expected.visible)
    assert "was not started, has ended" in message(ask(model, *inputs, correlation_id=1))
    assert "no sequence_id" in message(ask(model, *inputs, flags=1))


@pytest.mark.parametrize(("idle", "said"), [(1e-9, None), (60.0, "1 videos are followed already: end one")])
def test_videos_are_given_up_when_they_were_idle(start: Start, idle: float, said: str | None) -> None:
    model = start("track", max_sequences=1, idle_seconds=idle)
    outputs(ask(model, files("image", [A]), correlation_id=1, flags=1))
    second = ask(model, files("image", [A]), correlation_id=2, flags=1)
    if said is None:
        outputs(second)
        assert "was idle for 1e-09 s" in message(ask(model, files("image", [A]), correlation_id=1))
    else:
        assert said in message(second)


def test_the_encoder_may_be_another_model_of_the_server(
    start: Start, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def encoder(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        calls.append(inputs["images"].shape)
        return tiny_engine._encoder.backend.run(dict(inputs))

    model = start("match", EncoderPlatform.ONNXRUNTIME)
    fakes_triton.install(monkeypatch, {"encoder": encoder})
    found = outputs(ask(model, files("image_a", [A]), files("image_b", [A])))
    assert calls == [(2, *calls[0][1:])] and found["count"][0, 0] > 0  # both in one pass
    fakes_triton.install(monkeypatch)
    response = ask(model, files("image_a", [A]), files("image_b", [A]))
    assert "the model encoder failed: unknown model" in message(response)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([files("image_a", [A])], "input image_b is missing: the request has image_a"),
        ([files("image_a", [A, A]), files("image_b", [A])], "image_a has 2 images and image_b 1"),
        ([files("image_a", [A] * 3), files("image_b", [A] * 3)], "expected at most 2 in a request"),
        (
            [files("image_a", [A]), files("image_b", [b"x" * (1 + (1 << 20))])],
            "image_b has 1.0 MiB: expected at most 1",
        ),
        (
            [files("image_a", [A]), Tensor("image_b", np.zeros((1, 2)))],
            r"image_b has shape \(1, 2\): expected \(N, 1\)",
        ),
        ([files("image_a", [A]), Tensor("image_b", np.zeros((1, 1)))], "image_b is float64: expected the bytes"),
        ([files("image_a", []), files("image_b", [])], r"image_a has shape \(0, 1\)"),
        ([files("image_a", [b"/etc/passwd"]), files("image_b", [A])], "image_a is not an image"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(start: Start, inputs: list[Tensor], said: str) -> None:
    model = start("match", max_images=2, max_image_mib=1)
    (response,) = model.execute([InferenceRequest(inputs=inputs)])
    with pytest.raises(InputError, match=said):
        raise InputError(message(response))


def test_options_that_cannot_be() -> None:
    with pytest.raises(InputError, match="expected a model exactly where apply is among the tasks"):
        TaskOptions(read_tasks("apply"))
    with pytest.raises(InputError, match="each task once"):
        read_tasks("match,match")
    with pytest.raises(InputError, match="task 'sew'"):
        read_tasks("sew")
    assert "max_batch_size: 16" in task_config(
        triton_model.TASKS[read_tasks("match")[0]], TaskOptions(), RepositoryOptions(), {}
    )
