"""A TensorRT, or TensorRT for RTX, that is none: enforces the documented order of calls, computes by ONNX Runtime.

It stands on the fake GPU of ``fakes_cuda``: runs are put on its streams, read and write its memory, and are recorded by
its captures. A plan holds the ONNX graph, which ONNX Runtime's CPU runs when the stream is waited for (widened, with
rounding, if it is bf16). What breaks a rule raises :class:`RuleBroken`.
"""

from __future__ import annotations

import json
import sys
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fakes_cuda import Gpu, RuleBroken

from facetrt.engine.backends.widening import widen

MAGIC = b"fake plan\n"
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8, "INT64": np.int64, "INT32": np.int32}
FROM_ONNX = {1: "FLOAT", 2: "UINT8", 7: "INT64", 10: "HALF", 16: "BF16"}
_STATE: dict[str, Any] = {}


def install(monkeypatch: Any, gpu: Gpu, *, version: str = "11.4.0.106", rtx: bool = False) -> ModuleType:
    """Put the fake in place of ``tensorrt``, or of ``tensorrt_rtx``, the other of the two being absent.

    The module's ``fake`` holds what tests look at and break.
    """
    name, other = ("tensorrt_rtx", "tensorrt") if rtx else ("tensorrt", "tensorrt_rtx")
    module = _module(name, version)
    _STATE.update(gpu=gpu, module=module)
    module.fake = State()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    for absent in (other, "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, absent, None)
    return module


class State:
    """What happened, and what is to go wrong."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.live: dict[str, int] = {"runtime": 0, "engine": 0, "context": 0}
        self.scale = 1.0  # of all outputs: a plan that is wrong
        self.fail: set[str] = set()  # calls that fail
        self.conditional = False  # the parser makes a branch
        self.flags: list[Any] = []
        self.profiles: list[OptimizationProfile] = []
        self.hardware: Any = None
        self.capabilities: list[str] = []  # of TensorRT for RTX: what was built for
        self.unfused: set[str] = set()  # attentions that do not become one kernel
        self.scratch = 1 << 20  # bytes of the first profile; each further one takes as much again
        self.strategies: list[Any] = []  # how contexts get their memory
        self.compiling = False  # TensorRT for RTX: kernels are being compiled, and nothing can be recorded
        self.kernels: set[str] = set()  # of TensorRT for RTX: compiled in this process


def _fake() -> State:
    return _STATE["module"].fake  # type: ignore[no-any-return]


def _gpu() -> Gpu:
    return _STATE["gpu"]  # type: ignore[no-any-return]


def _rtx() -> bool:
    return _STATE["module"].__name__ == "tensorrt_rtx"  # type: ignore[no-any-return]


def _called(name: str) -> bool:
    """Note a call; whether it is to fail."""
    _fake().calls.append(name)
    return name in _fake().fail


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        self.initialised = True

    def log(self, severity: Severity, msg: str) -> None:
        raise RuleBroken("ILogger.log is to be overridden")


def _logger(logger: ILogger) -> ILogger:
    if not isinstance(logger, ILogger) or not getattr(logger, "initialised", False):
        raise RuleBroken("a logger derives from ILogger and calls its __init__")
    return logger


class IProgressMonitor:
    def __init__(self) -> None:
        self.initialised = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise RuleBroken("to be overridden")

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise RuleBroken("to be overridden")

    def phase_finish(self, phase_name: str) -> None:
        raise RuleBroken("to be overridden")


class IHostMemory:
    """Supports the buffer protocol through bytes()."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.nbytes = len(data)

    def __bytes__(self) -> bytes:
        return self._data


class DataType(Enum):
    FLOAT, HALF, BF16, INT8, INT32, INT64, BOOL, UINT8 = range(8)


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class LayerInformationFormat(Enum):
    ONELINE, JSON = range(2)


class ProfilingVerbosity(Enum):
    LAYER_NAMES_ONLY, DETAILED, NONE = range(3)


class HardwareCompatibilityLevel(Enum):
    NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)


class LayerType(Enum):
    MATRIX_MULTIPLY, CONDITION, CONDITIONAL_INPUT, CONDITIONAL_OUTPUT, SOFTMAX, NORMALIZATION, REDUCE = range(7)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class ComputeCapability(Enum):
    NONE, CURRENT, SM75, SM80, SM86, SM89, SM120, SM121 = range(8)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class BuilderFlag(Enum):
    """Those of 11: no FP16, BF16 or INT8; 10 has them, and a build that sets one is wrong."""

    TF32, VERSION_COMPATIBLE, REFIT, STRIP_PLAN = range(4)


