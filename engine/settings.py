"""Options, each written once: its type, default, bounds and help text, and everything that follows from them.

An option is a field of a frozen dataclass whose annotation carries a :class:`Setting`::

    num_pairs: Annotated[int, Setting("At most this many point pairs.", minimum=1, maximum=10_000)] = 10

From it come the checks of the value (:func:`check`), what a text like ``num_pairs=20`` means (:func:`read_options`) and
the command line's options (:mod:`facetrt.engine.cli.parameters`).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, TypeVar

from facetrt.kernels.errors import InputError

Choice = TypeVar("Choice", bound=StrEnum)
Options = TypeVar("Options")

NONE: Any = types.NoneType
NONE_WORDS = frozenset({"none", "all"})
TRUE, FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an option means and which values it takes. Without bounds any number will do, if it is finite.

    Attributes:
        help: one sentence for people; the command line shows it.
        minimum: the smallest value, and ``maximum`` the largest.
        above: a bound that values must exceed.
        expected: which values are taken, in words, where the bounds do not say it well.
        shown: how that help calls the default, where the field's own does not tell.
        panel: the group of options that it belongs to in that help.
        flag: its name on the command line, where that is another than the field's.
        read: how a text becomes the value, where the type alone does not say it; raises :class:`InputError`.
    """

    help: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    expected: str | None = None
    shown: str | None = None
    panel: str | None = None
    flag: str | None = None
    read: Callable[[str], Any] | None = None

    def holds(self, value: float) -> bool:
        """Whether a number keeps the bounds."""
        low = self.minimum is None or value >= self.minimum
        high = self.maximum is None or value <= self.maximum
        return low and high and (self.above is None or value > self.above)

    @property
    def bounds(self) -> str | None:
        """The bounds in words; None if there are none."""
        low, high = (None if bound is None else f"{bound:,}" for bound in (self.minimum, self.maximum))
        if self.above is not None:
            return f"more than {self.above:,}" + ("" if high is None else f", at most {high}")
        if low is not None:
            return f"at least {low}" if high is None else f"{low} to {high}"
        return None if high is None else f"at most {high}"


def read_facet(text: str) -> str:
    """A facet's name as it was typed; an empty one would stand for no choice."""
    if not text:
        raise InputError("the facet '' was not exported: expected KIND@LAYER, one of those that 'facetrt info' lists")
    return text


BUNDLES_CHOICE = ""  # a facet that nobody chose: the bundle names one for each task
FacetChoice = Annotated[
    str,
    Setting(
        "KIND@LAYER, one of those that 'facetrt info' lists; the bundle's own choice by default.",
        shown="",
        read=read_facet,
    ),
]
Hierarchy = Annotated[
    int,
    Setting(
        "Levels of log-binning of descriptors; 0 for none.",
        minimum=0,
        maximum=6,
        expected="0 (no binning) to 6; the method uses 2",
    ),
]


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a dataclass: a field, what it may hold, and its setting.

    ``kinds`` are the types that a value may have; ``default`` is ``dataclasses.MISSING`` where one must be given.
    """

    name: str
    kinds: tuple[Any, ...]
    setting: Setting
    default: Any

    @property
    def flag(self) -> str:
        """What it is called on the command line."""
        return f"--{(self.setting.flag or self.name).replace('_', '-')}"

    def expected(self, *, number: bool) -> str:
        """Which values are taken, in words. Where a ``number`` was given, its bounds say it."""
        if self.setting.expected is not None:
            return self.setting.expected
        return " or ".join(self._expected_of(kind, number=number) for kind in self.kinds)

    def _expected_of(self, kind: Any, *, number: bool) -> str:
        bounds = self.setting.bounds if kind in (int, float) else None
        if bounds is None:
            return _describe(kind)
        return bounds if number else f"{_describe(kind)}, {bounds}"

    def checked(self, value: Any) -> Any:
        """``value`` as the field holds it.

        Raises:
            InputError: another type, out of bounds, not finite, or a name that there is not.
        """
        if getattr(value, "shape", None) == ():
            value = value.item()  # of an array library: Python's own number
        choices = [kind for kind in self.kinds if _is_choice(kind)]
        if isinstance(value, str) and choices:
            return parse(choices[0], value, self.name)
        fitting = [kind for kind in self.kinds if _fits(value, kind)]
        for kind in fitting:
            if kind not in (int, float) or self.setting.holds(value):
                return kind(value) if kind in (bool, Path) else value
        raise InputError(f"{self.name}={value!r}: expected {self.expected(number=bool(fitting))}")

    def read(self, text: str) -> Any:
        """The value that a text means, checked.

        Raises:
            InputError: it means none.
        """
        if self.setting.read is not None:
            return self.checked(self.setting.read(text.strip()))
        for kind in sorted(self.kinds, key=lambda kind: kind is not NONE):
            try:
                value = _read(text.strip(), kind)
            except InputError:
                raise
            except ValueError:
                continue
            return self.checked(value)
        raise InputError(f"{self.name}={text!r}: expected {self.expected(number=False)}")


@cache
def options_of(kind: Any) -> dict[str, Option]:
    """The options of a dataclass by name: those of its fields that have a setting, of their own or of a base's."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):
        setting = _setting(kind, field.name, hints[field.name])
        if setting is not None:
            found[field.name] = Option(field.name, _kinds(hints[field.name]), setting, field.default)
    return found


