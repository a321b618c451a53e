"""Compile the device kernels ahead of time into a bundle: one cubin per program and architecture, and an index.

Compilation runs in child processes of its own: triton compiles nothing in a process that imported it as an interpreter,
and several processors share the work. No GPU is needed. ``python -m facetrt.export.kernels`` is such a child.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from facetrt.kernels.device import catalogue
from facetrt.kernels.device.runtime.cubins import (
    ARCHITECTURES,
    INDEX,
    PROGRAMS,
    SCHEMA,
    SHARED_LIMITS,
    SPECIFIC_FROM,
    CompiledKernel,
    program_digest,
    source_digest,
)
from facetrt.kernels.device.runtime.program import ALIGNMENT, POINTERS, Program
from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError
from facetrt.kernels.machine import processors

FOLDER = "kernels"
HIDDEN = 2  # pointers that triton appends: global and profile scratch memory
Report = Callable[[str], None]

_REFUSED = 3  # exit status of a child whose standard error is a message for the user
_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}
_PLAIN = {  # metadata of triton, and the values that an ordinary launch needs
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "launch_pdl": False,
    "launch_cooperative_grid": False,
    "num_ctas": 1,
    "cluster_dims": (1, 1, 1),
}
_Job = tuple[str, str]  # architecture, program


def parse_architectures(text: str) -> tuple[str, ...]:
    """``all``, ``none``, or names like ``sm_80,sm_90``, also written ``sm80`` as for a plan.

    Raises:
        InputError: a name that is not one of :data:`ARCHITECTURES`.
    """
    if text in ("all", "none"):
        return ARCHITECTURES if text == "all" else ()
    names = tuple(dict.fromkeys(re.sub(r"^sm_?", "sm_", name.strip().lower()) for name in text.split(",")))
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise InputError(
            f"kernels for {', '.join(unknown)!r}: expected all, none, or some of {','.join(ARCHITECTURES)}"
        )
    return names


def compile_kernels(
    folder: Path,
    architectures: Sequence[str],
    programs: Mapping[str, Program] | None = None,
    report: Report = lambda stage: None,
) -> None:
    """Write ``kernels/ARCHITECTURE/PROGRAM.cubin`` and ``kernels/ARCHITECTURE/kernels.json`` below ``folder``.

    Args:
        folder: of the bundle that is being written.
        architectures: like ``sm_90``.
        programs: all of the catalogue by default.
        report: called with the name of each stage.

    Raises:
        MissingDependencyError: triton is not installed.
        InputError: an unknown architecture.
        BackendError: a kernel does not compile, or to something that the runtime could not launch.
    """
    names = parse_architectures(",".join(architectures)) if architectures else ()
    try:
        triton = version("triton")
    except PackageNotFoundError as error:
        raise MissingDependencyError("compiling kernels needs triton: pip install 'facetrt[export]'") from error
    chosen = catalogue.programs() if programs is None else dict(programs)
    for name in names:
        (folder / FOLDER / name).mkdir(parents=True, exist_ok=True)
    report(f"compiling {len(chosen)} kernels for {', '.join(names)}")
    answers = _compile_all(folder / FOLDER, [(name, program) for name in names for program in chosen], chosen)
    for name in names:
        entries = {program: answers[name, program] for program in sorted(chosen)}
        index = {
            "schema": SCHEMA,
            "architecture": name,
            "toolkit": next((entry["toolkit"] for entry in entries.values()), ""),
            "triton": triton,
            "programs": {program: entry["kernel"] for program, entry in entries.items()},
        }
        (folder / FOLDER / name / INDEX).write_text(
            json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )


def _compile_all(folder: Path, jobs: list[_Job], programs: Mapping[str, Program]) -> dict[_Job, dict[str, Any]]:
    count = min(processors(), len(jobs))
    answers: dict[_Job, dict[str, Any]] = {}
    with ThreadPoolExecutor(max(1, count)) as children:
        for share in children.map(lambda start: _run_child(folder, jobs[start::count], programs), range(count)):
            answers.update(share)
    return answers


def _run_child(folder: Path, jobs: list[_Job], programs: Mapping[str, Program]) -> dict[_Job, dict[str, Any]]:
    order = [[architecture, _to_json(programs[name])] for architecture, name in jobs]
    found = subprocess.run(
        [sys.executable, "-P", "-m", "facetrt.export.kernels", str(folder)],
        env=_environment(),
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode == _REFUSED:
        raise BackendError(found.stderr.strip())
    if found.returncode:
        raise BackendError(f"compiling kernels ended with status {found.returncode}: {found.stderr.strip()[-2000:]}")
    return dict(zip(jobs, json.loads(found.stdout), strict=True))


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "TRITON_DISABLE_LINE_INFO": "1"}  # it would put paths of this machine into the bundle


def main(folder: Path) -> int:
    """Compile what standard input orders, and answer with a list in the same order."""
    try:
        answers = [_compile(folder, architecture, _from_json(told)) for architecture, told in json.load(sys.stdin)]
    except BackendError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    json.dump(answers, sys.stdout)
    return 0


def _to_json(program: Program) -> dict[str, Any]:
    return {
        **{entry.name: getattr(program, entry.name) for entry in fields(program)},
        "constants": {**program.constants},
    }


def _from_json(told: dict[str, Any]) -> Program:
    arguments = tuple((name, kind) for name, kind in told["arguments"])
    return Program(**{**told, "arguments": arguments, "divisible": tuple(told["divisible"])})


def _compile(folder: Path, architecture: str, program: Program) -> dict[str, Any]:
    triton, library = import_module("triton"), import_module("triton.backends.nvidia.compiler")
    number = int(architecture.removeprefix("sm_"))
    target = import_module("triton.backends.compiler").GPUTarget("cuda", number, 32)
    options = {"num_warps": program.warps, "num_stages": program.stages}
    try:
        compiled = triton.compile(_source(program), target=target, options=options)
    except Exception as error:  # the compiler's errors have no common class
        raise BackendError(f"{program.name} does not compile for {architecture}: {error}") from error
    code = compiled.asm["cubin"]
    kernel = describe(program, architecture, compiled.metadata, compiled.asm["ptx"], len(code))
    (folder / architecture / f"{program.name}.cubin").write_bytes(code)
    return {"kernel": asdict(kernel), "toolkit": str(library.get_ptxas(number).version)}


def _source(program: Program) -> Any:
    module, _, function = program.source.partition(":")
    divisible = [["tt.divisibility", ALIGNMENT]]
    aligned = [
        number for number, (name, kind) in enumerate(program.arguments) if kind in POINTERS or name in program.divisible
    ]
    return import_module("triton.compiler").ASTSource(
        fn=getattr(import_module(f"{PROGRAMS}.{module}"), function),
        signature={**dict(program.arguments), **dict.fromkeys(program.constants, "constexpr")},
        constexprs=dict(program.constants),
        attrs={(number,): divisible for number in aligned},
    )


def describe(program: Program, architecture: str, metadata: Any, ptx: str, size: int) -> CompiledKernel:
    """The index entry of a compiled program, after checking that the runtime can launch it.

    Raises:
        BackendError: the kernel wants scratch memory, clusters, a dependent or cooperative launch, or more shared
            memory than the architecture has; or its parameters are not those that the program declares.
    """
    wants = {name: getattr(metadata, name, plain) for name, plain in _PLAIN.items()}
    special = [f"{name} = {value}" for name, value in wants.items() if value != _PLAIN[name]]
    if special:
        raise BackendError(f"{program.name} for {architecture}: the runtime cannot launch {', '.join(special)}")
    if metadata.shared > SHARED_LIMITS[architecture]:
        raise BackendError(
            f"{program.name} for {architecture} needs {metadata.shared} bytes of shared memory: "
            f"expected at most {SHARED_LIMITS[architecture]}"
        )
    _check_parameters(program, metadata.name, ptx)
    specific = re.search(r"^\.target sm_\d+[af]", ptx, re.MULTILINE) is not None
    if specific != (int(architecture.removeprefix("sm_")) >= 10 * SPECIFIC_FROM):
        raise BackendError(f"{program.name} for {architecture}: unexpected target: this version of triton is unknown")
    return CompiledKernel(
        symbol=metadata.name,
        shared=metadata.shared,
        warps=metadata.num_warps,
        arguments=program.arguments,
        hidden=HIDDEN,
        size=size,
        program=program_digest(program),
        source=source_digest(program.source),
        specific=specific,
        constants=dict(program.constants),
    )


def _check_parameters(program: Program, symbol: str, ptx: str) -> None:
    entry = re.search(rf"\.entry\s+{re.escape(symbol)}\s*\((.*?)\)", ptx, re.DOTALL)
    found = re.findall(r"\.param\s+\.(\w+)", entry[1]) if entry else []
    expected = [_PTX_TYPES.get(kind, "u64") for _, kind in program.arguments] + ["u64"] * HIDDEN
    if found != expected:
        raise BackendError(
            f"{program.name} was compiled to parameters {found}: expected {expected}, the last {HIDDEN} of them hidden"
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
