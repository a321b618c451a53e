"""CudaDevice on a fake GPU that enforces CUDA's and pycuda's rules; its kernels run in Triton's interpreter."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import fakes_cuda
import numpy as np
import pytest
from fakes_cuda import Gpu, RuleBroken

from facetrt.export.kernels import compile_kernels
from facetrt.kernels.device import convert, log_bin, preprocess
from facetrt.kernels.device.runtime import cuda
from facetrt.kernels.device.runtime.base import Device
from facetrt.kernels.device.runtime.cubins import INDEX, KernelSet
from facetrt.kernels.device.runtime.cuda import CudaContext, CudaDevice, argument_format
from facetrt.kernels.device.runtime.exchange import from_external
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.errors import BackendError, BundleError, InputError, MissingDependencyError

PROGRAMS = (*convert.PROGRAMS, *log_bin.PROGRAMS, *preprocess.PROGRAMS)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    made = fakes_cuda.install(monkeypatch)
    if not import_module("triton").knobs.runtime.interpret:
        pytest.skip("a CUDA device is there, so triton compiles: the fake GPU needs its interpreter")
    yield made
    assert not made.stack(), "a context was left current"


@pytest.fixture
def opened(gpu: Gpu) -> Iterator[CudaDevice]:
    with CudaDevice.open(kernels=gpu.kernels(PROGRAMS)) as device:
        yield device


def test_describes_the_gpu(opened: CudaDevice, gpu: Gpu) -> None:
    assert (opened.name, opened.compute_capability, opened.driver_version) == ("Fake GPU", (9, 0), 13000)
    assert gpu.streams[opened.stream_handle].flags == cuda.NON_BLOCKING
    free, total = opened.memory_info()
    opened.empty((1000,), "u1")
    assert (opened.memory_info()[1], total) == (gpu.total, gpu.total)
    assert opened.memory_info()[0] == free - 1000


@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), ()])
@pytest.mark.parametrize("dtype", ["float16", "uint8", "int64"])
def test_copies_up_and_down(opened: CudaDevice, shape: tuple[int, ...], dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    array = opened.upload(values)
    other = opened.empty(shape, dtype)
    opened.copy(array, other)
    found = opened.download(other)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(opened.download(opened.zeros(shape, dtype)), np.zeros(shape))


def test_uploaded_values_may_change_at_once(opened: CudaDevice) -> None:
    """The fake copies as late as it may: staging memory that was reused too early would show."""
    values = np.zeros(64, np.float32)
    arrays = []
    for number in range(5):
        values[:] = number
        arrays.append(opened.upload(values))
    assert [opened.download(array)[0] for array in arrays] == [0, 1, 2, 3, 4]


def test_uploads_values_that_are_not_contiguous(opened: CudaDevice) -> None:
    values = np.arange(12).reshape(3, 4).T
    np.testing.assert_array_equal(opened.download(opened.upload(values)), values)


def test_staging_memory_is_reused_and_bounded(opened: CudaDevice, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "STAGING_LIMIT", 4096)
    kept = [opened.upload(np.full(1024, number, np.uint8)) for number in range(20)]
    assert len(gpu.pinned.live) <= 4
    assert [opened.download(array)[0] for array in kept] == list(range(20))


def test_an_upload_must_fit_its_target(opened: CudaDevice) -> None:
    with pytest.raises(InputError, match=r"\(3,\) float32 does not fill one of \(4,\) float32"):
        opened.upload_to(np.zeros(3, np.float32), opened.empty((4,), "float32"))
    with pytest.raises(InputError, match="a copy of 12 bytes into 16"):
        opened.copy(opened.empty((3,), "float32"), opened.empty((4,), "float32"))


def _to_half(device: Device) -> Any:
    values = np.linspace(-7e4, 7e4, 1500, dtype=np.float32)
    return device.download(convert.to_half(device, device.upload(values)))


def _log_bin(device: Device) -> Any:
    values = np.random.default_rng(1).standard_normal((1, 2, 3, 16)).astype(np.float16)
    return device.download(log_bin.log_bin(device, device.upload(values)))


def _preprocess(device: Device) -> Any:
    image = np.random.default_rng(2).integers(0, 256, (1, 13, 9, 3), dtype=np.uint8)
    return device.download(
        preprocess.preprocess(device, device.upload(image), (7, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "float32")
    )


@pytest.mark.parametrize(
    "operation",
    [_to_half, _log_bin, _preprocess],
)
def test_operations_give_what_they_give_from_source(opened: CudaDevice, operation: Any) -> None:
    np.testing.assert_array_equal(operation(opened), operation(TritonDevice("cpu")))


def test_arguments_are_packed_by_their_types(opened: CudaDevice, gpu: Gpu) -> None:
    assert argument_format(convert.PLACE, 2) == "PPqiiiiPP"
    batch = opened.zeros((3, 2, 2, 3), "uint8")
    image = opened.upload(np.arange(27, dtype=np.uint8).reshape(3, 3, 3))
    convert.place(opened, image, batch, 2)
    assert gpu.launches == [("convert_place", (1,), (image.pointer, batch.pointer, 24, 3, 2, 2, 12))]
    np.testing.assert_array_equal(opened.download(batch)[2], opened.download(image)[:2, :2])


def test_kernels_with_much_shared_memory_ask_for_it(gpu: Gpu) -> None:
    """The fake refuses launches with more than 48 KB that were not allowed before."""
    with CudaDevice.open(kernels=gpu.kernels(PROGRAMS, shared=90 * 1024)) as device:
        _to_half(device)
    assert gpu.launches


def test_memory_is_reused_in_stream_order(opened: CudaDevice, gpu: Gpu) -> None:
    values = np.linspace(0, 1, 500, dtype=np.float32)
    results = [convert.to_half(opened, opened.upload(values * number)) for number in range(4)]  # uploads freed at once
    for number, result in enumerate(results):
        np.testing.assert_array_equal(opened.download(result), (values * np.float32(number)).astype(np.float16))
    assert len(gpu.device_memory.live) < 8


def test_out_of_memory_says_what_to_do_and_leaves_the_device_usable(gpu: Gpu) -> None:
    gpu.total = 8 << 20
    with CudaDevice.open(kernels=gpu.kernels(PROGRAMS)) as device:
        kept = device.empty((6 << 20,), "uint8")
        with pytest.raises(
            BackendError,
            match=r"out of device memory on Fake GPU: 4\.0 MiB were needed .* 2\.0 MiB of 8\.0 MiB .* lower",
        ):
            device.empty((4 << 20,), "uint8")
        _to_half(device)
        del kept
        device.empty((4 << 20,), "uint8")


def test_out_of_memory_takes_what_other_lanes_hold_back(gpu: Gpu) -> None:
    gpu.total = 8 << 20
    with CudaDevice.open() as device, device.lane() as lane:
        lane.empty((6 << 20,), "uint8")  # given back at once, to the pool of its lane
        assert gpu.device_bytes() == 6 << 20
        device.empty((5 << 20,), "uint8")


def test_kernels_that_are_missing_are_named(gpu: Gpu) -> None:
    none = r"convert_to_half: the bundle has no compiled kernels.*--kernels sm_90"
    with CudaDevice.open() as device, pytest.raises(BackendError, match=none):
        _to_half(device)
    with (
        CudaDevice.open(kernels=gpu.kernels(log_bin.PROGRAMS)) as device,
        pytest.raises(BackendError, match="kernels for sm_90 lack convert_to_half"),
    ):
        _to_half(device)


def test_lanes_share_kernels(gpu: Gpu) -> None:
    with CudaDevice.open(kernels=gpu.kernels(PROGRAMS)) as device:
        lane = device.lane()
        _to_half(device)
        _to_half(lane)
        lane.close()


def test_kernels_of_another_architecture_are_an_error_of_the_driver(gpu: Gpu) -> None:
    kernels = gpu.kernels(PROGRAMS)
    gpu.capability = (8, 0)
    with (
        CudaDevice.open(kernels=kernels) as device,
        pytest.raises(BackendError, match=r"sm_90 by CUDA.*no kernel"),
    ):
        _to_half(device)


def test_a_damaged_cubin_is_found(gpu: Gpu) -> None:
    kernels = gpu.kernels(PROGRAMS)
    object.__setattr__(kernels, "read_cubin", lambda name: b"\x7fELF")
    with (
        CudaDevice.open(kernels=kernels) as device,
        pytest.raises(BundleError, match=r"convert_to_half.cubin is damaged"),
    ):
        _to_half(device)


def test_lanes_run_on_streams_of_their_own(opened: CudaDevice, gpu: Gpu) -> None:
    with opened.lane() as lane:
        assert lane.stream_handle != opened.stream_handle
        array = opened.upload(np.arange(40, dtype=np.float32))
        with pytest.raises(InputError, match="expected one of this lane; use adopt"):
            convert.to_half(lane, array)
        with pytest.raises(InputError, match="use adopt"):
            lane.download(array)
        borrowed = lane.adopt(array)
        del array
        opened.upload(np.full(40, 9, np.float32))  # must not get the memory that the other lane still reads
        np.testing.assert_array_equal(lane.download(convert.to_half(lane, borrowed)), np.arange(40))
        assert lane.adopt(borrowed) is borrowed


def test_borrowed_memory_is_given_back_in_order(opened: CudaDevice) -> None:
    """The borrower's kernel has not run when its array goes; the lender's next upload gets the same memory."""
    lane = opened.lane()
    array = opened.upload(np.arange(40, dtype=np.float32))
    half = convert.to_half(lane, lane.adopt(array))
    address = array.pointer
    del array
    again = opened.upload(np.full(40, 7, np.float32))
    assert again.pointer == address
    opened.synchronize()
    np.testing.assert_array_equal(lane.download(half), np.arange(40))
    lane.close()


def test_a_lane_waits_for_another(opened: CudaDevice, gpu: Gpu) -> None:
    lane = opened.lane()
    done: list[str] = []
    with opened.activate():
        gpu.enqueue(opened.stream_handle, lambda: done.append("first"))
    lane.wait_for(opened)
    with lane.activate():
        gpu.enqueue(lane.stream_handle, lambda: done.append("second"))
    lane.synchronize()
    assert done == ["first", "second"]
    lane.close()


def test_streams_of_others_are_waited_for_both_ways(opened: CudaDevice, gpu: Gpu) -> None:
    stream, done = gpu.foreign_stream(), []
    stream.put(lambda: done.append("theirs"))
    opened.wait_for_stream(stream.handle)
    with opened.activate():
        gpu.enqueue(opened.stream_handle, lambda: done.append("ours"))
    opened.hold_stream(stream.handle)
    stream.put(lambda: done.append("theirs again"))
    with opened.activate():
        stream.synchronize()
    assert done == ["theirs", "ours", "theirs again"]


def test_a_stream_of_another_context_is_refused(opened: CudaDevice, gpu: Gpu) -> None:
    stream = gpu.foreign_stream(other_context=True)
    for call in (opened.wait_for_stream, opened.hold_stream):
        with pytest.raises(BackendError, match="belongs to another CUDA context: expected one of the primary context"):
            call(stream.handle)


def test_events_measure_time(opened: CudaDevice) -> None:
    start = opened.record()
    _to_half(opened)
    assert opened.milliseconds(start, opened.record()) > 0


def test_graphs_replay_with_new_contents(opened: CudaDevice) -> None:
    values = np.arange(100, dtype=np.float32)
    source = opened.upload(values)
    convert.to_half(opened, source)
    with opened.capture() as graph:
        half = convert.to_half(opened, source)
        convert.to_half(opened, source)  # its memory goes at once; the graph must keep it
    for factor in (1, 2):
        opened.upload_to(values * factor, source)
        others = [opened.upload(np.full(size, 5, np.float16)) for size in (100, 200, 400)]
        opened.launch_graph(graph)
        np.testing.assert_array_equal(opened.download(half), values * factor)
        assert all((opened.download(other) == 5).all() for other in others)
    opened.close_graph(graph)
    with pytest.raises(InputError, match="until it is closed"):
        opened.launch_graph(graph)


def test_what_cannot_be_recorded_is_refused(opened: CudaDevice) -> None:
    array = opened.upload(np.arange(4, dtype=np.float32))
    with opened.capture() as graph:
        with pytest.raises(InputError, match="upload while a graph is recorded"):
            opened.upload(np.zeros(3))
        with pytest.raises(InputError, match="download while"):
            opened.download(array)
        with pytest.raises(InputError, match="synchronize while"):
            opened.synchronize()
        with pytest.raises(InputError, match="waiting for another stream while"):
            opened.wait_for_stream(opened.stream_handle)
        with pytest.raises(InputError, match="capture while"), opened.capture():
            pass
        with pytest.raises(InputError, match="from the end of its recording"):
            graph.launch()
    opened.close_graph(graph)


def test_a_failure_while_recording_ends_it(opened: CudaDevice) -> None:
    with pytest.raises(RuntimeError, match="mine"), opened.capture():
        raise RuntimeError("mine")
    _to_half(opened)  # the stream works as before
    with opened.capture() as graph:
        pass
    opened.close_graph(graph)


def test_every_thread_may_use_a_lane(opened: CudaDevice, gpu: Gpu) -> None:
    found: list[Any] = []

    def work(lane: CudaDevice) -> None:
        with lane:
            found.append(_to_half(lane))
        found.append(list(gpu.stack()))

    for _ in range(3):
        thread = threading.Thread(target=work, args=(opened.lane(),))
        thread.start()
        thread.join()
    expected = _to_half(opened)
    for result, stack in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_array_equal(result, expected)
        assert stack == []


def test_memory_may_go_on_a_thread_without_a_context(opened: CudaDevice) -> None:
    arrays = [opened.upload(np.zeros(5))]
    problems: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, problems.append
    try:
        thread = threading.Thread(target=arrays.clear)
        thread.start()
        thread.join()
    finally:
        sys.unraisablehook = hook
    assert problems == []


def test_lanes_wait_for_each_other_on_any_thread(opened: CudaDevice, gpu: Gpu) -> None:
    other = opened.lane()
    array = other.upload(np.arange(5))

    def work() -> None:
        for _ in range(3):
            opened.adopt(array)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert gpu.lost_events == 0


def test_switches_context_once_inside_activate(opened: CudaDevice, gpu: Gpu) -> None:
    with opened.activate():
        assert gpu.stack() == [gpu.primary]
        opened.upload(np.zeros(3))
        assert gpu.stack() == [gpu.primary]
    assert gpu.stack() == []


def test_context_of_another_user_stays_current(opened: CudaDevice, gpu: Gpu) -> None:
    gpu.other.push()
    _to_half(opened)
    assert gpu.stack() == [gpu.other]
    gpu.other.pop()


def test_close_gives_everything_back(gpu: Gpu) -> None:
    device = CudaDevice.open(kernels=gpu.kernels(PROGRAMS))
    kept, borrowed = device.upload(np.ones(100)), device.lane()
    on_lane = borrowed.adopt(kept)
    _to_half(device)
    device.close()
    device.close()
    with pytest.raises(InputError, match="the device was closed"):
        device.empty((3,), "uint8")
    with pytest.raises(InputError, match="the device was closed"):
        device.download(kept)
    assert len(gpu.device_memory.live) == 1
    borrowed.close()
    del kept, on_lane
    assert gpu.device_memory.live == {}
    assert gpu.pinned.live == {}


def test_a_device_that_goes_is_closed(gpu: Gpu) -> None:
    CudaDevice.open().upload(np.ones(100))
    gc.collect()
    assert gpu.device_memory.live == {}


def test_arrays_in_a_cycle_are_given_back(opened: CudaDevice, gpu: Gpu) -> None:
    """Errors' tracebacks make such cycles; the collector may find them on a thread where no context is current."""
    cycle: list[Any] = [opened.empty((100,), "u1")]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert gpu.device_memory.live.keys() == gpu.free_blocks  # held by the pool, for the next one


