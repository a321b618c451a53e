"""What compiled kernels take of a GPU's multiprocessors, read from their machine code: no GPU is needed.

``python -m facetrt.benchmarks.gpu.resources docs/kernels.md`` compiles every kernel for every architecture, writes the
table, and fails if one of them spills registers.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from facetrt.benchmarks.missing import import_library
from facetrt.benchmarks.results import Row, Spread
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import KERNELS
from facetrt.engine.files import scratch_folder
from facetrt.export.kernels import FOLDER, compile_kernels
from facetrt.kernels.device import catalogue
from facetrt.kernels.device.runtime.cubins import (
    ARCHITECTURES,
    INDEX,
    SHARED_LIMITS,
    KernelSet,
    choose_architecture,
    program_digest,
    source_digest,
)
from facetrt.kernels.errors import BackendError, FacetrtError

SECTION = "kernel resources"

# Of one multiprocessor; the same on all of these architectures. From NVIDIA's cuda_occupancy.h.
_REGISTERS, _PARTITIONS = 64 * 1024, 4  # registers belong to a quarter of the multiprocessor
_REGISTER_UNIT = 256  # a warp gets a multiple of so many
_SHARED_UNIT, _SHARED_RESERVED = 128, 1024  # bytes of a block

_TIMEOUT = 60  # seconds for one file

_TEXT = """\
# Device kernels: registers, shared memory, occupancy

Each cell: registers of a thread / bytes of shared memory of a block / blocks that a multiprocessor holds at a time. A
kernel that spills has `+` and the bytes of a thread that found no register: {spilling}.

Triton {triton}, assembler of CUDA {assemblers}. Written by
`python -m facetrt.benchmarks.gpu.resources docs/kernels.md`, which compiles every kernel for every architecture,
without a GPU; run it after a kernel has changed. Sources: `{digest}`.

