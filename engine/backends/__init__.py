"""Who runs the encoder, and how one is chosen."""

from __future__ import annotations

from enum import StrEnum

from facetrt.engine.backends.base import Backend
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend, import_onnxruntime
from facetrt.engine.bundle import Bundle
from facetrt.kernels.errors import InputError


class BackendName(StrEnum):
    """Backends by name; ``auto`` is resolved once, when the engine opens."""

    AUTO = "auto"
    ONNXRUNTIME = "onnxruntime"


class DeviceName(StrEnum):
    """Devices by name; ``auto`` is resolved once, when the engine opens."""

    AUTO = "auto"
    CPU = "cpu"


def make_backend(bundle: Bundle, *, backend: str, device: str, threads: int | None) -> Backend:
    """The backend that was asked for; nothing is substituted.

    Raises:
        InputError: a backend or device that this version does not have, or a thread count below 1.
        MissingDependencyError: the backend's library is not installed.
    """
    _check_choice("backend", backend, BackendName)
    _check_choice("device", device, DeviceName)
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: expected at least 1, or None for all cores")
    import_onnxruntime()  # its absence is reported here, not by the first image
    return OnnxRuntimeBackend(bundle, device=DeviceName.CPU, threads=threads)


def _check_choice(what: str, given: str, choices: type[StrEnum]) -> None:
    names = [str(choice) for choice in choices]
    if given not in names:
        raise InputError(f"{what} {given!r} is not available in this version: expected one of {', '.join(names)}")


__all__ = ["Backend", "BackendName", "DeviceName", "OnnxRuntimeBackend", "make_backend"]
