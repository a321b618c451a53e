"""TensorRT plans: built from a bundle's graph on the GPU that runs them, compared, and added to the bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends import OnnxRuntimeBackend, RunOptions, TensorRtBackend
from facetrt.engine.backends.cuda import gpu_architecture
from facetrt.engine.backends.options import BackendName, DeviceName, Precision
from facetrt.engine.backends.tensorrt import HARDWARE_COMPATIBLE, VERSION_COMPATIBLE, import_tensorrt, make_log
from facetrt.engine.bundle.bundle import (
    BUILTIN,
    ENCODER,
    PLANS,
    Bundle,
    Manifest,
    ParityReport,
    PlanRecord,
    drop_damaged,
    file_entry,
    read_manifest,
    without_damaged,
    write_manifest,
)
from facetrt.engine.encoding import parity
from facetrt.engine.encoding.positional import positional_table
from facetrt.engine.files import atomic_file
from facetrt.engine.images.geometry import grid_size
from facetrt.engine.images.loading import resize
from facetrt.engine.machine.memory import encoding_bytes, fits, too_much
from facetrt.engine.samples import sample_images
from facetrt.export.additions import staging
from facetrt.kernels.errors import (
    BackendError,
    BundleError,
    InputError,
    MissingDependencyError,
    OutputError,
    ParityError,
)

Report = Callable[[str], None]
Size = tuple[int, int]
Tensors = dict[str, NDArray[Any]]
Shapes = dict[str, list[list[int]]]  # input → smallest, most likely and largest shape

COMPARED_IMAGES = 3  # two photographs and noise; larger batches repeat them
MAX_TIMING_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is built for.

    Attributes:
        opt_batch: the batch size that kernels are chosen for; a single image has a profile of its own.
        max_batch: the most images in one run.
        min_size, opt_size, max_size: ``(height, width)`` of the images, for bundles of any size.
        version_compatible: the plan also runs under newer versions of the same TensorRT major.
        hardware_compatible: the plan also runs on other GPUs from sm_80 on, not as fast.
        timing_cache: a file with the measurements of earlier builds, made if it is not there, which makes the next
            build shorter.
    """

    opt_batch: int = 16
    max_batch: int = 16
    min_size: Size = (64, 64)
    opt_size: Size = (224, 224)
    max_size: Size = (448, 448)
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.opt_batch <= self.max_batch:
            raise InputError(f"opt batch {self.opt_batch}, max batch {self.max_batch}: expected 1 ≤ opt ≤ max")
        for side in (0, 1):
            low, likely, high = (size[side] for size in (self.min_size, self.opt_size, self.max_size))
            if not 1 <= low <= likely <= high:
                sizes = ", ".join(f"{h}x{w}" for h, w in (self.min_size, self.opt_size, self.max_size))
                raise InputError(f"min, opt and max size are {sizes}: expected them to ascend in height and width")

    @property
    def flags(self) -> list[str]:
        chosen = {HARDWARE_COMPATIBLE: self.hardware_compatible, VERSION_COMPATIBLE: self.version_compatible}
        return [name for name, on in sorted(chosen.items()) if on]


def check_target() -> str:
    """Architecture of the GPU, once everything that building needs is known to be there; takes no time.

    Raises:
        MissingDependencyError: TensorRT, pycuda, onnx or onnxruntime is not installed.
        BackendError: no GPU or no driver.
    """
    tensorrt = import_tensorrt()
    if not hasattr(tensorrt, "Builder"):
        raise MissingDependencyError("this TensorRT can run plans and not build them: pip install tensorrt")
    OnnxRuntimeBackend.check_installed()
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("building a plan needs onnx: pip install 'onnx>=1.17'") from error
    return gpu_architecture()


