"""OpenVINO on the CPU: fp32, and bf16 where the processor has it."""

from __future__ import annotations

import contextlib
import io
import platform
import queue
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import CLOSED, Backend, Tensors, first_line
from facetrt.engine.backends.compiled_cache import CompiledCache
from facetrt.engine.backends.onnxruntime import BF16_ON_CPU
from facetrt.engine.backends.run_options import BackendName, Precision, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import CLS_ATTENTION, ENCODER, Fp32Parts
from facetrt.engine.machine.processor import BF16_FLAGS, processor_flags
from facetrt.kernels.errors import BackendError, BundleError, FacetrtError, InputError, MissingDependencyError

HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}
TELEMETRY = "openvino_telemetry"
_importing = Lock()
ISLANDS = "patch convolution, residual stream"  # what bf16 always leaves in fp32; part of the cache's key
KEEP_FP32 = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}


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


class OpenVinoBackend(Backend):
    """Runs fp32 bundles in fp32 or bf16, one request per stream; results are copied out of the runtime's memory."""

    name = BackendName.OPENVINO
    _compiled: Any = None

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
        openvino = import_openvino()
        core = shared_core()
        try:
            self._compiled = self._compile(openvino, core)
        except FacetrtError:
            raise
        except Exception as error:
            raise BundleError(f"{self.bundle.path}: the encoder cannot be loaded: {first_line(error)}") from error
        inputs = [port.get_any_name() for port in self._compiled.inputs]
        self._check_graph(inputs, [name for port in self._compiled.outputs for name in port.get_names()])
        self.streams = int(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.streams):
            self._requests.put(self._compiled.create_infer_request())

    def _compile(self, openvino: Any, core: Any) -> Any:
        """The compiled encoder, from the cache if it is there."""
        config = self._config()
        if self.options.cache is None:
            return self._compile_anew(openvino, core, config)
        cache = CompiledCache(self.options.cache, self._key(openvino, core, config))
        stored = cache.read()
        if stored is not None:
            try:
                return core.import_model(io.BytesIO(stored), "CPU", config)
            except Exception as error:
                raise BackendError(f"openvino cannot use {cache.path}: {first_line(error)}; delete it") from error
        compiled = self._compile_anew(openvino, core, config)
        cache.write(compiled.export_model().getvalue())
        return compiled

    def _compile_anew(self, openvino: Any, core: Any, config: dict[str, Any]) -> Any:
        model = core.read_model(self.bundle.encoder)
        if self.options.precision is not Precision.BF16:
            return core.compile_model(model, "CPU", config)
        parts = self.bundle.manifest.fp32_parts(Precision.BF16)
        marked, products = keep_in_fp32(openvino, core, model, parts)
        compiled = core.compile_model(marked, "CPU", config)
        _check_islands(compiled, openvino, products)
        return compiled

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[self.options.precision],
            "PERFORMANCE_HINT": self.options.hint.upper(),
        }
        if self.options.threads is not None:
            config["INFERENCE_NUM_THREADS"] = self.options.threads
        return config

    def _key(self, openvino: Any, core: Any, config: dict[str, Any]) -> dict[str, str]:
        """Everything that a compiled encoder depends on."""
        manifest = self.bundle.manifest
        size = "any" if manifest.size is None else f"{manifest.size[0]}x{manifest.size[1]}"
        return {
            "encoder": manifest.files[ENCODER].sha256,
            "backend": f"openvino {openvino.get_version()}",
            "processor": core.get_property("CPU", "FULL_DEVICE_NAME"),
            "instructions": " ".join(sorted(processor_flags() or ())),
            "size": size,
            "islands": f"{ISLANDS}, {manifest.fp32_parts(self.options.precision)}",
            **{name.lower(): str(value) for name, value in config.items()},
        }

    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        request = self._requests.get()
        if request is None:
            self._requests.put(None)  # for the next one that waits
            raise BackendError(CLOSED)
        try:
            results = request.infer(dict(inputs), share_inputs=True)
            return [results[name] for name in self.bundle.manifest.outputs]
        except Exception as error:
            raise BackendError(f"openvino failed to run the encoder: {first_line(error)}") from error
        finally:
            self._requests.put(request if self._state == "active" else None)

    def _close(self) -> None:
        """Those that wait for a request are told; those that have one finish."""
        self._compiled = None
        self._requests.put(None)


def keep_in_fp32(openvino: Any, core: Any, model: Any, parts: Fp32Parts) -> tuple[Any, set[str]]:
    """The model with its patch convolution, residual stream and ``parts`` marked to stay in fp32 when it runs in bf16.

    In bf16 the convolution of 0..255 bytes loses what the folded mean would cancel, and the residual stream loses a
    little in each of its additions. With both in fp32 the relative error of ViT-S/8's layer-9 keys falls from 1.33 % to
    0.70 % and the time grows by 1 %. The mark can be set only in OpenVINO's own file format, so the model goes through
    a file. Beside the model come the names of the products of ``parts``.
    """
    marked, products = _stem(model) | _residuals(model), set[str]()
    kept = _parts(model, parts)
    if kept:
        unfused = _Unfused(openvino, model)
        for node in kept:
            unfused.rewrite(node)
        marked |= {node.get_friendly_name() for node in kept} | unfused.names
        products = unfused.products
    with tempfile.TemporaryDirectory(prefix="facetrt-") as folder:
        path = Path(folder) / "encoder.xml"
        openvino.serialize(model, str(path))
        tree = ElementTree.parse(path)
        for layer in tree.iter("layer"):
            if layer.get("name") in marked:
                _mark(layer)
        tree.write(path)
        return core.read_model(str(path)), products


