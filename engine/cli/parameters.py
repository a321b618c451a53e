"""Turning options into the command line: dataclasses in a command's signature become the options that users see.

A command names a dataclass once and gets its instance::

    @expanded
    def match(job: Job, options: Annotated[MatchOptions, Presets(PAPER_MATCH)]) -> None: ...

A field with a :class:`facetrt.engine.settings.Setting` becomes an option with its name, help, bounds, default and
panel; one that carries typer's own annotation, a positional argument for example, is taken as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from facetrt.engine.settings import Option, options_of

KEYWORD = inspect.Parameter.KEYWORD_ONLY


class Preset(StrEnum):
    """Which defaults a task starts from."""

    REFERENCE = "reference"
    PAPER = "paper"


PRESET = typer.Option("--preset", help="Defaults: of the published code, or those quoted in the paper.")


@dataclasses.dataclass(frozen=True)
class Presets:
    """Beside a dataclass in a command's signature: what ``--preset paper`` changes in its defaults."""

    paper: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Group:
    """A parameter of a command that stands for the options of a dataclass."""

    kind: Any
    presets: Presets | None

    @staticmethod
    def of(hint: Any) -> _Group | None:
        """None for any other parameter."""
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        return _Group(kind, next((extra for extra in extras if isinstance(extra, Presets)), None))

    def parameters(self) -> list[inspect.Parameter]:
        """One for each option."""
        hints, options = get_type_hints(self.kind, include_extras=True), options_of(self.kind)
        made = []
        for field in dataclasses.fields(self.kind):
            hint, default = hints[field.name], field.default
            if field.name in options:
                option = options[field.name]
                hint, default = typed(option), written(default) if is_text(option) else default
            default = inspect.Parameter.empty if default is dataclasses.MISSING else default
            made.append(inspect.Parameter(field.name, KEYWORD, default=default, annotation=hint))
        if self.presets is not None:
            hint = Annotated[Preset, PRESET]
            made.append(inspect.Parameter("preset", KEYWORD, default=Preset.REFERENCE, annotation=hint))
        return made

    def build(self, arguments: dict[str, Any], given: set[str]) -> Any:
        """The dataclass's instance; what it takes is removed from ``arguments``."""
        options, chosen = options_of(self.kind), {}
        for field in dataclasses.fields(self.kind):
            name, value = field.name, arguments.pop(field.name)
            if name not in options or not is_text(options[name]):
                chosen[name] = value
            elif name in given:
                chosen[name] = options[name].read(value)
        if self.presets is not None and arguments.pop("preset") is Preset.PAPER:
            chosen |= {name: value for name, value in self.presets.paper.items() if name not in given}
        return self.kind(**chosen)


def is_text(option: Option) -> bool:
    """Whether we read an option's text ourselves, because its type or its bounds are beyond typer."""
    kinds = [kind for kind in option.kinds if kind is not NoneType]
    native = kinds[0] in (int, float, str, bool, Path) or (isinstance(kinds[0], type) and issubclass(kinds[0], StrEnum))
    return len(kinds) > 1 or not native or option.setting.read is not None or option.setting.above is not None


def typed(option: Option) -> Any:
    """The annotation that makes typer offer an option."""
    setting, name = option.setting, option.flag
    kinds = [kind for kind in option.kinds if kind is not NoneType]
    more: dict[str, Any] = {"help": setting.help, "rich_help_panel": setting.panel}
    if setting.shown is not None:
        more["show_default"] = setting.shown or False
    if is_text(option):
        more |= {"metavar": "FLOAT" if kinds == [float] else None}
        return Annotated[str | None, typer.Option(name, **more)]
    if kinds[0] in (int, float):
        more |= {"min": setting.minimum, "max": setting.maximum}
    name = f"{name}/--no-{name[2:]}" if option.default is True else name
    kind = kinds[0] | None if NoneType in option.kinds else kinds[0]
    return Annotated[kind, typer.Option(name, **more)]


def written(default: Any) -> str | None:
    """A default as a text that :meth:`facetrt.engine.settings.Option.read` takes."""
    return "x".join(map(str, default)) if isinstance(default, tuple) else None if default is None else str(default)


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the dataclasses in its signature; it gets their instances.

    Raises:
        ValueError: two of them share the name of an option.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, _Group] = {}
    parameters = [inspect.Parameter("context", KEYWORD, annotation=typer.Context)]
    for name, parameter in inspect.signature(command).parameters.items():
        group = _Group.of(hints[name])
        if group is not None:
            groups[name] = group
            parameters += group.parameters()
        elif name != "context":
            parameters.append(parameter.replace(annotation=hints[name], kind=KEYWORD))

    def wrapper(context: typer.Context, **arguments: Any) -> None:
        made = {name: group.build(arguments, given(context)) for name, group in groups.items()}
        if "context" in hints:
            made["context"] = context
        command(**arguments, **made)

    functools.update_wrapper(wrapper, command)
    vars(wrapper).pop("__wrapped__")
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(wrapper)["__signature__"] = inspect.Signature(parameters)
    return wrapper


def given(context: typer.Context) -> set[str]:
    """Names of the parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