def values_of(options: Any, kind: Any = None, *, without: Iterable[str] = ()) -> dict[str, Any]:
    """An instance's options by name: all of them, or those that another dataclass ``kind`` has as well."""
    names: Any = type(options) if kind is None else kind
    return {name: getattr(options, name) for name in options_of(names) if name not in without}


def check(options: Any) -> None:
    """Check all options of a dataclass's instance, and put names of choices into their enumerations.

    For ``__post_init__``, also of frozen ones.

    Raises:
        InputError: ``num_pairs=0: expected at least 1``.
    """
    kind: Any = type(options)
    for name, option in options_of(kind).items():
        object.__setattr__(options, name, option.checked(getattr(options, name)))


def parse(choices: type[Choice], text: str, what: str) -> Choice:
    """A choice by its name; ``what`` says in the message of what.

    Raises:
        InputError: there is no such choice; the message lists all.
    """
    try:
        return choices(text)
    except ValueError as error:
        raise InputError(f"{what} {text!r}: expected {_describe(choices)}") from error


def parse_several(choices: type[Choice], text: str, what: str) -> tuple[Choice, ...]:
    """Choices that are joined by commas, each once.

    Raises:
        InputError: an unknown one, or one twice.
    """
    found = tuple(parse(choices, part.strip(), what) for part in text.split(","))
    if len(set(found)) < len(found):
        raise InputError(f"{what} {text!r}: expected each {what} once")
    return found


def read_options(kind: type[Options], changes: Mapping[str, Any]) -> Options:
    """``kind`` with some options changed; texts are read by the option's type.

    Raises:
        InputError: an unknown name, or a value that does not fit; the message lists what there is.
    """
    any_kind: Any = kind  # mypy does not take a type variable's type for hashable
    known = options_of(any_kind)
    if unknown := [name for name in changes if name not in known]:
        listed = ", ".join(f"{option.name}={option.default}" for option in known.values())
        raise InputError(f"there is no option {unknown[0]!r} here: expected one of {listed}")
    read = {name: known[name].read(value) if isinstance(value, str) else value for name, value in changes.items()}
    return kind(**read)


def split_settings(settings: Iterable[str]) -> dict[str, str]:
    """``["radius=24"]`` as a dictionary."""
    parsed = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise InputError(f"{setting!r}: expected NAME=VALUE, for example radius=24")
        parsed[name.strip().replace("-", "_")] = value.strip()
    return parsed


def _setting(kind: type, name: str, hint: Any) -> Setting | None:
    """A field's setting; one whose default alone a subclass changes keeps that of the base."""
    own = [setting for setting in getattr(hint, "__metadata__", ()) if isinstance(setting, Setting)]
    bases = [base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = [options_of(base)[name].setting for base in bases if name in options_of(base)]
    return next(iter([*own, *inherited]), None)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, without the settings in it."""
    if typing.get_origin(hint) is Annotated:
        return _kinds(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    return (hint,)


def _fits(value: Any, kind: Any) -> bool:
    if kind is bool:
        return isinstance(value, int) and value in (0, 1)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and (kind is int or math.isfinite(value))
    if kind is Path:
        return isinstance(value, (str, Path))
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(part, parts[0]) for part in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return isinstance(value, kind)


def _read(text: str, kind: Any) -> Any:
    """The value of one type that a text means, or :class:`ValueError`."""
    if kind is NONE:
        if text.lower() not in NONE_WORDS:
            raise ValueError(text)
        return None
    if kind is bool:
        if text.lower() not in TRUE | FALSE:
            raise ValueError(text)
        return text.lower() in TRUE
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if parts[-1] is Ellipsis:
            return tuple(_read(part.strip(), parts[0]) for part in text.split(","))
        return tuple(_read(part, one) for part, one in zip(text.lower().split("x"), parts, strict=True))
    if hasattr(kind, "parse"):
        return kind.parse(text)
    return text if _is_choice(kind) else kind(text)


def _is_choice(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, StrEnum)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        return f"{_describe(parts[0])}, or several, comma-separated" if parts[-1] is Ellipsis else "HEIGHTxWIDTH"
    if _is_choice(kind):
        names = list(kind)
        return " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
    words = {
        NONE: "none",
        bool: "yes or no",
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        Path: "a path",
    }
    return words.get(kind, str(getattr(kind, "__name__", kind)).lower())
