"""TensorRT plans: built from a bundle's graph, compared where the GPU is at hand, and added to the bundle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from facetrt.engine.backends.cuda import gpu_architecture
from facetrt.engine.backends.flavours import RTX, TENSORRT, Flavour, import_library
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.plan_check import check_reference, compare_plan
from facetrt.engine.backends.run_options import BackendName, DeviceName, Precision, RunOptions
from facetrt.engine.backends.tensorrt import HARDWARE_COMPATIBLE, VERSION_COMPATIBLE, TensorRtBackend
from facetrt.engine.bundle.bundle import BUILTIN, Bundle, read_manifest
from facetrt.engine.bundle.manifest import ENCODER, PLANS, Manifest, ParityReport, PlanRecord
from facetrt.engine.images.geometry import grid_size
from facetrt.engine.settings import Setting, check
from facetrt.export.export_options import GPU
from facetrt.export.mending import drop_damaged, file_entry, staging, without_damaged, write_manifest
from facetrt.export.plan_builder import Built, PlanBuilder, Settings
from facetrt.export.plan_graph import PreparedGraph, Size, prepare_graph, profile_shapes, profiles
from facetrt.kernels.device.runtime.cuda import CudaDevice
from facetrt.kernels.errors import (
    BundleError,
    InputError,
    MissingDependencyError,
    OutputError,
    ParityError,
)

Report = Callable[[str], None]
BATCH = 16

SCRATCH_SHARE = 0.5  # of a GPU's memory, that one lane's scratch may take: weights, images and results lie beside it
LARGEST_RTX = 96 << 30  # bytes, of the largest card that TensorRT for RTX runs on: no GPU is there to be asked
FOUND = {"parity", "layers", "attention", "fused_attention", "scratch_bytes"}  # fields of a record that a build fills
HALF = (Precision.FP16, Precision.BF16)


def parse_plan_architectures(text: str) -> tuple[str, ...] | None:
    """``all``, which is None, or a list like ``sm75,sm_89``.

    Raises:
        InputError: an architecture that TensorRT for RTX does not run on.
    """
    known = RTX.architectures or ()
    if text.strip().lower() == "all":
        return None
    names = tuple(
        dict.fromkeys(f"sm_{part.strip().lower().removeprefix('sm').lstrip('_')}" for part in text.split(","))
    )
    foreign = [name for name in names if name not in known]
    if foreign:
        raise InputError(
            f"--architectures {text}: TensorRT for RTX does not run on {', '.join(foreign)}: expected all, or some of "
            f"{','.join(known)}; for other GPUs build with --target tensorrt, there"
        )
    return names


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is built for. A single image has a profile of its own; sizes matter to bundles of any size."""

    opt_batch: Annotated[int | None, Setting("Batch size to tune for.", panel=GPU, shown="16")] = None
    max_batch: Annotated[int | None, Setting("Most images in one run.", panel=GPU, shown="16")] = None
    min_size: Annotated[Size, Setting("HEIGHTxWIDTH, of a dynamic bundle.", panel=GPU)] = (64, 64)
    opt_size: Annotated[Size, Setting("HEIGHTxWIDTH to tune for.", panel=GPU)] = (224, 224)
    max_size: Annotated[Size, Setting("HEIGHTxWIDTH.", panel=GPU)] = (448, 448)
    timing_cache: Annotated[Path | None, Setting("File of measurements, kept for the next build.", panel=GPU)] = None
    version_compatible: Annotated[bool, Setting("Also for newer versions of this TensorRT major.", panel=GPU)] = False
    hardware_compatible: Annotated[bool, Setting("Also for other GPUs from sm_80 on; slower.", panel=GPU)] = False
    architectures: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Of tensorrt-rtx: like sm75,sm89; all by default.", panel=GPU, shown="all", read=parse_plan_architectures
        ),
    ] = None
    allow_unfused: Annotated[bool, Setting("Build although attention holds its t × t matrix.", panel=GPU)] = False

    def __post_init__(self) -> None:
        check(self)
        _, likely, most = self.batches
        if not 1 <= likely <= most:
            raise InputError(f"opt batch {likely}, max batch {most}: expected 1 ≤ opt ≤ max")
        for side in (0, 1):
            low, likely, high = (size[side] for size in (self.min_size, self.opt_size, self.max_size))
            if not 1 <= low <= likely <= high:
                sizes = ", ".join(f"{h}x{w}" for h, w in (self.min_size, self.opt_size, self.max_size))
                raise InputError(f"min, opt and max size are {sizes}: expected them to ascend in height and width")

    @property
    def flags(self) -> list[str]:
        chosen = {HARDWARE_COMPATIBLE: self.hardware_compatible, VERSION_COMPATIBLE: self.version_compatible}
        return [name for name, on in sorted(chosen.items()) if on]

    @property
    def batches(self) -> tuple[int, int, int]:
        """Smallest, most likely and largest."""
        given = [batch for batch in (self.opt_batch, self.max_batch) if batch is not None] or [BATCH]
        return 1, given[0], given[-1]

    @property
    def sizes(self) -> tuple[Size, Size, Size]:
        """Smallest, most likely and largest."""
        return self.min_size, self.opt_size, self.max_size


