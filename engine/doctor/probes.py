"""Questions about this machine, each answered in a process of its own: a broken library takes only that one down.

Run as ``python -P probes.py NAME …``; prints one line of JSON. Only the standard library is imported at the top.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

LIBCUDA = {"win32": "nvcuda.dll"}.get(sys.platform, "libcuda.so.1")
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def gpu() -> dict[str, Any]:
    """What the driver says, without creating a context: versions, and each visible GPU."""
    try:
        cuda = ctypes.CDLL(LIBCUDA)
    except OSError:
        return {"error": f"no NVIDIA driver: {LIBCUDA} is not there"}
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    driver = importlib.import_module("facetrt.engine.machine.driver").driver_version()
    found: dict[str, Any] = {"cuda": [version.value // 1000, version.value % 1000 // 10], "driver": driver}
    code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return found | {"error": "the driver sees no GPU" if code == NO_DEVICE else _cuda_error(cuda, code)}
    return found | {"gpus": [_describe(cuda, number) for number in range(count.value)]}


def _describe(cuda: Any, number: int) -> dict[str, Any]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), number)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    for value, attribute in ((major, MAJOR), (minor, MINOR)):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return {"name": name.value.decode(), "capability": [major.value, minor.value], "memory": memory.value}


def _cuda_error(cuda: Any, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return f"the driver does not start: {(text.value or b'').decode() or f'error {code}'}"


def onnxruntime() -> dict[str, Any]:
    """The providers that it was built with."""
    return {"providers": list(importlib.import_module("onnxruntime").get_available_providers())}


def onnxruntime_cuda(model: str) -> dict[str, Any]:
    """Whether the CUDA provider takes a model: only then are CUDA's own libraries loaded."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()
    providers = runtime.InferenceSession(model, options, providers=["CUDAExecutionProvider"]).get_providers()
    if "CUDAExecutionProvider" not in providers:
        raise RuntimeError("the CUDA provider does not load: are CUDA and cuDNN there in the versions that it wants?")
    return {"providers": list(providers)}


def openvino() -> dict[str, Any]:
    """What it can compute with on the processor."""
    core = importlib.import_module("facetrt.engine.backends.openvino").import_openvino().Core()
    return {"capabilities": list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))}


def tensorrt() -> dict[str, Any]:
    """The version, after a runtime could be made: that is where a driver that is too old shows."""
    library = importlib.import_module("tensorrt")
    if library.Runtime(library.Logger(library.Logger.ERROR)) is None:
        raise RuntimeError("no runtime could be made")
    return {"version": str(library.__version__)}


def tensorrt_rtx() -> dict[str, Any]:
    """The version of TensorRT for RTX, after a runtime could be made."""
    flavours = importlib.import_module("facetrt.engine.backends.flavours")
    library = flavours.import_library(flavours.RTX)
    if library.Runtime(library.Logger(library.Logger.ERROR)) is None:
        raise RuntimeError("no runtime could be made")
    return {"version": str(library.__version__)}


def pycuda() -> dict[str, Any]:
    """How many GPUs it sees."""
    driver = importlib.import_module("pycuda.driver")
    driver.init()
    return {"count": int(driver.Device.count())}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    probe.__name__: probe for probe in (gpu, onnxruntime, onnxruntime_cuda, openvino, tensorrt, tensorrt_rtx, pycuda)
}


def main() -> None:
    """Answer one question; whatever goes wrong is the answer, too."""
    name, *arguments = sys.argv[1:]
    try:
        answer = PROBES[name](*arguments)
    except Exception as error:  # noqa: BLE001
        text = (str(error).strip().splitlines() or [""])[0]
        answer = {"error": f"{type(error).__name__}: {text}" if text else type(error).__name__}
    print("\n" + json.dumps(answer))  # a line of its own: libraries write to standard output as well


if __name__ == "__main__":
    main()
