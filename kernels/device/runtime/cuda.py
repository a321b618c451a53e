"""An NVIDIA GPU through pycuda: production's device, which needs neither torch nor triton."""

from __future__ import annotations

import atexit
import ctypes
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import DTypeLike, NDArray

from facetrt.kernels.device.runtime import streams
from facetrt.kernels.device.runtime.base import DeviceArray
from facetrt.kernels.device.runtime.cubins import KernelSet, remedy
from facetrt.kernels.device.runtime.exchange import SharingDevice
from facetrt.kernels.device.runtime.program import POINTERS, Program
from facetrt.kernels.device.runtime.streams import CapturedGraph
from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError

MINIMUM_DRIVER = 12000  # CUDA 12.0
MINIMUM_CAPABILITY = (7, 5)  # kernels begin at 8.0; encoders run before it with kernels of the host
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no hidden order with the default stream, which torch uses
STATIC_SHARED = 48 * 1024  # bytes that a kernel may have without asking for more
STAGING_LIMIT = 256 << 20  # bytes of pinned memory waiting for their copies, per stream
FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


class CudaContext:
    """The primary context of one GPU, which torch and ONNX Runtime use too; ``with`` makes it current on this thread.

    It is retained once per process and released by its end: releasing it earlier would leave it current, but dead, on
    the threads that used it.
    """

    _known: dict[int, CudaContext] = {}  # noqa: RUF012  (one per GPU and process is the point)
    _lock = threading.Lock()
    _active = threading.local()

    def __init__(self, driver: Any, ordinal: int) -> None:
        self.driver = driver
        self.ordinal = ordinal
        self.device = driver.Device(ordinal)
        self.context = self.device.retain_primary_context()
        # pycuda would destroy it at exit as if it were not the primary one, with memory still on it: it must stay.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.context))
        self.lanes: WeakSet[CudaDevice] = WeakSet()

    @classmethod
    def of(cls, ordinal: int) -> CudaContext:
        """The context of a GPU, by its number.

        Raises:
            MissingDependencyError: pycuda is not installed.
            BackendError: no driver, no such GPU, or one that is too old.
        """
        with cls._lock:
            if ordinal not in cls._known:
                driver = _import_driver()
                _check_gpu(driver, ordinal)
                with translated():
                    cls._known[ordinal] = cls(driver, ordinal)
            return cls._known[ordinal]

    @classmethod
    def close_lanes(cls) -> None:
        """Close all lanes of all GPUs; at exit, while pycuda still works."""
        for context in cls._known.values():
            for lane in list(context.lanes):
                lane.close()

    def __enter__(self) -> None:
        stack = self._active.__dict__.setdefault("stack", [])
        if not stack or stack[-1] is not self:
            self.context.push()
        stack.append(self)

    def __exit__(self, *error: object) -> None:
        # pycuda aborts the process when a thread ends with a context pushed, so every push has its pop here.
        stack = self._active.stack
        stack.pop()
        if not stack or stack[-1] is not self:
            self.driver.Context.pop()


atexit.register(CudaContext.close_lanes)


class _Block:
    """Memory of a pool. Given back with the context current, whichever thread drops it: pycuda's pool demands that."""

    def __init__(self, context: CudaContext, allocation: Any) -> None:
        self.context = context
        self.allocation = allocation

    def __del__(self) -> None:
        with self.context:
            self.allocation.free()


class _Borrowed:
    """Another lane's memory in use on this one: its owner's stream waits for this stream before it is given back."""

    def __init__(self, owner: Any, lender: CudaDevice, borrower: CudaDevice) -> None:
        self.owner = owner
        self.lender = lender
        self.borrower = borrower

    def __del__(self) -> None:
        recording = self.borrower._graph or self.lender._graph
        if recording is not None:  # an order between lanes cannot be recorded: the graph keeps the memory instead
            recording.kept.append(_Borrowed(self.owner, self.lender, self.borrower))
        elif not self.lender.closed and not self.borrower.closed:  # closing has waited already
            self.lender.wait_for(self.borrower)


