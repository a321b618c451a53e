"""Libraries that only the benchmarks need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from facetrt.kernels.errors import MissingDependencyError


def import_library(name: str, *, extra: str = "bench") -> Any:
    """The module, or an error that names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this benchmark needs {error.name or name}, which is not installed: pip install 'facetrt[{extra}]'"
        ) from error
