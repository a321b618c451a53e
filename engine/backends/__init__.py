"""Who runs the encoder, and how one is chosen."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from facetrt.engine.backends.base import Backend
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.openvino import OpenVinoBackend, runs_bf16
from facetrt.engine.backends.options import BackendName, DeviceName, Hint, Precision, RunOptions
from facetrt.engine.bundle import Bundle

BACKENDS: dict[BackendName, type[Backend]] = {
    BackendName.ONNXRUNTIME: OnnxRuntimeBackend,
    BackendName.OPENVINO: OpenVinoBackend,
}


def make_backend(bundle: Bundle, options: RunOptions) -> Backend:
    """The backend that was asked for; nothing is substituted.

    Raises:
        InputError: a precision that the backend, the bundle or the processor does not have.
        MissingDependencyError: the backend's library is not installed.
    """
    own = Precision(bundle.manifest.precision)
    precision = choose_precision(options.precision, own, options.backend)
    name = choose_backend(options.backend, precision, options.hint)
    backend = BACKENDS[name]
    backend.check_installed()  # its absence is reported here, not by the first image
    resolved = replace(options, backend=name, device=DeviceName.CPU, precision=precision)
    backend.check_supported(bundle, resolved)
    return backend(bundle, resolved)


def choose_precision(asked: Precision, own: Precision, backend: BackendName) -> Precision:
    """``auto`` is the bundle's own precision; ``fastest`` is bf16 where this machine has it, for fp32 bundles."""
    if asked is Precision.AUTO:
        return own
    if asked is Precision.FASTEST:
        possible = own is Precision.FP32 and backend is not BackendName.ONNXRUNTIME and installed("openvino")
        return Precision.BF16 if possible and runs_bf16() else own
    return asked


def choose_backend(asked: BackendName, precision: Precision, hint: Hint) -> BackendName:
    """``auto`` is OpenVINO for what only it does (bf16, throughput), or if it alone is installed; else ONNX Runtime.

    In fp32 the two are equally fast (ViT-S/8, stride 4: 1,502 and 1,511 ms), so the one that every installation has
    goes first.
    """
    if asked is not BackendName.AUTO:
        return asked
    if precision is Precision.BF16 or hint is Hint.THROUGHPUT:
        return BackendName.OPENVINO
    alone = installed("openvino") and not installed("onnxruntime") and precision is Precision.FP32
    return BackendName.OPENVINO if alone else BackendName.ONNXRUNTIME


def installed(module: str) -> bool:
    """Whether a library can be imported; it is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


__all__ = [
    "BACKENDS",
    "Backend",
    "BackendName",
    "DeviceName",
    "Hint",
    "OnnxRuntimeBackend",
    "OpenVinoBackend",
    "Precision",
    "RunOptions",
    "choose_backend",
    "choose_precision",
    "make_backend",
]