class _Functions:
    """Kernels, loaded when they are first launched, for all lanes of a device."""

    def __init__(self, context: CudaContext, kernels: KernelSet | None) -> None:
        self._context = context
        self._kernels = kernels
        self._loaded: dict[str, tuple[Any, tuple[int, int, int], int, tuple[int, ...]]] = {}
        self._lock = threading.Lock()

    def find(self, program: Program) -> tuple[Any, tuple[int, int, int], int, tuple[int, ...]]:
        """Prepared function, block, bytes of shared memory and values of the hidden parameters."""
        found = self._loaded.get(program.name)
        if found is None:
            with self._lock:
                found = self._loaded.setdefault(program.name, self._load(program))
        return found

    def _load(self, program: Program) -> tuple[Any, tuple[int, int, int], int, tuple[int, ...]]:
        if self._kernels is None:
            capability = self._context.device.compute_capability()
            raise BackendError(f"{program.name}: the bundle has no compiled kernels: {remedy(capability)}")
        kernel, code = self._kernels.find(program), self._kernels.cubin(program)
        driver = self._context.driver
        with translated(f"{program.name}, compiled for {self._kernels.architecture} by CUDA {self._kernels.toolkit}"):
            function = driver.module_from_buffer(code).get_function(kernel.symbol)
            if kernel.shared > STATIC_SHARED:
                function.set_attribute(driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared)
            function.prepare(argument_format(program, kernel.hidden))
        return function, (32 * kernel.warps, 1, 1), kernel.shared, (0,) * kernel.hidden

    def __del__(self) -> None:
        with self._context:
            self._loaded.clear()  # pycuda unloads modules only where their context is current


def argument_format(program: Program, hidden: int) -> str:
    """Arguments as the struct module packs them; native alignment is that of kernel parameters."""
    return "".join("P" if kind in POINTERS else FORMATS[kind] for _, kind in program.arguments) + "P" * hidden