{table}
"""


@dataclass(frozen=True)
class _Residents:
    """The most warps and blocks that a multiprocessor holds."""

    warps: int
    blocks: int


_RESIDENTS = {
    "sm_80": _Residents(64, 32),
    "sm_86": _Residents(48, 16),
    "sm_87": _Residents(48, 16),
    "sm_89": _Residents(48, 24),
    "sm_90": _Residents(64, 32),
    "sm_100": _Residents(64, 32),
    "sm_120": _Residents(48, 24),
}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes of local memory of a thread, which holds what found no register.
        shared: bytes of a block.
        warps: of a block.
        blocks: that fit a multiprocessor at a time.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    blocks: int


def read_usage(cubin: Path, symbol: str) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, as Triton's cuobjdump tells them.

    Raises:
        MissingDependencyError: triton is not installed.
        BackendError: cuobjdump is not there, or finds no such kernel in the file.
    """
    try:
        tool = import_library("triton.knobs", extra="export").nvidia.cuobjdump.path
        told = subprocess.run(
            [tool, "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"cuobjdump, which triton brings, cannot read {cubin.name}: {error}") from error
    found = re.search(rf"Function {re.escape(symbol)}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told.stdout)
    if found is None:
        raise BackendError(f"cuobjdump finds no kernel {symbol} in {cubin.name}: {told.stderr.strip()[-500:]}")
    return int(found[1]), int(found[2]) + int(found[3])


def read_resources(kernels: KernelSet) -> dict[str, Resources]:
    """The resources of every program of the catalogue, by name.

    Raises:
        BackendError: as :func:`read_usage`, or the kernels are not those of this version of facetrt.
        BundleError: a damaged file.
    """
    found = {}
    with scratch_folder() as folder:
        for name, program in sorted(catalogue.programs().items()):
            path = folder / f"{name}.cubin"
            path.write_bytes(kernels.cubin(program))
            kernel = kernels.find(program)
            registers, spilled = read_usage(path, kernel.symbol)
            blocks = resident_blocks(kernels.architecture, registers, kernel.shared, kernel.warps)
            found[name] = Resources(registers, spilled, kernel.shared, kernel.warps, blocks)
    return found


def resident_blocks(architecture: str, registers: int, shared: int, warps: int) -> int:
    """How many blocks a multiprocessor holds at a time; the other arguments are as in :class:`Resources`.

    Raises:
        BackendError: an architecture that kernels are not compiled for.
    """
    most = _RESIDENTS.get(architecture)
    if most is None:
        raise BackendError(f"kernels for {architecture}: expected one of {', '.join(_RESIDENTS)}")
    of_warp = _round_up(max(registers, 1) * 32, _REGISTER_UNIT)
    by_registers = _REGISTERS // _PARTITIONS // of_warp * _PARTITIONS // warps
    of_block = _round_up(shared, _SHARED_UNIT) + _SHARED_RESERVED
    by_shared = (SHARED_LIMITS[architecture] + _SHARED_RESERVED) // of_block
    return min(by_registers, by_shared, most.warps // warps, most.blocks)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def measure(bundle: Bundle, architecture: str) -> list[Row]:
    """A row for each of the bundle's kernels that run on a GPU of an ``architecture`` like ``sm_90``."""
    try:
        capability = divmod(int(architecture.removeprefix("sm_")), 10)
        folder = f"{KERNELS}/{choose_architecture(bundle.kernel_architectures(), capability)}"
        kernels = KernelSet.read(bundle.read(f"{folder}/{INDEX}"), lambda name: bundle.read(f"{folder}/{name}"))
        found = read_resources(kernels)
    except FacetrtError as error:
        return [Row(SECTION, "all kernels", None, unit="registers", reason=str(error))]
    return [
        Row(SECTION, name, Spread(float(resources.registers), None, 1), unit="registers", details=_details(resources))
        for name, resources in found.items()
    ]


def _details(resources: Resources) -> dict[str, Any]:
    return {
        "spilled bytes": resources.spilled,
        "shared bytes": resources.shared,
        "warps": resources.warps,
        "blocks per SM": resources.blocks,
    }


def sources_digest() -> str:
    """SHA-256 of everything that the kernels are compiled from."""
    digest = hashlib.sha256()
    for name, program in sorted(catalogue.programs().items()):
        digest.update(f"{name} {program_digest(program)} {source_digest(program.source)}\n".encode())
    return digest.hexdigest()


def main(path: Path) -> int:
    """Write the table of all kernels and architectures; 1 if a kernel spills registers."""
    with scratch_folder() as folder:
        compile_kernels(folder, ARCHITECTURES, report=lambda stage: print(stage, file=sys.stderr))
        sets = [_read_set(folder / FOLDER / architecture) for architecture in ARCHITECTURES]
        found = {kernels.architecture: read_resources(kernels) for kernels in sets}  # cubins are read here
    path.write_text(markdown(found, [kernels.toolkit for kernels in sets]), encoding="utf-8")
    spilling = [f"{n} on {a}: {r.spilled} bytes" for a, of in found.items() for n, r in of.items() if r.spilled]
    print("\n".join(["these kernels spill registers:", *spilling] if spilling else [str(path)]), file=sys.stderr)
    return 1 if spilling else 0


def _read_set(folder: Path) -> KernelSet:
    return KernelSet.read((folder / INDEX).read_bytes(), lambda name: (folder / name).read_bytes())


def markdown(found: Mapping[str, Mapping[str, Resources]], toolkits: Sequence[str]) -> str:
    """The table of ``docs/kernels.md``.

    Args:
        found: resources by architecture and program.
        toolkits: CUDA versions of the assembler, one for each architecture.
    """
    spilling = [resources for of in found.values() for resources in of.values() if resources.spilled]
    names = sorted({name for of in found.values() for name in of})
    rows = [[f"`{name}`", *(_cell(of[name]) for of in found.values())] for name in names]
    columns = ["kernel", *found]
    lines = [columns, ["---"] * len(columns), *rows]
    return _TEXT.format(
        spilling=f"{len(spilling)} do" if spilling else "none does",
        triton=version("triton"),
        assemblers=", ".join(dict.fromkeys(toolkits)),
        digest=sources_digest(),
        table="\n".join("| " + " | ".join(line) + " |" for line in lines),
    )


def _cell(resources: Resources) -> str:
    spilled = f" + {resources.spilled}" if resources.spilled else ""
    return f"{resources.registers}{spilled} / {resources.shared} / {resources.blocks}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