def build_plan(
    folder: Path | str, options: PlanOptions | None = None, *, report: Report = lambda stage: None
) -> tuple[str, PlanRecord]:
    """Build a plan for this machine's GPU and add it to the bundle; one that is there for the same key is kept.

    Before it is added, the plan runs on photographs and noise in every batch size and image size of its profile, next
    to the fp32 result of the same graph; one that misses the contract of its precision is not written. A build that is
    killed leaves the bundle as it was. Other plans and kernels that are damaged are taken out of the bundle and
    reported: it would not open with them.

    Args:
        folder: of the bundle. It must be writable.
        report: called with the name of each stage.

    Returns:
        The plan's name in the bundle, and its record.

    Raises:
        MissingDependencyError, BackendError: see :func:`check_target`; or TensorRT failed.
        InputError: a graph or options that cannot be built here.
        ParityError: the plan does not reproduce its graph.
        OutputError: the bundle cannot be written.
    """
    architecture, options = check_target(), options or PlanOptions()
    if options.timing_cache is not None and not options.timing_cache.absolute().parent.is_dir():
        raise InputError(f"{options.timing_cache}: there is no such folder for a timing cache")
    if str(folder) == BUILTIN:
        raise InputError("the bundle inside the package is not changed: export builtin with --out FOLDER first")
    bundle = Bundle.open(folder, complete=False)
    record = _new_record(bundle.manifest, options, architecture)
    _check_memory(bundle.manifest, record)
    name = plan_name(record)
    if _is_there(bundle, name, record, report):
        drop_damaged(bundle.path, report)
        return name, bundle.manifest.plans[name]
    try:
        with staging(bundle.path / PLANS) as made:
            record = _build_and_compare(made, bundle, name, record, options, report)
            _publish(bundle.path, made / name, name, record, report)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{bundle.path} cannot be written: {error.strerror or error}") from error
    return name, record


def _new_record(manifest: Manifest, options: PlanOptions, architecture: str) -> PlanRecord:
    """What the plan will be, its parity and layers still to be found."""
    if manifest.precision == Precision.BF16 and int(architecture.removeprefix("sm_")) < 80:
        raise InputError(f"{architecture} has no bf16 arithmetic: export with --precision fp16")
    return PlanRecord(
        encoder_sha256=manifest.files[ENCODER].sha256,
        tensorrt=import_tensorrt().__version__,
        architecture=architecture,
        profile=profile_shapes(manifest, options),
        flags=options.flags,
        precision=manifest.precision,
        parity=ParityReport([], {}),
        layers=0,
        fused_attention=0,
    )


def _check_memory(manifest: Manifest, record: PlanRecord) -> None:
    """The graph that the plan is compared with holds its attention in full, on the host."""
    _, height, width, _ = record.profile["images"][2]
    shape = manifest.architecture
    grid_h, grid_w = grid_size((height, width), shape.patch, manifest.stride)
    needed = encoding_bytes(dim=shape.dim, heads=shape.heads, cells=grid_h * grid_w, fused=False)
    if not fits(needed):
        raise InputError(
            f"the largest image, {height}x{width}, makes {too_much(needed, grid_h * grid_w, manifest.stride)} to "
            "compare the plan with: use a smaller --max-size"
        )


def profile_shapes(manifest: Manifest, options: PlanOptions) -> Shapes:
    """Smallest, most likely and largest shape of each input.

    The smallest grid is that of the smallest image with the stride of a whole patch, which low-resolution saliency and
    larger strides take.
    """
    batches = (1, options.opt_batch, options.max_batch)
    if manifest.size is not None:
        return {"images": [[batch, *manifest.size, 3] for batch in batches]}
    patch, dim = manifest.architecture.patch, manifest.architecture.dim
    sizes = (options.min_size, options.opt_size, options.max_size)
    strides = (patch, manifest.stride, manifest.stride)
    grids = [grid_size(size, patch, stride) for size, stride in zip(sizes, strides, strict=True)]
    return {
        "images": [[batch, *size, 3] for batch, size in zip(batches, sizes, strict=True)],
        "positional": [[1, *grid, dim] for grid in grids],
        "rows": [[grid[0]] for grid in grids],
        "cols": [[grid[1]] for grid in grids],
    }


