"""OpenVINO on the CPU: fp32, and bf16 where the processor has it.

One *general* program runs images of any size. Programs for one size are 1.03 to 1.07 times as fast (ViT-S/8 at stride
4: 112 to 320 pixels), cost 0.3 to 0.6 s to compile and hold the weights once more, and their results differ from the
general one's in the last bits. So which program runs an image depends on its size and the engine's options alone, never
on what came before, unless ``specialisation`` is ``lazy``.

Long sequences in bf16 run 1.26 times as fast, as attention takes their keys in chunks (``openvino_chunks``). They have
programs of their own unless ``specialisation`` is ``none``. Where a run was not exact, the general program runs again.
"""

from __future__ import annotations

import contextlib
import io
import math
import platform
import queue
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import CLOSED, Backend, Tensors, first_line
from facetrt.engine.backends.compiled_cache import CompiledCache
from facetrt.engine.backends.onnxruntime import BF16_ON_CPU
from facetrt.engine.backends.openvino_chunks import CHUNK, KEY_WEIGHTS, chunk_attention, is_exact, is_fused, is_long
from facetrt.engine.backends.openvino_islands import ISLANDS, check_islands, keep_in_fp32, mark_fp32
from facetrt.engine.backends.run_options import BackendName, Precision, RunOptions, Specialisation
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import ENCODER
from facetrt.engine.images.geometry import grid_size
from facetrt.engine.machine.processor import BF16_FLAGS, processor_flags
from facetrt.kernels.errors import BackendError, BundleError, FacetrtError, InputError, MissingDependencyError

HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}
TELEMETRY = "openvino_telemetry"
MAX_PROGRAMS = 4  # for one size each: about 110 MB of a ViT-S at 112 pixels, in bf16 as in fp32
LAZY_BATCHES = 10  # of one size, after which compiling for it has paid
_importing = Lock()

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of the inputs by name, without the batch's size


def import_openvino() -> Any:
    """The openvino module, or an error that names the extra that brings it; the only place that imports it.

    Importing it sends telemetry: a background thread that forks, writes to the home folder and opens connections. A
    fork while another thread multiplies matrices takes OpenBLAS's workers away, and that product never ends. So
    ``openvino_telemetry`` cannot be imported while openvino is; openvino then takes its own stand-in, and keeps it. An
    openvino that the caller has imported is left as it is, and so is a telemetry module.
    """
    with _importing:
        hidden = contextlib.nullcontext() if "openvino" in sys.modules else _without_telemetry()
        try:
            with hidden:
                import openvino  # noqa: TID251
        except ImportError as error:
            raise MissingDependencyError(
                "the openvino backend is not installed: pip install 'facetrt[openvino]', or use backend onnxruntime"
            ) from error
    return openvino


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """``openvino_telemetry`` is missing inside the block, and what it was afterwards."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == TELEMETRY}
    for name in before:
        del sys.modules[name]
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(before)


@cache
def shared_core() -> Any:
    """The process's one ``openvino.Core``, which is never given back.

    Its CPU plugin gives the thread that makes it a stack for signals, and takes that back with the core. Of several
    cores that end in another order than they began, the thread is left with a stack that is freed, and the next Ctrl-C
    crashes the process.
    """
    core = import_openvino().Core()
    core.set_property({"ENABLE_MMAP": False})  # models come from files that are gone before they are
    return core


def runs_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware, and OpenVINO uses that."""
    capable = "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    flags = processor_flags()
    return capable and (flags is None or bool(flags & BF16_FLAGS))


class _Program:
    """A compiled encoder and its requests, one for each stream.

    Attributes:
        chunked: whether attention takes keys in chunks; it then has the output ``key_weights``.
    """

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.chunked = any(KEY_WEIGHTS in port.get_names() for port in compiled.outputs)
        self.streams = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.streams):
            self._requests.put(compiled.create_infer_request())

    def run(self, inputs: Tensors, names: Sequence[str]) -> list[NDArray[np.float32]]:
        """The outputs of these names, copied out of the runtime's memory."""
        request = self._requests.get()
        if request is None:
            self._requests.put(None)  # for the next one that waits
            raise BackendError(CLOSED)
        try:
            results = request.infer(dict(inputs), share_inputs=True)
            return [results[name] for name in names]
        except Exception as error:
            raise BackendError(f"openvino failed to run the encoder: {first_line(error)}") from error
        finally:
            self._requests.put(None if self.compiled is None else request)

    def close(self) -> None:
        """Those that wait for a request are told; those that have one finish."""
        self.compiled = None
        self._requests.put(None)


