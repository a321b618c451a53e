"""A GPU that is none: stands in for pycuda and for NVIDIA's cuda.bindings, and enforces their rules.

Memory is host memory, so data are real. Work put on a stream runs late: only when somebody waits for it, which shows
missing waits and memory handed out too early. Kernels run in Triton's interpreter on the very bytes that were packed
for them. What breaks a rule raises :class:`RuleBroken`, which is no error of CUDA's and therefore not caught anywhere.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import struct
import sys
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from facetrt.kernels.device.runtime.cubins import INDEX, SCHEMA, KernelSet, program_digest, source_digest
from facetrt.kernels.device.runtime.program import POINTERS, Program

FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}
HIDDEN = 2


if "triton" not in sys.modules and not torch.cuda.is_available():  # a real GPU is tested by compiled kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")  # fake memory is host memory, where only the interpreter runs


class RuleBroken(AssertionError):
    """Something that a real driver answers with garbage, a crash or an error."""


class Memory:
    """Allocations of one kind, by address."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.live: dict[int, tuple[int, Any]] = {}

    def allocate(self, nbytes: int) -> int:
        storage = (ctypes.c_uint8 * (nbytes + 512))()
        address = -(-ctypes.addressof(storage) // 256) * 256
        ctypes.memset(address, 0xA5, nbytes)
        self.live[address] = (nbytes, storage)
        return address

    def free(self, address: int) -> None:
        if address not in self.live:
            raise RuleBroken(f"{self.kind} memory {address:#x} freed twice, or never allocated")
        del self.live[address]

    def rest(self, pointer: int) -> int:
        """Bytes from ``pointer`` to the end of its allocation; 0 if it is in none."""
        starts = sorted(self.live)
        place = bisect_right(starts, pointer) - 1
        if place < 0:
            return 0
        return max(0, starts[place] + self.live[starts[place]][0] - pointer)

    def check(self, pointer: int, nbytes: int, what: str) -> None:
        if self.rest(pointer) < nbytes:
            raise RuleBroken(
                f"{what}: {nbytes} bytes at {pointer:#x} are not within {self.kind} memory "
                f"(out of bounds, or used after it was freed)"
            )


class Stream:
    """pycuda.driver.Stream."""

    def __init__(self, flags: int = 0) -> None:
        self._gpu = _gpu()
        self._context = self._gpu.current("Stream")
        self._gpu.add_stream(self, flags)

    def _setup(self, handle: int, flags: int) -> None:
        self.handle = handle
        self.flags = flags
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def synchronize(self) -> None:
        self._gpu.current("Stream.synchronize")
        self._drain()

    def _drain(self) -> None:
        if self.captured is not None:
            raise RuleBroken("a stream was waited for while it was captured")
        while self.queue:
            self.queue.pop(0)()

    def is_done(self) -> bool:
        return not self.queue

    def wait_for_event(self, event: Event) -> None:
        self._gpu.current("Stream.wait_for_event")
        if not event.recorded:
            raise RuleBroken("a stream waits for an event that was never recorded")
        self.put(partial(_run_until, event._done, event._stream))  # the driver needs the event no longer


class Event:
    """pycuda.driver.Event."""

    def __init__(self, flags: int = 0) -> None:
        self._gpu = _gpu()
        self._gpu.current("Event")
        self.recorded = False
        self.flags = flags
        self._done = [False]

    def __del__(self) -> None:
        """pycuda destroys it where the context is current or was made; elsewhere it warns, and the event is lost."""
        if not self._gpu.stack() and threading.get_ident() != self._gpu.context_thread:
            self._gpu.lost_events += 1

    def record(self, stream: Stream | None = None) -> Event:
        _gpu().current("Event.record")
        if stream is None:
            raise RuleBroken("an event was recorded on the default stream")
        if stream.captured is not None:
            raise RuleBroken("an event was recorded while its stream was captured")
        self.recorded, self._done, self._stream = True, [False], stream
        stream.put(partial(self._done.__setitem__, 0, True))
        return self

    def query(self) -> bool:
        _gpu().current("Event.query")
        return self._done[0]

    def synchronize(self) -> Event:
        _gpu().current("Event.synchronize")
        _run_until(self._done, self._stream)
        return self

    def time_till(self, other: Event) -> float:
        if not (self._done[0] and other._done[0]) or self.flags & 2 or other.flags & 2:
            raise RuleBroken("times of events that have not happened, or do not take them")
        return 0.5

    def time_since(self, other: Event) -> float:
        return other.time_till(self)


def _run_until(done: list[bool], stream: Stream) -> None:
    while not done[0]:
        stream.queue.pop(0)()


class Context:
    """pycuda.driver.Context: the primary one of a device."""

    def __init__(self, gpu: Gpu, handle: int) -> None:
        self._gpu = gpu
        self.handle = handle

    def push(self) -> None:
        self._gpu.stack().append(self)

    @staticmethod
    def pop() -> None:
        if not _gpu().stack():
            raise RuleBroken("a context was popped where none was pushed")
        _gpu().stack().pop()

    @staticmethod
    def get_current() -> Context | None:
        stack = _gpu().stack()
        return stack[-1] if stack else None

    @staticmethod
    def synchronize() -> None:
        _gpu().current("Context.synchronize")
        _gpu().drain()


class Device:
    """pycuda.driver.Device."""

    def __init__(self, ordinal: int) -> None:
        if not _gpu().initialised:
            raise _gpu().driver.LogicError("cuDeviceGet failed: initialization error")
        self._ordinal = ordinal

    @staticmethod
    def count() -> int:
        return 1

    def name(self) -> str:
        return "Fake GPU"

    def compute_capability(self) -> tuple[int, int]:
        return _gpu().capability

    def total_memory(self) -> int:
        return _gpu().total

    def retain_primary_context(self) -> Context:
        _gpu().context_thread = threading.get_ident()
        return _gpu().primary


class DeviceMemoryPool:
    """pycuda.tools.DeviceMemoryPool; sizes are not rounded up, so that bounds are sharp."""

    def __init__(self) -> None:
        _gpu().current("DeviceMemoryPool")
        self.held: dict[int, list[int]] = {}
        self.holding = True

    def allocate(self, size: int) -> PooledDeviceAllocation:
        gpu = _gpu()
        gpu.current("DeviceMemoryPool.allocate")
        if not self.held.get(size) and gpu.device_bytes() + size > gpu.total:
            gc.collect()
            self.free_held()
        pointer = self.held[size].pop() if self.held.get(size) else gpu.mem_alloc(size)
        gpu.free_blocks.discard(pointer)
        return PooledDeviceAllocation(self, pointer, size)

    def give_back(self, pointer: int, size: int) -> None:
        _gpu().current("DeviceMemoryPool: memory given back (pycuda ends the process here)")
        if self.holding:
            self.held.setdefault(size, []).append(pointer)
            _gpu().free_blocks.add(pointer)
        else:
            _gpu().mem_free(pointer)

    def free_held(self) -> None:
        _gpu().current("DeviceMemoryPool.free_held")
        for pointers in self.held.values():
            while pointers:
                _gpu().mem_free(pointers.pop())

    def stop_holding(self) -> None:
        self.holding = False
        self.free_held()

    @property
    def held_blocks(self) -> int:
        return sum(len(pointers) for pointers in self.held.values())


def destructor(function: Callable[[], None]) -> Any:
    """Something whose last reference, when it goes, calls ``function``, as a C++ object's destructor does.

    The cycle collector calls the ``__del__`` of everything that it found, in any order, before it takes anything apart.
    Objects of pycuda have none: they go when what holds them is taken apart. So does an array, which the collector
    does not know.
    """
    token = np.empty(0)
    weakref.finalize(token, function).atexit = False
    return token


class PooledDeviceAllocation:
    """What the pool gives; convertible to its address."""

    def __init__(self, pool: DeviceMemoryPool, pointer: int, size: int) -> None:
        self._block = _PooledBlock(pool, pointer, size)
        self._token = destructor(self._block.destroy)

    def free(self) -> None:
        if self._block.free:
            raise RuleBroken("device memory given back twice")
        self._block.destroy()

    def __int__(self) -> int:
        return self._block.pointer


class _PooledBlock:
    def __init__(self, pool: DeviceMemoryPool, pointer: int, size: int) -> None:
        self.pool, self.pointer, self.size, self.free = pool, pointer, size, False

    def destroy(self) -> None:
        if not self.free:
            self.free = True
            self.pool.give_back(self.pointer, self.size)


class _PinnedBlock:
    def __init__(self, pool: PageLockedMemoryPool, address: int, nbytes: int) -> None:
        self.pool, self.address, self.nbytes = pool, address, nbytes
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        self.pool.held.setdefault(self.nbytes, []).append(self.address)


class PageLockedMemoryPool:
    """pycuda.tools.PageLockedMemoryPool."""

    def __init__(self, allocator: object = None) -> None:
        self.held: dict[int, list[int]] = {}

    def allocate(self, shape: Iterable[int], dtype: Any, order: str = "C") -> Any:
        gpu = _gpu()
        gpu.current("PageLockedMemoryPool.allocate")
        shape = tuple(shape)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free = self.held.get(nbytes)
        address = free.pop() if free else gpu.pinned.allocate(nbytes)
        return np.asarray(_PinnedBlock(self, address, nbytes)).view(dtype).reshape(shape)

    def free_held(self) -> None:
        for addresses in self.held.values():
            while addresses:
                _gpu().pinned.free(addresses.pop())

    def stop_holding(self) -> None:
        self.free_held()


class Function:
    """pycuda.driver.Function of a fake cubin: runs the Triton kernel that the cubin names."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.program = module, module.programs[name]
        self.arg_format: str | None = None
        self.dynamic_limit = 48 * 1024

    def set_attribute(self, attribute: int, value: int) -> None:
        _gpu().current("Function.set_attribute")
        if attribute == 8:
            self.dynamic_limit = value

    def prepare(self, arg_types: Any, texrefs: Any = None) -> Function:
        self.arg_format = "".join(arg_types)
        expected = "".join("P" if kind in POINTERS else FORMATS[kind] for _, kind in self.program.arguments)
        if self.arg_format != expected + "P" * HIDDEN:
            raise RuleBroken(f"{self.program.name} takes {expected + 'P' * HIDDEN}, prepared for {self.arg_format}")
        return self

    def prepared_async_call(
        self, grid: tuple[int, ...], block: tuple[int, ...], stream: Stream, *args: Any, shared_size: int = 0
    ) -> None:
        gpu = _gpu()
        context = gpu.current("prepared_async_call")
        if self.arg_format is None:
            raise RuleBroken("a launch before prepare()")
        if stream is None or gpu.streams.get(stream.handle) is not stream or stream._context is not context:
            raise RuleBroken("a launch on no stream, a dead one or one of another context")
        if not isinstance(grid, tuple) or block != (32 * self.program.warps, 1, 1):
            raise RuleBroken(f"grid {grid}, block {block}: expected {self.program.warps} warps")
        if shared_size != self.module.shared[self.program.name] or shared_size > self.dynamic_limit:
            raise RuleBroken(f"{shared_size} bytes of shared memory, {self.dynamic_limit} allowed")
        values = struct.unpack(self.arg_format, struct.pack(self.arg_format, *args))
        if any(values[len(self.program.arguments) :]):
            raise RuleBroken("hidden parameters that are not null")
        values = values[: len(self.program.arguments)]
        gpu.launches.append((self.program.name, grid, values))
        self._check(values)
        stream.put(lambda: self._run(grid, values, replayed=stream))

    def _check(self, values: tuple[Any, ...]) -> None:
        for (name, kind), value in zip(self.program.arguments, values, strict=True):
            if kind in POINTERS:
                if value % 16:
                    raise RuleBroken(f"{self.program.name}: {name} is not aligned to 16 bytes")
                _gpu().check_live(value, 0, f"{self.program.name}: {name}")
            elif name in self.program.divisible and value % 16:
                raise RuleBroken(f"{self.program.name}: {name} = {value} is no multiple of 16")

    def _run(self, grid: tuple[int, ...], values: tuple[Any, ...], replayed: Stream) -> None:
        module, _, function = self.program.source.partition(":")
        kernel = getattr(import_module(f"facetrt.kernels.device.programs.{module}"), function)
        passed = [
            _gpu().tensor(value, kind) if kind in POINTERS else value
            for (_, kind), value in zip(self.program.arguments, values, strict=True)
        ]
        options = {"num_warps": self.program.warps, "num_stages": self.program.stages}
        kernel[grid](*passed, **self.program.constants, **options)


class Module:
    """pycuda.driver.Module."""

    def __init__(self, code: bytes) -> None:
        described = json.loads(code[4:])
        program = _gpu().programs[described["program"]]
        if described["capability"][0] != _gpu().capability[0]:
            raise _gpu().driver.RuntimeError("cuModuleLoadDataEx failed: no kernel image is available for execution")
        self.programs = {described["symbol"]: program}
        self.shared = {program.name: described["shared"]}

    def get_function(self, name: str) -> Function:
        _gpu().current("Module.get_function")
        if name not in self.programs:
            raise _gpu().driver.LogicError("cuModuleGetFunction failed: named symbol not found")
        return Function(self, name)


class Gpu:
    """The state of the machine: memory, streams, and the modules that stand in for the libraries.

    Attributes:
        launches: (program, grid, values) of every launch, in order.
        total: bytes of device memory.
        capability: compute capability.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0), total: int = 1 << 30) -> None:
        self.capability, self.total = capability, total
        self.device_memory, self.pinned = Memory("device"), Memory("pinned")
        self.free_blocks: set[int] = set()
        self.streams: dict[int, Stream] = {}
        self.programs: dict[str, Program] = {}
        self.launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.initialised = False
        self.context_thread, self.lost_events = 0, 0
        self.driver_version, self.built_version = 13000, (13, 0, 0)
        self._local = threading.local()
        self.primary, self.other = Context(self, 0xC0DE), Context(self, 0xBAD)
        self.driver = _driver_module(self)
        self.bindings = _bindings_module(self)
        tools = ModuleType("pycuda.tools")
        tools.DeviceMemoryPool, tools.PageLockedMemoryPool = DeviceMemoryPool, PageLockedMemoryPool  # type: ignore[attr-defined]
        self.modules = {
            "pycuda": ModuleType("pycuda"),
            "pycuda.driver": self.driver,
            "pycuda.tools": tools,
            "cuda.bindings.driver": self.bindings,
        }

    def stack(self) -> list[Context]:
        return self._local.__dict__.setdefault("stack", [])

    def current(self, what: str) -> Context:
        if not self.stack():
            raise RuleBroken(f"{what}: no context is current on this thread")
        return self.stack()[-1]

    def add_stream(self, stream: Stream, flags: int) -> None:
        stream._setup(0x1000 + 16 * len(self.streams), flags)
        self.streams[stream.handle] = stream

    def foreign_stream(self, *, other_context: bool = False) -> Stream:
        """A stream that somebody else made."""
        context = self.other if other_context else self.primary
        context.push()
        try:
            return Stream()
        finally:
            Context.pop()

    def enqueue(self, handle: int, work: Callable[[], None]) -> None:
        """Put work on a stream, as a library that was given the handle does."""
        self.current("work of a library")
        self.streams[handle].put(work)

    def drain(self) -> None:
        for stream in self.streams.values():
            if stream.captured is None:
                stream._drain()

    def mem_alloc(self, nbytes: int) -> int:
        self.current("mem_alloc")
        if self.device_bytes() + nbytes > self.total:
            raise self.driver.MemoryError("cuMemAlloc failed: out of memory")
        return self.device_memory.allocate(nbytes)

    def mem_free(self, pointer: int) -> None:
        self.drain()  # cuMemFree waits for the device
        self.free_blocks.discard(pointer)
        self.device_memory.free(pointer)

    def device_bytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.device_memory.live.values())

    def check_live(self, pointer: int, nbytes: int, what: str) -> None:
        """The bytes are within an allocation that is in use."""
        self.device_memory.check(pointer, max(1, nbytes), what)
        starts = sorted(self.device_memory.live)
        if starts[bisect_right(starts, pointer) - 1] in self.free_blocks:
            raise RuleBroken(f"{what}: {pointer:#x} was given back to its pool: used after it was freed")

    def view(self, pointer: int, nbytes: int) -> Any:
        """The bytes themselves, as a NumPy array."""
        self.device_memory.check(pointer, nbytes, "view")
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))

    def tensor(self, pointer: int, kind: str) -> Any:
        torch = import_module("torch")
        whole = self.view(pointer, self.device_memory.rest(pointer))
        usable = whole[: whole.size - whole.size % np.dtype(POINTERS[kind]).itemsize]
        return torch.from_numpy(usable).view(getattr(torch, np.dtype(POINTERS[kind]).name))

    def kernels(self, programs: Iterable[Program], shared: int = 1024) -> KernelSet:
        """Fake cubins of these programs, and their index as export writes it."""
        codes = self.compiled(programs, shared)
        return KernelSet.read(codes.pop(INDEX), codes.__getitem__)

    def compiled(self, programs: Iterable[Program], shared: int = 1024) -> dict[str, bytes]:
        """Files of a bundle's folder for this GPU: fake cubins of these programs, and their index."""
        architecture = f"sm_{self.capability[0]}{self.capability[1]}"
        codes: dict[str, bytes] = {}
        index: dict[str, Any] = {}
        for program in programs:
            self.programs[program.name] = program
            symbol = program.source.partition(":")[2]
            described = {"program": program.name, "symbol": symbol, "shared": shared, "capability": self.capability}
            code = codes[f"{program.name}.cubin"] = b"\x7fELF" + json.dumps(described).encode()
            index[program.name] = {
                "symbol": symbol,
                "shared": shared,
                "warps": program.warps,
                "arguments": program.arguments,
                "hidden": HIDDEN,
                "size": len(code),
                "program": program_digest(program),
                "source": source_digest(program.source),
                "specific": self.capability[0] >= 9,
                "constants": dict(program.constants),
            }
        whole = {"schema": SCHEMA, "architecture": architecture, "toolkit": "12.9", "triton": "0", "programs": index}
        return {**codes, INDEX: json.dumps(whole).encode()}


