"""Options given as text (``name=value``) become fields of a protocol's options; unknown names are errors."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, TypeVar

from facetrt.engine.evaluation.protocol import Options
from facetrt.kernels.errors import InputError

T = TypeVar("T", bound=Options)

TRUE, FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})


def make_options(kind: type[T], changes: Mapping[str, Any]) -> T:
    """``kind`` with some fields changed; texts are read by the field's type.

    Raises:
        InputError: an unknown name, or a text that does not fit; the message lists what there is.
    """
    hints = typing.get_type_hints(kind)
    unknown = [name for name in changes if name not in hints]
    if unknown:
        known = ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(kind))
        raise InputError(f"there is no option {unknown[0]!r} here: expected one of {known}")
    return kind(**{name: _read(name, value, hints[name]) for name, value in changes.items()})


def parse_settings(settings: Iterable[str]) -> dict[str, str]:
    """``["radius=24"]`` as a dictionary."""
    parsed = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise InputError(f"{setting!r}: expected NAME=VALUE, for example radius=24")
        parsed[name.strip().replace("-", "_")] = value.strip()
    return parsed


def _read(name: str, value: Any, kind: Any) -> Any:
    kinds = typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)
    text = "none" if value is None else "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    for one in kinds:
        try:
            return _read_as(text, one)
        except ValueError:
            continue
    expected = " or ".join(_describe(one) for one in kinds)
    raise InputError(f"option {name}={value!r}: expected {expected}")


def _read_as(text: str, kind: Any) -> Any:
    if kind is type(None):
        if text.lower() not in ("none", "all"):
            raise ValueError(text)
        return None
    if kind is bool:
        return _boolean(text)
    if typing.get_origin(kind) is tuple:
        height, cross, width = text.lower().partition("x")
        if not cross:
            raise ValueError(text)
        return int(height), int(width)
    return kind(text)


def _boolean(text: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(text)


def _describe(kind: Any) -> str:
    if kind is type(None):
        return "none"
    if typing.get_origin(kind) is tuple:
        return "HEIGHTxWIDTH"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return " or ".join(kind)
    return {bool: "yes or no", int: "a whole number", float: "a number"}.get(kind, str(kind))