class OpenVinoBackend(Backend):
    """Runs fp32 bundles in fp32 or bf16, one request per stream; results are copied out of the runtime's memory."""

    name = BackendName.OPENVINO
    _general: _Program | None = None

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        super().__init__(bundle, options)
        self._programs: OrderedDict[Shapes, _Program] = OrderedDict()  # the last one used is the last
        self._seen: Counter[Shapes] = Counter()  # batches
        self._compiling = Lock()

    @classmethod
    def check_installed(cls) -> None:
        import_openvino()

    @classmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        if bundle.manifest.precision == Precision.BF16:
            raise InputError(BF16_ON_CPU)
        if bundle.manifest.precision != Precision.FP32 or options.precision not in HINTS:
            raise InputError(
                f"openvino runs fp32 bundles in fp32 or bf16; this one is {bundle.manifest.precision} and "
                f"{options.precision} was asked: export with --precision fp32, or use backend onnxruntime"
            )
        if options.precision is Precision.BF16 and not runs_bf16():
            raise InputError(
                f"this processor ({platform.processor() or platform.machine()}) has no bf16 arithmetic: use precision "
                "fp32, or fastest, which takes bf16 only where it exists"
            )

    def _activate(self) -> None:
        try:
            self._general = _Program(self._compile())
        except FacetrtError:
            raise
        except Exception as error:
            raise BundleError(f"{self.bundle.path}: the encoder cannot be loaded: {first_line(error)}") from error
        compiled = self._general.compiled
        inputs = [port.get_any_name() for port in compiled.inputs]
        self._check_graph(inputs, [name for port in compiled.outputs for name in port.get_names()])
        self.streams = self._general.streams

    def _compile(self, shapes: Shapes | None = None) -> Any:
        """The encoder compiled for all sizes, or for one; from the cache if it is there."""
        core, config = shared_core(), self._config()
        if self.options.cache is None:
            return self._compile_anew(shapes)
        cache = CompiledCache(self.options.cache, self._key(shapes))
        stored = cache.read()
        if stored is not None:
            try:
                return core.import_model(io.BytesIO(stored), "CPU", config)
            except Exception as error:
                raise BackendError(f"openvino cannot use {cache.path}: {first_line(error)}; delete it") from error
        compiled = self._compile_anew(shapes)
        cache.write(compiled.export_model().getvalue())
        return compiled

    def _compile_anew(self, shapes: Shapes | None) -> Any:
        if shapes is None:
            return self._compiled(*self._read(self.bundle.encoder))
        model, products = self._source
        model = model.clone()
        model.reshape({name: import_openvino().PartialShape(list(shape)) for name, shape in shapes})
        chunked = self._compile_chunked(model.clone(), products) if self._is_long(shapes) else None
        return self._compiled(model, products) if chunked is None else chunked

    def _compile_chunked(self, model: Any, products: set[str]) -> Any | None:
        """The model compiled with keys in chunks; None where this OpenVINO does not fuse what that is made of here."""
        names, made = chunk_attention(import_openvino(), model)
        compiled = self._compiled(mark_fp32(import_openvino(), shared_core(), model, names), products)
        return compiled if is_fused(compiled, made) else None

    def _compiled(self, model: Any, products: set[str]) -> Any:
        compiled = shared_core().compile_model(model, "CPU", self._config())
        if self.options.precision is Precision.BF16:
            check_islands(compiled, import_openvino(), products)
        return compiled

    @cached_property
    def _source(self) -> tuple[Any, set[str]]:
        """What programs for one size are made of; only engines that have such programs hold it."""
        return self._read(self.bundle.read(ENCODER))

    def _read(self, encoder: bytes) -> tuple[Any, set[str]]:
        """The model, marked for its precision, and the names of the products that must stay in fp32."""
        core, precision = shared_core(), self.options.precision
        model = core.read_model(encoder)
        if precision is not Precision.BF16:
            return model, set()
        return keep_in_fp32(import_openvino(), core, model, self.bundle.manifest.fp32_parts(precision))

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[self.options.precision],
            "PERFORMANCE_HINT": self.options.hint.upper(),
        }
        if self.options.threads is not None:
            config["INFERENCE_NUM_THREADS"] = self.options.threads
        return config

    def _key(self, shapes: Shapes | None) -> dict[str, str]:
        """Everything that a compiled encoder depends on."""
        manifest, fixed = self.bundle.manifest, self.bundle.manifest.size
        size = "any" if fixed is None else f"{fixed[0]}x{fixed[1]}"
        return {
            "encoder": manifest.files[ENCODER].sha256,
            "backend": f"openvino {import_openvino().get_version()}",
            "processor": shared_core().get_property("CPU", "FULL_DEVICE_NAME"),
            "instructions": " ".join(sorted(processor_flags() or ())),
            "size": size if shapes is None else "; ".join(f"{name} {shape}" for name, shape in shapes),
            "keys": f"in chunks of {CHUNK}" if self._is_long(shapes) else "whole",
            "islands": f"{ISLANDS}, {manifest.fp32_parts(self.options.precision)}",
            **{name.lower(): str(value) for name, value in self._config().items()},
        }

    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        names, program = self.bundle.manifest.outputs, self._program(inputs)
        if not program.chunked:
            return program.run(inputs, names)
        *outputs, weights = program.run(inputs, [*names, KEY_WEIGHTS])
        return outputs if is_exact(weights) else self._for_all_sizes().run(inputs, names)

    def _program(self, inputs: Tensors) -> _Program:
        """What runs inputs of these shapes: told by their size, and by how many came before only if that was chosen."""
        shapes = _shapes_of(inputs)
        if self._specialises(shapes):
            return self._program_for(shapes)
        return self._for_all_sizes()

    def _for_all_sizes(self) -> _Program:
        general = self._general
        if general is None:  # closed by another thread just now
            raise BackendError(CLOSED)
        return general

    def _specialises(self, shapes: Shapes) -> bool:
        """Whether a size gets a program of its own; counts its batches where that decides."""
        chosen = self.options.specialisation
        if chosen is not Specialisation.NONE and self._is_long(shapes):
            return True
        if not self.bundle.manifest.dynamic or chosen in (Specialisation.AUTO, Specialisation.NONE):
            return False
        if chosen is Specialisation.EAGER:
            return True
        with self._compiling:
            self._seen[shapes] += 1
            return self._seen[shapes] > LAZY_BATCHES

    def _is_long(self, shapes: Shapes | None) -> bool:
        """Whether a program for these shapes takes keys in chunks; riders of all blocks leave few keys."""
        if shapes is None or self.options.precision is not Precision.BF16:
            return False
        manifest, given = self.bundle.manifest, dict(shapes)
        if manifest.riders is not None and manifest.riders.from_block == 0:
            return is_long(given["carriers"][0])
        architecture, (height, width) = manifest.architecture, given["images"][1:3]
        grid = grid_size((height, width), architecture.patch, manifest.stride)
        if manifest.dynamic:
            grid = given["rows"][0], given["cols"][0]
        return is_long(architecture.prefix + math.prod(grid))

    def _program_for(self, shapes: Shapes) -> _Program:
        """The program for one size, compiled now if it is not among the last ones; other threads wait."""
        with self._compiling:
            if self._general is None:
                raise BackendError(CLOSED)
            program = self._programs.pop(shapes, None) or self._specialised(shapes)
            while len(self._programs) >= MAX_PROGRAMS:
                self._programs.popitem(last=False)  # a thread that runs it still holds it
            self._programs[shapes] = program
            return program

    def _specialised(self, shapes: Shapes) -> _Program:
        try:
            return _Program(self._compile(shapes))
        except FacetrtError:
            raise
        except Exception as error:
            size = dict(shapes)["images"][1:3]
            raise BackendError(
                f"openvino cannot compile the encoder for images of {size[0]}×{size[1]}: {first_line(error)}; use "
                "specialisation none"
            ) from error

    def _close(self) -> None:
        with self._compiling:
            programs = [self._general, *self._programs.values()]
            self._general = None
            self._programs.clear()
            self.__dict__.pop("_source", None)
        for program in programs:
            if program is not None:
                program.close()


def _shapes_of(inputs: Tensors) -> Shapes:
    """Shapes by name, with the batch left open."""
    return tuple(
        (name, (-1, *value.shape[1:]) if name == "images" else value.shape) for name, value in sorted(inputs.items())
    )