_INSTALLED: list[Gpu] = []


def _gpu() -> Gpu:
    return _INSTALLED[-1]


def install(monkeypatch: Any, **options: Any) -> Gpu:
    """Put a fresh fake GPU in place of pycuda and cuda.bindings for one test."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there: a fake one needs Triton's interpreter")
    for name in ("torch", "triton"):  # they look for the real cuda.bindings when they are imported
        import_module(name)
    gpu = Gpu(**options)
    _INSTALLED.append(gpu)
    for name, module in gpu.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    from facetrt.kernels.device.runtime.cuda import CudaContext

    monkeypatch.setattr(CudaContext, "_known", {})
    return gpu


def _driver_module(gpu: Gpu) -> Any:
    module: Any = ModuleType("pycuda.driver")
    module.Error = type("Error", (Exception,), {})
    for name in ("MemoryError", "LogicError", "LaunchError", "RuntimeError"):
        setattr(module, name, type(name, (module.Error,), {}))
    module.Stream, module.Event, module.Context, module.Device = Stream, Event, Context, Device
    module.function_attribute = SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    module.event_flags = SimpleNamespace(DEFAULT=0, BLOCKING_SYNC=1, DISABLE_TIMING=2)
    module.get_version = lambda: gpu.built_version
    module.get_driver_version = lambda: gpu.driver_version

    def init(flags: int = 0) -> None:
        gpu.initialised = True

    def mem_get_info() -> tuple[int, int]:
        gpu.current("mem_get_info")
        return gpu.total - gpu.device_bytes(), gpu.total

    def module_from_buffer(buffer: bytes, options: Any = (), message_handler: Any = None) -> Module:
        gpu.current("module_from_buffer")
        return Module(buffer)

    def own(stream: Stream | None, what: str) -> Stream:
        context = gpu.current(what)
        if stream is None or gpu.streams.get(stream.handle) is not stream or stream._context is not context:
            raise RuleBroken(f"{what}: no stream, or one of another context")
        return stream

    def host(array: Any, what: str) -> tuple[int, int]:
        if not array.flags.c_contiguous:
            raise RuleBroken(f"{what}: the host array is not contiguous")
        gpu.pinned.check(array.ctypes.data, array.nbytes, f"{what}: an asynchronous copy")
        return array.ctypes.data, array.nbytes

    def move(stream: Stream, target: int, source: int, nbytes: int, live: tuple[int, ...], what: str) -> None:
        for pointer in live:
            gpu.check_live(pointer, nbytes, what)
        stream.put(lambda: ctypes.memmove(target, source, nbytes) and None)

    def memcpy_htod_async(dest: int, src: Any, stream: Stream | None = None) -> None:
        address, nbytes = host(src, "memcpy_htod_async")
        move(own(stream, "memcpy_htod_async"), int(dest), address, nbytes, (int(dest),), "memcpy_htod_async")

    def memcpy_dtoh_async(dest: Any, src: int, stream: Stream | None = None) -> None:
        address, nbytes = host(dest, "memcpy_dtoh_async")
        move(own(stream, "memcpy_dtoh_async"), address, int(src), nbytes, (int(src),), "memcpy_dtoh_async")

    def memcpy_dtod_async(dest: int, src: int, size: int, stream: Stream | None = None) -> None:
        both = (int(dest), int(src))
        move(own(stream, "memcpy_dtod_async"), int(dest), int(src), size, both, "memcpy_dtod_async")

    def memset_d8_async(dest: int, data: int, size: int, stream: Stream | None = None) -> None:
        gpu.check_live(int(dest), size, "memset_d8_async")
        own(stream, "memset_d8_async").put(lambda: ctypes.memset(int(dest), data, size) and None)

    for function in (
        init,
        mem_get_info,
        module_from_buffer,
        memcpy_htod_async,
        memcpy_dtoh_async,
        memcpy_dtod_async,
        memset_d8_async,
    ):
        setattr(module, function.__name__, function)
    return module


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_STATE = 401


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class CUevent_flags(IntEnum):
    CU_EVENT_DEFAULT = 0
    CU_EVENT_BLOCKING_SYNC = 1
    CU_EVENT_DISABLE_TIMING = 2


class CUstream(int):
    """A handle; calls take these, not plain numbers."""


class _Graph:
    def __init__(self, work: list[Callable[[], None]]) -> None:
        self.work: list[Callable[[], None]] | None = work


def _bindings_module(gpu: Gpu) -> Any:
    module: Any = ModuleType("cuda.bindings.driver")
    module.CUresult, module.CUstream = CUresult, CUstream
    module.CUstreamCaptureMode, module.CUevent_flags = CUstreamCaptureMode, CUevent_flags
    good = CUresult.CUDA_SUCCESS

    def find(handle: Any) -> Stream:
        gpu.current("cuda.bindings")
        if not isinstance(handle, CUstream) or int(handle) not in gpu.streams:
            raise RuleBroken(f"{handle!r} is no live CUstream")
        return gpu.streams[int(handle)]

    def cuStreamGetCtx(hStream: Any) -> tuple[Any, ...]:
        return good, find(hStream)._context.handle

    def cuEventCreate(Flags: int) -> tuple[Any, ...]:
        return good, Event(Flags)

    def cuEventRecord(hEvent: Event, hStream: Any) -> tuple[Any, ...]:
        hEvent.record(find(hStream))
        return (good,)

    def cuStreamWaitEvent(hStream: Any, hEvent: Event, Flags: int) -> tuple[Any, ...]:
        find(hStream).wait_for_event(hEvent)
        return (good,)

    def cuEventDestroy(hEvent: Event) -> tuple[Any, ...]:
        return (good,)

    def cuStreamBeginCapture(hStream: Any, mode: Any) -> tuple[Any, ...]:
        stream = find(hStream)
        if stream.captured is not None or not isinstance(mode, CUstreamCaptureMode):
            return (CUresult.CUDA_ERROR_ILLEGAL_STATE,)
        stream.captured = []
        return (good,)

    def cuStreamEndCapture(hStream: Any) -> tuple[Any, ...]:
        stream = find(hStream)
        if stream.captured is None:
            return CUresult.CUDA_ERROR_ILLEGAL_STATE, None
        graph, stream.captured = _Graph(stream.captured), None
        return good, graph

    def cuGraphInstantiate(hGraph: _Graph, flags: int) -> tuple[Any, ...]:
        if hGraph.work is None:
            raise RuleBroken("a destroyed graph was instantiated")
        return good, _Graph(list(hGraph.work))

    def cuGraphLaunch(hGraphExec: _Graph, hStream: Any) -> tuple[Any, ...]:
        if hGraphExec.work is None:
            raise RuleBroken("a destroyed graph was launched")
        for work in hGraphExec.work:
            find(hStream).put(work)
        return (good,)

    def cuGraphDestroy(hGraph: _Graph) -> tuple[Any, ...]:
        if hGraph.work is None:
            raise RuleBroken("a graph was destroyed twice")
        hGraph.work = None
        return (good,)

    for function in (
        cuStreamGetCtx,
        cuEventCreate,
        cuEventRecord,
        cuStreamWaitEvent,
        cuEventDestroy,
        cuStreamBeginCapture,
        cuStreamEndCapture,
        cuGraphInstantiate,
        cuGraphLaunch,
        cuGraphDestroy,
    ):
        setattr(module, function.__name__, function)
    module.cuGraphExecDestroy = cuGraphDestroy
    return module