def plan_name(record: PlanRecord) -> str:
    """``plans/sm_90-11.4.0.106-b1-16-16.plan``, with the sizes where they vary and the flags where there are any."""
    shapes = record.profile["images"]
    parts = [record.architecture, record.tensorrt, "b" + "-".join(str(shape[0]) for shape in shapes)]
    if len(record.profile) > 1:
        parts.append("-".join(f"{shape[1]}x{shape[2]}" for shape in shapes))
    return f"{PLANS}/{'-'.join([*parts, *record.flags])}.plan"


def _is_there(bundle: Bundle, name: str, record: PlanRecord, report: Report) -> bool:
    """Whether the bundle has this very plan, whole; if not, what differs is reported."""
    old = bundle.manifest.plans.get(name)
    if old is None:
        return False
    found = replace(record, parity=old.parity, layers=old.layers, fused_attention=old.fused_attention)
    different = [field for field, value in vars(found).items() if value != getattr(old, field)]
    if different:
        report(f"{name} is there with another {', '.join(different)}: building anew")
        return False
    try:
        bundle.read(name)
    except BundleError as error:
        report(f"{error}: building anew")
        return False
    report(f"{name} is there for the same graph, GPU, version and profile: kept")
    return True


def _build_and_compare(
    made: Path, bundle: Bundle, name: str, record: PlanRecord, options: PlanOptions, report: Report
) -> PlanRecord:
    report("reading the graph")
    builder = _Builder(prepare_graph(bundle.encoder), report)
    report("building the plan, which takes minutes")
    data = builder.build(profiles(record.profile), options)
    layers, fused = builder.inspect(data)
    path = made / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    record = replace(record, layers=layers, fused_attention=fused)
    report("comparing with ONNX Runtime in fp32")
    files = {ENCODER: bundle.manifest.files[ENCODER], name: file_entry(path)}
    manifest = replace(bundle.manifest, files=files, plans={name: record})
    return replace(record, parity=compare_plan(replace(bundle, path=made, manifest=manifest), record))


def _publish(folder: Path, built: Path, name: str, record: PlanRecord, report: Report) -> None:
    """Plan first, manifest last; an older plan of this name is taken out of the manifest before it is replaced."""
    old = read_manifest(folder)  # as it is now: another build may have added its plan meanwhile
    files = {key: entry for key, entry in old.files.items() if key != name}
    plans = {key: plan for key, plan in old.plans.items() if key != name}
    kept = without_damaged(folder, replace(old, files=files, plans=plans), report)
    if kept != old:
        write_manifest(folder, kept)
    entry = file_entry(built)
    built.replace(folder / name)
    write_manifest(folder, replace(kept, files={**kept.files, name: entry}, plans={**kept.plans, name: record}))