class BuilderFlag10(Enum):
    TF32, VERSION_COMPATIBLE, REFIT, STRIP_PLAN, FP16, BF16, INT8, OBEY_PRECISION_CONSTRAINTS = range(8)


class NetworkDefinitionCreationFlag10(IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = range(2)


class NetworkDefinitionCreationFlag11(IntEnum):
    """STRONGLY_TYPED is deprecated and ignored."""

    STRONGLY_TYPED = 0


def nptype(trt_type: DataType) -> Any:
    if trt_type.name not in NUMPY:
        raise TypeError(f"Could not resolve TensorRT datatype to an equivalent numpy datatype: {trt_type}")
    return NUMPY[trt_type.name]


# ------------------------------------------------------------------------------------------------------------ building
class Builder:
    def __init__(self, logger: ILogger) -> None:
        _called("Builder")
        self.logger = _logger(logger)

    def create_network(self, flags: int = 0) -> Network:
        _called("create_network")
        ten = _STATE["module"].__version__.startswith("10.")
        if ten and not flags & 1 << int(NetworkDefinitionCreationFlag10.STRONGLY_TYPED):
            raise RuleBroken("on TensorRT 10 a network is strongly typed only if the flag says so")
        if not ten and flags & ~1:
            raise RuleBroken(f"flags {flags}: only STRONGLY_TYPED is known")
        return Network(self)

    def create_builder_config(self) -> BuilderConfig:
        _called("create_builder_config")
        return BuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> IHostMemory | None:
        failed = _called("build_serialized_network")
        if network.model is None or network.builder is not self:
            raise RuleBroken("a network is parsed, and built by its own builder")
        dynamic = {i.name for i in network.model.graph.input if any(d.dim_param for d in i.type.tensor_type.shape.dim)}
        for profile in config.profiles:
            if not dynamic <= set(profile.shapes):
                raise RuleBroken(f"a profile lacks the dynamic inputs {dynamic - set(profile.shapes)}")
        if dynamic and not config.profiles:
            raise RuleBroken("dynamic inputs need an optimisation profile")
        bad = [flag for flag in config.flags if flag.name not in ("TF32", "VERSION_COMPATIBLE")]
        if bad:
            raise RuleBroken(f"{bad}: precision comes from the graph")
        if _rtx() and not config.capabilities:
            raise RuleBroken("without a list of capabilities TensorRT for RTX asks the GPU, and there may be none")
        self._report(config.progress_monitor)
        if failed:
            self.logger.log(Severity.ERROR, "[optimizer.cpp] Could not find any implementation for node {X}")
            return None
        fake = _fake()
        fake.flags, fake.profiles, fake.hardware = (
            list(config.flags),
            config.profiles,
            config.hardware_compatibility_level,
        )
        fake.capabilities = config.capabilities
        layers = network.layers_of_plan(len(config.profiles))
        for line in self._report_of(layers, len(config.profiles)) if _rtx() else ():
            self.logger.log(Severity.VERBOSE, line)
        header = {
            "version": _STATE["module"].__version__,
            "layers": layers,
            "scratch": [fake.scratch * (1 + i) for i in range(max(1, len(config.profiles)))],
            "profiles": [p.shapes for p in config.profiles],
            "detailed": config.profiling_verbosity is ProfilingVerbosity.DETAILED,
            "host_code": BuilderFlag10.VERSION_COMPATIBLE.name in {flag.name for flag in config.flags},
            "scale": fake.scale,
        }
        return IHostMemory(MAGIC + json.dumps(header).encode() + b"\n" + network.model.SerializeToString())

    def _report_of(self, layers: list[dict[str, str]], profiles: int) -> list[str]:
        """The log as 1.7 writes it: memory of each profile, then all layers in one message."""
        scratch = [f"Total Activation Memory: {_fake().scratch * (1 + i)} bytes" for i in range(max(1, profiles))]
        lines = [", ".join(f"{key}: {value}" for key, value in layer.items()) for layer in layers]
        return [*scratch, "\n".join(["Layers:", *lines, "", "Bindings: "])]

    def _report(self, monitor: IProgressMonitor | None) -> None:
        if monitor is None:
            return
        if not getattr(monitor, "initialised", False):
            raise RuleBroken("a progress monitor calls IProgressMonitor.__init__")
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Tactic Timing", "Building Engine", 3)
        if not monitor.step_complete("Tactic Timing", 1):
            raise RuleBroken("the build was cancelled")
        monitor.phase_finish("Tactic Timing")
        monitor.phase_finish("Building Engine")


class Tensor:
    def __init__(self, dtype: DataType) -> None:
        self.dtype = dtype


class Layer:
    def __init__(self, name: str, kind: LayerType, dtype: DataType) -> None:
        self.name, self.type, self._dtype = name, kind, dtype

    def get_input(self, index: int) -> Tensor:
        return Tensor(self._dtype)


class Network:
    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.model: Any = None
        self._kinds: dict[str, int] | None = None

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    def get_layer(self, index: int) -> Layer:
        node = self.model.graph.node[index]
        kind = SUMS.get(node.op_type, LayerType.MATRIX_MULTIPLY)
        branch = _fake().conditional and index == 0
        return Layer(node.name, LayerType.CONDITION if branch else kind, self._kind_of(node.input))

    def _kind_of(self, inputs: Any) -> DataType:
        if self._kinds is None:
            graph = onnx.shape_inference.infer_shapes(self.model).graph
            values = (*graph.value_info, *graph.output, *graph.input)
            self._kinds = {v.name: v.type.tensor_type.elem_type for v in values}
        return DataType[FROM_ONNX.get(self._kinds.get(inputs[0] if inputs else "", 1), "FLOAT")]

    def layers_of_plan(self, profiles: int) -> list[dict[str, str]]:
        """One layer for each node and profile; attention of half-precision graphs carries the name of its kernel."""
        half = any(tensor.data_type in (10, 16) for tensor in self.model.graph.initializer)
        made = []
        for profile in range(max(1, profiles)):
            for i, node in enumerate(self.model.graph.node):
                fused = half and node.name.startswith("attention_") and node.name not in _fake().unfused
                name = f"{'_gemm_mha_v2' if fused else '__myl_kgen'}_myl{profile}_{i}"
                metadata = f"[ONNX Layer: {node.name}]"
                made.append({"Name": name, "LayerType": "kgen", "TacticName": "", "Metadata": metadata})
        return made


class ParserError:
    def __init__(self, text: str) -> None:
        self.text = text

    def desc(self) -> str:
        return self.text


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        _called("OnnxParser")
        self.network, self.logger, self.errors = network, _logger(logger), list[ParserError]()

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        _called("parse")
        parsed = onnx.load_from_string(model)
        if parsed.functions or any(node.domain not in ("", "ai.onnx") for node in parsed.graph.node):
            raise RuleBroken("TensorRT's parser knows neither this graph's functions nor its other domains")
        for node in parsed.graph.node:
            for name in node.input:
                if name == "images" and node.op_type not in ("Cast", "Identity"):
                    self.errors.append(ParserError(f"{node.op_type}: UINT8 is for inputs that are cast at once"))
        if "parse" in _fake().fail:
            self.errors.append(ParserError("No importer registered for op: Fancy"))
        self.network.model = None if self.errors else parsed
        return not self.errors


class OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        """Takes what does not ascend: adding the profile finds out."""
        shapes = [list(shape) for shape in (min, opt, max)]
        if any(n < 0 for shape in shapes for n in shape):
            raise RuntimeError("a dimension is negative")
        self.shapes[input] = shapes

    @property
    def ascends(self) -> bool:
        return all(a <= b <= c for shapes in self.shapes.values() for a, b, c in zip(*shapes, strict=True))


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.data + b"timed")


