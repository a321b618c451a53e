"""What this process may use of its machine: processors and memory, as containers and ``ulimit`` leave them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from facetrt.kernels.errors import UnsupportedSystemError

ROOT = Path("/")
V1, V2 = "cgroup", "cgroup2"  # file systems


def check_system(system: str = os.name) -> None:
    """Raise :class:`UnsupportedSystemError` unless this is a POSIX system: files are locked and limits read its way."""
    if system != "posix":
        raise UnsupportedSystemError(
            f"facetrt runs on Linux and macOS, and this system is {sys.platform}: on Windows use WSL 2"
        )


@dataclass(frozen=True)
class Memory:
    """Bytes that may be used, and whose bound that is, for messages: ``this machine has``."""

    nbytes: int
    bound: str

    def __str__(self) -> str:
        return (
            f"{self.bound} {self.nbytes / 1e9:.1f} GB"
            if self.nbytes >= 1e9
            else f"{self.bound} {self.nbytes / 1e6:.0f} MB"
        )


def usable_memory(root: Path = ROOT) -> Memory:
    """The least of the machine's memory, the container's, and what ``ulimit`` leaves to this process.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    check_system()
    found = [Memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine has")]
    found += [Memory(limit, "this container has") for limit in _memory_limits(root)]
    return min([*found, *_process_limits(root)], key=lambda memory: memory.nbytes)


def _process_limits(root: Path) -> Iterator[Memory]:
    """What ``ulimit -v`` and ``-d`` leave, since they count whatever is mapped, and libraries map gigabytes."""
    import resource

    mapped = _numbers(root / "proc/self/statm")
    for kind, option, column in ((resource.RLIMIT_AS, "-v", 0), (resource.RLIMIT_DATA, "-d", 5)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            used = mapped[column] * os.sysconf("SC_PAGE_SIZE") if len(mapped) > column else 0
            yield Memory(max(0, limit - used), f"ulimit {option} leaves")


def _memory_limits(root: Path) -> Iterator[int]:
    for version, folder in _groups("memory", root):
        yield from _numbers(folder / ("memory.max" if version == V2 else "memory.limit_in_bytes"))[:1]


def processors(root: Path = ROOT) -> int:
    """How many processors this process may use: of those it may run on, as many as its container's share of time."""
    return max(1, min([processors_to_run_on(), *map(math.ceil, _processor_limits(root))]))


def processors_to_run_on() -> int:
    """Without regard to shares of time; what libraries count that start threads of their own accord."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_limits(root: Path) -> Iterator[float]:
    for version, folder in _groups("cpu", root):
        if version == V2:
            numbers = _numbers(folder / "cpu.max")
        else:
            numbers = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        if len(numbers) == 2 and min(numbers) > 0:  # "max" or -1: no limit
            yield numbers[0] / numbers[1]


def _groups(controller: str, root: Path) -> Iterator[tuple[str, Path]]:
    """Version and folder of each control group that bounds this process: its own and those that hold it.

    A process sees its groups as mounted: a container without a namespace of its own has a part of the host's tree.
    """
    paths = dict(_paths(root))
    for version, tree, mounted, controllers in _mounts(root):
        if version == V1 and controller not in controllers:
            continue
        path = Path(paths.get("" if version == V2 else controller, "/"))
        inside = path.relative_to(tree).parts if path.is_relative_to(tree) and ".." not in path.parts else ()
        for depth in range(len(inside), -1, -1):
            yield version, root.joinpath(mounted.lstrip("/"), *inside[:depth])


def _paths(root: Path) -> Iterator[tuple[str, str]]:
    """Controllers, and the path of this process's group in their tree; the tree of version 2 has the empty name."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for controller in controllers.split(","):
            yield controller, path


def _mounts(root: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """File system, which part of its tree, where it is mounted, and its options, of mounted control groups."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) > 4 and kind[0] in (V1, V2):
            yield kind[0], _unescaped(fields[3]), _unescaped(fields[4]), kind[-1].split(",")


def _unescaped(path: str) -> str:
    for character in " \t\n\\":
        path = path.replace(f"\\{ord(character):03o}", character)
    return path


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not there, as on other systems
        return []


def _numbers(path: Path) -> list[int]:
    """The whole numbers that a file begins with."""
    numbers: list[int] = []
    for word in " ".join(_lines(path)).split():
        if not word.lstrip("-").isdecimal():
            break
        numbers.append(int(word))
    return numbers
