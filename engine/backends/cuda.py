"""What the backends on a GPU share: lanes, each with a stream of its own."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import CLOSED, Backend, Tensors, check_inputs
from facetrt.engine.backends.run_options import Hint, Kernels, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import CLS_ATTENTION, KERNELS, Manifest
from facetrt.kernels.device import DeviceArray
from facetrt.kernels.device.runtime.cubins import INDEX, KernelSet, choose_architecture
from facetrt.kernels.device.runtime.cuda import CudaContext, CudaDevice
from facetrt.kernels.errors import BackendError, InputError

MAX_REPLAYS = 4  # batch sizes per lane whose launches are recorded: a stream of images has its batch and a last one

DeviceTensors = Mapping[str, DeviceArray]
Shape = tuple[int, ...]


def gpu_architecture() -> str:
    """The architecture of the first GPU, like ``sm_90``.

    Raises:
        MissingDependencyError: pycuda is not installed.
        BackendError: no driver or no GPU.
    """
    major, minor = CudaContext.of(0).device.compute_capability()
    return f"sm_{major}{minor}"


class Lane(ABC):
    """An encoder on a stream of its own. Of one user at a time, who gets it from :meth:`CudaBackend.lane`.

    Its methods are called with the CUDA context current, except :meth:`run`, which sees to that itself.
    """

    def __init__(self, device: CudaDevice, manifest: Manifest) -> None:
        self.device = device
        self.manifest = manifest

    def run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        """Encode one batch; returns before the device has, so what it returns is only for this lane's stream.

        Shapes, types and names as for :meth:`Backend.run`. ``rows`` and ``cols`` must lie within the grid of the patch
        convolution, which is not checked here: their values are on the device. The results belong to the caller.

        Raises:
            BackendError: inputs that do not fit the encoder, arrays of another stream, out of device memory, or a
                failure inside the runtime.
        """
        self._check(inputs)
        with self.device.activate():
            return self._run(inputs)

    def _check(self, inputs: DeviceTensors) -> None:
        check_inputs(self.manifest, inputs)
        for name, array in inputs.items():
            if array.device is not self.device:
                raise BackendError(f"input {name} belongs to another stream: make it on this lane's device")

    @abstractmethod
    def _run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]: ...

    @abstractmethod
    def close(self) -> None:
        """Give everything back but the device."""


class CudaBackend(Backend):
    """Runs on the first GPU, in lanes: one stream, and one set of the runtime's buffers, for each.

    A lane or stream that is in use when the backend closes is given back by its user, and closed then.

    Attributes:
        keeps_cache: whether it compiles when it opens, and keeps the result.
    """

    keeps_cache: ClassVar[bool] = False

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        super().__init__(bundle, options)
        self._changed = threading.Condition()  # guards what follows
        self._free: list[Lane] = []
        self._open_lanes: list[Lane] = []
        self._devices: list[CudaDevice] = []
        self._idle: list[CudaDevice] = []  # of those without an encoder
        self._streams_in_use = 0
        self._transfers = 0.0, 0.0  # of devices that are closed

    @classmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        gpu_architecture()  # a machine without a GPU is told so here, not by the first image
        own = bundle.manifest.precision
        if options.precision != own:
            raise InputError(
                f"on a GPU a bundle runs in its own precision, {own}, and {options.precision} was asked: export with "
                f"--precision {options.precision}"
            )
        if options.hint is not Hint.LATENCY:
            raise InputError("hint throughput is for the CPU: on a GPU use streams=2")
        if options.cache is not None and not cls.keeps_cache:
            raise InputError(
                "a cache is for backends that compile when they open: on a GPU tensorrt-rtx does, and plans of others "
                "lie in the bundle"
            )
        if options.kernels is Kernels.DEVICE:
            _architecture_of_kernels(bundle)

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """A free lane, waited for if all are in use.

        Raises:
            BackendError: the backend is closed, or was closed while this waited.
        """
        self.activate()
        with self._changed:
            while not self._free and self._state == "active":
                self._changed.wait()
            if self._state != "active":
                raise BackendError(CLOSED)
            lane = self._free.pop(0)  # in turn, so that a caller's batches overlap
        try:
            yield lane
        finally:
            with self._changed:
                self._free.append(lane)
                if self._state == "active":
                    self._changed.notify()
                else:
                    self._dispose()

    @contextmanager
    def stream(self) -> Iterator[CudaDevice]:
        """A stream without an encoder, for what comes before and after it; made where none is free.

        Raises:
            BackendError: the backend is closed.
        """
        self.activate()
        with self._changed:
            if self._state != "active":
                raise BackendError(CLOSED)
            if not self._idle:
                self._devices.append(self._devices[0].lane())
                self._idle.append(self._devices[-1])
            device = self._idle.pop()  # the last one that was used, so that one user stays on one
            self._streams_in_use += 1
        try:
            yield device
        finally:
            with self._changed:
                self._idle.append(device)
                self._streams_in_use -= 1
                if self._state != "active":
                    self._dispose()

    def transfers(self) -> tuple[float, float]:
        with self._changed:
            up, down = self._transfers
            up += sum(device.upload_seconds for device in self._devices)
            return up, down + sum(device.download_seconds for device in self._devices)

    def _activate(self) -> None:
        try:
            self._devices.append(CudaDevice.open(kernels=self._kernels()))
            with self._devices[0].activate():
                self._open(self._devices[0])
                for i in range(self.options.streams):
                    if i:
                        self._devices.append(self._devices[0].lane())
                    self._open_lanes.append(self._make_lane(self._devices[i]))
        except BaseException:
            self._free = list(self._open_lanes)
            self._dispose()
            raise
        self._free = list(self._open_lanes)
        self.streams = self.options.streams

    def _kernels(self) -> KernelSet | None:
        """The bundle's kernels for this GPU, if the tasks run them on it; cubins are read when they are launched."""
        if self.options.kernels is not Kernels.DEVICE:
            return None
        folder = f"{KERNELS}/{_architecture_of_kernels(self.bundle)}"
        bundle = self.bundle
        return KernelSet.read(bundle.read(f"{folder}/{INDEX}"), lambda name: bundle.read(f"{folder}/{name}"))

    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        with self.lane() as lane:
            outputs = lane.run({name: lane.device.upload(values) for name, values in inputs.items()})
            return [lane.device.download(outputs[name]) for name in self.bundle.manifest.outputs]

    def _close(self) -> None:
        with self._changed:
            self._changed.notify_all()
            self._dispose()

    def _dispose(self) -> None:
        """Close the free lanes and, with the last one and the last stream, everything else."""
        for lane in self._free:
            lane.device.synchronize()
            with lane.device.activate():
                lane.close()
            self._open_lanes.remove(lane)
        self._free = []
        if not self._open_lanes and not self._streams_in_use and self._devices:
            self._transfers, self._idle = self.transfers(), []
            with self._devices[0].activate():
                self._shut()
            while self._devices:
                self._devices.pop().close()

    @abstractmethod
    def _open(self, device: CudaDevice) -> None:
        """Load what all lanes share."""

    @abstractmethod
    def _make_lane(self, device: CudaDevice) -> Lane: ...

    @abstractmethod
    def _shut(self) -> None:
        """Give back what :meth:`_open` loaded, or as much of it as it did."""