def check_target(flavour: Flavour = TENSORRT) -> None:
    """Raise unless everything that building needs is there; takes no time.

    Raises:
        MissingDependencyError: the library, onnx or, for plans of the GPU here, pycuda or onnxruntime is not installed.
        BackendError: plans are built for the GPU here, and there is none.
    """
    if not hasattr(import_library(flavour), "Builder"):
        raise MissingDependencyError(f"this {flavour.title} can run plans and not build them: {flavour.install}")
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("building a plan needs onnx: pip install 'onnx>=1.17'") from error
    if not flavour.ahead_of_time:
        OnnxRuntimeBackend.check_installed()
        gpu_architecture()


def build_plan(
    folder: Path | str,
    options: PlanOptions | None = None,
    *,
    flavour: Flavour = TENSORRT,
    report: Report = lambda stage: None,
) -> tuple[str, PlanRecord]:
    """Build a plan and add it to the bundle; one that is there for the same key is kept.

    A plan of TensorRT is built for this machine's GPU. Before it is added, it runs on photographs and noise in every
    batch size and image size of its profile, next to the fp32 result of the same graph; one that misses the contract of
    its precision is not written. A plan of TensorRT for RTX is built for any list of its architectures, without a GPU;
    it is compared in the same way by the backend that runs it first.

    A build that is killed leaves the bundle as it was. Other plans and kernels that are damaged are taken out of the
    bundle and reported: it would not open with them.

    Args:
        folder: of the bundle. It must be writable.
        report: called with the name of each stage.

    Returns:
        The plan's name in the bundle, and its record.

    Raises:
        MissingDependencyError, BackendError: see :func:`check_target`; or the library failed.
        InputError: a graph or options that cannot be built here; attention that is not fused; a plan whose scratch
            memory leaves the GPU too little.
        ParityError: the plan does not reproduce its graph.
        OutputError: the bundle cannot be written.
    """
    options = options or PlanOptions()
    check_options(options, flavour)
    check_target(flavour)
    if str(folder) == BUILTIN:
        raise InputError("the bundle inside the package is not changed: export builtin with --out FOLDER first")
    bundle = Bundle.open(folder, complete=False)
    record = _new_record(bundle.manifest, options, flavour)
    check_fusible(bundle.manifest.precision, options, flavour)
    _check_materialised(bundle.manifest, record, _device_memory(flavour))
    if not flavour.ahead_of_time:
        check_reference(bundle.manifest, record)
    name = plan_name(record)
    if _is_there(bundle, name, record, report):
        drop_damaged(bundle.path, report)
        return name, bundle.manifest.plans[name]
    try:
        with staging(bundle.path / PLANS) as made:
            record = _build(made / name, bundle, record, options, flavour, report)
            if not flavour.ahead_of_time:
                record = replace(record, parity=_compare(made, bundle, name, record, report))
            _publish(bundle.path, made / name, name, record, report)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{bundle.path} cannot be written: {error.strerror or error}") from error
    return name, record


