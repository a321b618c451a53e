"""TensorRT: plans that were built on this kind of GPU, by this version, from this bundle's graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from facetrt.engine.backends.base import CLOSED, DTYPES, first_line
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
from facetrt.engine.backends.flavours import TENSORRT, Flavour, import_library, make_log, version_numbers
from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import ENCODER, Manifest, PlanRecord
from facetrt.kernels.device import DeviceArray
from facetrt.kernels.device.runtime.cuda import CudaDevice
from facetrt.kernels.device.runtime.streams import CapturedGraph
from facetrt.kernels.errors import BackendError, BundleError, InputError

HARDWARE_COMPATIBLE, VERSION_COMPATIBLE = "hardware_compatible", "version_compatible"


@dataclass(frozen=True)
class PlanKey:
    """What a plan must have been built for to run here."""

    encoder_sha256: str
    version: str
    architecture: str
    precision: str

    @staticmethod
    def here(manifest: Manifest, version: str, architecture: str) -> PlanKey:
        return PlanKey(manifest.files[ENCODER].sha256, version, architecture, manifest.precision)

    def differences(self, record: PlanRecord) -> list[str]:
        """Names of the fields in which a plan does not fit."""
        fits = {
            "encoder_sha256": self.encoder_sha256 == record.encoder_sha256,
            "version": self.version == record.version
            or (VERSION_COMPATIBLE in record.flags and _newer_of_same_major(self.version, record.version)),
            "architecture": self.architecture in record.architectures
            or (HARDWARE_COMPATIBLE in record.flags and _at_least_ampere(self.architecture)),
            "precision": self.precision == record.precision,
        }
        return [name for name, fit in fits.items() if not fit]


def _newer_of_same_major(here: str, built: str) -> bool:
    a, b = version_numbers(here), version_numbers(built)
    return a[0] == b[0] and a >= b


def _at_least_ampere(architecture: str) -> bool:
    return int(architecture.removeprefix("sm_")) >= 80


def find_plan(bundle: Bundle, key: PlanKey, flavour: Flavour = TENSORRT) -> str:
    """Name of the plan that runs here; of several one without compatibility flags, of these the one built last.

    Raises:
        InputError: there is none; names the fields in which the closest differs.
    """
    if not flavour.covers(key.architecture):
        raise InputError(
            f"{flavour.title} does not run on {key.architecture}, the GPU here, but on "
            f"{', '.join(flavour.architectures or ())}: use backend {TENSORRT.backend} or onnxruntime"
        )
    plans, command = plans_of(bundle.manifest, flavour), flavour.build_command(bundle.path)
    if not plans:
        where = "anywhere" if flavour.ahead_of_time else "on this machine"
        raise InputError(f"{bundle.path} has no {flavour.title} plan: build one {where} with '{command}'")
    misfits = {name: key.differences(record) for name, record in plans.items()}
    fitting = [name for name in reversed(plans) if not misfits[name]]
    if fitting:
        return min(fitting, key=lambda name: len(plans[name].flags))
    closest = min(misfits, key=lambda name: len(misfits[name]))
    fields = "; ".join(
        f"field '{n}' is {getattr(plans[closest], n):.48} in the plan and {getattr(key, n):.24} here"
        for n in misfits[closest]
    )
    raise InputError(f"{bundle.path / closest} does not run here: {fields}; build one with '{command}'")


def plans_of(manifest: Manifest, flavour: Flavour) -> dict[str, PlanRecord]:
    """The plans that one of the two libraries has built."""
    return {name: record for name, record in manifest.plans.items() if record.builder == flavour.backend}


def has_plan_here(manifest: Manifest, flavour: Flavour = TENSORRT) -> bool:
    """Whether one of the bundle's plans fits this GPU and the library that is installed."""
    plans = plans_of(manifest, flavour).values()
    if not plans:
        return False
    key = PlanKey.here(manifest, import_library(flavour).__version__, gpu_architecture())
    return flavour.covers(key.architecture) and any(not key.differences(record) for record in plans)