def _architecture_of_kernels(bundle: Bundle) -> str:
    """Which of the bundle's kernels run on this GPU; raises :class:`BackendError` if none do."""
    capability = CudaContext.of(0).device.compute_capability()
    try:
        return choose_architecture(bundle.kernel_architectures(), capability)
    except BackendError as error:
        raise BackendError(f"{bundle.path}: {error}") from error


def output_shapes(manifest: Manifest, inputs: DeviceTensors) -> dict[str, Shape]:
    """Shape of each output for these inputs."""
    batch, height, width, _ = inputs["images"].shape
    if manifest.dynamic:
        cells = inputs["rows"].size * inputs["cols"].size
    else:
        patch, stride = manifest.architecture.patch, manifest.stride
        cells = (1 + (height - patch) // stride) * (1 + (width - patch) // stride)
    rows = (batch, manifest.architecture.prefix + cells, manifest.architecture.dim)
    return {name: (batch, cells) if name == CLS_ATTENTION else rows for name in manifest.outputs}


def fixed_copies(device: CudaDevice, arrays: DeviceTensors) -> dict[str, DeviceArray]:
    """Arrays like these at addresses that stay, with the same contents."""
    fixed = {name: device.empty(array.shape, array.dtype) for name, array in arrays.items()}
    copy_all(device, arrays, fixed)
    return fixed


def copy_all(device: CudaDevice, sources: DeviceTensors, targets: DeviceTensors) -> None:
    """Copy each array into that of the same name."""
    for name, array in sources.items():
        device.copy(array, targets[name])


def input_shapes(inputs: Mapping[str, Any]) -> dict[str, Shape]:
    """Shape of each input."""
    return {name: tuple(array.shape) for name, array in inputs.items()}
