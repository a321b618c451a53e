"""The options of ``Engine.open``, for every command that opens one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from facetrt.engine.backends.run_options import BackendName, DeviceName, Hint, Kernels, Precision, Specialisation
from facetrt.engine.cli.app import errors
from facetrt.engine.engine import Engine
from facetrt.engine.machine.memory import MAX_CELLS

PANEL = "Running the encoder"


def _option(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, rich_help_panel=PANEL, **more)


@dataclass(frozen=True)
class Opening:
    """How the user wants the encoder to be run. Field by field the command line's options."""

    backend: Annotated[BackendName, _option("--backend", "Who runs it.")] = BackendName.AUTO
    device: Annotated[DeviceName, _option("--device", "Where.")] = DeviceName.AUTO
    precision: Annotated[
        Precision, _option("--precision", "Auto is the bundle's own; fastest is bf16 where that is exact enough.")
    ] = Precision.AUTO
    hint: Annotated[Hint, _option("--hint", "One batch at a time, or several side by side.")] = Hint.LATENCY
    threads: Annotated[int | None, _option("--threads", "Of the processor; all cores by default.", min=1)] = None
    cache: Annotated[Path | None, _option("--cache", "Folder for compiled encoders (openvino, tensorrt-rtx).")] = None
    streams: Annotated[int, _option("--streams", "Of a GPU: batches that overlap.", min=1)] = 1
    kernels: Annotated[
        Kernels, _option("--kernels", "Where match and cosegment do the rest; auto is beside the encoder.")
    ] = Kernels.AUTO
    allow_inexact: Annotated[
        bool, _option("--allow-inexact", "Run a precision although it misses its contract with this bundle.")
    ] = False
    max_cells: Annotated[
        int, _option("--max-cells", "An image of more is refused: time grows with their square.", min=1)
    ] = MAX_CELLS
    specialisation: Annotated[
        Specialisation, _option("--specialisation", "When tensorrt-rtx compiles kernels for new image sizes.")
    ] = Specialisation.EAGER

    def engine(self, bundle: str | Path) -> Engine:
        """Open a bundle; what runs is said where something was asked for or left to facetrt."""
        engine = Engine.open(bundle, **{field.name: getattr(self, field.name) for field in fields(self)})
        if (self.backend, self.device, self.precision) != (BackendName.AUTO, DeviceName.AUTO, Precision.AUTO):
            errors.print(f"running {engine.backend} in {engine.precision} on {engine.device}")
        return engine


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :class:`Opening`, in place of its parameter ``opening``."""
    hints = get_type_hints(command, include_extras=True)
    options = get_type_hints(Opening, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        parameter.replace(annotation=hints[name], kind=keyword)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "opening"
    ]
    parameters += [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=options[field.name])
        for field in fields(Opening)
    ]

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        opening = Opening(**{field.name: arguments.pop(field.name) for field in fields(Opening)})
        command(**arguments, opening=opening)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapper.__wrapped__
    return wrapper
