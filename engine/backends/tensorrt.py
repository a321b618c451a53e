"""TensorRT: plans that were built on this kind of GPU, by this version, from this bundle's graph."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from facetrt.engine.backends.base import DTYPES, first_line
from facetrt.engine.backends.cuda import (
    MAX_REPLAYS,
    CudaBackend,
    DeviceTensors,
    Lane,
    Shape,
    copy_all,
    fixed_copies,
    gpu_architecture,
    input_shapes,
)
from facetrt.engine.backends.options import BackendName, RunOptions
from facetrt.engine.bundle.bundle import ENCODER, Bundle, Manifest, PlanRecord
from facetrt.kernels.device import DeviceArray
from facetrt.kernels.device.runtime.cuda import CudaDevice
from facetrt.kernels.errors import BackendError, BundleError, InputError, MissingDependencyError

OLDEST = (10, 16)
NEWEST_MAJOR = 11
BUILD_ONE = "facetrt export {bundle} --target tensorrt"
NO_MEMORY = re.compile(r"out ?of ?memory|memory .*could not be allocated|MemoryAllocation", re.IGNORECASE | re.DOTALL)
HARDWARE_COMPATIBLE, VERSION_COMPATIBLE = "hardware_compatible", "version_compatible"


def import_tensorrt() -> Any:
    """The tensorrt module, or an error that says what to install."""
    try:
        import tensorrt
    except ImportError as error:
        raise MissingDependencyError(
            f"TensorRT cannot be imported ({first_line(error)}): pip install 'facetrt[gpu]', or use backend onnxruntime"
        ) from error
    version = version_numbers(tensorrt.__version__)
    if version < OLDEST or version[0] > NEWEST_MAJOR:
        raise MissingDependencyError(
            f"TensorRT {tensorrt.__version__} is installed: expected {OLDEST[0]}.{OLDEST[1]} or newer, up to "
            f"{NEWEST_MAJOR}.x; pip install 'tensorrt>=10.16,<12'"
        )
    return tensorrt


def version_numbers(text: str) -> tuple[int, ...]:
    """``11.4.0.106`` as numbers, so that they compare."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def make_log(tensorrt: Any) -> Any:
    """A logger that keeps TensorRT's errors, instead of printing them: a call that fails only returns nothing."""

    class Log(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (tensorrt.ILogger.INTERNAL_ERROR, tensorrt.ILogger.ERROR):
                self.errors.append(msg.strip())

        def last(self) -> str:
            """The last error, which is then forgotten."""
            return self.errors.pop() if self.errors else "TensorRT gave no reason"

        def lacks_memory(self) -> bool:
            """Whether one of the errors is about memory; they are then forgotten."""
            found = any(NO_MEMORY.search(error) for error in self.errors)
            if found:
                self.errors.clear()
            return found

    return Log()


@dataclass(frozen=True)
class PlanKey:
    """What a plan must have been built for to run here."""

    encoder_sha256: str
    tensorrt: str
    architecture: str
    precision: str

    @staticmethod
    def here(manifest: Manifest, version: str, architecture: str) -> PlanKey:
        return PlanKey(manifest.files[ENCODER].sha256, version, architecture, manifest.precision)

    def differences(self, record: PlanRecord) -> list[str]:
        """Names of the fields in which a plan does not fit."""
        allowed = {
            "tensorrt": VERSION_COMPATIBLE in record.flags and _newer_of_same_major(self.tensorrt, record.tensorrt),
            "architecture": HARDWARE_COMPATIBLE in record.flags and _at_least_ampere(self.architecture),
        }
        return [n for n, value in vars(self).items() if getattr(record, n) != value and not allowed.get(n, False)]


def _newer_of_same_major(here: str, built: str) -> bool:
    a, b = version_numbers(here), version_numbers(built)
    return a[0] == b[0] and a >= b


def _at_least_ampere(architecture: str) -> bool:
    return int(architecture.removeprefix("sm_")) >= 80


def find_plan(bundle: Bundle, key: PlanKey) -> str:
    """Name of the plan that runs here; of several one without compatibility flags, of these the one built last.

    Raises:
        InputError: there is none; names the fields in which the closest differs.
    """
    plans, command = bundle.manifest.plans, BUILD_ONE.format(bundle=bundle.path)
    if not plans:
        raise InputError(f"{bundle.path} has no TensorRT plan: build one on this machine with '{command}'")
    misfits = {name: key.differences(record) for name, record in plans.items()}
    fitting = [name for name in reversed(plans) if not misfits[name]]
    if fitting:
        return min(fitting, key=lambda name: len(plans[name].flags))
    closest = min(misfits, key=lambda name: len(misfits[name]))
    fields = "; ".join(
        f"field '{n}' is {getattr(plans[closest], n):.24} in the plan and {getattr(key, n):.24} here"
        for n in misfits[closest]
    )
    raise InputError(f"{bundle.path / closest} does not run here: {fields}; build one here with '{command}'")


def has_plan_here(manifest: Manifest) -> bool:
    """Whether one of the bundle's plans fits this GPU and the TensorRT that is installed."""
    key = PlanKey.here(manifest, import_tensorrt().__version__, gpu_architecture())
    return any(not key.differences(record) for record in manifest.plans.values())


class TensorRtBackend(CudaBackend):
    """One engine, and an execution context for each lane.

    Bundles of one size run as CUDA graphs: the second batch of a size is recorded, and later ones are replayed.
    """

    name = BackendName.TENSORRT
    _runtime: Any = None
    _engine: Any = None

    @classmethod
    def check_installed(cls) -> None:
        import_tensorrt()

    @classmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        super().check_supported(bundle, options)
        find_plan(bundle, PlanKey.here(bundle.manifest, import_tensorrt().__version__, gpu_architecture()))

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        super().__init__(bundle, options)
        self.plan = ""  # its name, once active

    def _open(self, device: CudaDevice) -> None:
        self._trt = import_tensorrt()
        self._log = make_log(self._trt)
        major, minor = device.compute_capability
        key = PlanKey.here(self.bundle.manifest, self._trt.__version__, f"sm_{major}{minor}")
        self.plan = find_plan(self.bundle, key)
        record = self.bundle.manifest.plans[self.plan]
        self.max_batch = record.max_batch
        self._runtime = self._trt.Runtime(self._log)
        if VERSION_COMPATIBLE in record.flags:
            self._runtime.engine_host_code_allowed = True  # such a plan brings its own runtime
        plan = self.bundle.read(self.plan)
        self._engine = _with_memory(lambda: self._runtime.deserialize_cuda_engine(plan), device, self._log)
        if self._engine is None:
            raise BundleError(
                f"{self.bundle.path}: the encoder cannot be loaded: {self.plan}: {self._log.last()}; build it again "
                f"with '{BUILD_ONE.format(bundle=self.bundle.path)}'"
            )
        self._check_engine()

    def _check_engine(self) -> None:
        """Names and types of the engine's tensors must be those that the manifest means."""
        engine, mode = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == mode.INPUT]
        self._check_graph(inputs, (name for name in names if engine.get_tensor_mode(name) == mode.OUTPUT))
        for name in names:
            expected = np.dtype(DTYPES.get(name, np.float32))
            given = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name)))
            if given != expected:
                raise BundleError(
                    f"{self.bundle.path}: {self.plan}: tensor {name} has type {given}: expected {expected}"
                )

    def _make_lane(self, device: CudaDevice) -> Lane:
        return TensorRtLane(device, self.bundle.manifest, self._trt, self._engine, self._log)

    def _shut(self) -> None:
        self._engine = None
        self._runtime = None  # after its engine, which after its contexts


