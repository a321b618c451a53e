"""What a compiled kernel is called, takes and was built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from facetrt.kernels.errors import InputError

Constant = int | float | bool | str

POINTERS: Mapping[str, Any] = MappingProxyType(
    {
        "*fp16": np.float16,
        "*fp32": np.float32,
        "*fp64": np.float64,
        "*i32": np.int32,
        "*i64": np.int64,
        "*u8": np.uint8,
        "*u16": np.uint16,
        "*i16": np.int16,
        "*i8": np.int8,
    }
)
SCALARS = ("i32", "i64", "fp32")
ALIGNMENT = 16  # bytes, of every pointer: kernels are compiled for it


@dataclass(frozen=True)
class Program:
    """One kernel as it is compiled: a Triton function, the types of its arguments, and its constants.

    Attributes:
        name: of the program; names its cubin in a bundle, so it says what sets it apart (``log_bin_fp16``).
        source: ``module:function`` below ``facetrt.kernels.device.programs``.
        arguments: names and Triton types of what is passed at launch, in order; ``*fp16`` is a pointer to float16.
            Pointers are aligned to 16 bytes.
        constants: compile-time parameters, by name.
        divisible: integer arguments that are multiples of 16, which is what lets loads be vectorised.
        warps: of 32 threads, per program instance.
        stages: of software pipelining.
    """

    name: str
    source: str
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        types = dict(self.arguments)
        unknown = [kind for kind in types.values() if kind not in POINTERS and kind not in SCALARS]
        if unknown or not set(self.divisible) <= set(types):
            raise InputError(f"program {self.name}: unknown types {unknown} or divisible {self.divisible}")

    def check(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Raise :class:`InputError` unless a launch passes what the program was compiled for."""
        if not 1 <= len(grid) <= 3 or min(grid) < 1:
            raise InputError(f"{self.name}: grid {grid}: expected one to three positive numbers")
        if len(grid) > 1 and max(grid[1:]) > 0xFFFF:
            raise InputError(f"{self.name}: grid {grid}: expected at most 65,535 in the second and third place")
        if len(arguments) != len(self.arguments):
            raise InputError(f"{self.name} takes {len(self.arguments)} arguments, {len(arguments)} were given")
        for (name, kind), value in zip(self.arguments, arguments, strict=True):
            self._check_argument(name, kind, value)

    def _check_argument(self, name: str, kind: str, value: Any) -> None:
        if kind in POINTERS:
            given = getattr(value, "dtype", None)
            if given != np.dtype(POINTERS[kind]):
                raise InputError(f"{self.name}: {name} has type {given}: expected {np.dtype(POINTERS[kind])}")
            if value.pointer % ALIGNMENT:
                raise InputError(f"{self.name}: {name} starts at an address that is no multiple of {ALIGNMENT} bytes")
        elif kind == "fp32":
            if not isinstance(value, (int, float)):
                raise InputError(f"{self.name}: {name} is {value!r}: expected a number")
        else:
            bits = 31 if kind == "i32" else 63
            if not isinstance(value, int) or not -(1 << bits) <= value < 1 << bits:
                raise InputError(f"{self.name}: {name} is {value!r}: expected an integer of {bits + 1} bits")
            if name in self.divisible and value % 16:
                raise InputError(f"{self.name}: {name} is {value}: expected a multiple of 16")