def test_devices_share_one_context(gpu: Gpu) -> None:
    assert CudaDevice.open().context is CudaDevice.open().context is CudaContext.of(0)


def _without(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = cuda.import_module
    monkeypatch.setattr(CudaContext, "_known", {})

    def importing(name: str) -> Any:
        if name == "pycuda.driver":
            raise error
        return real(name)

    monkeypatch.setattr(cuda, "import_module", importing)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ModuleNotFoundError("No module named 'pycuda'"), MissingDependencyError, r"facetrt\[gpu\]"),
        (ImportError("libcuda.so.1: cannot open shared object file"), BackendError, "no NVIDIA driver is installed"),
        (ImportError("libcurand.so.10: cannot open"), BackendError, "pycuda was built for another CUDA version"),
    ],
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    _without(monkeypatch, error)
    with pytest.raises(kind, match=message):
        CudaDevice.open()


def _failing(gpu: Gpu, message: str) -> Any:
    def init(flags: int = 0) -> None:
        raise gpu.driver.RuntimeError(message)

    return init


def test_machines_that_cannot_be_used_are_refused(gpu: Gpu) -> None:
    with pytest.raises(BackendError, match="GPU 3 was asked for: expected 0 to 0"):
        CudaDevice.open(3)
    gpu.capability = (7, 0)
    with pytest.raises(BackendError, match=r"Fake GPU has compute capability 7\.0: expected 7\.5"):
        CudaDevice.open()
    gpu.driver_version = 11080
    with pytest.raises(BackendError, match=r"supports CUDA up to 11\.8: expected 12\.0; update the driver"):
        CudaDevice.open()
    gpu.driver_version = 12040
    with pytest.raises(BackendError, match=r"pycuda was built with CUDA 13\.0, the driver supports up to 12\.4"):
        CudaDevice.open()
    gpu.driver.init = _failing(gpu, "cuInit failed: no CUDA-capable device is detected")
    with pytest.raises(BackendError, match="no NVIDIA GPU is visible"):
        CudaDevice.open()
    gpu.driver.init = _failing(gpu, "cuInit failed: system has unsupported display driver / cuda driver combination")
    with pytest.raises(BackendError, match="the NVIDIA driver cannot be used: see nvidia-smi"):
        CudaDevice.open()


