"""A TensorRT plan next to its graph: on photographs and noise, in every corner of its profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends import parity
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.run_options import BackendName, DeviceName, Precision, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import Manifest, ParityReport, PlanRecord
from facetrt.engine.bundle.positional import Cells
from facetrt.engine.images.geometry import grid_size
from facetrt.engine.images.loading import resize
from facetrt.engine.machine.memory import encoding_bytes, fits, too_much
from facetrt.engine.samples import sample_images
from facetrt.kernels.errors import InputError, MissingDependencyError

COMPARED_IMAGES = 3  # two photographs and noise; larger batches repeat them
RUNS_TO_RECORDED = 3  # of one shape: a plain one, one that is recorded, one that is replayed

Size = tuple[int, int]
Tensors = dict[str, NDArray[Any]]
Outputs = dict[str, NDArray[np.float32]]
Run = Callable[[Tensors], Outputs]


@dataclass(frozen=True)
class _Case:
    """One batch to compare: how many images of which size, with which stride."""

    batch: int
    size: Size
    step: int = 1  # every step-th cell of the patch convolution

    def __str__(self) -> str:
        return f"{self.batch} × {self.size[0]}×{self.size[1]}{f' step {self.step}' if self.step > 1 else ''}"


def check_reference(manifest: Manifest, record: PlanRecord) -> None:
    """Raise :class:`InputError` if the processor's memory does not hold what the plan is compared with."""
    _, height, width, _ = record.profile["images"][2]
    shape = manifest.architecture
    grid_h, grid_w = grid_size((height, width), shape.patch, manifest.stride)
    mixed = bool(manifest.fp32_parts(manifest.precision).blocks)  # whose attention is written out
    needed = encoding_bytes(dim=shape.dim, heads=shape.heads, cells=grid_h * grid_w, fused=not mixed)
    if not fits(needed):
        raise InputError(
            f"the largest image, {height}x{width}, makes {too_much(needed, grid_h * grid_w, manifest.stride)} to "
            "compare the plan with: use a smaller --max-size"
        )


def compare_plan(staged: Bundle, record: PlanRecord, run: Run) -> ParityReport:
    """Run a plan in every size of its profile next to its graph in fp32, by ONNX Runtime on the processor.

    Args:
        run: one batch by the plan.

    Raises:
        ParityError: it misses the contract of its precision; names the worst output.
    """
    expected = _references(staged, record)
    reports: list[dict[str, parity.Metrics]] = []
    cases = list(_cases(staged.manifest, record))
    for case in cases:
        for _ in range(1 if staged.manifest.dynamic else RUNS_TO_RECORDED):
            outputs = run(encoder_inputs(staged, case.batch, case.size, case.step))
            for i in range(case.batch):
                one = {name: values[i] for name, values in outputs.items()}
                reference = expected[case.size, case.step][i % COMPARED_IMAGES]
                reports.append(parity.compare(one, reference, staged.manifest.architecture.prefix))
    found = parity.worst(reports)
    parity.check(found, Precision(record.precision))
    return ParityReport([str(case) for case in cases], found)


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


def _references(staged: Bundle, record: PlanRecord) -> dict[tuple[Size, int], list[Outputs]]:
    """Each compared image's outputs in fp32, by image size and step."""
    graph = staged.encoder if record.precision == Precision.FP32 else _widened(staged.encoder)
    manifest = replace(staged.manifest, precision=Precision.FP32)
    backend = OnnxRuntimeBackend(
        replace(staged, encoder=graph, manifest=manifest),
        RunOptions(BackendName.ONNXRUNTIME, DeviceName.CPU, precision=Precision.FP32),
    )
    found: dict[tuple[Size, int], list[Outputs]] = {}
    try:
        for size, step in {(case.size, case.step): None for case in _cases(staged.manifest, record)}:
            inputs = encoder_inputs(staged, COMPARED_IMAGES, size, step)
            singles = ({**inputs, "images": inputs["images"][i : i + 1]} for i in range(COMPARED_IMAGES))
            found[size, step] = [{n: v[0] for n, v in backend.run(single).items()} for single in singles]
    finally:
        backend.close()
    return found


def _widened(graph: bytes) -> bytes:
    try:
        import onnx

        from facetrt.engine.backends.widening import widen
    except ImportError as error:
        raise MissingDependencyError("comparing a half-precision plan needs onnx: pip install 'onnx>=1.17'") from error
    return bytes(widen(onnx.load_from_string(graph), rounding=False).SerializeToString())


def encoder_inputs(bundle: Bundle, batch: int, size: Size, step: int = 1) -> Tensors:
    """Inputs of the encoder for a batch that repeats two photographs and noise."""
    photos = [resize(image, size) for image in list(sample_images().values())[: COMPARED_IMAGES - 1]]
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    images = np.stack([[*photos, noise][i % COMPARED_IMAGES] for i in range(batch)])
    if not bundle.manifest.dynamic:
        return {"images": images}
    cells = Cells(size, bundle.manifest.architecture.patch, bundle.manifest.stride * step)
    grid_h, grid_w = cells.grid
    return {
        "images": images,
        **bundle.positions(cells),
        "rows": np.arange(grid_h, dtype=np.int64) * step,
        "cols": np.arange(grid_w, dtype=np.int64) * step,
    }