class BuilderConfig:
    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[OptimizationProfile] = []
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor: Any = None
        self.capabilities: list[str] = []
        self._cache: TimingCache | None = None

    @property
    def num_compute_capabilities(self) -> int:
        return len(self.capabilities)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self.capabilities = [""] * count

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        self.capabilities[index] = compute_capability.name
        return True

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags = {kept for kept in self.flags if kept.name != flag.name}

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        if _called("add_optimization_profile") or not profile.ascends:
            if not _rtx():
                raise RuntimeError("the profile is not valid")
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache.data and not cache.data.startswith(b"timed"):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        if self._cache is None:
            raise RuleBroken("there is no timing cache")
        return self._cache


# ------------------------------------------------------------------------------------------------------------- running
class Runtime:
    def __init__(self, logger: ILogger) -> None:
        _called("Runtime")
        self.logger = _logger(logger)
        self.engine_host_code_allowed = False
        _fake().live["runtime"] += 1

    def __del__(self) -> None:
        _fake().live["runtime"] -= 1

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None:
        failed = _called("deserialize_cuda_engine")
        if not isinstance(serialized_engine, bytes) or not serialized_engine.startswith(MAGIC) or failed:
            self.logger.log(Severity.ERROR, "[runtime.cpp] Serialization assertion magicTagRead == kMAGIC_TAG failed.")
            return None
        header, graph = serialized_engine[len(MAGIC) :].split(b"\n", 1)
        plan = json.loads(header)
        if plan["version"] != _STATE["module"].__version__ and not plan["host_code"]:
            self.logger.log(Severity.ERROR, "[runtime.cpp] The engine plan file is not compatible with this version.")
            return None
        if plan["host_code"] and not self.engine_host_code_allowed:
            self.logger.log(Severity.ERROR, "[runtime.cpp] engine_host_code_allowed is needed")
            return None
        return CudaEngine(self, plan, onnx.load_from_string(graph))


