"""What the sections of the GPU suite share: a device for kernels, encoders on device memory, torch's baselines."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from facetrt.benchmarks.cpu.workbench import Sizes, Workbench, prepare
from facetrt.engine.backends.base import Backend
from facetrt.engine.backends.choice import make_backend
from facetrt.engine.backends.cuda import CudaBackend, Lane
from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.encoding.encoder import Encoder
from facetrt.engine.engine import Engine
from facetrt.export.export_options import ExportOptions, GraphPrecision
from facetrt.export.models import ModelSpec
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.runtime.cubins import choose_architecture
from facetrt.kernels.device.runtime.cuda import CudaContext
from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.device.runtime.triton_device import TritonDevice
from facetrt.kernels.errors import BackendError, FacetrtError, MissingDependencyError


@dataclass(frozen=True)
class GpuSizes(Sizes):
    """How large everything is; the bars hold for the defaults.

    Attributes:
        batch: images encoded at once.
        calls: of a round in which each call is waited for.
        window: seconds of a round in which calls are queued.
        decoded: ``(height, width)`` of the images that the resize takes.
        labels: of the CRF; ``crf_iterations`` likewise.
        iterations: of the k-means sweep; ``restarts`` likewise.
        points: that are followed; ``frames`` of a video likewise.
    """

    images: int = 100
    product: int = 8192
    seconds: float = 900
    batch: int = 16
    calls: int = 200
    window: float = 0.1
    decoded: tuple[int, int] = (1080, 1920)
    labels: int = 5
    iterations: int = 300
    restarts: int = 10
    crf_iterations: int = 10
    points: int = 100
    frames: int = 60


QUICK_GPU = GpuSizes(
    side=32, images=4, large_grid=6, product=128, seconds=0, batch=2, calls=1, window=0.0, decoded=(20, 28), labels=2,
    iterations=1, restarts=1, crf_iterations=1, eigenvector=(4, 6), points=2, frames=3,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What is measured, and on what.

    Attributes:
        torch: torch's name of the device.
        engines: (backend, device) pairs; the first is what the bars are about.
        compiled: whether the strong glue is compiled.
        half: whether torch computes in fp16.
    """

    torch: str = "cuda"
    engines: tuple[tuple[str, str], ...] = (("tensorrt", "cuda"), ("onnxruntime", "cuda"))
    compiled: bool = True
    half: bool = True


@dataclass(frozen=True)
class Pass:
    """One encoder pass on inputs that lie on the device: queue it, wait for it, fetch what it returned."""

    queue: Callable[[], Any]
    synchronize: Callable[[], object]
    fetch: Callable[[Any], Mapping[str, NDArray[Any]]]


