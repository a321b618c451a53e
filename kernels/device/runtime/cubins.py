"""Compiled kernels of a bundle as the runtime reads them: cubins and what their launches need."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any

from facetrt.kernels.device.runtime.program import POINTERS, SCALARS, Program
from facetrt.kernels.errors import BackendError, BundleError

SCHEMA = 1
INDEX = "kernels.json"
PROGRAMS = "facetrt.kernels.device.programs"
SHARED_LIMITS = {  # bytes of shared memory that one block may have, by architecture
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
ARCHITECTURES = tuple(SHARED_LIMITS)
SPECIFIC_FROM = 9  # from this compute capability on, kernels are compiled for exactly one architecture (sm_90a)
# Embedded chips: NVIDIA promises no binary compatibility among them, nor between them and others.
EMBEDDED = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0)})

_INDEX_LIMIT = 4 << 20
_CUBIN_LIMIT = 16 << 20
_PROGRAM_LIMIT = 1024
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_ARCHITECTURE = re.compile(r"sm_([1-9]\d?)(\d)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def program_digest(program: Program) -> str:
    """SHA-256 of everything that a program declares."""
    declared = {entry.name: getattr(program, entry.name) for entry in fields(program)}
    declared["constants"] = dict(program.constants)
    return hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()


@cache
def source_digest(source: str) -> str:
    """SHA-256 of the Triton source of a ``module:function``, with that of the program modules which it imports."""
    digest = hashlib.sha256()
    for module in sorted(_modules(source.partition(":")[0], set())):
        digest.update(f"{module}\n".encode() + _text(module) + b"\0")
    return digest.hexdigest()


def _modules(module: str, known: set[str]) -> set[str]:
    known.add(module)
    for node in ast.walk(ast.parse(_text(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PROGRAMS):
            inner = str(node.module).removeprefix(PROGRAMS).removeprefix(".")
            for imported in [inner] if inner else [name.name for name in node.names]:
                if imported not in known:
                    _modules(imported, known)
    return known


def _text(module: str) -> bytes:
    # The folder is a plain package of the wheel; reading the text imports nothing, least of all triton.
    return files("facetrt.kernels.device").joinpath("programs", f"{module}.py").read_bytes()


@dataclass(frozen=True)
class CompiledKernel:
    """One entry of the index.

    Attributes:
        symbol: of the kernel in its cubin.
        shared: bytes of dynamic shared memory.
        warps: of 32 threads, per block.
        arguments: names and Triton types, in order.
        hidden: pointers behind the arguments, which are passed as null.
        size: of the cubin in bytes.
        program, source: digests of what was compiled.
        specific: runs on exactly the architecture that it was compiled for.
        constants: that it was compiled with, for the reader.
    """

    symbol: str
    shared: int
    warps: int
    arguments: tuple[tuple[str, str], ...]
    hidden: int
    size: int
    program: str
    source: str
    specific: bool
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelSet:
    """The kernels of one architecture.

    Attributes:
        architecture: like ``sm_90``.
        toolkit: CUDA version that compiled them; drivers of an older major version cannot load them.
        kernels: by the name of the program.
        read_cubin: gives the bytes of a file beside the index.
    """

    architecture: str
    toolkit: str
    kernels: Mapping[str, CompiledKernel]
    read_cubin: Callable[[str], bytes] = field(repr=False)

    @classmethod
    def read(cls, index: bytes, read: Callable[[str], bytes]) -> KernelSet:
        """Read the content of ``kernels.json``; ``read`` gives the files beside it, by name, when they are needed.

        Raises:
            BundleError: an index that is damaged, too large, or of an unknown schema.
        """
        if len(index) > _INDEX_LIMIT:
            raise BundleError(f"{INDEX} has {len(index)} bytes: expected at most {_INDEX_LIMIT}")
        try:
            found = json.loads(index)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{INDEX} is no JSON: {error}") from error
        _keys(found, {"schema", "architecture", "toolkit", "triton", "programs"}, INDEX)
        if found["schema"] != SCHEMA:
            raise BundleError(f"{INDEX} has schema {found['schema']!r}: this version reads {SCHEMA}; export again")
        architecture = _matching(_ARCHITECTURE, found["architecture"], "architecture")
        programs = found["programs"]
        if not isinstance(programs, dict) or len(programs) > _PROGRAM_LIMIT:
            raise BundleError(f"{INDEX}: programs: expected an object of at most {_PROGRAM_LIMIT} entries")
        kernels = {_matching(_NAME, name, "program"): _kernel(name, entry) for name, entry in programs.items()}
        return cls(architecture, _text_field(found["toolkit"], "toolkit"), kernels, read)

    def find(self, program: Program) -> CompiledKernel:
        """What ``program`` was compiled to.

        Raises:
            BackendError: it is not among the kernels, or was compiled from something else.
        """
        kernel = self.kernels.get(program.name)
        if kernel is None:
            raise BackendError(f"the bundle's kernels for {self.architecture} lack {program.name}: {self._remedy()}")
        if kernel.program != program_digest(program) or kernel.source != source_digest(program.source):
            raise BackendError(
                f"the bundle's kernel {program.name} was compiled by another version of facetrt: {self._remedy()}"
            )
        return kernel

    def cubin(self, program: Program) -> bytes:
        """The machine code of ``program``.

        Raises:
            BackendError: as :meth:`find`.
            BundleError: the file is not what the index describes.
        """
        kernel = self.find(program)
        code = self.read_cubin(f"{program.name}.cubin")
        if len(code) != kernel.size or not code.startswith(b"\x7fELF"):
            raise BundleError(
                f"{program.name}.cubin is damaged: {len(code)} bytes: expected an ELF of {kernel.size}; "
                f"{self._remedy()}"
            )
        return code

    def _remedy(self) -> str:
        return remedy(_capability(self.architecture))


def choose_architecture(available: Iterable[str], capability: tuple[int, int]) -> str:
    """Which of a bundle's architectures runs on a device of compute capability ``(major, minor)``.

    That of the device, or by CUDA's binary compatibility the highest lower minor version of the same major version,
    which holds neither for embedded chips nor for architecture-specific code.

    Raises:
        BackendError: none does; names what is there and what to do.
    """
    names = list(available)
    found = _best(names, capability)
    if found is not None:
        return found
    there = ", ".join(sorted(names, key=_capability)) or "none"
    wanted = f"sm_{capability[0]}{capability[1]}"
    raise BackendError(f"kernels missing for this architecture, {wanted}; the bundle has {there}: {remedy(capability)}")


def architecture_to_compile(capability: tuple[int, int]) -> str | None:
    """Which of :data:`ARCHITECTURES` to compile for a device; None if nothing that this version compiles runs there."""
    return _best(ARCHITECTURES, capability)


def remedy(capability: tuple[int, int]) -> str:
    """What to do about kernels that a bundle lacks for a device."""
    wanted = architecture_to_compile(capability)
    if wanted is None:
        return f"{no_kernels(capability)}: use kernels host"
    return f"run facetrt export BUNDLE --kernels {wanted}, or use kernels host"


def no_kernels(capability: tuple[int, int]) -> str:
    """That a device has none in any bundle, in words."""
    return f"this version of facetrt has no kernels for sm_{capability[0]}{capability[1]}"


def _best(available: Iterable[str], capability: tuple[int, int]) -> str | None:
    names = {_capability(name): name for name in available}
    usable = [found for found in names if found == capability or _compatible(found, capability)]
    return names[max(usable)] if usable else None


def _compatible(compiled: tuple[int, int], device: tuple[int, int]) -> bool:
    same = compiled[0] == device[0] and compiled[1] < device[1] and device[0] < SPECIFIC_FROM
    return same and not {compiled, device} & EMBEDDED


def _capability(architecture: str) -> tuple[int, int]:
    found = _ARCHITECTURE.fullmatch(architecture)
    if found is None:
        raise BundleError(f"architecture {architecture!r}: expected a name like sm_90")
    return int(found[1]), int(found[2])


def _kernel(name: str, entry: Any) -> CompiledKernel:
    _keys(entry, set(CompiledKernel.__dataclass_fields__), name)
    arguments = entry["arguments"]
    if not isinstance(arguments, list) or not all(_is_argument(argument) for argument in arguments):
        raise BundleError(f"{INDEX}: {name}: arguments {arguments!r}: expected pairs of name and type")
    if not isinstance(entry["specific"], bool) or not isinstance(entry["constants"], dict):
        raise BundleError(f"{INDEX}: {name}: specific and constants: expected true or false, and an object")
    return CompiledKernel(
        symbol=_matching(_SYMBOL, entry["symbol"], f"{name}: symbol"),
        shared=_integer(entry["shared"], 0, max(SHARED_LIMITS.values()), f"{name}: shared"),
        warps=_integer(entry["warps"], 1, 32, f"{name}: warps"),
        arguments=tuple((str(argument), str(kind)) for argument, kind in arguments),
        hidden=_integer(entry["hidden"], 0, 8, f"{name}: hidden"),
        size=_integer(entry["size"], 1, _CUBIN_LIMIT, f"{name}: size"),
        program=_matching(_DIGEST, entry["program"], f"{name}: program"),
        source=_matching(_DIGEST, entry["source"], f"{name}: source"),
        specific=entry["specific"],
        constants=entry["constants"],
    )


def _is_argument(found: Any) -> bool:
    pair = isinstance(found, list) and len(found) == 2 and all(isinstance(text, str) for text in found)
    return pair and (found[1] in POINTERS or found[1] in SCALARS)


def _keys(found: Any, expected: set[str], what: str) -> None:
    if not isinstance(found, dict) or set(found) != expected:
        given = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise BundleError(f"{what}: keys {given}: expected {sorted(expected)}")


def _matching(pattern: re.Pattern[str], found: Any, what: str) -> str:
    if not isinstance(found, str) or not pattern.fullmatch(found):
        raise BundleError(f"{INDEX}: {what} is {found!r}: expected {pattern.pattern}")
    return found


def _text_field(found: Any, what: str) -> str:
    if not isinstance(found, str) or len(found) > 64:
        raise BundleError(f"{INDEX}: {what} is {found!r}: expected a short text")
    return found


def _integer(found: Any, low: int, high: int, what: str) -> int:
    if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
        raise BundleError(f"{INDEX}: {what} is {found!r}: expected an integer from {low} to {high}")
    return found