def test_errors_of_the_driver_become_ours(opened: CudaDevice, gpu: Gpu) -> None:
    def fail() -> None:
        raise gpu.driver.LogicError("cuStreamSynchronize failed: an illegal memory access was encountered")

    with opened.activate():
        gpu.enqueue(opened.stream_handle, fail)
    with pytest.raises(BackendError, match="CUDA: cuStreamSynchronize failed: an illegal memory access"):
        opened.synchronize()


def test_the_names_that_graphs_use_are_those_of_the_real_bindings() -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    fake = fakes_cuda.Gpu().bindings
    for name, found in vars(fake).items():
        if name.startswith("cu"):
            words = (getattr(real, name).__doc__ or "").partition(")")[0].partition("(")[2].split(",")
            names = [word.partition(":")[0].split()[-1] for word in words]
            wanted = found.__code__.co_varnames[: found.__code__.co_argcount]
            assert len(names) == len(wanted), name
            if name != "cuGraphExecDestroy":
                assert names == list(wanted), name
    for enum in (fakes_cuda.CUresult, fakes_cuda.CUstreamCaptureMode, fakes_cuda.CUevent_flags):
        for member in enum:
            assert int(getattr(getattr(real, enum.__name__), member.name)) == member
    assert int(real.CUstream(123)) == 123


