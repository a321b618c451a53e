"""Triton's configurations of a task and of the encoder, from what they take and give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import numpy as np

from facetrt.engine.backends.base import DTYPES as ENCODER_DTYPES
from facetrt.engine.backends.base import input_names
from facetrt.engine.bundle.manifest import CLS_ATTENTION, ENCODER, Manifest
from facetrt.engine.images.geometry import grid_size
from facetrt.engine.serving.pbtxt import Word, pbtxt
from facetrt.engine.serving.tasks import PANEL, ServedTask, TaskName, TaskOptions
from facetrt.engine.serving.tensors import Tensor
from facetrt.engine.settings import Setting, check

ENCODER_MODEL = "encoder"
SETTINGS = "facetrt"  # the parameter of a model's configuration that holds all of ours, as JSON
VERSION = 1
WARM_SIDE = 224  # pixels
TYPES = {"BYTES": "STRING", "uint8": "UINT8", "float32": "FP32", "int64": "INT64"}  # others have the same name
MICROSECONDS = 1_000_000


class EncoderPlatform(StrEnum):
    """What runs the encoder in Triton: a model of its own by ONNX Runtime or TensorRT, or each task's own process."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    INSIDE = "inside"


@dataclass(frozen=True)
class QueueOptions:
    """How requests are collected."""

    instances: Annotated[int, Setting("Processes of each task.", minimum=1, maximum=64, panel=PANEL)] = 1
    batch: Annotated[int, Setting("Requests that are run together.", minimum=1, maximum=1024, panel=PANEL)] = 16
    waiting: Annotated[
        int, Setting("Requests that may wait for a task; more are refused (503).", minimum=1, panel=PANEL)
    ] = 64

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class RepositoryOptions(QueueOptions):
    """How the server runs the models."""

    encoder: Annotated[
        EncoderPlatform,
        Setting("Runs the encoder: Triton's onnxruntime or tensorrt, or the tasks' own processes.", panel=PANEL),
    ] = EncoderPlatform.ONNXRUNTIME


def task_config(
    task: type[ServedTask[Any]], tasks: TaskOptions, options: RepositoryOptions, settings: Mapping[str, Any]
) -> str:
    """``config.pbtxt`` of a task; ``settings`` are for :class:`facetrt.engine.serving.triton_model.TritonPythonModel`.

    Requests of one image, or pair, are collected into batches; a set of images is one request, and the frames of a
    video come in order to one process, which remembers it.
    """
    tracks = task.name is TaskName.TRACK
    batch = options.batch if task.batches else int(tracks)
    return pbtxt(
        {
            "name": str(task.name),
            "backend": "python",
            "max_batch_size": batch,
            "input": [_tensor(tensor) for tensor in task.inputs],
            "output": [_tensor(tensor) for tensor in task.outputs],
            **_scheduling(task, tasks, options),
            "instance_group": [{"kind": Word("KIND_CPU"), "count": 1 if tracks else options.instances}],
            "response_cache": {"enable": True} if task.batches else None,
            "model_warmup": [_warm_up(task)] if warms_up(task, options) else None,
            "parameters": [{"key": SETTINGS, "value": {"string_value": json.dumps(settings)}}],
        }
    )


def encoder_config(manifest: Manifest, options: RepositoryOptions) -> str:
    """``config.pbtxt`` of the encoder.

    One of a fixed size is batched by the server; one of any size takes where its cells are beside the images, which are
    of the whole batch and not of each image, so that tasks batch instead.
    """
    fixed = manifest.size is not None
    plan = options.encoder is EncoderPlatform.TENSORRT
    lead = [] if fixed else [-1]
    return pbtxt(
        {
            "name": ENCODER_MODEL,
            "platform": "tensorrt_plan" if plan else "onnxruntime_onnx",
            "default_model_filename": sorted(manifest.plans)[-1] if plan else ENCODER,
            "max_batch_size": options.batch if fixed else 0,
            "input": [
                {
                    "name": name,
                    "data_type": _data_type(np.dtype(ENCODER_DTYPES[name]).name),
                    "dims": _input_shape(name, manifest, lead),
                }
                for name in input_names(manifest)
            ],
            "output": [
                {"name": name, "data_type": _data_type("FP32"), "dims": [*lead, *_output_shape(name, manifest)]}
                for name in manifest.outputs
            ],
            "dynamic_batching": {} if fixed else None,
            "instance_group": [{"kind": Word("KIND_AUTO"), "count": 1}],
            "model_warmup": [_encoder_warm_up(manifest)],
            "version_policy": {"specific": {"versions": [VERSION]}},
        }
    )