class TensorRtBackend(CudaBackend):
    """One engine, and execution contexts for each lane.

    Bundles of one size run as CUDA graphs: the second batch of a size is recorded, and later ones are replayed.

    Attributes:
        plan: the plan's name, once active.
    """

    flavour: ClassVar[Flavour] = TENSORRT
    name = TENSORRT.backend
    _runtime: Any = None
    _engine: Any = None

    @classmethod
    def check_installed(cls) -> None:
        import_library(cls.flavour)

    @classmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        super().check_supported(bundle, options)
        version = import_library(cls.flavour).__version__
        find_plan(bundle, PlanKey.here(bundle.manifest, version, gpu_architecture()), cls.flavour)

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        super().__init__(bundle, options)
        self.plan = ""

    def _open(self, device: CudaDevice) -> None:
        self._trt = import_library(self.flavour)
        self._log = make_log(self._trt)
        major, minor = device.compute_capability
        key = PlanKey.here(self.bundle.manifest, self._trt.__version__, f"sm_{major}{minor}")
        self.plan = find_plan(self.bundle, key, self.flavour)
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
                f"with '{self.flavour.build_command(self.bundle.path)}'"
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
        return TensorRtLane(device, self.bundle.manifest, self._engine, self._log, self._make_context)

    def _make_context(self) -> Any:
        """An execution context of the engine, without memory: its lane gives it some."""
        return self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def _shut(self) -> None:
        self._engine = None
        self._runtime = None  # after its engine, which after its contexts


class TensorRtLane(Lane):
    """Execution contexts of one engine, all on one stream, and therefore all in one block of scratch memory."""

    def __init__(
        self, device: CudaDevice, manifest: Manifest, engine: Any, log: Any, make_context: Callable[[], Any]
    ) -> None:
        super().__init__(device, manifest)
        self._engine, self._log, self._make_context = engine, log, make_context
        self._profiles = _Profiles(engine)
        self._scratch: DeviceArray | None = None
        self._plain = self._context()
        self._replays: dict[Shape, _Replay] = {}
        self._seen: set[Shape] = set()

    def _context(self) -> _Context:
        made = _with_memory(self._make_context, self.device, self._log)
        if made is None:
            raise BackendError(f"TensorRT cannot make an execution context: {self._log.last()}; use fewer streams")
        return _Context(self.device, self._engine, made, self._log, self.manifest)

    def _run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        profile = self._profiles.choose(input_shapes(inputs))
        scratch = self._reserve(self._profiles.scratch_bytes[profile])
        replay = None if self.manifest.dynamic else self._replay(inputs, profile, scratch)
        return self._plain.run(inputs, profile, scratch) if replay is None else replay.run(inputs)

    def _reserve(self, nbytes: int) -> DeviceArray:
        """The lane's block, grown to what a run needs; recordings, which hold the smaller one, are then made anew."""
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._forget()
            self._scratch = None  # given back before a larger one is asked for
            self._scratch = self.device.empty((nbytes,), np.uint8)
        return self._scratch

    def _replay(self, inputs: DeviceTensors, profile: int, scratch: DeviceArray) -> _Replay | None:
        """The recorded run for these shapes, made when they come a second time: most last batches come once."""
        shape = inputs["images"].shape
        if shape not in self._replays and shape in self._seen and len(self._replays) < MAX_REPLAYS:
            self._replays[shape] = _Replay(self.device, self._context(), inputs, profile, scratch)
        self._seen.add(shape)
        return self._replays.get(shape)

    def _forget(self) -> None:
        for replay in self._replays.values():
            replay.close()
        self._replays.clear()

    def close(self) -> None:
        self._forget()
        self._plain.close()
        self._scratch = None
        self._engine = None  # users may hold the lane for longer
        self._make_context = _closed


def _closed() -> Any:
    raise BackendError(CLOSED)


