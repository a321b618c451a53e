"""Device arrays to and from other libraries (torch, CuPy, NumPy) without a copy: DLPack, CUDA array interface."""

from __future__ import annotations

import ctypes
import math
from ctypes import CFUNCTYPE, POINTER, PYFUNCTYPE, Structure, c_char_p, c_int32, c_int64, c_uint64, c_void_p, py_object
from typing import Any

import numpy as np

from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.errors import InputError

HOST, CUDA = 1, 2  # DLPack's device types
LEGACY_STREAM = 1  # the default stream, in both protocols; 0 is ambiguous and not allowed
NO_ORDER = -1  # DLPack: the consumer orders the streams by itself

_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # NumPy's kinds as DLPack's type codes
_TYPES = {(0, bits): f"int{bits}" for bits in (8, 16, 32, 64)}
_TYPES |= {(1, bits): f"uint{bits}" for bits in (8, 16, 32, 64)}
_TYPES |= {(2, bits): f"float{bits}" for bits in (16, 32, 64)} | {(6, 8): "bool"}


class _Device(Structure):
    _fields_ = (("kind", c_int32), ("number", c_int32))


class _Type(Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device", _Device),
        ("ndim", c_int32),
        ("dtype", _Type),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    )


class _Managed(Structure):
    """DLManagedTensor: what a capsule called ``dltensor`` points to."""

    _fields_ = (("tensor", _Tensor), ("context", c_void_p), ("deleter", c_void_p))


