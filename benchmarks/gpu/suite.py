"""The GPU suite: the order of its sections, and the bars that it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from facetrt.benchmarks.cpu.suite import Opening, Report
from facetrt.benchmarks.cpu.task_times import RESEARCH
from facetrt.benchmarks.gpu import encoder as gpu_encoder
from facetrt.benchmarks.gpu import kernels as gpu_kernels
from facetrt.benchmarks.gpu import resources
from facetrt.benchmarks.gpu import task_times as gpu_tasks
from facetrt.benchmarks.gpu import video as gpu_video
from facetrt.benchmarks.gpu.workbench import GpuSizes, GpuWorkbench
from facetrt.benchmarks.results import Bar
from facetrt.benchmarks.video_suite import BARE
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.images.geometry import grid_size

STRIDE, PATCH = 4, 8  # of the model that the bars are for


def run_gpu(bench: GpuWorkbench, gpu: dict[str, Any], *, notes: Sequence[str] = ()) -> Report:
    """Measure all sections; a row that this machine cannot run says why.

    Args:
        gpu: from :func:`facetrt.benchmarks.gpu.facts.find_gpu`.
        notes: what a reader must know about the model.
    """
    opening = Opening(gpu=gpu)
    rows = [*gpu_encoder.measure(bench), *gpu_kernels.measure(bench), *gpu_tasks.measure(bench)]
    rows += gpu_video.measure(bench)
    rows += resources.measure(Bundle.open(bench.bundle), gpu["arch"])
    comparable = bench.sizes == GpuSizes() and bench.stride == STRIDE and bench.spec.patch == PATCH
    return opening.close("gpu", bench, rows, bars(bench.sizes), comparable=comparable, notes=notes)


def bars(sizes: GpuSizes) -> list[Bar]:
    """What is wanted on an H200, for ViT-S/8 at stride 4 and 224 pixels in fp16."""
    ours = gpu_encoder.engine_name("tensorrt")
    single, batch = gpu_encoder.section(1), gpu_encoder.section(sizes.batch)
    grid_h, grid_w = grid_size((sizes.side, sizes.side), PATCH, STRIDE)
    small, large = (gpu_kernels.buddies_name(cells) for cells in (grid_h * grid_w, sizes.large_grid**2))
    frames = gpu_tasks.FRAMES
    binned = gpu_kernels.section("log_bin")
    return [
        _seconds(f"encoder, {sizes.batch} images (1,300 images/s)", batch, ours, sizes.batch / 1300),
        Bar(f"encoder, {sizes.batch} images, vs torch.compile", batch, ours, gpu_encoder.COMPILED, 1.2),
        _seconds("encoder, one image", single, ours, 1.5e-3),
        Bar("log_bin, share of copy bandwidth", binned, "log_bin", gpu_kernels.copy_name("log_bin"), 0.7),
        _seconds(small, gpu_kernels.section(small), small, 0.35e-3),
        Bar(f"{large}, memory", gpu_kernels.MEMORY, large, None, 1e9 / 2**20, at_most=True, unit="MiB"),
        _seconds("pair match from decoded frames, median", frames, ours, 4e-3),
        _seconds("pair match from decoded frames, p99", frames, f"{ours}, p99", 6e-3),
        Bar("pair match from decoded frames, vs research style", frames, ours, RESEARCH, 50),
        Bar(
            "time per frame, track and mask vs the encoder alone",
            gpu_video.section("tensorrt"),
            BARE,
            gpu_video.BOTH,
            1.3,
            at_most=True,
        ),
        _seconds(
            f"cosegment, {sizes.images} decoded images (150 images/s)", gpu_tasks.COSEGMENT, ours, sizes.images / 150
        ),
    ]


def _seconds(what: str, section: str, row: str, wanted: float) -> Bar:
    return Bar(what, section, row, None, wanted, at_most=True, unit="s")
