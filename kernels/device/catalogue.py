"""All programs: what export compiles into a bundle, and what a runtime may launch."""

from __future__ import annotations

from importlib import import_module

from facetrt.kernels.device.runtime.program import Program
from facetrt.kernels.errors import InputError

OPERATIONS = (
    "preprocess",
    "convert",
    "log_bin",
    "best_buddies",
    "select",
    "kmeans",
    "vote",
    "dense_crf",
    "refine",
    "propagate",
    "track",
    "graph",
)


def programs() -> dict[str, Program]:
    """Every program of every operation, by name."""
    found: dict[str, Program] = {}
    for operation in OPERATIONS:
        for program in import_module(f"facetrt.kernels.device.{operation}").PROGRAMS:
            if program.name in found:
                raise InputError(f"two programs are called {program.name}")
            found[program.name] = program
    return found