class _ManagedVersioned(Structure):
    """DLManagedTensorVersioned of DLPack 1: what a capsule called ``dltensor_versioned`` points to."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", _Tensor),
    )


_NAME, _NAME_VERSIONED, _USED = b"dltensor", b"dltensor_versioned", b"used_dltensor"
_Deleter = CFUNCTYPE(None, c_void_p)
_Destructor = PYFUNCTYPE(None, c_void_p)
_new_capsule = PYFUNCTYPE(py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_is_valid = PYFUNCTYPE(ctypes.c_int, py_object, c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_rename = PYFUNCTYPE(ctypes.c_int, py_object, c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
# A capsule that is being destroyed must not become a Python object again: these take its address.
_dying_is_valid = PYFUNCTYPE(ctypes.c_int, c_void_p, c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_dying_pointer = PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))

# What consumers hold, by the address of the structure that they were given: (what it points to, array, stream).
_given: dict[int, tuple[tuple[Any, ...], DeviceArray, int | None]] = {}


def to_dlpack(
    array: DeviceArray,
    stream: int | None = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """A DLPack capsule of an array, as ``array.__dlpack__``.

    Args:
        array: it lives at least as long as the consumer uses it.
        stream: of the consumer, which is made to wait for the array's; None for the default stream, -1 for none.
        max_version: that the consumer understands.
        dl_device, copy: only the array's own device, and no copy.

    Raises:
        BufferError: a copy or another device was asked for.
    """
    device = array.device.exchange_device
    if copy or (dl_device is not None and tuple(dl_device) != device):
        raise BufferError(f"an array on DLPack device {device} is given without a copy only, and as it is")
    consumer = None
    if device[0] == CUDA and stream != NO_ORDER:
        consumer = LEGACY_STREAM if stream is None else stream
        array.device.hold_stream(consumer)
    versioned = max_version is not None and max_version[0] >= 1
    managed: Any = _ManagedVersioned(major=1, minor=0) if versioned else _Managed()
    shape, strides = _fill(managed.tensor, array, device)
    managed.deleter = ctypes.cast(_DELETER, c_void_p)
    _given[ctypes.addressof(managed)] = ((managed, shape, strides), array, consumer)
    name = _NAME_VERSIONED if versioned else _NAME
    return _new_capsule(ctypes.addressof(managed), name, ctypes.cast(_DESTRUCTOR, c_void_p))


def _fill(tensor: _Tensor, array: DeviceArray, device: tuple[int, int]) -> tuple[Any, Any]:
    shape = (c_int64 * len(array.shape))(*array.shape)
    strides = (c_int64 * len(array.shape))(*(math.prod(array.shape[i + 1 :]) for i in range(len(array.shape))))
    tensor.data = array.pointer
    tensor.device = _Device(*device)
    tensor.ndim = len(array.shape)
    tensor.dtype = _Type(_KINDS[array.dtype.kind], 8 * array.dtype.itemsize, 1)
    tensor.shape = ctypes.cast(shape, POINTER(c_int64))
    tensor.strides = ctypes.cast(strides, POINTER(c_int64))
    return shape, strides


def _delete_given(address: int) -> None:
    _, array, consumer = _given.pop(address)
    if consumer is not None:
        _Lent(array, consumer)  # ends at once


class _Lent:
    """An array that a consumer has used; its end makes our stream wait, which may reuse the memory, for the consumer's.

    Called by the consumer, on any of its threads.
    """

    def __init__(self, array: DeviceArray, consumer: int) -> None:
        self.array = array
        self.consumer = consumer

    def __del__(self) -> None:
        device = self.array.device
        try:
            device.wait_for_stream(self.consumer)
        except InputError:  # our stream is being recorded, and a wait cannot be: the graph keeps the memory instead
            device.release_later(_Lent(self.array, self.consumer))


def _destroy_capsule(capsule: int) -> None:
    for name in (_NAME, _NAME_VERSIONED):  # a consumer that took the tensor has renamed its capsule
        if _dying_is_valid(capsule, name):
            _delete_given(_dying_pointer(capsule, name))


# Kept here, because C code holds their addresses.
_DELETER = _Deleter(_delete_given)
_DESTRUCTOR = _Destructor(_destroy_capsule)


def cuda_array_interface(array: DeviceArray) -> dict[str, Any]:
    """The CUDA array interface, version 3. Consumers wait for ``stream``; torch does not, so prefer DLPack for it.

    Raises:
        AttributeError: the array is in host memory.
    """
    if array.device.exchange_device[0] != CUDA:
        raise AttributeError("__cuda_array_interface__: the array is in host memory")
    return {
        "shape": array.shape,
        "typestr": array.dtype.str,
        "data": (array.pointer if array.size else 0, False),
        "strides": None,
        "stream": array.device.stream_handle,
        "version": 3,
    }


class SharingDevice(Device):
    """A device that hands its memory to other libraries."""

    def to_dlpack(
        self,
        array: DeviceArray,
        stream: int | None,
        max_version: tuple[int, int] | None,
        dl_device: tuple[int, int] | None,
        copy: bool | None,
    ) -> Any:
        """See :func:`to_dlpack`."""
        return to_dlpack(array, stream, max_version, dl_device, copy)

    def cuda_array_interface(self, array: DeviceArray) -> dict[str, Any]:
        """See :func:`cuda_array_interface`."""
        return cuda_array_interface(array)


def from_external(device: Device, source: Any) -> DeviceArray:
    """Another library's array (torch, CuPy, …) for use on ``device``'s stream, without a copy.

    What the other library has put on its own stream is waited for. It may change or reuse the memory only after
    ``device.synchronize()``, or when the result has gone: the memory is kept until the work on it is done.

    Raises:
        InputError: on another device, not contiguous, of another type than integers, floats and booleans, or no array.
        BackendError: it belongs to another CUDA context.
    """
    if hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__"):
        return _from_dlpack(device, source)
    if device.exchange_device[0] == CUDA and hasattr(source, "__cuda_array_interface__"):
        return _from_interface(device, source)
    raise InputError(
        f"a {type(source).__name__} was given: expected an array with __dlpack__"
        + (" or __cuda_array_interface__" if device.exchange_device[0] == CUDA else "")
    )


def _from_dlpack(device: Device, source: Any) -> DeviceArray:
    kind, number = source.__dlpack_device__()
    if (int(kind), int(number)) != device.exchange_device:
        raise InputError(
            f"an array on DLPack device {(int(kind), int(number))} was given: expected one on {device.exchange_device} "
            "(1 is host memory, 2 a GPU)"
        )
    try:
        capsule = source.__dlpack__(stream=device.stream_handle) if kind == CUDA else source.__dlpack__()
    except BufferError as error:
        raise InputError(f"the array cannot be shared: {error}") from error
    if not _is_valid(capsule, _NAME):
        raise InputError(f"a {type(source).__name__} answered with a capsule that is no unused dltensor")
    taken = _Taken(_pointer(capsule, _NAME))
    _rename(capsule, _USED)
    tensor = taken.managed.tensor
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else None
    code = (tensor.dtype.code, tensor.dtype.bits)
    if code not in _TYPES or tensor.dtype.lanes != 1:
        raise InputError(f"elements of DLPack type {code} were given: expected integers, floats or booleans")
    dtype = np.dtype(_TYPES[code])
    _check_contiguous(shape, strides)
    return _wrap(device, (tensor.data or 0) + tensor.byte_offset, shape, dtype, taken)


def _from_interface(device: Device, source: Any) -> DeviceArray:
    told = source.__cuda_array_interface__
    dtype, shape, strides = np.dtype(told["typestr"]), tuple(told["shape"]), told.get("strides")
    if dtype.kind not in _KINDS or told.get("mask") is not None:
        raise InputError(f"elements of type {dtype} were given: expected integers, floats or booleans, and no mask")
    if strides is not None:
        if any(stride % dtype.itemsize for stride in strides):
            raise InputError(f"strides {tuple(strides)} are no multiples of {dtype.itemsize} bytes")
        strides = tuple(stride // dtype.itemsize for stride in strides)
    _check_contiguous(shape, strides)
    if told.get("stream") is not None:
        device.wait_for_stream(int(told["stream"]))
    return _wrap(device, int(told["data"][0]), shape, dtype, source)


def _check_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
    if strides is None or math.prod(shape) == 0:
        return
    expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(n > 1 and given != wanted for n, given, wanted in zip(shape, strides, expected, strict=True)):
        raise InputError(f"an array of shape {shape} with strides {strides} was given: expected a contiguous one")


def _wrap(device: Device, pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any], keep: Any) -> DeviceArray:
    nbytes = math.prod(shape) * dtype.itemsize
    return DeviceArray(pointer, shape, dtype, device.foreign_memory(pointer, nbytes, _Foreign(device, keep)), device)


class _Foreign:
    """Memory of another library in use on a device's stream; let go when the stream's work so far is done."""

    def __init__(self, device: Device, keep: Any) -> None:
        self.device = device
        self.keep = keep

    def __del__(self) -> None:
        self.device.release_later(self.keep)


class _Taken:
    """A DLPack tensor that this side has taken, and gives back to its producer."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.managed = _Managed.from_address(address)

    def __del__(self) -> None:
        if self.managed.deleter:
            _Deleter(self.managed.deleter)(self.address)
