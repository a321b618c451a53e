"""What figures were measured on, and with which versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from facetrt.engine.machine.processor import BF16_FLAGS, cpu_field, installed_versions, processor_flags
from facetrt.kernels.machine import processors, usable_memory

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")
PACKAGES = (
    "facetrt", "numpy", "opencv-python-headless", "pillow", "onnxruntime", "onnxruntime-gpu", "tensorrt", "pycuda",
    "openvino", "faiss-cpu", "scikit-learn", "torch", "triton", "timm", "pydensecrf2",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores and memory that this process may use, instruction sets that matter, and the load at start."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": processors(),
        "flags": [flag for flag in FLAGS if flag in cpu_flags()],
        "memory_gib": round(usable_memory().nbytes / 2**30, 1),
        "system": platform.platform(terse=True),
        "load_average": load,
    }


def cpu_flags() -> frozenset[str]:
    """Instruction sets by Linux's names; empty on other systems."""
    return frozenset(processor_flags() or ())


def has_bf16() -> bool:
    """Whether the processor multiplies bf16 numbers by itself."""
    return bool(cpu_flags() & BF16_FLAGS)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that are installed."""
    return installed_versions(PACKAGES)


def commit() -> str | None:
    """The commit that facetrt runs from, with ``+`` where files were changed; None outside a checkout of it."""
    here = Path(__file__)
    if _git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if head is None else head + ("+" if changes else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
