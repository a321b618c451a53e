"""What this machine's processor can do, and which libraries are installed: for choices, and for records of runs."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo, x86 and Arm


def processor_flags() -> set[str] | None:
    """Instruction sets by the names of ``/proc/cpuinfo``; None where the system does not say."""
    found = cpu_field("flags") or cpu_field("Features")
    return set(found.split()) if found else None


def cpu_field(name: str) -> str:
    """A field of the first processor in ``/proc/cpuinfo``, or an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
