"""Packages that show names of many modules, and import a module when one of its names is used."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package whose public names are imported when they are used (as PEP 562 has it, and beyond).

    An operation has the name of its file (``facetrt.kernels.kmeans`` is the function). Python sets a package's
    attribute to the file when the file is imported; here the public name stays.
    """

    _homes: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        try:
            home = self.__dict__["_homes"][name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self) from None
        value = getattr(import_module(home), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__dict__.get("_homes", {})):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def show(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """Give a package public names.

    Args:
        package: its ``__name__``.
        homes: module → names in it.
    """
    module = sys.modules[package]
    module.__class__ = _LazyPackage
    module._homes = {name: home for home, names in homes.items() for name in names}  # type: ignore[attr-defined]