def _mark(layer: ElementTree.Element) -> None:
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        layer.insert(0 if layer.find("data") is None else 1, info)
    ElementTree.SubElement(info, "attribute", KEEP_FP32)


def _stem(model: Any) -> set[str]:
    """Everything before the first matrix product: bytes, patch convolution, positional table."""
    names: set[str] = set()
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            break
        names.add(node.get_friendly_name())
    return names


def _residuals(model: Any) -> set[str]:
    """Additions of two computed tensors; biases are constants."""
    return {node.get_friendly_name() for node in model.get_ordered_ops() if _is_residual(node)}


def _is_residual(node: Any) -> bool:
    return node.get_type_name() == "Add" and all(source.get_type_name() != "Constant" for source in _sources(node))


def _parts(model: Any, parts: Fp32Parts) -> list[Any]:
    """The nodes that ``parts`` are made of.

    A node's block is told by how many residual additions lie before it, of which a block has two. [CLS] attention is
    what its output needs of the last block.
    """
    blocks = _blocks(model)
    names = {name for name, block in blocks.items() if block in parts.blocks}
    results = model.get_results() if parts.cls_attention else []
    waiting = [node for node in results if CLS_ATTENTION in node.get_friendly_name()]
    last = max((blocks[node.get_friendly_name()] for node in waiting), default=0)
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        name = node.get_friendly_name()
        if name not in seen and blocks.get(name) == last:
            seen.add(name)
            waiting += _sources(node)
    return [node for node in model.get_ordered_ops() if node.get_friendly_name() in names | seen]


class _Unfused:
    """Rewrites products and attention so that a mark on them lives.

    OpenVINO turns a product with constant weights into another operation, attention into a fused one, and moves
    constant factors about; marks are lost on the way. So constants get a zero added that is known at run time only, and
    the softmax of attention goes over the other axis, which is not fused.

    Attributes:
        names: of all nodes made.
        products: of those among them that must run in fp32.
    """

    def __init__(self, openvino: Any, model: Any) -> None:
        self.names: set[str] = set()
        self.products: set[str] = set()
        self._ops, self._softmax = openvino.opset14, openvino.opset1.softmax
        images = next(port for port in model.inputs if "images" in port.get_names())
        pixels = self._made(self._ops.reshape(images, np.array([-1]), False))
        first = self._made(self._ops.gather(pixels, np.array([0]), np.array(0)))
        number = self._made(self._ops.convert(first, "f32"))
        self._zero = self._made(self._ops.multiply(number, np.zeros(1, np.float32)))

    def rewrite(self, node: Any) -> None:
        """Replace one node, if it is of those kinds, in the model."""
        kind, sources = node.get_type_name(), _sources(node)
        if kind == "ScaledDotProductAttention":
            self._attend(node)
        elif kind == "MatMul" and sources[1].get_type_name() == "Constant":
            weights = self._made(self._ops.unsqueeze(self._input(node, 1), np.array(0)))
            self._replace(node, self._product(self._input(node, 0), self._varying(weights)))
        elif kind == "Multiply" and not sources[1].get_output_partial_shape(0).rank.get_length():
            self._replace(node, self._ops.multiply(self._input(node, 0), self._varying(self._input(node, 1))))

    def _attend(self, node: Any) -> None:
        query, key, value = (self._input(node, i) for i in range(3))
        scale: Any = np.float32(query.get_partial_shape()[3].get_length() ** -0.5)
        if node.get_input_size() > 4:
            scale = self._input(node, 4)
        scaled = self._made(self._ops.multiply(query, self._varying(scale)))
        logits = self._product(key, scaled, transpose_b=True)  # (B, heads, keys, queries)
        weights = self._made(self._softmax(logits, 2))
        self._replace(node, self._product(weights, value, transpose_a=True))

    def _product(self, a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False) -> Any:
        made = self._made(self._ops.matmul(a, b, transpose_a, transpose_b))
        self.products.add(made.get_friendly_name())
        return made

    def _varying(self, constant: Any) -> Any:
        return self._made(self._ops.add(constant, self._zero))

    def _replace(self, node: Any, other: Any) -> None:
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(self._made(other).output(0))

    def _made(self, node: Any) -> Any:
        self.names.add(node.get_friendly_name())
        return node

    @staticmethod
    def _input(node: Any, number: int) -> Any:
        return node.input(number).get_source_output()


def _sources(node: Any) -> list[Any]:
    return [value.get_source_output().get_node() for value in node.inputs()]


def _blocks(model: Any) -> dict[str, int]:
    """The block of each computed node by name; nodes before the first block are in none."""
    before: dict[str, int] = {}
    stem = _stem(model)
    for node in model.get_ordered_ops():
        sources = _sources(node)
        before[node.get_friendly_name()] = max(
            (before[s.get_friendly_name()] + (s.get_friendly_name() not in stem and _is_residual(s)) for s in sources),
            default=0,
        )
    constants = {node.get_friendly_name() for node in model.get_ordered_ops() if node.get_type_name() == "Constant"}
    return {name: count // 2 for name, count in before.items() if name not in stem | constants}


def _check_islands(compiled: Any, openvino: Any, products: set[str]) -> None:
    """Raise :class:`BackendError` if this OpenVINO did not heed the marks of the convolution or of a product."""
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kept = products.intersection(info["originalLayersNames"].value.split(","))
        if (info["layerType"].value == "Convolution" or kept) and info["runtimePrecision"].value != "f32":
            what = "a product" if kept else "the patch convolution"
            raise BackendError(
                f"openvino {openvino.get_version()} does not keep {what} in fp32, so bf16 would miss its accuracy: "
                "install openvino 2026.4 or newer, or use precision fp32"
            )
