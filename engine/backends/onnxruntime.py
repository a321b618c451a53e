"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import DYNAMIC_INPUTS, STATIC_INPUTS, Backend, Tensors
from facetrt.kernels.errors import BackendError, BundleError, MissingDependencyError


def import_onnxruntime() -> Any:
    """The onnxruntime module, or an error that names both extras that bring it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "the onnxruntime backend is not installed: pip install 'facetrt[cpu]' (or 'facetrt[gpu]' with CUDA)"
        ) from error
    return onnxruntime


class OnnxRuntimeBackend(Backend):
    """The portable backend; results are copied out of the runtime's memory."""

    name = "onnxruntime"
    _session: Any = None

    def _activate(self) -> None:
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # failures are raised as errors; the library would print them as well
        options.intra_op_num_threads = self.threads or 0
        options.enable_mem_pattern = not self.bundle.manifest.dynamic  # patterns of past shapes would pile up
        try:
            self._session = onnxruntime.InferenceSession(
                self.bundle.encoder, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BundleError(f"{self.bundle.path}: the encoder cannot be loaded: {_first_line(error)}") from error
        expected = DYNAMIC_INPUTS if self.bundle.manifest.dynamic else STATIC_INPUTS
        given = sorted(value.name for value in self._session.get_inputs())
        if given != sorted(expected):
            raise BundleError(
                f"{self.bundle.path}: the encoder has inputs {given}, the manifest means {sorted(expected)}"
            )
        names = {output.name for output in self._session.get_outputs()}
        missing = [name for name in self.bundle.manifest.outputs if name not in names]
        if missing:
            raise BundleError(f"{self.bundle.path}: the encoder has no output {missing}, but the manifest lists it")

    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        try:
            outputs: list[NDArray[np.float32]] = self._session.run(self.bundle.manifest.outputs, dict(inputs))
        except Exception as error:
            raise BackendError(f"onnxruntime failed to run the encoder: {_first_line(error)}") from error
        return outputs

    def _close(self) -> None:
        self._session = None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