def test_the_fake_is_strict(opened: CudaDevice, gpu: Gpu) -> None:
    """Each of these would be silent corruption or a crash on a real GPU."""
    driver, stream = gpu.driver, opened.stream
    array = opened.zeros((8,), "float32")
    with pytest.raises(RuleBroken, match="no context is current"):
        driver.memset_d8_async(array.pointer, 0, 4, stream)
    with opened.activate():
        with pytest.raises(RuleBroken, match="out of bounds"):
            driver.memset_d8_async(array.pointer, 0, 33, stream)
        with pytest.raises(RuleBroken, match="pinned"):
            driver.memcpy_htod_async(array.pointer, np.zeros(8, np.float32), stream)
        with pytest.raises(RuleBroken, match="no stream"):
            driver.memset_d8_async(array.pointer, 0, 4)
        with pytest.raises(RuleBroken, match="another context"):
            driver.memset_d8_async(array.pointer, 0, 4, gpu.foreign_stream(other_context=True))
        pointer = array.pointer
        del array
        with pytest.raises(RuleBroken, match="used after it was freed"):
            driver.memset_d8_async(pointer, 0, 4, stream)
        code = opened._functions._kernels.cubin(convert.TO_HALF)  # type: ignore[union-attr]
        function = driver.module_from_buffer(code).get_function("to_half")
        with pytest.raises(RuleBroken, match="before prepare"):
            function.prepared_async_call((1,), (128, 1, 1), stream)
        with pytest.raises(RuleBroken, match="prepared for"):
            function.prepare("PPi")


