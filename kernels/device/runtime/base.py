"""A device as the operations see it: arrays, copies and launches in the order of one stream."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array in device memory.

    Attributes:
        pointer: address of the first element.
        owner: what keeps the memory; it is given back when the last array on it goes.
        device: whose stream orders all use of it.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any = field(repr=False)
    device: Device = field(repr=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """What ``torch.from_dlpack`` and the like call: see :meth:`Device.to_dlpack`."""
        return self.device.to_dlpack(self, stream, max_version, dl_device, copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device.exchange_device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.device.cuda_array_interface(self)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory in another shape; one -1 is inferred."""
        known = math.prod(n for n in shape if n != -1)
        if shape.count(-1) > 1 or (-1 in shape and (not known or self.size % known)):
            raise InputError(f"shape {self.shape} does not become {shape}")
        whole = tuple(self.size // known if n == -1 else n for n in shape)
        if math.prod(whole) != self.size:
            raise InputError(f"shape {self.shape} does not become {shape}")
        return DeviceArray(self.pointer, whole, self.dtype, self.owner, self.device)

    def rows(self, start: int, stop: int) -> DeviceArray:
        """Entries ``start..stop`` of the first axis, as a view."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise InputError(f"rows {start} to {stop} of {self.shape[0]}")
        offset = start * math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.pointer + offset, (stop - start, *self.shape[1:]), self.dtype, self.owner, self.device)


class Device(ABC):
    """One stream of one device. Calls return at once, except :meth:`download` and :meth:`synchronize`."""

    @property
    def ordinal(self) -> int:
        """Number of the GPU, as CUDA counts them; 0 where there is none."""
        return 0

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Memory with arbitrary content.

        Raises:
            BackendError: out of device memory; says how much was needed and how much is free.
        """

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Memory with all bytes zero."""

    @abstractmethod
    def upload(self, values: NDArray[Any]) -> DeviceArray:
        """A copy of a host array, which may be changed as soon as this returns."""

    @abstractmethod
    def download(self, array: DeviceArray) -> NDArray[Any]:
        """A copy in host memory. Waits for everything before it on this stream."""

    @abstractmethod
    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy all bytes of ``source`` to ``target``, of the same size, on the device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything before on this stream."""

    def adopt(self, array: DeviceArray) -> DeviceArray:
        """Another stream's array for use on this one, ordered after everything so far on the other."""
        if array.device is self:
            return array
        array.device.synchronize()
        return replace(array, device=self)

    @abstractmethod
    def _launch(self, program: Program, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None: ...

    def launch(self, program: Program, grid: tuple[int, ...], *arguments: DeviceArray | int | float) -> None:
        """Run a program on ``grid`` instances.

        Raises:
            InputError: arguments that are not what the program was compiled for.
            BackendError: the program is missing for this device.
        """
        program.check(grid, arguments)
        self._launch(program, grid, arguments)

    def __deepcopy__(self, memo: object) -> Device:
        return self

    # What exchanging arrays with other libraries needs: :class:`facetrt.kernels.device.runtime.exchange.SharingDevice`
    # does it. What is said of streams here is right for host memory, which has none.

    def to_dlpack(
        self,
        array: DeviceArray,
        stream: int | None,
        max_version: tuple[int, int] | None,
        dl_device: tuple[int, int] | None,
        copy: bool | None,
    ) -> Any:
        """A DLPack capsule of one of this device's arrays.

        Raises:
            BufferError: this device does not share its memory.
        """
        raise BufferError(f"a {type(self).__name__} does not share its memory with other libraries")

    def cuda_array_interface(self, array: DeviceArray) -> dict[str, Any]:
        """The CUDA array interface of one of this device's arrays.

        Raises:
            AttributeError: this device does not share its memory, or it is no GPU's.
        """
        raise AttributeError("__cuda_array_interface__: this device does not share its memory with other libraries")

    @property
    def exchange_device(self) -> tuple[int, int]:
        """DLPack's device type, 1 for host memory and 2 for CUDA, and number."""
        return 1, 0

    @property
    def stream_handle(self) -> int:
        """What other libraries know the stream by; 1 is the default stream."""
        return 1

    def wait_for_stream(self, handle: int) -> None:  # noqa: B027
        """Let everything put on this stream from now on wait for what is by now on a stream of someone else."""

    def hold_stream(self, handle: int) -> None:  # noqa: B027
        """Let everything put on a stream of someone else from now on wait for what is by now on this one."""

    def release_later(self, owner: Any) -> None:  # noqa: B027
        """Keep ``owner`` until everything so far on this stream is done."""

    def foreign_memory(self, pointer: int, nbytes: int, keep: Any) -> Any:
        """The owner for an array in someone else's memory, which ``keep`` keeps."""
        return keep