@dataclass
class GpuWorkbench(Workbench):
    """A workbench for one GPU; use as a context manager."""

    sizes: GpuSizes = field(default_factory=GpuSizes)
    target: Target = field(default_factory=Target)

    def gpu_engine(self, backend: str, device: str) -> Engine:
        """An open engine; raises where it cannot run."""

        def make() -> Engine:
            return self._stack.enter_context(Engine.open(self.bundle, backend=backend, device=device))

        return self.once(("gpu engine", backend, device), make)

    def encoder_pass(self, backend: str, device: str, images: NDArray[np.uint8]) -> Pass:
        """The encoder alone, on ``(B, H, W, 3)``; nothing is copied to or from the host."""
        runner = self._backend(backend, device)
        encoder, size = Encoder(runner.bundle, runner), (images.shape[1], images.shape[2])
        used_h, used_w = encoder.used_size(size)
        inputs = {
            "images": np.ascontiguousarray(images[:, :used_h, :used_w]),
            **encoder.grid_inputs(size, step=1),
        }
        if not isinstance(runner, CudaBackend):
            return Pass(lambda: runner.run(inputs), lambda: None, lambda outputs: outputs)
        lane = self._lane(runner)
        held = {name: lane.device.upload(values) for name, values in inputs.items()}
        return Pass(
            lambda: lane.run(held),
            lane.device.synchronize,
            lambda outputs: {name: lane.device.download(values) for name, values in outputs.items()},
        )

    @cached_property
    def kernels(self) -> Device:
        """Where kernels run: on a backend's lane if the bundle holds them for this GPU, else from source by Triton."""
        for backend, device in self.target.engines:
            try:
                runner = self._backend(backend, device)
                if isinstance(runner, CudaBackend) and self._holds_kernels():
                    return self._lane(runner).device
            except FacetrtError:
                continue  # its rows say why
        return TritonDevice(self.target.torch)

    def _lane(self, runner: CudaBackend) -> Lane:
        """The one lane of a backend, for as long as the workbench is open."""
        return self.once(("lane", runner.name), lambda: self._stack.enter_context(runner.lane()))

    def _holds_kernels(self) -> bool:
        try:
            capability = CudaContext.of(0).device.compute_capability()
            choose_architecture(Bundle.open(self.bundle).kernel_architectures(), capability)
        except BackendError:
            return False
        return True

    def _backend(self, backend: str, device: str) -> Backend:
        def make() -> Backend:
            opened = make_backend(
                Bundle.open(self.bundle),
                RunOptions.parse(
                    backend=backend, device=device, precision="auto", hint="latency", threads=None, cache=None
                ),
            )
            self._stack.callback(opened.close)
            opened.activate()
            return opened

        return self.once(("backend", backend, device), make)

    def glue_gpu(self, *, compiled: bool | None = None, half: bool | None = None) -> Any:
        """The strong glue; compiled and in fp16 as the target says, unless given."""
        from facetrt.benchmarks.baselines.strong_glue_gpu import Glue

        chosen = self.target.compiled if compiled is None else compiled, self.target.half if half is None else half

        def make() -> Glue:
            return Glue(self.spec, self.state, self.target.torch, compiled=chosen[0], half=chosen[1])

        return self.once(("glue on the GPU", *chosen), make)

    def extractor_gpu(self, stride: int | None = None) -> Any:
        """The research style's model at the bundle's stride or another."""
        from facetrt.benchmarks.baselines.research_style import Extractor

        chosen = stride or self.stride
        return self.once(
            ("extractor on the GPU", chosen), lambda: Extractor(self.spec, self.state, chosen, self.target.torch)
        )

    def wait(self) -> None:
        """Wait for everything that torch queued."""
        if self.target.torch == "cuda":
            self.torch.cuda.synchronize()

    def guarded(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work`` of torch, whose failures (no compiler, no memory) cost its own row only."""

        def run(*arguments: Any) -> Any:
            try:
                return work(*arguments)
            except FacetrtError:
                raise
            except Exception as error:
                line = (str(error).strip().splitlines() or [""])[0]
                raise BackendError(f"torch failed: {type(error).__name__}: {line:.200}") from error

        return run


class CountingDevice(Device):
    """Another device, and how much memory is allocated through it.

    Attributes:
        peak: the most bytes at a time.
    """

    def __init__(self, device: Device) -> None:
        self._device, self._held, self.peak = device, 0, 0

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        return self._count(self._device.empty(shape, dtype))

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        return self._count(self._device.zeros(shape, dtype))

    def upload(self, values: NDArray[Any]) -> DeviceArray:
        return self._count(self._device.upload(values))

    def download(self, array: DeviceArray) -> NDArray[Any]:
        return self._device.download(array)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        self._device.copy(source, target)

    def synchronize(self) -> None:
        self._device.synchronize()

    def _launch(self, program: Program, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self._device.launch(program, grid, *arguments)

    def _count(self, array: DeviceArray) -> DeviceArray:
        self._held += array.nbytes
        self.peak = max(self.peak, self._held)
        weakref.finalize(array.owner, self._release, array.nbytes)
        return array

    def _release(self, nbytes: int) -> None:
        self._held -= nbytes


def prepare_gpu(
    bundle: Path | str | None, weights: Path | None, folder: Path, arch: str, report: Callable[[str], None]
) -> tuple[Path | str, ModelSpec, Any]:
    """Do as :func:`prepare`; what is exported is fp16, with kernels and a TensorRT plan for this GPU.

    Without TensorRT there is no plan, and its rows say so.
    """
    from facetrt.export.additions import add_kernels
    from facetrt.export.plans import build_plan

    opened, spec, state = prepare(bundle, weights, folder, ExportOptions(precision=GraphPrecision.FP16))
    if bundle is None:
        add_kernels(Path(opened), [arch], report=report)
        try:
            build_plan(Path(opened), report=report)
        except MissingDependencyError as error:
            report(str(error))
    return opened, spec, state
