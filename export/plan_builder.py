"""TensorRT's builder, network and parser: from a prepared graph to a plan, and what the build says about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facetrt.engine.backends.flavours import Flavour, import_library, make_log
from facetrt.engine.files import atomic_file
from facetrt.export.plan_graph import PreparedGraph, Shapes
from facetrt.kernels.errors import BackendError, InputError

Report = Callable[[str], None]

MAX_TIMING_CACHE_BYTES = 256 << 20
SUMS = ("SOFTMAX", "NORMALIZATION", "REDUCE")  # layers that add up many numbers
HALVES = ("HALF", "BF16")

SCRATCH = "Total Activation Memory: "  # of one profile, in bytes
NOTES = re.compile(rf"{SCRATCH}\d+|^Name: .*, LayerType: .*$", re.MULTILINE)  # in the log, as TensorRT words them


@dataclass(frozen=True)
class Settings:
    """How to build.

    Attributes:
        architectures: GPUs to build for, by a library that builds ahead of time; others build for the GPU here.
        version_compatible, hardware_compatible, timing_cache: as in :class:`facetrt.export.plans.PlanOptions`.
    """

    architectures: Sequence[str] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """A plan, and what the builder says about it.

    Attributes:
        data: the serialised plan.
        layers: how many it has, over all profiles.
        unfused: attentions that are not one kernel in every profile, by the names of :class:`PreparedGraph`.
        scratch_bytes: device memory that a run needs beside weights, inputs and outputs, by profile.
    """

    data: bytes
    layers: int
    unfused: tuple[str, ...]
    scratch_bytes: list[int]


class PlanBuilder:
    """Everything lives as long as this does.

    Raises:
        InputError: the library cannot read the graph, or would branch or sum in half precision.
    """

    def __init__(self, graph: PreparedGraph, flavour: Flavour, report: Report) -> None:
        self._graph, self._flavour, self._report = graph, flavour, report
        self._library = import_library(flavour)
        self._log = make_log(self._library, NOTES)
        self._builder = self._library.Builder(self._log)
        typed = getattr(self._library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self._network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser = self._library.OnnxParser(self._network, self._log)
        if not self._parser.parse(graph.data):
            errors = [self._parser.get_error(i).desc() for i in range(self._parser.num_errors)]
            raise InputError(f"{flavour.title} cannot read the graph: {'; '.join(errors) or self._log.last()}")
        self._check_layers()

    def _check_layers(self) -> None:
        """The parser itself may make conditions of other operators; and what sums many numbers must do so in fp32."""
        layers = [self._network.get_layer(i) for i in range(self._network.num_layers)]
        branches = [layer.name for layer in layers if layer.type.name.startswith("CONDITION")]
        if branches:
            raise InputError(
                f"{self._flavour.title}'s parser made branches of the graph ({', '.join(branches[:3])}): not trusted"
            )
        short = [n.name for n in layers if n.type.name in SUMS and n.get_input(0).dtype.name in HALVES]
        if short:
            raise InputError(
                f"the graph sums in half precision ({', '.join(short[:3])}), where ViTs do not survive: export again"
            )

    def build(self, wanted: Sequence[Shapes], settings: Settings) -> Built:
        """Build with one profile for each of the given shapes.

        Raises:
            InputError: profiles or a timing cache that the library refuses.
            BackendError: it failed.
        """
        config = self._config(settings)
        for shapes in wanted:
            self._add_profile(config, shapes)
        cache = self._load_cache(config, settings.timing_cache)
        self._log.notes.clear()
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise BackendError(f"{self._flavour.title} could not build the plan: {self._log.last()}")
        if settings.timing_cache is not None and cache is not None:
            with atomic_file(settings.timing_cache) as path:
                path.write_bytes(bytes(config.get_timing_cache().serialize()))
        return self._read_log(bytes(plan)) if self._flavour.ahead_of_time else self._inspect(bytes(plan))

    def _config(self, settings: Settings) -> Any:
        library, config = self._library, self._builder.create_builder_config()
        config.clear_flag(library.BuilderFlag.TF32)  # on by default: fp32 bundles are held to fp32's contract
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED  # names of the graph's nodes in the layers
        config.progress_monitor = self._monitor = _make_monitor(library, self._report)
        if settings.version_compatible:
            config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
        if settings.hardware_compatible:
            config.hardware_compatibility_level = library.HardwareCompatibilityLevel.AMPERE_PLUS
        if self._flavour.ahead_of_time:
            self._choose_architectures(config, settings.architectures)
        return config

    def _choose_architectures(self, config: Any, architectures: Sequence[str]) -> None:
        """Each by name: the default leaves out 7.5, and a level of compatibility would ask for a GPU."""
        config.num_compute_capabilities = len(architectures)
        for i, architecture in enumerate(architectures):
            capability = getattr(self._library.ComputeCapability, architecture.replace("_", "").upper(), None)
            if capability is None or not config.set_compute_capability(capability, i):
                raise InputError(f"{self._flavour.title} {self._library.__version__} does not build for {architecture}")

    def _add_profile(self, config: Any, shapes: Shapes) -> None:
        """TensorRT raises, TensorRT for RTX answers −1 or raises."""
        reason = ""
        try:
            profile = self._builder.create_optimization_profile()
            for name, (low, likely, high) in shapes.items():
                profile.set_shape(name, low, likely, high)
            if config.add_optimization_profile(profile) >= 0:
                return
        except (RuntimeError, ValueError) as error:
            reason = str(error)
        raise InputError(f"{self._flavour.title} refuses the profile {shapes}: {reason or self._log.last()}")

    def _load_cache(self, config: Any, path: Path | None) -> Any:
        """The timing cache in use, or None without one."""
        if path is None:
            return None
        if path.is_file() and path.stat().st_size > MAX_TIMING_CACHE_BYTES:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes: expected a timing cache, which is smaller")
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, False):  # False: not one of another GPU or version
            raise InputError(f"TensorRT cannot use the timing cache {path}: {self._log.last()}; choose another file")
        return cache

    def _read_log(self, plan: bytes) -> Built:
        """Where no GPU loads the plan, what the builder wrote about it."""
        notes = self._log.notes
        layers = [note for note in notes if not note.startswith(SCRATCH)]
        scratch = [int(note.removeprefix(SCRATCH)) for note in notes if note.startswith(SCRATCH)]
        if not layers or not scratch:
            raise BackendError(
                f"{self._flavour.title} {self._library.__version__} does not say what it built, as this version of "
                f"facetrt expects: pip install '{self._flavour.requirement}'"
            )
        return Built(plan, len(layers), self._unfused(layers, len(scratch)), scratch)

    def _inspect(self, plan: bytes) -> Built:
        """Load the plan and ask the engine."""
        runtime = self._library.Runtime(self._log)
        runtime.engine_host_code_allowed = True  # version-compatible plans bring code, which was made here just now
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"TensorRT cannot load the plan that it built: {self._log.last()}")
        text = engine.create_engine_inspector().get_engine_information(self._library.LayerInformationFormat.JSON)
        layers = [_as_text(layer) for layer in json.loads(text)["Layers"]]
        count = engine.num_optimization_profiles
        scratch = [int(engine.get_device_memory_size_for_profile_v2(i)) for i in range(count)]
        return Built(plan, len(layers), self._unfused(layers, count), scratch)

    def _unfused(self, layers: Sequence[str], profiles: int) -> tuple[str, ...]:
        """Kernels of fused attention carry ``mha`` in their names, and the names of the nodes that they stand for."""
        fused = [layer for layer in layers if "mha" in layer.partition("Metadata")[0].lower()]
        times = {name: sum(f"[ONNX Layer: {name}]" in layer for layer in fused) for name in self._graph.attention}
        return tuple(name for name, count in times.items() if count < profiles)


def _as_text(layer: Any) -> str:
    """A layer of the inspector's JSON as the builder's log writes it, as far as it is read here."""
    if not isinstance(layer, dict):
        return str(layer)
    return ", ".join(f"{key}: {layer.get(key, '')}" for key in ("Name", "LayerType", "TacticName", "Metadata"))


def _make_monitor(library: Any, report: Report) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        """Reports the phases below the outermost one; called from TensorRT's threads."""

        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                report(f"{phase_name} ({num_steps} steps)")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()