def test_programs_without_constants_have_a_format() -> None:
    program = Program("p", "m:f", (("a", "*u8"), ("b", "fp32"), ("c", "i64")))
    assert argument_format(program, 0) == "Pfq"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaDevice]:
    """A GPU, with kernels compiled for it."""
    torch = pytest.importorskip("torch", reason="torch compiles the kernels")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("pycuda.driver", reason="pycuda is not installed")
    folder = tmp_path_factory.mktemp("kernels")
    with CudaDevice.open() as first:
        architecture = "sm_{}{}".format(*first.compute_capability)
    compile_kernels(folder, [architecture], {program.name: program for program in PROGRAMS})
    found = folder / "kernels" / architecture
    kernels = KernelSet.read((found / INDEX).read_bytes(), lambda name: (found / name).read_bytes())
    with CudaDevice.open(kernels=kernels) as device:
        yield device


def test_a_gpu_is_not_tested_in_the_interpreter(gpu: Gpu) -> None:
    with pytest.raises(InputError, match="unset TRITON_INTERPRET"):
        TritonDevice("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("operation", [_to_half, _log_bin, _preprocess])
def test_gpu_runs_compiled_kernels_as_triton_runs_them(real: CudaDevice, operation: Any) -> None:
    np.testing.assert_array_equal(operation(real), operation(TritonDevice("cuda")))


@pytest.mark.gpu
def test_gpu_replays_graphs_and_shares_with_torch(real: CudaDevice) -> None:
    torch = import_module("torch")
    values = torch.arange(1000, dtype=torch.float32, device="cuda") * 2
    source = from_external(real, values)
    convert.to_half(real, source)
    with real.capture() as graph:
        half = convert.to_half(real, source)
    real.upload_to(np.full(1000, 3, np.float32), source)
    real.launch_graph(graph)
    np.testing.assert_array_equal(torch.from_dlpack(half).cpu().numpy(), 3)
    assert (values == 3).all()
    real.close_graph(graph)


@pytest.mark.gpu
def test_gpu_survives_running_out_of_memory(real: CudaDevice) -> None:
    with pytest.raises(BackendError, match="out of device memory"):
        real.empty((real.memory_info()[1],), "uint8")
    with real.lane() as lane:
        np.testing.assert_array_equal(_to_half(lane), _to_half(real))


def test_what_the_pools_hold_back_is_given_to_others(gpu: Gpu) -> None:
    """Of all lanes, and nothing that is in use."""
    with CudaDevice.open() as device, device.lane() as lane:
        kept = device.upload(np.arange(4))
        for each in (device, lane):
            each.empty((1 << 20,), "uint8")
        assert device._pool.held_blocks and lane._pool.held_blocks
        device.free_held()
        assert gpu.device_bytes() == kept.nbytes
        np.testing.assert_array_equal(device.download(kept), np.arange(4))


def test_an_architecture_without_kernels_names_no_command(gpu: Gpu) -> None:
    gpu.capability = (10, 3)
    with (
        CudaDevice.open() as device,
        pytest.raises(BackendError, match=r"has no kernels for sm_103: use kernels host$"),
    ):
        _to_half(device)
