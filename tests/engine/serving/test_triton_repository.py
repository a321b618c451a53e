from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from helpers import export_tiny, facets
from tritonclient.grpc import model_config_pb2

from facetrt.engine.bundle.manifest import MANIFEST
from facetrt.engine.serving.pbtxt import Word, pbtxt
from facetrt.engine.serving.tasks import TaskOptions, read_tasks
from facetrt.engine.serving.triton_config import EncoderPlatform, RepositoryOptions
from facetrt.engine.serving.triton_repository import differences, write_repository
from facetrt.kernels.errors import FacetrtError, InputError, OutputError

TASKS = TaskOptions(read_tasks("match,cosegment,discover,track"), load_size=64, idle_seconds=30.0)


@pytest.fixture
def repository(tiny_bundle: Path, tmp_path: Path) -> Path:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    models = write_repository(bundle, tmp_path / "models", TASKS, RepositoryOptions(batch=8, instances=2))
    assert models == ["match", "cosegment", "discover", "track", "encoder"]
    return tmp_path / "models"


def config(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    """As NVIDIA's schema reads it, which knows every field's name and type."""
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_tasks_are_what_nvidias_schema_means(repository: Path) -> None:
    match = config(repository, "match")
    assert (match.backend, match.max_batch_size, match.instance_group[0].count) == ("python", 8, 2)
    assert [(each.name, each.data_type, list(each.dims)) for each in match.input] == [
        ("image_a", model_config_pb2.TYPE_STRING, [1]), ("image_b", model_config_pb2.TYPE_STRING, [1])
    ]  # fmt: skip
    policy = match.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 64 and policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert match.response_cache.enable
    assert not match.model_warmup  # which calls another model
    assert json.loads(match.parameters["facetrt"].string_value)["options"] == {
        "idle_seconds": 30.0,
        "load_size": 64,
        "tasks": "match",
    }


def test_sets_of_images_are_one_request_and_videos_are_sequences(repository: Path) -> None:
    cosegment, track = config(repository, "cosegment"), config(repository, "track")
    assert cosegment.max_batch_size == 0 and list(cosegment.input[0].dims) == [-1, 1]
    assert not cosegment.response_cache.enable and not cosegment.model_warmup
    assert track.sequence_batching.WhichOneof("strategy_choice") == "direct"
    assert track.sequence_batching.max_sequence_idle_microseconds == 30_000_000
    assert [each.optional for each in track.input] == [False, True] and track.instance_group[0].count == 1


def test_an_encoder_of_any_size(repository: Path) -> None:
    encoder = config(repository, "encoder")
    assert (encoder.platform, encoder.max_batch_size) == ("onnxruntime_onnx", 0)
    assert {each.name: list(each.dims) for each in encoder.input} == {
        "images": [-1, -1, -1, 3], "positional": [1, -1, -1, 48], "rows": [-1], "cols": [-1]
    }  # fmt: skip
    assert {each.name: list(each.dims) for each in encoder.output}["cls_attention"] == [-1, -1]
    assert (repository / "encoder" / "1" / encoder.default_model_filename).is_file()
    (warm,) = encoder.model_warmup
    assert {name: list(each.dims) for name, each in warm.inputs.items()} == {
        "images": [1, 224, 224, 3], "positional": [1, 55, 55, 48], "rows": [55], "cols": [55]
    }  # fmt: skip


def test_an_encoder_of_one_size_is_batched_by_the_server(tiny_weights: Path, tmp_path: Path) -> None:
    bundle = export_tiny(tiny_weights, tmp_path / "fixed", size=(48, 64))
    write_repository(bundle, tmp_path / "models", TaskOptions(load_size=(48, 64)), RepositoryOptions(batch=4))
    encoder = config(tmp_path / "models", "encoder")
    assert encoder.max_batch_size == 4 and encoder.HasField("dynamic_batching")
    assert [list(each.dims) for each in encoder.input] == [[48, 64, 3]]
    shapes = {each.name: list(each.dims) for each in encoder.output}
    cells = shapes["cls_attention"][0]
    assert shapes[next(iter(shapes))] in ([1 + cells, 48], [cells]) and cells > 0
    assert differences(tmp_path / "models") == []


def test_an_encoder_inside_the_tasks(tiny_bundle: Path, tmp_path: Path) -> None:
    inside = RepositoryOptions(encoder=EncoderPlatform.INSIDE)
    assert write_repository(tiny_bundle, tmp_path / "models", TASKS, inside) == list(TASKS.tasks)
    settings = json.loads(config(tmp_path / "models", "match").parameters["facetrt"].string_value)
    assert settings["bundle"] == str(tiny_bundle.absolute()) and settings["encoder"] is None
    (warm,) = config(tmp_path / "models", "match").model_warmup
    found = {name: each.input_data_file for name, each in warm.inputs.items()}
    assert found == {"image_a": "image_a", "image_b": "image_b"}
    assert all((tmp_path / "models" / "match" / "warmup" / name).stat().st_size > 4 for name in found)
    assert differences(tmp_path / "models") == []
    with pytest.raises(InputError, match="has no TensorRT plan: add one with"):
        write_repository(tiny_bundle, tmp_path / "plan", TASKS, RepositoryOptions(encoder=EncoderPlatform.TENSORRT))


def test_what_has_changed_is_listed(repository: Path, tiny_weights: Path, tmp_path: Path) -> None:
    assert differences(repository) == []
    text = repository / "match" / "config.pbtxt"
    text.write_text(text.read_text().replace("count: 2", "count: 3"))
    (repository / "track" / "1" / "model.py").unlink()
    assert differences(repository) == [
        "match/config.pbtxt is not what would be written now", "track/1/model.py is missing"
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "bundle")
    export_tiny(tiny_weights, tmp_path / "bundle", facets=facets("key@1"))
    found = differences(repository)
    assert any("is another bundle by now" in line for line in found)
    assert "encoder/config.pbtxt is not what would be written now" in found


def test_a_damaged_copy_of_the_bundle_is_no_surprise(repository: Path) -> None:
    encoder = repository / "encoder" / "1" / "encoder.onnx"
    encoder.write_bytes(encoder.read_bytes()[:-1] + b"\0")
    with pytest.raises(FacetrtError, match=r"encoder\.onnx"):
        differences(repository)


def test_only_our_repositories_are_replaced(repository: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    write_repository(tiny_bundle, repository, TASKS, RepositoryOptions(), force=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / MANIFEST).write_text("{}")
    with pytest.raises(OutputError, match="was not written by facetrt as a model repository"):
        write_repository(tiny_bundle, tmp_path / "theirs", TASKS, RepositoryOptions(), force=True)
    with pytest.raises(FacetrtError, match=r"repository\.json"):
        differences(tmp_path / "theirs")


def test_texts_are_escaped() -> None:
    text = pbtxt({"name": 'a "b"\n\\é', "kind": Word("KIND_CPU"), "dims": [], "flag": True, "none": None, "sub": {}})
    assert text == 'name: "a \\"b\\"\\n\\\\\\u00e9"\nkind: KIND_CPU\nflag: true\nsub {\n}\n'
