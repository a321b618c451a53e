"""ONNX Runtime with a CUDA provider that is none: runs on the CPU, on the streams and memory of ``fakes_cuda``.

Enforces what the provider's documentation asks for: addresses in live memory, a stream of the context, and for CUDA
graphs one number for each set of shapes and addresses. What breaks a rule raises :class:`RuleBroken`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from fakes_cuda import Gpu, RuleBroken

PROVIDER = "CUDAExecutionProvider"


def make(gpu: Gpu, *, available: bool = True, loads: bool = True) -> Any:
    """A module like ``onnxruntime``; ``loads`` says whether the provider's library can be loaded."""
    state = SimpleNamespace(sessions=[], preloaded=0)

    class SessionOptions:
        log_severity_level = 2

    class RunOptions:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_run_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    class InferenceSession(Session):
        def __init__(self, encoder: bytes, options: SessionOptions, providers: list[Any]) -> None:
            if not isinstance(options, SessionOptions):
                raise RuleBroken("options of another module")
            super().__init__(gpu, encoder, providers, loads=loads)
            state.sessions.append(self)

    def preload_dlls() -> None:
        state.preloaded += 1

    providers = [PROVIDER, "CPUExecutionProvider"] if available else ["CPUExecutionProvider"]
    return SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: providers,
        preload_dlls=preload_dlls,
        SessionOptions=SessionOptions,
        RunOptions=RunOptions,
        InferenceSession=InferenceSession,
        state=state,
    )


class Session:
    def __init__(self, gpu: Gpu, encoder: bytes, providers: list[Any], *, loads: bool) -> None:
        gpu.current("InferenceSession")
        ((name, self.provider),) = providers
        if name != PROVIDER or any(not isinstance(value, str) for value in self.provider.values()):
            raise RuleBroken(f"providers {providers}: expected CUDA alone, with texts as its options")
        self.gpu, self.loads, self.fallback = gpu, loads, True
        if int(self.provider["user_compute_stream"]) not in gpu.streams:
            raise RuleBroken("user_compute_stream is no live stream")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.inner = onnxruntime.InferenceSession(encoder, options, providers=["CPUExecutionProvider"])
        self.recorded: dict[str, Any] = {}

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"] if self.loads else ["CPUExecutionProvider"]

    def disable_fallback(self) -> None:
        self.fallback = False

    def get_inputs(self) -> Any:
        return self.inner.get_inputs()

    def get_outputs(self) -> Any:
        return self.inner.get_outputs()

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        self.gpu.current("run_with_iobinding")
        if self.fallback:
            raise RuleBroken("a run with the fallback still on")
        bound = {**binding.inputs, **binding.outputs}
        for name, (kind, shape, pointer) in bound.items():
            self.gpu.check_live(pointer, int(np.prod(shape)) * np.dtype(kind).itemsize, f"tensor {name}")
        number = options.entries.get("gpu_graph_id")
        recording = self.provider["enable_cuda_graph"] == "1" and number != "-1"
        if recording and (number is None or self.recorded.setdefault(number, bound) != bound):
            raise RuleBroken(f"CUDA graph {number} was recorded with other addresses or shapes: stale results")
        if options.entries.get("disable_synchronize_execution_providers") != "1":
            raise RuleBroken("the run waits for the device")
        self.gpu.enqueue(int(self.provider["user_compute_stream"]), lambda: self._compute(binding))

    def _compute(self, binding: Binding) -> None:
        inputs = {name: self._view(*where).copy() for name, where in binding.inputs.items()}
        results = self.inner.run(list(binding.outputs), inputs)
        for where, values in zip(binding.outputs.values(), results, strict=True):
            self._view(*where)[...] = values

    def _view(self, kind: Any, shape: tuple[int, ...], pointer: int) -> Any:
        nbytes = int(np.prod(shape)) * np.dtype(kind).itemsize
        return self.gpu.view(pointer, nbytes).view(kind).reshape(shape)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        self.inputs[name] = self._checked(device_type, device_id, element_type, shape, buffer_ptr)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Any = None,
        buffer_ptr: int | None = None,
    ) -> None:
        self.outputs[name] = self._checked(device_type, device_id, element_type, shape, buffer_ptr)

    def _checked(self, device_type: str, device_id: int, kind: Any, shape: Any, pointer: int | None) -> Any:
        if device_type != "cuda" or device_id != 0 or not isinstance(pointer, int) or not isinstance(shape, list):
            raise RuleBroken(f"bound to {device_type}:{device_id} at {pointer!r} with shape {shape!r}")
        return kind, tuple(shape), pointer