# ---------------------------------------------------------------------------------------------------- graph and build
def prepare_graph(encoder: bytes) -> bytes:
    """The graph as TensorRT's parser takes it.

    The attention function, which is one operation elsewhere, is written out in standard operators, and bytes are cast
    before anything else reads them: TensorRT has bytes at its edge only.

    Raises:
        InputError: a graph with ``If``, which TensorRT has been seen to build wrongly.
    """
    import onnx
    import onnx.inliner

    model = onnx.inliner.inline_local_functions(onnx.load_from_string(encoder))
    branches = [node.name or node.op_type for node in model.graph.node if node.op_type == "If"]
    if branches:
        raise InputError(
            f"the graph branches ({', '.join(branches[:3])}): TensorRT is not trusted with If; export again"
        )
    used = {node.domain for node in model.graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    _cast_first(model.graph)
    return bytes(model.SerializeToString())


def _cast_first(graph: Any) -> None:
    """Let everything that reads the images read them after their cast."""
    nodes = list(graph.node)
    cast = next((node for node in nodes if node.op_type == "Cast" and node.input[0] == "images"), None)
    if cast is None:
        raise InputError("the graph does not cast its images first: it is not one of facetrt's; export again")
    nodes.remove(cast)
    for node in nodes:
        for i, name in enumerate(node.input):
            if name == "images":
                node.input[i] = cast.output[0]
    nodes.insert(0, cast)
    del graph.node[:]
    graph.node.extend(nodes)


def profiles(shapes: Shapes) -> list[Shapes]:
    """Profiles to build with: one image first, because kernels chosen for a batch are slow for one, then batches."""
    low, likely, high = shapes["images"]
    if high[0] == 1:
        return [shapes]
    single = [[1, *shape[1:]] for shape in (low, likely, high)]
    return [{**shapes, "images": single}, shapes]


class _Builder:
    """TensorRT's builder, network and parser; they live as long as this does."""

    def __init__(self, graph: bytes, report: Report) -> None:
        self._trt, self._report = import_tensorrt(), report
        self._log = make_log(self._trt)
        self._builder = self._trt.Builder(self._log)
        typed = getattr(self._trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 knows nothing else
        self._network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser = self._trt.OnnxParser(self._network, self._log)
        if not self._parser.parse(graph):
            errors = [self._parser.get_error(i).desc() for i in range(self._parser.num_errors)]
            raise InputError(f"TensorRT cannot read the graph: {'; '.join(errors) or self._log.last()}")
        self._refuse_branches()

    def _refuse_branches(self) -> None:
        """The parser itself may make conditions of other operators."""
        layers = [self._network.get_layer(i) for i in range(self._network.num_layers)]
        branches = [layer.name for layer in layers if layer.type.name.startswith("CONDITION")]
        if branches:
            raise InputError(f"TensorRT's parser made branches of the graph ({', '.join(branches[:3])}): not trusted")

    def build(self, wanted: list[Shapes], options: PlanOptions) -> bytes:
        """The serialised plan."""
        config = self._config(options)
        for shapes in wanted:
            profile = self._builder.create_optimization_profile()
            for name, (low, likely, high) in shapes.items():
                profile.set_shape(name, low, likely, high)
            if config.add_optimization_profile(profile) < 0:
                raise InputError(f"TensorRT refuses the profile {shapes}: {self._log.last()}")
        cache = self._load_cache(config, options.timing_cache)
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise BackendError(f"TensorRT could not build the plan: {self._log.last()}")
        if options.timing_cache is not None and cache is not None:
            with atomic_file(options.timing_cache) as path:
                path.write_bytes(bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _config(self, options: PlanOptions) -> Any:
        trt, config = self._trt, self._builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 bundles are held to fp32's contract
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector
        config.progress_monitor = self._monitor = _make_monitor(trt, self._report)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        return config

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

    def inspect(self, plan: bytes) -> tuple[int, int]:
        """Layers of a built plan, and how many of them are fused attentions, by the inspector's own names."""
        runtime = self._trt.Runtime(self._log)
        runtime.engine_host_code_allowed = True  # version-compatible plans bring code, which was made here just now
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"TensorRT cannot load the plan that it built: {self._log.last()}")
        text = engine.create_engine_inspector().get_engine_information(self._trt.LayerInformationFormat.JSON)
        layers = json.loads(text)["Layers"]
        return len(layers), sum(_is_attention(layer) for layer in layers)


def _is_attention(layer: Any) -> bool:
    """Kernels of fused multi-head attention carry ``mha`` in their names."""
    names = layer.values() if isinstance(layer, dict) else [layer]
    return any(isinstance(name, str) and "mha" in name.lower() for name in names)


def _make_monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the phases below the outermost one; called from TensorRT's threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                report(f"{phase_name} ({num_steps} steps)")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


# ---------------------------------------------------------------------------------------------------------- comparison
@dataclass(frozen=True)
class _Case:
    """One batch to compare: how many images of which size, with which stride."""

    batch: int
    size: Size
    step: int = 1  # every step-th cell of the patch convolution

    def __str__(self) -> str:
        return f"{self.batch} × {self.size[0]}×{self.size[1]}{f' step {self.step}' if self.step > 1 else ''}"


def compare_plan(staged: Bundle, record: PlanRecord) -> ParityReport:
    """Run a plan in every size of its profile next to its graph in fp32.

    Raises:
        ParityError: it misses the contract of its precision; names the worst output.
    """
    expected = _references(staged, record)
    reports: list[dict[str, parity.Metrics]] = []
    backend = TensorRtBackend(
        staged, RunOptions(BackendName.TENSORRT, DeviceName.CUDA, precision=Precision(record.precision))
    )
    cases = list(_cases(staged.manifest, record))
    try:
        for case in cases:
            for _ in range(1 if staged.manifest.dynamic else 3):  # plain, recorded, replayed
                outputs = backend.run(encoder_inputs(staged, case.batch, case.size, case.step))
                for i in range(case.batch):
                    one = {name: values[i] for name, values in outputs.items()}
                    reports.append(parity.compare(one, expected[case.size, case.step][i % COMPARED_IMAGES]))
        outputs_worst = parity.worst(reports)
        parity.check(outputs_worst, Precision(record.precision))
    except ParityError as error:
        raise ParityError(f"the plan does not reproduce its graph: {error}; no plan was written") from None
    finally:
        backend.close()
    return ParityReport([str(case) for case in cases], outputs_worst)


def _cases(manifest: Manifest, record: PlanRecord) -> Iterator[_Case]:
    """Every corner of the profile, single images and batches alike; in a dynamic bundle larger strides as well."""
    shapes = record.profile["images"]
    batches = sorted({shape[0] for shape in shapes})
    if manifest.size is not None:
        yield from (_Case(batch, (manifest.size[0], manifest.size[1])) for batch in batches)
        return
    small, likely, large = ((shape[1], shape[2]) for shape in shapes)
    yield from dict.fromkeys(_Case(batch, size) for batch in batches for size in (small, likely))
    yield _Case(batches[-1], large)
    step = manifest.architecture.patch // manifest.stride
    if step > 1:
        yield from dict.fromkeys(_Case(batches[-1], size, step) for size in (small, likely))


def _references(staged: Bundle, record: PlanRecord) -> dict[tuple[Size, int], list[dict[str, NDArray[np.float32]]]]:
    """Each compared image's outputs in fp32, by image size and step."""
    import onnx

    from facetrt.export.widening import widen

    graph = staged.encoder
    if record.precision != Precision.FP32:
        graph = widen(onnx.load_from_string(graph), rounding=False).SerializeToString()
    manifest = replace(staged.manifest, precision=Precision.FP32)
    backend = OnnxRuntimeBackend(
        replace(staged, encoder=graph, manifest=manifest),
        RunOptions(BackendName.ONNXRUNTIME, DeviceName.CPU, precision=Precision.FP32),
    )
    found: dict[tuple[Size, int], list[dict[str, NDArray[np.float32]]]] = {}
    try:
        for size, step in {(case.size, case.step): None for case in _cases(staged.manifest, record)}:
            inputs = encoder_inputs(staged, COMPARED_IMAGES, size, step)
            singles = ({**inputs, "images": inputs["images"][i : i + 1]} for i in range(COMPARED_IMAGES))
            found[size, step] = [{n: v[0] for n, v in backend.run(single).items()} for single in singles]
    finally:
        backend.close()
    return found


def encoder_inputs(bundle: Bundle, batch: int, size: Size, step: int = 1) -> Tensors:
    """Inputs of the encoder for a batch that repeats two photographs and noise."""
    photos = [resize(image, size) for image in list(sample_images().values())[: COMPARED_IMAGES - 1]]
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    images = np.stack([[*photos, noise][i % COMPARED_IMAGES] for i in range(batch)])
    if bundle.positional is None:
        return {"images": images}
    patch, stride = bundle.manifest.architecture.patch, bundle.manifest.stride
    grid_h, grid_w = grid_size(size, patch, stride * step)
    return {
        "images": images,
        "positional": positional_table(bundle.positional, (grid_h, grid_w), size)[None],
        "rows": np.arange(grid_h, dtype=np.int64) * step,
        "cols": np.arange(grid_w, dtype=np.int64) * step,
    }
