"""ONNX Runtime on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import CLOSED, Backend, Tensors, first_line
from facetrt.engine.backends.run_options import BackendName, Hint, Precision, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.kernels.errors import BackendError, BundleError, InputError, MissingDependencyError

BF16_ON_CPU = (
    "this bundle is bf16, which runs on a GPU only: use device cuda (backend tensorrt, with a plan), or export with "
    "--precision fp32, which backend openvino runs in bf16 where the processor has it"
)


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
    """The portable backend, in the bundle's own precision; results are copied out of the runtime's memory."""

    name = BackendName.ONNXRUNTIME
    _session: Any = None

    @classmethod
    def check_installed(cls) -> None:
        import_onnxruntime()

    @classmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        own = bundle.manifest.precision
        if own == Precision.BF16:
            raise InputError(BF16_ON_CPU)
        if options.precision != own:
            raise InputError(
                f"onnxruntime runs a bundle in its own precision, {own}, and {options.precision} was asked: "
                "use precision auto, backend openvino for bf16, or export with another --precision"
            )
        if options.hint is not Hint.LATENCY:
            raise InputError("onnxruntime has no throughput mode here: use hint latency, or backend openvino")
        if options.cache is not None:
            warnings.warn("the cache is not used: onnxruntime compiles nothing that could be kept", stacklevel=2)

    def _activate(self) -> None:
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # failures are raised as errors; the library would print them as well
        options.intra_op_num_threads = self.options.threads or 0
        options.enable_mem_pattern = not self.bundle.manifest.dynamic  # patterns of past shapes would pile up
        try:
            self._session = onnxruntime.InferenceSession(
                self.bundle.encoder, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BundleError(f"{self.bundle.path}: the encoder cannot be loaded: {first_line(error)}") from error
        self._check_graph(
            (value.name for value in self._session.get_inputs()), (value.name for value in self._session.get_outputs())
        )

    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        session = self._session
        if session is None:  # closed by another thread just now
            raise BackendError(CLOSED)
        try:
            outputs: list[NDArray[np.float32]] = session.run(self.bundle.manifest.outputs, dict(inputs))
        except Exception as error:
            raise BackendError(f"onnxruntime failed to run the encoder: {first_line(error)}") from error
        return outputs

    def _close(self) -> None:
        self._session = None
