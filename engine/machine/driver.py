"""The GPU driver of this machine."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def driver_version() -> str | None:
    """The version of NVIDIA's driver, like ``580.65.06``; None if nobody says."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # noqa: BLE001  (an optional library whose errors share no base with anything)
        path = Path("/sys/module/nvidia/version")
        return path.read_text().strip() if path.is_file() else None
