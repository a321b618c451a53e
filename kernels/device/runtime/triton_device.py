"""Triton kernels from source, on torch tensors: for tests and development, not for production.

Under ``TRITON_INTERPRET=1`` (set before triton is imported) they run in Triton's interpreter on a CPU.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from facetrt.kernels.device.runtime.base import DeviceArray
from facetrt.kernels.device.runtime.exchange import SharingDevice
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError, MissingDependencyError

PROGRAMS = "facetrt.kernels.device.programs"


class TritonDevice(SharingDevice):
    """Launches programs by Triton's own just-in-time path; ``name`` is torch's name of the device, ``cpu`` or ``cuda``.

    Arrays are slices of flat uint8 tensors; a canary behind each shows writes past its end (:meth:`check_canaries`).
    """

    def __init__(self, name: str = "cpu") -> None:
        try:
            self._torch = import_module("torch")
            self._triton = import_module("triton")
        except ImportError as error:
            raise MissingDependencyError(
                "kernels from source need torch and triton: pip install 'facetrt[export]'"
            ) from error
        if name == "cpu" and not self._triton.knobs.runtime.interpret:
            raise InputError("on a CPU kernels run in the interpreter only: set TRITON_INTERPRET=1 before the start")
        if name != "cpu" and self._triton.knobs.runtime.interpret:
            raise InputError("on a GPU kernels run compiled, not in the interpreter: unset TRITON_INTERPRET")
        self.name = name

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        storage = self._torch.full((nbytes + _PADDING,), _CANARY, dtype=self._torch.uint8, device=self.name)
        skip = -storage.data_ptr() % 16
        return DeviceArray(storage.data_ptr() + skip, tuple(shape), kind, storage, self)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        array = self.empty(shape, dtype)
        self._bytes(array).zero_()
        return array

    def upload(self, values: NDArray[Any]) -> DeviceArray:
        array = self.empty(values.shape, values.dtype)
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._bytes(array).copy_(self._torch.from_numpy(flat.copy()))
        return array

    def download(self, array: DeviceArray) -> NDArray[Any]:
        found: NDArray[Any] = self._bytes(array).cpu().numpy().copy()
        return found.view(array.dtype).reshape(array.shape)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        if source.nbytes != target.nbytes:
            raise InputError(f"a copy of {source.nbytes} bytes into {target.nbytes}")
        self._bytes(target).copy_(self._bytes(source))

    def synchronize(self) -> None:
        if self.name != "cpu":
            self._torch.cuda.synchronize()

    @property
    def exchange_device(self) -> tuple[int, int]:
        return (1, 0) if self.name == "cpu" else (2, int(self._torch.cuda.current_device()))

    @property
    def stream_handle(self) -> int:
        return 1 if self.name == "cpu" else int(self._torch.cuda.current_stream().cuda_stream) or 1

    def wait_for_stream(self, handle: int) -> None:
        self.synchronize()  # all streams of the GPU

    def hold_stream(self, handle: int) -> None:
        self.synchronize()

    def foreign_memory(self, pointer: int, nbytes: int, keep: Any) -> Any:
        if not nbytes:
            return self._torch.empty(0, dtype=self._torch.uint8, device=self.name)
        memory: Any = _Memory(pointer, nbytes, keep)
        if self.name == "cpu":
            return self._torch.from_numpy(np.asarray(memory))
        return self._torch.as_tensor(memory, device=self.name)

    def _launch(self, program: Program, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        module, _, function = program.source.partition(":")
        kernel = getattr(import_module(f"{PROGRAMS}.{module}"), function)
        passed = [self._tensor(value) if isinstance(value, DeviceArray) else value for value in arguments]
        options = {"num_warps": program.warps, "num_stages": program.stages}
        kernel[grid](*passed, **program.constants, **options)

    def _bytes(self, array: DeviceArray) -> Any:
        start = array.pointer - array.owner.data_ptr()
        return array.owner[start : start + array.nbytes]

    def _tensor(self, array: DeviceArray) -> Any:
        return self._bytes(array).view(getattr(self._torch, array.dtype.name)).reshape(array.shape)

    def check_canaries(self, *arrays: DeviceArray) -> None:
        """Raise :class:`InputError` if a kernel wrote behind one of these whole arrays."""
        for array in arrays:
            end = array.pointer - array.owner.data_ptr() + array.nbytes
            if not bool((array.owner[end:] == _CANARY).all()):
                raise InputError(f"a kernel wrote past the end of an array of shape {array.shape}")


class _Memory:
    """Bytes at an address, in the terms of torch: an array in host memory, or the CUDA array interface."""

    def __init__(self, pointer: int, nbytes: int, keep: Any) -> None:
        self.keep = keep
        told = {"data": (pointer, False), "shape": (nbytes,), "typestr": "|u1", "strides": None, "version": 3}
        self.__array_interface__ = self.__cuda_array_interface__ = told


_PADDING = 256
_CANARY = 0xA5
