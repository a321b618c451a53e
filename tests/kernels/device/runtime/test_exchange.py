from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fakes_cuda
import numpy as np
import pytest
import torch
from fakes_cuda import Gpu

from facetrt.kernels.device import convert
from facetrt.kernels.device.runtime import exchange
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.cuda import CudaDevice
from facetrt.kernels.device.runtime.exchange import from_external
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.errors import BackendError, InputError

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def host() -> TritonDevice:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there: host memory is exchanged by the interpreter's device")
    return TritonDevice("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return fakes_cuda.install(monkeypatch)


@pytest.fixture
def cuda(gpu: Gpu) -> Iterator[CudaDevice]:
    with CudaDevice.open(kernels=gpu.kernels(convert.PROGRAMS)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    if exchange._given:  # a failed test's frames hold what it exported
        gc.collect()
    assert exchange._given == {}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("importing", [np.from_dlpack, torch.from_dlpack], ids=["numpy", "torch"])
def test_others_see_the_same_memory(host: TritonDevice, importing: Any, dtype: str) -> None:
    array = host.upload(VALUES.astype(dtype))
    seen = importing(array)
    np.testing.assert_array_equal(np.asarray(seen), VALUES.astype(dtype))
    seen[1, 2] = 0
    assert host.download(array)[1, 2] == 0


@pytest.mark.parametrize("importing", [np.from_dlpack, torch.from_dlpack], ids=["numpy", "torch"])
def test_memory_lives_as_long_as_the_other_uses_it(host: TritonDevice, importing: Any) -> None:
    array = host.upload(VALUES)
    owner = weakref.ref(array.owner)
    seen = importing(array)
    del array
    gc.collect()
    assert owner() is not None
    np.testing.assert_array_equal(np.asarray(seen), VALUES)
    assert len(exchange._given) == 1
    del seen
    gc.collect()
    assert exchange._given == {}
    assert owner() is None


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 3)])
def test_capsules_that_nobody_takes_are_cleaned_up(host: TritonDevice, version: tuple[int, int] | None) -> None:
    capsule = host.upload(VALUES).__dlpack__(max_version=version)
    assert ("dltensor_versioned" in repr(capsule)) == (version is not None and version[0] == 1)
    assert len(exchange._given) == 1
    del capsule
    assert exchange._given == {}


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_the_deleter_runs_once(
    host: TritonDevice, version: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It pops the entry: a second call would raise, which ctypes reports as unraisable."""
    problems: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    array = host.upload(VALUES)
    capsule = SimpleNamespace(
        __dlpack__=lambda **_: array.__dlpack__(max_version=version), __dlpack_device__=array.__dlpack_device__
    )
    taken = type("Producer", (), {name: staticmethod(call) for name, call in vars(capsule).items()})()
    for importing in (np.from_dlpack, torch.from_dlpack):
        seen = importing(taken)
        assert seen.shape == VALUES.shape
        del seen
        gc.collect()
    assert exchange._given == {}
    assert problems == []


def test_views_and_empty_arrays_are_exchanged(host: TritonDevice) -> None:
    array = host.upload(VALUES)
    np.testing.assert_array_equal(np.from_dlpack(array.rows(1, 3)), VALUES[1:])
    np.testing.assert_array_equal(torch.from_dlpack(array.reshape(2, -1)), VALUES.reshape(2, 6))
    assert np.from_dlpack(host.empty((0, 4), "float32")).shape == (0, 4)
    assert np.from_dlpack(host.upload(np.array(3.0))).shape == ()


def test_copies_and_other_devices_are_refused(host: TritonDevice) -> None:
    array = host.upload(VALUES)
    assert array.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="without a copy only"):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"DLPack device \(1, 0\)"):
        array.__dlpack__(dl_device=(2, 0))
    with pytest.raises(AttributeError, match="host memory"):
        _ = array.__cuda_array_interface__
    assert not hasattr(array, "__cuda_array_interface__")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool])
def test_takes_tensors_of_torch_without_a_copy(host: TritonDevice, dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    array = from_external(host, tensor)
    assert (array.pointer, array.shape) == (tensor.data_ptr(), (3, 4))
    np.testing.assert_array_equal(host.download(array), tensor.numpy())
    tensor[0] = 1
    np.testing.assert_array_equal(host.download(array), tensor.numpy())


def test_takes_arrays_of_numpy_and_launches_on_them(host: TritonDevice) -> None:
    array = from_external(host, np.linspace(0, 1, 40, dtype=np.float32))
    np.testing.assert_array_equal(
        host.download(convert.to_half(host, array)), np.linspace(0, 1, 40, dtype=np.float32).astype(np.float16)
    )


def test_foreign_memory_lives_until_the_array_goes(host: TritonDevice) -> None:
    class Watched(np.ndarray[Any, Any]):
        gone = 0

        def __del__(self) -> None:
            Watched.gone += 1

    values = VALUES.copy().view(Watched)
    array: DeviceArray | None = from_external(host, values)
    del values
    gc.collect()
    assert Watched.gone == 0
    assert array is not None
    np.testing.assert_array_equal(host.download(array), VALUES)
    del array
    gc.collect()
    assert Watched.gone == 1


def test_takes_odd_but_contiguous_shapes(host: TritonDevice) -> None:
    assert from_external(host, torch.empty(0, 3)).shape == (0, 3)
    assert from_external(host, torch.tensor(2.5)).shape == ()
    assert from_external(host, torch.zeros(4, 1, 2).transpose(0, 1).contiguous()).shape == (1, 4, 2)
    one_row = torch.zeros(5, 3)[2:3]  # of one row, whose stride means nothing
    assert from_external(host, one_row).shape == (1, 3)
    offset = from_external(host, torch.arange(12)[4:])
    np.testing.assert_array_equal(host.download(offset), np.arange(4, 12))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: torch.zeros(3, 4).T, r"shape \(4, 3\) with strides \(1, 4\) was given: expected a contiguous one"),
        (lambda: torch.zeros(4)[::2], "expected a contiguous one"),
        (lambda: torch.zeros(3, dtype=torch.bfloat16), r"DLPack type \(4, 16\)"),
        (lambda: torch.zeros(3, dtype=torch.complex64), r"DLPack type \(5, 64\)"),
        (lambda: torch.zeros(3, requires_grad=True), "cannot be shared"),
        (lambda: [1, 2], "a list was given: expected an array with __dlpack__$"),
    ],
)
def test_what_cannot_be_taken_is_refused(host: TritonDevice, source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_external(host, source())


def test_memory_of_another_device_is_refused(cuda: CudaDevice) -> None:
    with pytest.raises(InputError, match=r"DLPack device \(1, 0\) was given: expected one on \(2, 0\)"):
        from_external(cuda, torch.zeros(3))


class Interface:
    """Another library's array on the fake GPU."""

    def __init__(self, gpu: Gpu, values: np.ndarray[Any, Any], **told: Any) -> None:
        self.gpu = gpu
        gpu.primary.push()
        self.pointer = gpu.mem_alloc(values.nbytes)
        gpu.primary.pop()
        self.values = values
        given = {"shape": values.shape, "typestr": values.dtype.str, "data": (self.pointer, False), "version": 3}
        self.__cuda_array_interface__ = {**given, **told}

    def fill(self) -> None:
        self.gpu.view(self.pointer, self.values.nbytes)[:] = self.values.reshape(-1).view(np.uint8)


@pytest.mark.parametrize("strides", [None, (16, 4)])
def test_takes_the_cuda_array_interface_after_its_stream(cuda: CudaDevice, gpu: Gpu, strides: Any) -> None:
    stream = gpu.foreign_stream()
    source = Interface(gpu, VALUES, stream=stream.handle, strides=strides)
    stream.put(source.fill)  # has not run when the array is taken
    array = from_external(cuda, source)
    assert array.pointer == source.pointer
    np.testing.assert_array_equal(cuda.download(array), VALUES)


def test_keeps_foreign_memory_until_the_stream_is_done(cuda: CudaDevice, gpu: Gpu) -> None:
    source = Interface(gpu, VALUES.reshape(-1))
    source.fill()
    array = from_external(cuda, source)
    count = sys.getrefcount(source)
    half = convert.to_half(cuda, array)
    del array
    assert sys.getrefcount(source) == count  # the kernel has not run
    cuda.synchronize()
    assert sys.getrefcount(source) == count - 1
    np.testing.assert_array_equal(cuda.download(half), VALUES.reshape(-1))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"strides": (4, 12)}, "expected a contiguous one"),
        ({"strides": (15, 4)}, "no multiples of 4 bytes"),
        ({"typestr": "<c8"}, "complex64"),
        ({"mask": object()}, "no mask"),
    ],
)
def test_interfaces_that_cannot_be_taken_are_refused(cuda: CudaDevice, gpu: Gpu, told: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_external(cuda, Interface(gpu, VALUES, **told))


def test_an_interface_on_a_stream_of_another_context_is_refused(cuda: CudaDevice, gpu: Gpu) -> None:
    stream = gpu.foreign_stream(other_context=True)
    with pytest.raises(BackendError, match="belongs to another CUDA context"):
        from_external(cuda, Interface(gpu, VALUES, stream=stream.handle))


def test_gives_the_cuda_array_interface(cuda: CudaDevice) -> None:
    array = cuda.upload(VALUES)
    assert array.__cuda_array_interface__ == {
        "shape": (3, 4),
        "typestr": "<f4",
        "data": (array.pointer, False),
        "strides": None,
        "stream": cuda.stream_handle,
        "version": 3,
    }
    assert cuda.empty((0,), "int8").__cuda_array_interface__["data"] == (0, False)


class Passing:
    """A library that hands on what it was given, on a stream of its own."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        self.asked: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, stream: int | None = None) -> Any:
        self.asked.append(stream)
        return self.array.__dlpack__(stream=stream)


def test_dlpack_orders_the_streams_both_ways(cuda: CudaDevice) -> None:
    """One lane's array goes to another lane through DLPack, as it would to another library."""
    lane = cuda.lane()
    source = Passing(cuda.upload(VALUES))
    taken = from_external(lane, source)
    assert source.asked == [lane.stream_handle]
    address = taken.pointer
    copied = lane.empty((3, 4), "float32")
    lane.copy(taken, copied)
    del source, taken  # the producer's next upload gets the memory, and must wait for the consumer's copy
    gc.collect()
    np.testing.assert_array_equal(lane.download(copied), VALUES)
    lane.synchronize()
    again = cuda.upload(VALUES + 1)
    assert again.pointer == address
    lane.close()


def test_dlpack_without_order_and_with_the_default_stream(cuda: CudaDevice, gpu: Gpu) -> None:
    array = cuda.upload(VALUES)
    del gpu.streams[cuda.stream_handle]  # so that an order would fail
    capsule = array.__dlpack__(stream=-1)
    assert "dltensor" in repr(capsule)
    with pytest.raises(fakes_cuda.RuleBroken, match="no live CUstream"):
        array.__dlpack__()
    gpu.streams[cuda.stream_handle] = cuda.stream


def test_what_others_hold_outlives_the_device(cuda: CudaDevice, gpu: Gpu) -> None:
    capsule = cuda.upload(VALUES).__dlpack__(stream=gpu.foreign_stream().handle)
    cuda.close()
    assert len(gpu.device_memory.live) == 1
    del capsule
    assert gpu.device_memory.live == {}


def test_memory_given_back_while_the_lane_records_is_kept_by_the_graph(
    cuda: CudaDevice, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait cannot be recorded, and without one the memory would be reused before the consumer is done."""
    problems: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    consumer, seen = gpu.foreign_stream(), list[int]()
    array = cuda.upload(VALUES)
    address, block, capsule = array.pointer, weakref.ref(array.owner), array.__dlpack__(stream=consumer.handle)
    del array
    with cuda.activate():
        gpu.enqueue(consumer.handle, lambda: seen.append(int(gpu.view(address, 4).view(np.float32)[0])))
    held = [capsule]
    del capsule
    with cuda.capture() as graph:
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
    assert problems == [] and exchange._given == {}
    assert block() is not None and cuda.empty((3, 4), "float32").pointer != address
    cuda.close_graph(graph)
    assert block() is None and seen == []
    again = cuda.upload(VALUES + 7)
    assert again.pointer == address
    np.testing.assert_array_equal(cuda.download(again), VALUES + 7)
    assert seen == [0] and problems == []  # the consumer came first


def test_a_device_that_does_not_share_says_so() -> None:
    array = DeviceArray(0, (1,), np.dtype(np.uint8), None, Unshared())
    with pytest.raises(BufferError, match="a Unshared does not share its memory"):
        array.__dlpack__()
    assert not hasattr(array, "__cuda_array_interface__")


class Unshared(Device):
    """What an operation needs of a device, and no more."""

    empty = zeros = upload = download = copy = synchronize = _launch = NotImplemented
