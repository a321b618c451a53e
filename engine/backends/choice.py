"""How a backend is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

from facetrt.engine.backends.base import Backend
from facetrt.engine.backends.flavours import FLAVOURS
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from facetrt.engine.backends.openvino import OpenVinoBackend, runs_bf16
from facetrt.engine.backends.run_options import (
    BackendName,
    DeviceName,
    Hint,
    Kernels,
    Precision,
    RunOptions,
    Specialisation,
)
from facetrt.engine.backends.tensorrt import TensorRtBackend, has_plan_here
from facetrt.engine.backends.tensorrt_rtx import TensorRtRtxBackend
from facetrt.engine.bundle.bundle import Bundle
from facetrt.kernels.errors import InputError

BACKENDS: Mapping[tuple[BackendName, DeviceName], type[Backend]] = {
    (BackendName.ONNXRUNTIME, DeviceName.CPU): OnnxRuntimeBackend,
    (BackendName.OPENVINO, DeviceName.CPU): OpenVinoBackend,
    (BackendName.ONNXRUNTIME, DeviceName.CUDA): OnnxRuntimeCudaBackend,
    (BackendName.TENSORRT, DeviceName.CUDA): TensorRtBackend,
    (BackendName.TENSORRT_RTX, DeviceName.CUDA): TensorRtRtxBackend,
}


def make_backend(bundle: Bundle, options: RunOptions) -> Backend:
    """The backend that was asked for; nothing is substituted.

    Raises:
        InputError: a precision, device or number of streams that the backend, the bundle or the processor does not
            have; a bundle without a TensorRT plan that fits here.
        MissingDependencyError: the backend's library is not installed.
        BackendError: a GPU was asked for and there is none.
    """
    resolved = resolve(bundle, options)
    backend = BACKENDS[resolved.backend, resolved.device]
    backend.check_installed()  # its absence is reported here, not by the first image
    backend.check_supported(bundle, resolved)
    if not resolved.allow_inexact:
        check_exact(bundle, resolved.precision)
    return backend(bundle, resolved)


def check_exact(bundle: Bundle, precision: Precision) -> None:
    """Raise :class:`InputError` if the bundle misses the contract of ``precision``, or nobody measured whether it does.

    A bundle's own precision holds: it would not have been written.
    """
    own, record = bundle.manifest.precision, bundle.manifest.precisions.get(precision)
    if precision == own or (record is not None and record.holds):
        return
    insist = "insist with allow_inexact=True (--allow-inexact)"
    if record is None:
        raise InputError(
            f"{bundle.path}: how exact {precision} is was not measured when this bundle was exported: export it "
            f"again, use precision {own}, or {insist}; 'facetrt info {bundle.path} --measure --precision {precision}' "
            "measures it on photographs"
        )
    raise InputError(
        f"{precision} misses its contract with this bundle: {record.missed}, measured by {record.measured}: use "
        f"precision {own}, or fastest, which takes only what holds, or {insist}"
    )


def resolve(bundle: Bundle, options: RunOptions) -> RunOptions:
    """The same choices without any ``auto``.

    Raises:
        InputError: choices that exclude each other.
    """
    own = Precision(bundle.manifest.precision)
    device = choose_device(options.device, options.backend)
    bf16 = bundle.manifest.precisions.get(Precision.BF16)
    keeps_bf16 = bf16 is not None and bf16.holds and (bf16.relative_time is None or bf16.relative_time < 1)
    precision = choose_precision(options.precision, own, options.backend, device, keeps_bf16=keeps_bf16)
    if device is DeviceName.CUDA:
        name = choose_cuda_backend(options.backend, bundle)
    else:
        name = choose_backend(options.backend, precision, options.hint)
    if (name, device) not in BACKENDS:
        there = ", ".join(at for each, at in BACKENDS if each is name)
        raise InputError(f"backend {name} does not run on device {device}: use device {there}, or another backend")
    if options.streams > 1 and device is DeviceName.CPU:
        raise InputError(
            f"streams={options.streams} are parallel lanes of a GPU, and the device is cpu: use device cuda, or hint "
            "throughput"
        )
    kernels = choose_kernels(options.kernels, device)
    specialisation = choose_specialisation(options.specialisation, name)
    return replace(
        options, backend=name, device=device, precision=precision, kernels=kernels, specialisation=specialisation
    )


def choose_device(asked: DeviceName, backend: BackendName) -> DeviceName:
    """``auto`` is the GPU for TensorRT, which runs nowhere else, and the CPU otherwise."""
    if asked is not DeviceName.AUTO:
        return asked
    return DeviceName.CUDA if backend in FLAVOURS else DeviceName.CPU


def choose_kernels(asked: Kernels, device: DeviceName) -> Kernels:
    """``auto`` is where the encoder runs."""
    if asked is Kernels.DEVICE and device is DeviceName.CPU:
        raise InputError("kernels=device needs a GPU, and the device is cpu: use device cuda, or kernels host")
    if asked is Kernels.AUTO:
        return Kernels.DEVICE if device is DeviceName.CUDA else Kernels.HOST
    return asked


def choose_specialisation(asked: Specialisation, backend: BackendName) -> Specialisation:
    """``auto`` stays what it is for OpenVINO, which goes by an image's size, and is ``eager`` for all others."""
    compiles = backend in (BackendName.OPENVINO, BackendName.TENSORRT_RTX)
    if asked in (Specialisation.LAZY, Specialisation.NONE) and not compiles:
        raise InputError(f"specialisation {asked} is for backends openvino and tensorrt-rtx, and this is {backend}")
    if asked is Specialisation.AUTO and backend is not BackendName.OPENVINO:
        return Specialisation.EAGER
    return asked


def choose_precision(
    asked: Precision,
    own: Precision,
    backend: BackendName,
    device: DeviceName = DeviceName.CPU,
    *,
    keeps_bf16: bool = True,
) -> Precision:
    """``auto`` is the bundle's own precision; ``fastest`` is bf16 where this CPU has it, for fp32 bundles that keep its
    contract.
    """
    if asked is Precision.AUTO:
        return own
    if asked is Precision.FASTEST:
        here = device is DeviceName.CPU and own is Precision.FP32
        possible = here and keeps_bf16 and backend is not BackendName.ONNXRUNTIME and installed("openvino")
        return Precision.BF16 if possible and runs_bf16() else own
    return asked


def choose_cuda_backend(asked: BackendName, bundle: Bundle) -> BackendName:
    """``auto`` is TensorRT, then TensorRT for RTX, if the bundle has a plan that the installed library runs on this
    GPU; else ONNX Runtime.
    """
    if asked is not BackendName.AUTO:
        return asked
    for flavour in FLAVOURS.values():
        if any(map(installed, flavour.modules)) and has_plan_here(bundle.manifest, flavour):
            return flavour.backend
    return BackendName.ONNXRUNTIME


def choose_backend(asked: BackendName, precision: Precision, hint: Hint) -> BackendName:
    """The CPU's backend. ``auto`` is OpenVINO for what only it does (bf16, throughput), or alone; else ONNX Runtime.

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