def check_options(options: PlanOptions, flavour: Flavour) -> None:
    """Raise :class:`InputError` for options that the library has no place for."""
    if options.timing_cache is not None and not options.timing_cache.absolute().parent.is_dir():
        raise InputError(f"{options.timing_cache}: there is no such folder for a timing cache")
    if flavour.ahead_of_time:
        given = [*options.flags, *(["timing_cache"] if options.timing_cache is not None else [])]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(
                f"{names} is for plans of --target tensorrt: {flavour.title} takes no times when it builds, and builds "
                "for --architectures"
            )
    elif options.architectures is not None:
        raise InputError("--architectures is for --target tensorrt-rtx: TensorRT builds for the GPU of this machine")


def check_fusible(precision: str, options: PlanOptions, flavour: Flavour) -> None:
    """Raise :class:`InputError` for a bundle whose attention no build fuses: known before anything takes long."""
    if precision not in HALF and not options.allow_unfused:
        raise InputError(
            f"{flavour.title} does not fuse attention in fp32, which then holds its t × t matrix: export with "
            "--precision fp16 or bf16, or insist with --allow-unfused"
        )


def _new_record(manifest: Manifest, options: PlanOptions, flavour: Flavour) -> PlanRecord:
    """What the plan will be; what its build finds is still to come."""
    return PlanRecord(
        encoder_sha256=manifest.files[ENCODER].sha256,
        builder=flavour.backend,
        version=import_library(flavour).__version__,
        architectures=_architectures(manifest, options, flavour),
        profile=profile_shapes(manifest, options.batches, options.sizes),
        flags=options.flags,
        precision=manifest.precision,
        parity=ParityReport([], {}),
        layers=0,
        attention=0,
        fused_attention=0,
        scratch_bytes=[],
    )


def _architectures(manifest: Manifest, options: PlanOptions, flavour: Flavour) -> list[str]:
    """What to build for; where nothing was named, without what cannot run the bundle."""
    known = (flavour.architectures or ()) if flavour.ahead_of_time else (gpu_architecture(),)
    lacks = _turing_lacks(manifest, flavour)
    chosen = options.architectures or known
    short = [name for name in chosen if lacks and int(name.removeprefix("sm_")) < 80]
    if short and (options.architectures is not None or not flavour.ahead_of_time):
        raise InputError(f"{', '.join(short)} has no {lacks}: export with --precision fp16, or for newer GPUs")
    return [name for name in chosen if name not in short]


def _turing_lacks(manifest: Manifest, flavour: Flavour) -> str:
    """What GPUs before sm_80 lack for a bundle; empty if nothing. There TensorRT for RTX has halves for products."""
    if manifest.precision == Precision.BF16:
        return "bf16 arithmetic"
    kept = manifest.fp32_parts(manifest.precision)
    whole = manifest.precision == Precision.FP32 or kept.cls_attention or kept.blocks
    if flavour.ahead_of_time and whole:
        what = "this bundle is fp32" if manifest.precision == Precision.FP32 else f"fp32 is kept for {kept}"
        return f"fp32 matrix products in {flavour.title} ({what})"
    return ""


def _device_memory(flavour: Flavour) -> int:
    """Bytes of the GPU that the plan is for, or of the largest that it may meet."""
    if flavour.ahead_of_time:
        return LARGEST_RTX
    device = CudaDevice.open()
    try:
        return device.memory_info()[1]
    finally:
        device.close()


def _check_materialised(manifest: Manifest, record: PlanRecord, memory: int) -> None:
    """Refuse what cannot fit before it is built, which takes minutes: in fp32 a head's t × t matrix is held in full."""
    if manifest.precision in HALF:
        return
    batch, height, width = record.profile["images"][2][:3]
    tokens = 1 + (record.profile["rows"][2][0] * record.profile["cols"][2][0] if manifest.dynamic else _cells(manifest))
    attended = tokens
    if manifest.riders is not None and not manifest.riders.from_block:
        shape = manifest.architecture
        attended = shape.prefix + math.prod(grid_size((height, width), shape.patch, shape.patch))
    needed = batch * manifest.architecture.heads * tokens * attended * 4
    _check_scratch(needed, f"{batch} × {height}×{width}", memory, manifest.precision)


def _cells(manifest: Manifest) -> int:
    height, width = manifest.size or (0, 0)
    grid_h, grid_w = grid_size((height, width), manifest.architecture.patch, manifest.stride)
    return grid_h * grid_w


