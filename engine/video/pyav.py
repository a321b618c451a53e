"""PyAV, which reads and writes every video file and network stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from facetrt.kernels.errors import MissingDependencyError


def import_av() -> Any:
    """The library; raises :class:`MissingDependencyError`, which names the extras, if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            "videos need PyAV, which is not installed: pip install 'facetrt[cpu]' (or 'facetrt[gpu]' with CUDA)"
        ) from error
    return av


def open_file(path: Path) -> Any:
    """PyAV's container of a file, whatever its name: colons are no address."""
    return import_av().open(f"file:{path}", metadata_errors="ignore")