class _Profiles:
    """An engine's profiles: which shapes each takes, and how much scratch memory a run in it needs."""

    def __init__(self, engine: Any) -> None:
        count = engine.num_optimization_profiles
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if name in DTYPES]
        self._bounds = [{n: _bounds(engine.get_tensor_profile_shape(n, i)) for n in inputs} for i in range(count)]
        self.scratch_bytes = [int(engine.get_device_memory_size_for_profile_v2(i)) for i in range(count)]

    def choose(self, shapes: Mapping[str, Shape]) -> int:
        """Number of the first profile that takes all shapes; raises :class:`BackendError` if none does."""
        for index, bounds in enumerate(self._bounds):
            if all(_within(shape, *bounds[name]) for name, shape in shapes.items()):
                return index
        raise BackendError(self._misfit(shapes))

    def _misfit(self, shapes: Mapping[str, Shape]) -> str:
        """Which input is outside of the profile that comes last; there is one, unless somebody else built the plan."""
        for name, shape in shapes.items():
            low, high = self._bounds[-1][name]
            if not _within(shape, low, high):
                return (
                    f"{name} has shape {shape}, and the plan's profile takes {low} to {high}: use fewer or smaller "
                    "images, or build a plan with a larger --max-batch or --max-size"
                )
        return f"inputs of shapes {dict(shapes)} fit none of the plan's profiles"


def _bounds(profile: Any) -> tuple[Shape, Shape]:
    low, _, high = profile
    return tuple(low), tuple(high)


class _Context:
    """An execution context, and what is set in it."""

    def __init__(self, device: CudaDevice, engine: Any, context: Any, log: Any, manifest: Manifest) -> None:
        self._device, self._engine, self._context = device, engine, context
        self._log, self._outputs = log, manifest.outputs
        self._profile = 0

    def run(self, inputs: DeviceTensors, profile: int, scratch: DeviceArray) -> dict[str, DeviceArray]:
        """One run into new arrays."""
        outputs = self.prepare(inputs, profile, scratch)
        self.enqueue()
        return outputs

    def prepare(self, inputs: DeviceTensors, profile: int, scratch: DeviceArray) -> dict[str, DeviceArray]:
        """Set profile, memory, shapes and addresses; returns the outputs, new arrays whose contents come with the
        run.
        """
        self._choose_profile(profile)
        self._context.set_device_memory(scratch.pointer, scratch.nbytes)
        for name, array in inputs.items():
            self._check(self._context.set_input_shape(name, array.shape), f"take {name} of shape {array.shape}")
        unknown = self._infer_shapes()
        self._check(not unknown, f"infer shapes; {', '.join(unknown)} would have to be given")
        outputs = {name: self._make_output(name) for name in self._outputs}
        self._set_addresses({**inputs, **outputs})
        return outputs

    def _infer_shapes(self) -> list[str]:
        """Inputs that still lack a shape; other failures are exceptions of the binding."""
        try:
            return list(self._context.infer_shapes())
        except RuntimeError as error:
            raise BackendError(f"TensorRT failed to infer shapes: {first_line(error)}: {self._log.last()}") from error

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

    def _choose_profile(self, index: int) -> None:
        if index != self._profile:
            done = self._context.set_optimization_profile_async(index, self._device.stream_handle)
            self._check(done, f"switch to profile {index}")
            self._profile = index

    @property
    def recordable(self) -> bool:
        """Whether what was just run could be recorded: not while kernels for it are still being compiled."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._device.stream_handle))

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
    set there. A run that cannot be recorded yet is run as it is.
    """

    def __init__(
        self, device: CudaDevice, context: _Context, inputs: DeviceTensors, profile: int, scratch: DeviceArray
    ) -> None:
        self._device, self._context, self._scratch = device, context, scratch
        self._inputs = fixed_copies(device, inputs)
        self._outputs = context.prepare(self._inputs, profile, scratch)
        context.enqueue()  # what is set up lazily must be done before it is recorded
        self._graph = self._record()

    def _record(self) -> CapturedGraph | None:
        if not self._context.recordable:
            return None
        with self._device.capture() as graph:
            self._context.enqueue()
        return graph

    def run(self, inputs: DeviceTensors) -> dict[str, DeviceArray]:
        copy_all(self._device, inputs, self._inputs)
        if self._graph is None:
            self._graph = self._record()
        if self._graph is None:
            self._context.enqueue()
        else:
            self._device.launch_graph(self._graph)
        results = {name: self._device.empty(array.shape, array.dtype) for name, array in self._outputs.items()}
        copy_all(self._device, self._outputs, results)
        return results

    def close(self) -> None:
        if self._graph is not None:
            self._device.close_graph(self._graph)
        self._context.close()