class TensorRtLane(Lane):
    """Execution contexts of one engine, all on one stream."""

    def __init__(self, device: CudaDevice, manifest: Manifest, trt: Any, engine: Any, log: Any) -> None:
        super().__init__(device, manifest)
        self._trt, self._engine, self._log = trt, engine, log
        self._plain = _Context(device, engine, log, manifest)
        self._replays: dict[Shape, _Replay] = {}
        self._seen: set[Shape] = set()

    def _run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        replay = None if self.manifest.dynamic else self._replay(inputs)
        return self._plain.run(inputs) if replay is None else replay.run(inputs)

    def _replay(self, inputs: DeviceTensors) -> _Replay | None:
        """The recorded run for these shapes, made when they come a second time: most last batches come once."""
        shape = inputs["images"].shape
        if shape not in self._replays and shape in self._seen and len(self._replays) < MAX_REPLAYS:
            context = _Context(self.device, self._engine, self._log, self.manifest)
            self._replays[shape] = _Replay(self.device, context, inputs)
        self._seen.add(shape)
        return self._replays.get(shape)

    def close(self) -> None:
        for replay in self._replays.values():
            replay.close()
        self._replays.clear()
        self._plain.close()
        self._engine = None  # users may hold the lane for longer


class _Context:
    """An execution context, and what is set in it."""

    def __init__(self, device: CudaDevice, engine: Any, log: Any, manifest: Manifest) -> None:
        self._device, self._engine, self._log, self._outputs = device, engine, log, manifest.outputs
        self._profile = 0
        self._context = _with_memory(engine.create_execution_context, device, log)
        if self._context is None:
            raise BackendError(
                f"TensorRT cannot make an execution context, which takes {engine.device_memory_size_v2:,} bytes of "
                f"device memory: {log.last()}; use fewer streams, or a plan with a smaller --max-batch"
            )

    def run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        """One run into new arrays."""
        outputs = self.prepare(inputs)
        self.enqueue()
        return outputs

    def prepare(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        """Set profile, shapes and addresses; returns the outputs, new arrays whose contents come with the run."""
        self._choose_profile(input_shapes(inputs))
        for name, array in inputs.items():
            self._check(self._context.set_input_shape(name, array.shape), f"take {name} of shape {array.shape}")
        unknown = self._context.infer_shapes()
        self._check(not unknown, f"infer shapes; {', '.join(unknown)} would have to be given")
        outputs = {name: self._make_output(name) for name in self._outputs}
        self._set_addresses({**inputs, **outputs})
        return outputs

    def _make_output(self, name: str) -> DeviceArray:
        return self._device.empty(tuple(self._context.get_tensor_shape(name)), np.float32)

    def _set_addresses(self, arrays: Mapping[str, DeviceArray]) -> None:
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            array = arrays.get(name)
            if array is None:
                raise BackendError(f"the plan has an output {name} that the manifest does not list: build it again")
            self._check(self._context.set_tensor_address(name, array.pointer), f"take the address of {name}")

    def enqueue(self) -> None:
        stream = self._device.stream_handle
        done = _with_memory(lambda: self._context.execute_async_v3(stream), self._device, self._log)
        self._check(done, "run the encoder")

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> None:
        for index in range(self._engine.num_optimization_profiles):
            if all(_within(shape, *self._bounds(name, index)) for name, shape in shapes.items()):
                break
        else:
            raise BackendError(self._misfit(shapes))
        if index != self._profile:
            done = self._context.set_optimization_profile_async(index, self._device.stream_handle)
            self._check(done, f"switch to profile {index}")
            self._profile = index

    def _bounds(self, name: str, profile: int) -> tuple[Shape, Shape]:
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)

    def _misfit(self, shapes: Mapping[str, Shape]) -> str:
        """Which input is outside of the profile that comes last; there is one, unless somebody else built the plan."""
        last = self._engine.num_optimization_profiles - 1
        for name, shape in shapes.items():
            low, high = self._bounds(name, last)
            if not _within(shape, low, high):
                return (
                    f"{name} has shape {shape}, and the plan's profile takes {low} to {high}: use fewer or smaller "
                    "images, or build a plan with a larger --max-batch or --max-size"
                )
        return f"inputs of shapes {dict(shapes)} fit none of the plan's profiles"

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"TensorRT failed to {what}: {self._log.last()}")

    def close(self) -> None:
        self._context = None
        self._engine = None


def _with_memory(call: Callable[[], Any], device: CudaDevice, log: Any) -> Any:
    """What TensorRT answers; if it lacks memory, once more after our pools have given back what they hold."""
    answer = call()
    if (answer is None or answer is False) and log.lacks_memory():
        device.free_held()
        answer = call()
    return answer


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


class _Replay:
    """A run on arrays of its own, recorded once and replayed.

    Its context is nobody else's: a recorded run holds the context's state, and would be wrong after another shape was
    set there.
    """

    def __init__(self, device: CudaDevice, context: _Context, inputs: DeviceTensors) -> None:
        self._device, self._context = device, context
        self._inputs = fixed_copies(device, inputs)
        self._outputs = context.prepare(self._inputs)
        context.enqueue()  # what is set up lazily must be done before it is recorded
        with device.capture() as graph:
            context.enqueue()
        self._graph = graph

    def run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        copy_all(self._device, inputs, self._inputs)
        self._device.launch_graph(self._graph)
        results = {name: self._device.empty(array.shape, array.dtype) for name, array in self._outputs.items()}
        copy_all(self._device, self._outputs, results)
        return results

    def close(self) -> None:
        self._device.close_graph(self._graph)
        self._context.close()
