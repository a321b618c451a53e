"""The command line's frame: the program, options shared by commands, progress, and how errors leave it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from facetrt.kernels.errors import FacetrtError, InputError, printable

if TYPE_CHECKING:
    from facetrt.engine.bundle.manifest import Manifest

HELP = "Dense visual descriptors from a frozen DINO ViT: correspondence, co-segmentation, parts, PCA, evaluation."


def frame() -> typer.Typer:
    """The program without its commands."""
    app = typer.Typer(
        name="facetrt", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
    )
    app.callback()(_options)
    return app


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=lambda given: _say_version(given),
            help="Show the installed version and exit.",
        ),
    ] = False,
) -> None:
    """What is asked of the program itself."""


def _say_version(given: bool) -> None:
    if given:
        from facetrt.engine.version import installed_version

        typer.echo(f"facetrt {installed_version()}")
        raise typer.Exit


console = Console(highlight=False, markup=False)  # names of files and models may look like markup
errors = Console(stderr=True, highlight=False, markup=False)


def parse_facets(text: str | None, manifest: Manifest) -> list[str]:
    """Comma-separated facets that the bundle has; all of them for None. Found out before anything is encoded."""
    names = manifest.facets if text is None else [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"facets {text!r}: expected names out of {','.join(manifest.facets)}")
    for name in names:
        if name not in manifest.facets:
            raise InputError(manifest.missing_facet(name))
    return list(dict.fromkeys(names))


BUNDLE_VARIABLE = "FACETRT_BUNDLE"  # names the bundle for every command that opens one
BUNDLE_HELP = "Bundle folder, or 'builtin' for the small model that ships with facetrt."


def no_bundle(how: str = "--bundle ") -> str:
    """Raise :class:`InputError`; ``how`` stands before a bundle on the command line."""
    raise InputError(
        f"no bundle was given: add {how}FOLDER (written by 'facetrt export'), {how}builtin for the small model "
        f"that ships with facetrt, or set {BUNDLE_VARIABLE} for all commands"
    )


BundleOption = Annotated[
    str,
    typer.Option(
        "--bundle",
        "-b",
        help=f"{BUNDLE_HELP} Required, here or in the variable.",
        envvar=BUNDLE_VARIABLE,
        default_factory=no_bundle,
        show_default=False,
    ),
]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Image files or folders of images.", show_default=False)]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it appears complete or not at all.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier result.")]
IntermediateOption = Annotated[
    bool, typer.Option("--save-intermediate", help="Also write saliency maps and what the task saw on the way.")
]


@contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error; yields ``update(done, total)``."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Interruption:
    """What is said when a signal ends the command. A library's Ctrl-C is the caller's; this is the program's alone.

    Attributes:
        requested: whether a signal came; from then on only its own line is printed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._say: list[Callable[[], str]] = []
        self._said: str | None = None

    @contextmanager
    def explained(self, say: Callable[[], str]) -> Iterator[None]:
        """While the block lasts, ``say`` tells what is done and how to go on. The innermost one counts."""
        self._say.append(say)
        try:
            yield
        except BaseException:
            if self.requested and self._said is None:
                self._said = say()
            raise
        finally:
            self._say.remove(say)

    def line(self) -> str:
        """What the command has to say; nothing if it has nothing."""
        return self._said or (self._say[-1]() if self._say else "")


interruption = Interruption()


def run(program: typer.Typer) -> None:
    """Run the command line; errors of facetrt become one line on standard error and an exit code."""
    warnings.showwarning = _show_warning
    try:
        program()
    except FacetrtError as error:
        _say("error:", "bold red", str(error))
        sys.exit(error.exit_code)
    except (OSError, MemoryError) as error:
        _say("error:", "bold red", str(error) or type(error).__name__)
        sys.exit(1)


def _say(word: str, style: str, message: str) -> None:
    """One line on standard error."""
    if not interruption.requested:
        errors.print(Text.assemble((word, style), " ", printable(message)), soft_wrap=True)


def note(message: str) -> None:
    """One line on standard error that is not an error."""
    _say("note:", "yellow", message)


def _show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    """A warning as a note, but for Pillow's of large images: the bound on pixels is ours, and says what to do."""
    if type(message).__name__ != "DecompressionBombWarning":  # by name: Pillow is not imported for every command
        note(str(message))