def _check_scratch(needed: int, largest: str, memory: int, precision: str) -> None:
    if needed <= SCRATCH_SHARE * memory:
        return
    half = "" if precision in HALF else "--precision fp16, whose attention is fused, or "
    raise InputError(
        f"the largest batch, {largest}, needs {needed / 1e9:,.1f} GB of scratch memory, more than {SCRATCH_SHARE:.0%} "
        f"of the {memory / 1e9:,.0f} GB of the GPU: use {half}a smaller --max-batch or --max-size"
    )


def plan_name(record: PlanRecord) -> str:
    """``plans/sm_90-11.4.0.106-b1-16-16.plan``, with the sizes where they vary and the flags where there are any.

    Those of TensorRT for RTX begin with ``rtx``, and name architectures unless they have all.
    """
    shapes = record.profile["images"]
    parts = [*record.architectures, record.version, "b" + "-".join(str(shape[0]) for shape in shapes)]
    if record.builder == RTX.backend:
        named = [] if tuple(record.architectures) == RTX.architectures else record.architectures
        parts = ["rtx", *named, *parts[len(record.architectures) :]]
    if len(record.profile) > 1:
        parts.append("-".join(f"{shape[1]}x{shape[2]}" for shape in shapes))
    return f"{PLANS}/{'-'.join([*parts, *record.flags])}.plan"


def _is_there(bundle: Bundle, name: str, record: PlanRecord, report: Report) -> bool:
    """Whether the bundle has this very plan, whole; if not, what differs is reported."""
    old = bundle.manifest.plans.get(name)
    if old is None:
        return False
    known = vars(record).keys() - FOUND
    different = sorted(field for field in known if getattr(record, field) != getattr(old, field))
    if different:
        report(f"{name} is there with another {', '.join(different)}: building anew")
        return False
    try:
        bundle.read(name)
    except BundleError as error:
        report(f"{error}: building anew")
        return False
    report(f"{name} is there for the same graph, GPUs, version and profile: kept")
    return True


def _build(
    path: Path, bundle: Bundle, record: PlanRecord, options: PlanOptions, flavour: Flavour, report: Report
) -> PlanRecord:
    """Write the plan; returns its record with what the build found."""
    report("reading the graph")
    graph = prepare_graph(bundle.encoder)
    builder = PlanBuilder(graph, flavour, report)
    report(f"building the plan{'' if flavour.ahead_of_time else ', which takes minutes'}")
    settings = Settings(
        record.architectures, options.version_compatible, options.hardware_compatible, options.timing_cache
    )
    built = builder.build(profiles(record.profile), settings)
    if not options.allow_unfused:
        _check_fused(graph, built, flavour)
    batch, height, width = record.profile["images"][2][:3]
    _check_scratch(
        max(built.scratch_bytes), f"{batch} × {height}×{width}", _device_memory(flavour), bundle.manifest.precision
    )
    path.parent.mkdir(parents=True)
    path.write_bytes(built.data)
    return replace(
        record,
        layers=built.layers,
        attention=len(graph.attention),
        fused_attention=len(graph.attention) - len(built.unfused),
        scratch_bytes=built.scratch_bytes,
    )


def _check_fused(graph: PreparedGraph, built: Built, flavour: Flavour) -> None:
    if built.unfused:
        raise InputError(
            f"{flavour.title} did not fuse {', '.join(built.unfused)} (the number is that of the block; "
            f"{len(built.unfused)} of {len(graph.attention)}), which then hold their t × t matrices: blocks in fp32 "
            "are never fused; use another --precision, or insist with --allow-unfused"
        )


def _compare(made: Path, bundle: Bundle, name: str, record: PlanRecord, report: Report) -> ParityReport:
    report("comparing with ONNX Runtime in fp32")
    files = {ENCODER: bundle.manifest.files[ENCODER], name: file_entry(made / name)}
    staged = replace(bundle, path=made, manifest=replace(bundle.manifest, files=files, plans={name: record}))
    backend = TensorRtBackend(
        staged, RunOptions(BackendName.TENSORRT, DeviceName.CUDA, precision=Precision(record.precision))
    )
    try:
        return compare_plan(staged, record, backend.run)
    except ParityError as error:
        raise ParityError(f"the plan does not reproduce its graph: {error}; no plan was written") from None
    finally:
        backend.close()


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
