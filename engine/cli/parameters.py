"""From options to the command line: dataclasses in a command's signature become the options that users see."""

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
from facetrt.kernels.errors import InputError

KEYWORD = inspect.Parameter.KEYWORD_ONLY


class Preset(StrEnum):
    """Which defaults a task starts from."""

    REFERENCE = "reference"
    PAPER = "paper"


PRESET = typer.Option(help="Defaults: of the published code, or those quoted in the paper.")


@dataclasses.dataclass(frozen=True)
class Presets:
    """Beside a dataclass in a command's signature: ``paper`` has what ``--preset paper`` changes in its defaults."""

    paper: Mapping[str, Any]


class Without:
    """Beside a dataclass in a command's signature: fields that are no options of this command."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclasses.dataclass(frozen=True)
class _Group:
    """A parameter of a command that stands for the options of a dataclass."""

    kind: type
    names: list[str]
    presets: Presets | None

    @staticmethod
    def of(hint: Any) -> _Group | None:
        """None for any other parameter."""
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        left_out = [name for extra in extras if isinstance(extra, Without) for name in extra.names]
        names = [field.name for field in dataclasses.fields(kind) if field.name not in left_out]
        return _Group(kind, names, next((extra for extra in extras if isinstance(extra, Presets)), None))

    def parameters(self) -> list[inspect.Parameter]:
        """One for each option. Fields may also carry typer's own annotations instead of a setting."""
        hints, options = get_type_hints(self.kind, include_extras=True), options_of(self.kind)
        made = []
        for field in dataclasses.fields(self.kind):
            if field.name in self.names:
                hint = typed(options[field.name]) if field.name in options else hints[field.name]
                default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
                made.append(inspect.Parameter(field.name, KEYWORD, default=default, annotation=hint))
        if self.presets is not None:
            hint = Annotated[Preset, PRESET]
            made.append(inspect.Parameter("preset", KEYWORD, default=Preset.REFERENCE, annotation=hint))
        return made

    def build(self, arguments: dict[str, Any], given: set[str]) -> Any:
        """The dataclass's instance; what it takes is removed from ``arguments``."""
        chosen = {name: arguments.pop(name) for name in self.names}
        if self.presets is not None and arguments.pop("preset") is Preset.PAPER:
            chosen |= {name: value for name, value in self.presets.paper.items() if name not in given}
        return self.kind(**chosen)


def typed(option: Option) -> Any:
    """The annotation that makes typer offer an option: its type, help, bounds and panel from the setting."""
    setting, name = option.setting, flag(option.name)
    kinds = tuple(kind for kind in option.kinds if kind is not NoneType)
    more: dict[str, Any] = {"help": setting.help, "rich_help_panel": setting.panel}
    if setting.shown is not None:
        more["show_default"] = setting.shown or False
    elif isinstance(option.default, tuple):
        more["show_default"] = "x".join(map(str, option.default))
    if len(kinds) > 1 or not _native(kinds[0]) or setting.read is not None or setting.above is not None:
        more |= {"parser": functools.partial(_parsed, option), "metavar": "FLOAT" if float in kinds else "TEXT"}
        return Annotated[Any, typer.Option(name, **more)]
    if kinds[0] in (int, float):
        more |= {"min": setting.minimum, "max": setting.maximum}
    name = f"{name}/--no-{name[2:]}" if option.default is True else name
    kind = kinds[0] | None if NoneType in option.kinds else kinds[0]
    return Annotated[kind, typer.Option(name, **more)]


def flag(name: str) -> str:
    """What an option is called on the command line."""
    return f"--{name.replace('_', '-')}"


def _native(kind: Any) -> bool:
    """Whether typer reads a type as we do."""
    return kind in (int, float, str, bool, Path) or (isinstance(kind, type) and issubclass(kind, StrEnum))


def _parsed(option: Option, given: Any) -> Any:
    """What a text on the command line means; defaults pass as they are."""
    if not isinstance(given, str):
        return given
    try:
        return option.read(given)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the dataclasses in its signature; it gets their instances.

    Raises:
        TypeError: two parameters share the name of an option.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, _Group] = {}
    parameters = [inspect.Parameter("context", KEYWORD, annotation=typer.Context)]
    for name, parameter in inspect.signature(command).parameters.items():
        group = _Group.of(hints[name])
        if group is not None:
            groups[name] = group
            parameters += group.parameters()
        elif hints[name] is not typer.Context:
            parameters.append(parameter.replace(annotation=hints[name], kind=KEYWORD))
    signature = inspect.Signature(parameters)  # refuses a name that is there twice

    def wrapper(context: typer.Context, **arguments: Any) -> None:
        made = {name: group.build(arguments, given(context)) for name, group in groups.items()}
        own = {name: context for name, hint in hints.items() if hint is typer.Context}
        command(**arguments, **made, **own)

    functools.update_wrapper(wrapper, command)
    vars(wrapper).pop("__wrapped__")
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(wrapper)["__signature__"] = signature
    return wrapper


def given(context: typer.Context) -> set[str]:
    """Names of the parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
