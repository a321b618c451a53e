"""The GPU that a suite runs on, found out before anything heavy is imported."""

from __future__ import annotations

from typing import Any

from facetrt.engine.doctor.diagnosis import Driver, ask, read_driver
from facetrt.kernels.errors import BackendError


class NoGpuError(BackendError):
    """A suite that needs a GPU, on a machine without one."""

    exit_code = 2


def find_gpu() -> dict[str, Any]:
    """What a report says about the GPU; nothing is imported, and no context made.

    Raises:
        BackendError: there is none.
    """
    return describe(read_driver(ask("gpu")))


def describe(driver: Driver) -> dict[str, Any]:
    """The first GPU and its driver."""
    if not driver.gpus or driver.cuda is None:
        raise NoGpuError(f"the GPU suite needs an NVIDIA GPU: {driver.problem}; see 'facetrt doctor'")
    gpu = driver.gpus[0]
    return {
        "name": gpu.name,
        "arch": gpu.arch,
        "memory_gib": round(gpu.memory / 2**30, 1),
        "driver": driver.version,
        "cuda": f"{driver.cuda[0]}.{driver.cuda[1]}",
    }