def warms_up(task: type[ServedTask[Any]], options: RepositoryOptions) -> bool:
    """Whether a task is tried before it counts as ready.

    One whose encoder is another model is not: a call to that during the trial ends the server (Triton 24.10).
    """
    return task.batches and options.encoder is EncoderPlatform.INSIDE


def images_of(task: type[ServedTask[Any]]) -> Sequence[Tensor]:
    """The inputs that are image files."""
    return [tensor for tensor in task.inputs if tensor.datatype == "BYTES"]


def _scheduling(task: type[ServedTask[Any]], tasks: TaskOptions, options: RepositoryOptions) -> dict[str, Any]:
    if task.name is TaskName.TRACK:
        idle = int(tasks.idle_seconds * MICROSECONDS)
        return {"sequence_batching": {"max_sequence_idle_microseconds": idle, "direct": {}}}
    waiting = {"timeout_action": Word("REJECT"), "max_queue_size": options.waiting}
    return {"dynamic_batching": {"default_queue_policy": waiting}}


def _warm_up(task: type[ServedTask[Any]]) -> dict[str, Any]:
    """A photograph for each image; its file is named as the input is."""
    content = {"data_type": _data_type("BYTES"), "dims": [1]}
    inputs = [{"key": each.name, "value": content | {"input_data_file": each.name}} for each in images_of(task)]
    return {"name": "a photograph", "batch_size": 1, "inputs": inputs}


def _encoder_warm_up(manifest: Manifest) -> dict[str, Any]:
    """A black image; of any size, one of :data:`WARM_SIDE`, all of whose cells are its first."""
    size = (manifest.size[0], manifest.size[1]) if manifest.size else (WARM_SIDE, WARM_SIDE)
    grid_h, grid_w = grid_size(size, manifest.architecture.patch, manifest.stride)
    lead = [] if manifest.size else [1]
    shapes = {name: _input_shape(name, manifest, lead) for name in input_names(manifest)}
    shapes |= {"images": [*lead, *size, 3]}
    for name, sides in (("positional", (grid_h, grid_w)), ("rotation", (grid_h, grid_w))):
        if name in shapes:
            shapes[name][1:3] = sides
    counts = {"rows": [grid_h], "cols": [grid_w], "carriers": [1]}
    shapes |= {name: count for name, count in counts.items() if name in shapes}
    inputs = [
        {
            "key": name,
            "value": {
                "data_type": _data_type(np.dtype(ENCODER_DTYPES[name]).name),
                "dims": shape,
                "zero_data": True,
            },
        }
        for name, shape in shapes.items()
    ]
    return {"name": "a black image", "batch_size": 1, "inputs": inputs}


def _tensor(tensor: Tensor) -> dict[str, Any]:
    described = {"name": tensor.name, "data_type": _data_type(tensor.datatype), "dims": list(tensor.shape)}
    return described | ({"optional": True} if tensor.optional else {})


def _data_type(name: str) -> Word:
    return Word(f"TYPE_{TYPES.get(name, name)}")


def _input_shape(name: str, manifest: Manifest, lead: list[int]) -> list[int]:
    height, width = manifest.size or (-1, -1)
    tables = {
        "images": [*lead, height, width, 3],
        "positional": [1, -1, -1, manifest.architecture.dim],
        "rotation": [2, -1, -1, manifest.architecture.head_dim // 2],
    }
    return tables.get(name, [-1])


def _output_shape(name: str, manifest: Manifest) -> list[int]:
    cells = -1
    if manifest.size is not None:
        height, width = manifest.size
        grid_h, grid_w = grid_size((height, width), manifest.architecture.patch, manifest.stride)
        cells = grid_h * grid_w
    if name == CLS_ATTENTION:
        return [cells]
    return [cells if cells < 0 else manifest.architecture.prefix + cells, manifest.architecture.dim]
