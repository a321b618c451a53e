"""What Triton's Python backend runs: one task of a bundle, in a process of the server.

Every model of the repository has a ``model.py`` that imports :class:`TritonPythonModel`. The encoder is the server's
own model, called from here with each batch (Triton's business logic scripting), or runs in this process. An ensemble
could not do the first: images of several sizes, pairs, a second pass at half the size and videos are calls whose number
and shapes depend on what is asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import Backend, Tensors
from facetrt.engine.backends.run_options import DeviceName, Kernels, Precision, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.encoding.encoder import Encoder
from facetrt.engine.engine import Engine
from facetrt.engine.serving.tasks import SEQUENCE, TASKS, Outcome, ServedTask, TaskOptions
from facetrt.engine.serving.tensors import Request
from facetrt.engine.serving.triton_config import SETTINGS
from facetrt.engine.settings import read_options
from facetrt.kernels.errors import BackendError, FacetrtError

START, END = 1, 2  # bits of a request's flags, TRITONSERVER_REQUEST_FLAG_SEQUENCE_*


class TritonBackend(Backend):
    """The encoder as a model of the same server."""

    name = "triton"

    def __init__(self, bundle: Bundle, options: RunOptions, model: str) -> None:
        super().__init__(bundle, options)
        self._model = model

    @classmethod
    def check_installed(cls) -> None:
        _server()

    @classmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        """Whatever the server runs."""

    def _activate(self) -> None:
        """The server has loaded it, or says so at the first call."""

    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        server = _server()
        names = self.bundle.manifest.outputs
        response = server.InferenceRequest(
            model_name=self._model,
            requested_output_names=names,
            inputs=[server.Tensor(name, np.ascontiguousarray(values)) for name, values in inputs.items()],
            preferred_memory=server.PreferredMemory(server.TRITONSERVER_MEMORY_CPU),
        ).exec()
        if response.has_error():
            raise BackendError(f"the model {self._model} failed: {response.error().message()}")
        return [server.get_output_tensor_by_name(response, name).as_numpy() for name in names]

    def _close(self) -> None:
        """It is the server's."""


class TritonPythonModel:
    """One task; Triton makes and calls it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle and prepare the task.

        Raises:
            FacetrtError: what keeps the model from being served; the server logs it.
        """
        configuration = json.loads(args["model_config"])
        settings = json.loads(configuration["parameters"][SETTINGS]["string_value"])
        here = Path(args["model_repository"]) / args["model_version"]
        options = read_options(TaskOptions, settings["options"] | _located(settings["options"], here))
        self._engine = _open(here / settings["bundle"], settings["encoder"], settings["running"])
        self._task: ServedTask[Any] = TASKS[options.tasks[0]](self._engine, options)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request, whose items are run together; an error is its own request's alone."""
        read = [_attempt(self._read, request) for request in requests]
        items = [item for found in read if not isinstance(found, FacetrtError) for item in found]
        outcomes = iter(self._run(items))
        responses = []
        for found in read:
            if isinstance(found, FacetrtError):
                responses.append(_failed(found))
                continue
            own = [next(outcomes) for _ in found]
            answer = _attempt(self._task.respond, own)
            responses.append(_failed(answer) if isinstance(answer, FacetrtError) else _answered(answer))
        return responses

    def _run(self, items: list[Any]) -> list[Outcome]:
        """What is found of each item; what fails all of them, an encoder for example, is the error of each."""
        found = _attempt(self._task.run, items) if items else []
        return [found] * len(items) if isinstance(found, FacetrtError) else list(found)

    def _read(self, request: Any) -> list[Any]:
        return self._task.read(_request(request))

    def finalize(self) -> None:
        """Give everything back."""
        self._engine.close()


def _open(bundle: Path, encoder: str | None, running: dict[str, Any]) -> Engine:
    if encoder is None:
        return Engine.open(bundle, **running)
    opened = Bundle.open(bundle)
    options = RunOptions(device=DeviceName.CPU, precision=Precision(opened.manifest.precision), kernels=Kernels.HOST)
    return Engine(Encoder(opened, TritonBackend(opened, options, encoder)))


def _located(options: dict[str, Any], here: Path) -> dict[str, Any]:
    """The learned model lies beside ``model.py``."""
    return {"learned": str(here / options["learned"])} if options.get("learned") else {}


def _request(request: Any) -> Request:
    tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    flags = request.flags()
    found = (request.correlation_id(), bool(flags & START), bool(flags & END))
    return Request(tensors, dict(zip(SEQUENCE, found, strict=True)))


def _attempt(work: Any, given: Any) -> Any:
    try:
        return work(given)
    except FacetrtError as error:
        return error


def _answered(outputs: dict[str, NDArray[Any]]) -> Any:
    server = _server()
    return server.InferenceResponse([server.Tensor(name, values) for name, values in outputs.items()])


def _failed(error: FacetrtError) -> Any:
    server = _server()
    return server.InferenceResponse(error=server.TritonError(str(error), server.TritonError.INVALID_ARG))


def _server() -> Any:
    """Triton's own module, which there is in its processes alone."""
    return import_module("triton_python_backend_utils")
