"""A stand-in for ``triton_python_backend_utils``, as NVIDIA documents it for the Python backend of 24.10.

``tests/triton`` runs the same models in the server itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

Models = dict[str, Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]]


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "buifO":
            raise TypeError(f"{name} is no tensor")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError(Exception):
    INVALID_ARG = "invalid argument"

    def __init__(self, message: str, code: str = "") -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._outputs, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs


class PreferredMemory:
    def __init__(self, kind: str) -> None:
        self.kind = kind


class InferenceRequest:
    """What a model gets, and what it sends to another one."""

    models: Models = {}  # noqa: RUF012  (of the server, by name)

    def __init__(
        self,
        model_name: str = "",
        requested_output_names: Sequence[str] = (),
        inputs: Sequence[Tensor] = (),
        *,
        correlation_id: int = 0,
        flags: int = 0,
        preferred_memory: PreferredMemory | None = None,
    ) -> None:
        self._model, self._names, self._inputs = model_name, requested_output_names, list(inputs)
        self._id, self._flags = correlation_id, flags

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def correlation_id(self) -> int:
        return self._id

    def flags(self) -> int:
        return self._flags

    def exec(self) -> InferenceResponse:
        if self._model not in self.models:
            return InferenceResponse(error=TritonError(f"unknown model {self._model}"))
        found = self.models[self._model]({tensor.name(): tensor.as_numpy() for tensor in self._inputs})
        return InferenceResponse([Tensor(name, found[name]) for name in self._names])


def install(monkeypatch: pytest.MonkeyPatch, models: Models | None = None) -> None:
    """Put it where a model imports it from, with other models of the server."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, InferenceResponse
    module.InferenceRequest, module.PreferredMemory = InferenceRequest, PreferredMemory
    module.TRITONSERVER_MEMORY_CPU = "cpu"

    def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
        return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)

    module.get_output_tensor_by_name = get_output_tensor_by_name
    monkeypatch.setattr(InferenceRequest, "models", models or {})
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


def arguments(repository: Path, model: str, parameters: Mapping[str, str]) -> dict[str, str]:
    """What ``initialize`` gets."""
    configuration = {"name": model, "parameters": {k: {"string_value": v} for k, v in parameters.items()}}
    return {
        "model_config": json.dumps(configuration),
        "model_repository": str(repository / model),
        "model_version": "1",
        "model_name": model,
    }


def files(name: str, contents: Sequence[bytes]) -> Tensor:
    """BYTES ``(N, 1)``."""
    array = np.empty((len(contents), 1), np.object_)
    array[:, 0] = list(contents)
    return Tensor(name, array)


def outputs(response: InferenceResponse) -> dict[str, np.ndarray]:
    """What a response without an error holds."""
    assert not response.has_error(), response.error() and response.error().message()  # type: ignore[union-attr]
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