class CudaEngine:
    def __init__(self, runtime: Runtime, plan: dict[str, Any], model: Any) -> None:
        self.runtime = runtime  # the real bindings keep it alive, too, as contexts do with their engine
        self.plan, self.logger = plan, runtime.logger
        graph = model.graph
        self.values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
        self.prefix = next((weight.dims[1] for weight in graph.initializer if weight.name == "prefix"), 0)
        self.inputs = [value.name for value in graph.input]
        self.outputs = [value.name for value in graph.output]
        halves = {tensor.data_type for tensor in graph.initializer}
        runnable = widen(model, rounding=True) if onnx.TensorProto.BFLOAT16 in halves else model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            runnable.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        _fake().live["engine"] += 1

    def __del__(self) -> None:
        _fake().live["engine"] -= 1

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.plan["profiles"])

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return int(self.plan["scratch"][profile_index])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[FROM_ONNX[self.values[name].elem_type]]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.plan["profiles"][profile_index][name]]

    def create_execution_context(self, strategy: Any = None) -> ExecutionContext | None:
        if isinstance(strategy, RuntimeConfig):
            strategy = strategy.checked()
        elif _rtx():
            raise RuleBroken("kernels are only kept by contexts that are made with a runtime configuration")
        _fake().strategies.append(strategy)
        if _called("create_execution_context"):
            self.logger.log(
                Severity.ERROR, "[defaultAllocator.cpp] Requested amount of GPU memory could not be allocated"
            )
            return None
        _gpu().current("create_execution_context")
        return RtxExecutionContext(self) if _rtx() else ExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class RuntimeCache:
    """Compiled kernels, of this version on this GPU."""

    def serialize(self) -> IHostMemory:
        _gpu().current("serialize")
        return IHostMemory(json.dumps([_STATE["module"].__version__, sorted(_fake().kernels)]).encode())

    def deserialize(self, blob: bytes) -> bool:
        _called("deserialize")
        version, kernels = json.loads(blob)
        if version != _STATE["module"].__version__:
            return False
        _fake().kernels |= set(kernels)
        return True


class RuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self._cache = cache
        return True

    def checked(self) -> ExecutionContextAllocationStrategy:
        _called(f"specialisation {self.dynamic_shapes_kernel_specialization_strategy.name}")
        return self._strategy


class EngineInspector:
    def __init__(self, engine: CudaEngine) -> None:
        self.engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        if format is not LayerInformationFormat.JSON:
            raise RuleBroken("only JSON can be read reliably")
        layers: list[Any] = self.engine.plan["layers"]
        if not self.engine.plan["detailed"]:
            layers = [layer["Name"] for layer in layers]
        return json.dumps({"Layers": layers, "Bindings": []})