class CudaDevice(SharingDevice):
    """One stream of an NVIDIA GPU. Lanes (:meth:`lane`) are further streams with the same context and kernels.

    A lane is used by one thread at a time; different lanes by different threads. Memory comes from a pool of the lane
    and goes back to it when the last array on it goes: what comes next on the stream may have it at once. An array
    is therefore used on its own lane only, or through :meth:`adopt` on another.

    Attributes:
        name: of the GPU.
        compute_capability: (major, minor).
        driver_version: newest CUDA version that the driver supports, like 13000.
        stream: pycuda's; ``stream_handle`` is the number that others know it by.
        upload_seconds: that callers spent until now; ``download_seconds`` likewise, which waiting is part of.
    """

    def __init__(self, context: CudaContext, functions: _Functions) -> None:
        """Use :meth:`open` and :meth:`lane`."""
        self.context = context
        self.name: str = context.device.name()
        self.compute_capability: tuple[int, int] = context.device.compute_capability()
        self.driver_version: int = context.driver.get_driver_version()
        self._driver = context.driver
        self._functions = functions
        self._graph: CapturedGraph | None = None
        self._pending: deque[tuple[Any, Any]] = deque()  # (event, what must live until then)
        self._staged = 0
        self._sweeping = threading.Lock()
        self.upload_seconds = self.download_seconds = 0.0
        tools = import_module("pycuda.tools")
        with context, translated():
            self.stream = self._driver.Stream(NON_BLOCKING)
            self._pool = tools.DeviceMemoryPool()
            self._pinned = tools.PageLockedMemoryPool()
        context.lanes.add(self)

    @classmethod
    def open(cls, ordinal: int = 0, kernels: KernelSet | None = None) -> CudaDevice:
        """The first lane of a GPU.

        Raises:
            MissingDependencyError: pycuda is not installed.
            BackendError: no driver, no such GPU, or one that is too old.
        """
        context = CudaContext.of(ordinal)
        return cls(context, _Functions(context, kernels))

    def lane(self) -> CudaDevice:
        """A further stream of the same GPU, which launches the same kernels."""
        return CudaDevice(self.context, self._functions)

    @property
    def closed(self) -> bool:
        return self.stream is None

    def __repr__(self) -> str:
        return f"<GPU {self.ordinal}, {'closed' if self.closed else f'stream {self.stream_handle:#x}'}>"

    def activate(self) -> CudaContext:
        """``with device.activate():`` makes the context current on this thread; calls inside need not switch."""
        return self.context

    @property
    def ordinal(self) -> int:
        """Number of the GPU."""
        return self.context.ordinal

    @property
    def exchange_device(self) -> tuple[int, int]:
        return 2, self.ordinal

    @property
    def stream_handle(self) -> int:
        """The CUstream as a number."""
        return int(self.stream.handle)

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the GPU. What a pool holds back counts as used."""
        with self.context, translated():
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        kind = np.dtype(dtype)
        nbytes = max(1, math.prod(shape) * kind.itemsize)
        self._check_lane()
        with self.context, translated():
            self._sweep()
            owner = _Block(self.context, self._allocate(nbytes))
        if self._graph is not None:
            self._graph.kept.append(owner)
        return DeviceArray(int(owner.allocation), tuple(shape), kind, owner, self)

    def _allocate(self, nbytes: int) -> Any:
        try:
            return self._pool.allocate(nbytes)
        except self._driver.MemoryError:
            self.free_held()  # what other lanes' pools hold back helps here
        try:
            return self._pool.allocate(nbytes)
        except self._driver.MemoryError as error:
            free, total = self.memory_info()
            raise BackendError(
                f"out of device memory on {self.name}: {_mebibytes(nbytes)} were needed in one piece, "
                f"{_mebibytes(free)} of {_mebibytes(total)} are free: lower the batch size or the image size, "
                "or use fewer streams"
            ) from error

    def free_held(self) -> None:
        """Give the GPU what the pools of all lanes hold back: other libraries allocate beside them, and cannot ask."""
        with self.context, translated():
            for lane in list(self.context.lanes):
                lane._pool.free_held()

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        array = self.empty(shape, dtype)
        if array.nbytes:
            with self.context, translated():
                self._driver.memset_d8_async(array.pointer, 0, array.nbytes, self.stream)
        return array

    def upload(self, values: NDArray[Any]) -> DeviceArray:
        self._refuse_while_recording("upload")
        array = self.empty(values.shape, values.dtype)
        self.upload_to(values, array)
        return array

    def upload_to(self, values: NDArray[Any], target: DeviceArray) -> None:
        """Copy a host array into a device array of its type and size; it may be changed as soon as this returns.

        Raises:
            InputError: type or size differ.
        """
        self._refuse_while_recording("upload")
        if values.dtype != target.dtype or values.size != target.size:
            raise InputError(
                f"an array of {values.shape} {values.dtype} does not fill one of {target.shape} {target.dtype}"
            )
        self._check_lane(target)
        if not values.nbytes:
            return
        start = time.perf_counter()
        with self.context, translated():
            self._wait_for_staging(values.nbytes)
            staging = self.pinned(values.shape, values.dtype)
            np.copyto(staging, values)
            self._driver.memcpy_htod_async(target.pointer, staging, self.stream)
            self._staged += staging.nbytes
            self._keep(staging)
        self.upload_seconds += time.perf_counter() - start

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A host array in pinned memory, from a pool; given back when the last view of it goes."""
        nbytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        with self.context, translated():
            whole: NDArray[Any] = self._pinned.allocate((nbytes,), np.uint8)
        return whole[: math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        self._refuse_while_recording("download")
        self._check_lane(array)
        if not array.nbytes:
            return np.empty(array.shape, array.dtype)
        start = time.perf_counter()
        staging = self.pinned(array.shape, array.dtype)
        with self.context, translated():
            self._driver.memcpy_dtoh_async(staging, array.pointer, self.stream)
            self.stream.synchronize()
            self._sweep()
        found = staging.copy()
        self.download_seconds += time.perf_counter() - start
        return found

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        if source.nbytes != target.nbytes:
            raise InputError(f"a copy of {source.nbytes} bytes into {target.nbytes}")
        self._check_lane(source, target)
        if source.nbytes:
            with self.context, translated():
                self._driver.memcpy_dtod_async(target.pointer, source.pointer, source.nbytes, self.stream)

    def synchronize(self) -> None:
        self._refuse_while_recording("synchronize")
        with self.context, translated():
            self.stream.synchronize()
            self._sweep()

    def _launch(self, program: Program, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self._check_lane(*(value for value in arguments if isinstance(value, DeviceArray)))
        values = [value.pointer if isinstance(value, DeviceArray) else value for value in arguments]
        with self.context:
            function, block, shared, hidden = self._functions.find(program)
            with translated(program.name):
                function.prepared_async_call(grid, block, self.stream, *values, *hidden, shared_size=shared)

    def record(self) -> Any:
        """An event after everything so far on this stream, for :meth:`milliseconds`."""
        with self.context, translated():
            return self._driver.Event().record(self.stream)

    def milliseconds(self, start: Any, stop: Any) -> float:
        """Time between two events of :meth:`record`. Waits for the later one."""
        with self.context, translated():
            stop.synchronize()
            return float(start.time_till(stop))

    def wait_for(self, other: CudaDevice) -> None:
        """Let everything put on this lane from now on wait for what is on the other by now."""
        for lane in (self, other):
            lane._check_lane()
            lane._refuse_while_recording("waiting for another stream")
        with self.context, translated():
            event = self._driver.Event(self._driver.event_flags.DISABLE_TIMING).record(other.stream)
            self.stream.wait_for_event(event)
            del event  # pycuda destroys it, for which the context must be current

    def adopt(self, array: DeviceArray) -> DeviceArray:
        """Another lane's array for use on this lane, ordered after everything so far on the other."""
        if not isinstance(array.device, CudaDevice) or array.device.context is not self.context:
            raise InputError(f"an array of {array.device!r} was given: expected one of another lane of the same GPU")
        if array.device is self:
            return array
        self._refuse_while_recording("adopt")
        self.wait_for(array.device)
        owner = _Borrowed(array.owner, array.device, self)
        return DeviceArray(array.pointer, array.shape, array.dtype, owner, self)

    def wait_for_stream(self, handle: int) -> None:
        """Let everything put on this lane from now on wait for what is by now on a stream of someone else.

        Raises:
            BackendError: the stream belongs to another context; cuStreamGetCtx tells.
        """
        self._order(handle, ours_first=False)

    def hold_stream(self, handle: int) -> None:
        """Let everything put on a stream of someone else from now on wait for what is by now on this lane.

        Raises:
            BackendError: the stream belongs to another context.
        """
        self._order(handle, ours_first=True)

    def _order(self, handle: int, *, ours_first: bool) -> None:
        self._refuse_while_recording("waiting for another stream")
        if self.closed:  # everything on this lane is done, and nothing will follow
            return
        with self.context:
            self._check_context(handle)
            first, then = (self.stream_handle, handle) if ours_first else (handle, self.stream_handle)
            streams.order(first, then)

    def _check_context(self, handle: int) -> None:
        if streams.context_of(handle) != self.context.context.handle:
            raise BackendError(
                f"stream {handle:#x} belongs to another CUDA context: expected one of the primary context of GPU "
                f"{self.ordinal}, which torch, CuPy and ONNX Runtime use by themselves"
            )

    def release_later(self, owner: Any) -> None:
        if self.closed:
            return
        with self.context, translated():
            self._keep(owner)

    @contextmanager
    def capture(self) -> Iterator[CapturedGraph]:
        """Record what the body puts on this stream as a graph; nothing of it runs until ``graph.launch()``.

        Run the same work once before, so that kernels are loaded. Copies from and to the host cannot be recorded.
        :meth:`launch_graph` and :meth:`close_graph` take what comes out of it.

        Raises:
            InputError: one recording inside another.
        """
        self._refuse_while_recording("capture")
        with self.context:
            graph = self._graph = CapturedGraph(self.stream_handle)
            try:
                yield graph
            except BaseException:
                self._graph = None
                graph.abandon()
                raise
            self._graph = None
            graph.finish()

    def launch_graph(self, graph: CapturedGraph) -> None:
        """Put recorded work on this stream."""
        with self.context:
            graph.launch()

    def close_graph(self, graph: CapturedGraph) -> None:
        """Wait for this stream and give the graph's memory back."""
        self.synchronize()
        with self.context:
            graph.close()

    def close(self) -> None:
        """Wait for the stream and give everything back that no array uses. Arrays stay valid until they go."""
        if self.closed:
            return
        with self.context, translated():
            self.stream.synchronize()
            self._sweep()
            self._pool.stop_holding()
            self._pinned.stop_holding()
            self.context.lanes.discard(self)
            self.stream = None  # pycuda destroys it, for which the context must be current

    def __del__(self) -> None:
        if getattr(self, "stream", None) is not None and not sys.is_finalizing():
            self.close()

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_lane(self, *arrays: DeviceArray) -> None:
        if self.closed:
            raise InputError(f"the device was closed: {self.name}")
        for array in arrays:
            if array.device is not self:
                raise InputError(f"an array of {array.device!r} was given: expected one of this lane; use adopt()")

    def _refuse_while_recording(self, what: str) -> None:
        if self._graph is not None:
            raise InputError(
                f"{what} while a graph is recorded: only launches and copies on the device can be recorded"
            )

    def _keep(self, owner: Any) -> None:
        if self._graph is not None:
            self._graph.kept.append(owner)
            return
        event = self._driver.Event(self._driver.event_flags.DISABLE_TIMING).record(self.stream)
        self._pending.append((event, owner))

    def _wait_for_staging(self, nbytes: int) -> None:
        self._sweep()
        if self._staged and self._staged + nbytes > STAGING_LIMIT:
            self.stream.synchronize()
            self._sweep()

    def _sweep(self) -> None:
        """Let go of what finished work no longer needs. Called with the context current."""
        if self._graph is not None or not self._sweeping.acquire(blocking=False):
            return
        try:
            while self._pending and self._pending[0][0].query():
                _, owner = self._pending.popleft()
                if isinstance(owner, np.ndarray):
                    self._staged -= owner.nbytes
        finally:
            self._sweeping.release()


@contextmanager
def translated(doing: str = "") -> Iterator[None]:
    """CUDA's errors as facetrt's."""
    driver = import_module("pycuda.driver")
    try:
        yield
    except driver.Error as error:
        raise BackendError(f"CUDA: {doing}{': ' if doing else ''}{error}") from error


def _import_driver() -> Any:
    try:
        driver = import_module("pycuda.driver")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"a GPU needs pycuda: pip install 'facetrt[gpu]', or 'facetrt[rtx]' for TensorRT for RTX ({error})"
        ) from error
    except ImportError as error:  # pycuda is there, and the dynamic linker failed
        if "libcuda" in str(error):
            raise BackendError(f"no NVIDIA driver is installed: install it, or use a CPU backend ({error})") from error
        raise BackendError(
            f"pycuda was built for another CUDA version than is installed: "
            f"pip install --force-reinstall --no-binary pycuda pycuda ({error})"
        ) from error
    return driver


def _check_gpu(driver: Any, ordinal: int) -> None:
    try:
        driver.init()
        count = driver.Device.count()
    except driver.Error as error:
        if "no CUDA-capable device" in str(error) or "no device" in str(error):
            raise BackendError(f"no NVIDIA GPU is visible: use a CPU backend, or see nvidia-smi ({error})") from error
        raise BackendError(f"the NVIDIA driver cannot be used: see nvidia-smi ({error})") from error
    if not 0 <= ordinal < count:
        raise BackendError(f"GPU {ordinal} was asked for: expected 0 to {count - 1}")
    version = driver.get_driver_version()
    if version < MINIMUM_DRIVER:
        raise BackendError(f"the NVIDIA driver supports CUDA up to {_cuda(version)}: expected 12.0; update the driver")
    built = driver.get_version()
    if built[0] > version // 1000:
        raise BackendError(
            f"pycuda was built with CUDA {built[0]}.{built[1]}, the driver supports up to {_cuda(version)}: "
            "update the driver, or install pycuda with an older CUDA"
        )
    gpu = driver.Device(ordinal)
    if gpu.compute_capability() < MINIMUM_CAPABILITY:
        major, minor = gpu.compute_capability()
        raise BackendError(f"{gpu.name()} has compute capability {major}.{minor}: expected 7.5 or later; use a CPU")


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"