class ExecutionContext:
    """Enforces: a profile that the shapes fit, all shapes, all addresses in live memory, then a run on a stream."""

    def __init__(self, engine: CudaEngine) -> None:
        self.engine = engine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.warm: set[tuple[Any, ...]] = set()
        self.captured: list[bool] = []
        self.scratch = (0, 0)
        _fake().live["context"] += 1

    def __del__(self) -> None:
        _fake().live["context"] -= 1
        if not _gpu().stack():
            _fake().calls.append("RuleBroken: a context went with no CUDA context current")

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        _called(f"set_optimization_profile_async {profile_index}")
        _gpu().current("set_optimization_profile_async")
        self._stream(stream_handle)
        self.profile, self.shapes = profile_index, {}
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = (memory, size)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if name not in self.engine.inputs:
            raise RuleBroken(f"{name} is no input")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if self.captured and self.shapes.get(name) not in (None, tuple(shape)):
            raise RuleBroken("a context's shape was changed after a run of it was recorded: the recording is void")
        if len(low) != len(shape) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            self.engine.logger.log(Severity.ERROR, "IExecutionContext::setInputShape: out of range")
            return False
        self.shapes[name] = tuple(shape)
        return "set_input_shape" not in _fake().fail

    def infer_shapes(self) -> list[str]:
        if "infer_shapes" in _fake().fail:
            self.engine.logger.log(Severity.ERROR, "IExecutionContext::inferShapes: Error Code 7: broadcast failed")
            raise RuntimeError("Shape inference failed")
        return self._unknown()

    def _unknown(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self._unknown():
            return tuple(-1 for _ in self.engine.values[name].shape.dim)
        if name in self.shapes:
            return self.shapes[name]
        batch = self.shapes["images"][0]
        sides = [d.dim_value for d in self.engine.values[name].shape.dim]
        if "rows" in self.shapes:
            cells = self.shapes["rows"][0] * self.shapes["cols"][0]
            return (batch, cells) if len(sides) == 2 else (batch, self.engine.prefix + cells, sides[2])
        return (batch, *sides[1:])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.values or not isinstance(memory, int) or memory % 16:
            raise RuleBroken(f"address {memory!r} of {name}")
        self.addresses[name] = memory
        return True

    def _nbytes(self, name: str) -> int:
        size = int(np.prod(self.get_tensor_shape(name)))
        return size * np.dtype(nptype(self.engine.get_tensor_dtype(name))).itemsize

    def _stream(self, handle: int) -> Any:
        stream = _gpu().streams.get(handle)
        if not isinstance(handle, int) or stream is None:
            raise RuleBroken(f"{handle!r} is no live stream")
        return stream

    def execute_async_v3(self, stream_handle: int) -> bool:
        failed = _called("execute_async_v3")
        _gpu().current("execute_async_v3")
        stream = self._stream(stream_handle)
        if self._unknown():
            raise RuleBroken(f"a run before the shapes of {self._unknown()} were set")
        needed = self.engine.get_device_memory_size_for_profile_v2(self.profile)
        if self.scratch[1] < needed or self.scratch[0] % 16:
            raise RuleBroken(f"a run in scratch memory {self.scratch}: {needed} bytes are needed")
        _gpu().check_live(self.scratch[0], needed, "scratch memory")
        missing = set(self.engine.values) - set(self.addresses)
        if missing:
            raise RuleBroken(f"a run before the addresses of {missing} were set")
        for name, address in self.addresses.items():
            _gpu().check_live(address, self._nbytes(name), f"tensor {name}")
        if failed:
            self.engine.logger.log(Severity.ERROR, "[myelin] CUDA error 700 launching kernel: illegal memory access")
            return False
        state = tuple(sorted(self.shapes.items()))
        if _rtx():
            _fake().kernels.add(str(state))
        if stream.captured is not None:
            if state not in self.warm:
                raise RuleBroken("a run was recorded before a plain run of the same shapes")
            if _fake().compiling:
                raise RuleBroken("a run was recorded while its kernels are being compiled")
            self.captured.append(True)
        self.warm.add(state)
        stream.put(self._work(dict(self.addresses), {n: self.get_tensor_shape(n) for n in self.engine.values}))
        return True

    def _work(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> Any:
        engine, scale = self.engine, self.engine.plan["scale"]

        def view(name: str) -> Any:
            kind = np.dtype(nptype(engine.get_tensor_dtype(name)))
            nbytes = int(np.prod(shapes[name])) * kind.itemsize
            return _gpu().view(addresses[name], nbytes).view(kind).reshape(shapes[name])

        def work() -> None:
            results = engine.session.run(engine.outputs, {name: view(name).copy() for name in engine.inputs})
            for name, values in zip(engine.outputs, results, strict=True):
                view(name)[...] = values * np.float32(scale)

        return work


class RtxExecutionContext(ExecutionContext):
    """With what only TensorRT for RTX has."""

    def is_stream_capturable(self, stream: int) -> bool:
        self._stream(stream)
        return not _fake().compiling


SUMS = {
    "Softmax": LayerType.SOFTMAX,
    "LayerNormalization": LayerType.NORMALIZATION,
    "ReduceMean": LayerType.REDUCE,
}


def _module(name: str, version: str) -> ModuleType:
    ten = version.startswith("10.")
    module: Any = ModuleType(name)
    module.__version__ = version
    module.__spec__ = ModuleSpec(name, None)  # find_spec looks at it
    module.BuilderFlag = BuilderFlag10 if ten else BuilderFlag
    module.NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag10 if ten else NetworkDefinitionCreationFlag11
    for thing in (
        ILogger, IProgressMonitor, DataType, TensorIOMode, LayerInformationFormat, ProfilingVerbosity,
        HardwareCompatibilityLevel, LayerType, ExecutionContextAllocationStrategy, Builder, OnnxParser, Runtime, nptype,
    ):  # fmt: skip
        setattr(module, thing.__name__, thing)
    if name == "tensorrt_rtx":
        module.ComputeCapability = ComputeCapability
        module.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    return module  # type: ignore[no-any-return]
