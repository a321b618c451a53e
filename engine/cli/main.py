"""Entry point of the ``facetrt`` command: signals and streams first, then the command that is asked for, and no other.

:data:`COMMANDS` names every command and where it lives. ``facetrt --help`` is made from it alone; a command's module,
with the libraries that it needs, is imported when the command is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from facetrt.engine.cli.stopping import Stopped, Stopping
from facetrt.engine.cli.streams import lost_output, open_streams

if TYPE_CHECKING:
    import typer


class Command(NamedTuple):
    """One command of the program.

    Attributes:
        name: as it is typed.
        place: ``module:function`` that carries it out; its docstring is the command's help.
        group: the panel of ``facetrt --help`` that shows it.
        help: the docstring's first line.
        extra: of the distribution, with what the module imports; empty if it needs none.
    """

    name: str
    place: str
    group: str
    help: str
    extra: str = ""

    def function(self) -> Callable[..., None]:
        """Import what carries the command out.

        Raises:
            MissingDependencyError: if a library is missing that comes with the extra.
        """
        module, _, name = self.place.partition(":")
        try:
            found: Callable[..., None] = getattr(import_module(module), name)
            return found
        except ModuleNotFoundError as error:
            if not self.extra:
                raise
            from facetrt.kernels.errors import MissingDependencyError

            raise MissingDependencyError(
                f"facetrt {self.name} needs {error.name or module}, which is not installed: "
                f"pip install 'facetrt[{self.extra}]'"
            ) from error

    def load(self) -> Any:
        """The command as the parser sees it, with its options."""
        import typer

        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(self.name)(self.function())
        return typer.main.get_command(alone)


START, BUNDLES, TASKS, VIDEO, DATA, MACHINE = "Start", "Bundles", "Tasks", "Video", "Data and scores", "Machine"
COMMANDS = (  # in the order in which people meet them
    Command(
        "demo",
        "facetrt.engine.cli.tasks:demo",
        START,
        "Co-segment and match the photographs that ship with facetrt; no download, no torch.",
    ),
    Command(
        "export",
        "facetrt.export.cli:export",
        BUNDLES,
        "Turn a checkpoint into a bundle, compared with the torch model before it is written; or add to a bundle.",
        extra="export",
    ),
    Command(
        "models",
        "facetrt.export.models_cli:models",
        BUNDLES,
        "List the models that can be exported: patch, size, registers, strides, licence, where weights come from.",
    ),
    Command(
        "info",
        "facetrt.engine.cli.info:info",
        BUNDLES,
        "Check a bundle's files and show what it holds; with --measure also how accurately it runs on this machine.",
    ),
    Command(
        "match",
        "facetrt.engine.cli.tasks:match",
        TASKS,
        "Find corresponding points of two images and draw them side by side.",
    ),
    Command(
        "cosegment",
        "facetrt.engine.cli.tasks:cosegment",
        TASKS,
        "Segment the objects that the images share; masks at the original size, overlays, data.",
    ),
    Command(
        "parts",
        "facetrt.engine.cli.tasks:parts",
        TASKS,
        "Segment the parts that the images' common objects share; part colours mean the same in all images.",
    ),
    Command(
        "discover",
        "facetrt.engine.cli.discovery:discover",
        TASKS,
        "Find the objects in each image by itself, without labels: boxes, masks, overlays, COCO annotations.",
    ),
    Command(
        "found-head",
        "facetrt.engine.cli.discovery:found_head",
        TASKS,
        "Train FOUND's head on photographs without labels: a few hundred numbers that tell foreground from background.",
    ),
    Command(
        "similarity",
        "facetrt.engine.cli.inspection:similarity",
        TASKS,
        "How similar a point of the first image is to every cell of the second.",
    ),
    Command(
        "pca",
        "facetrt.engine.cli.inspection:pca",
        TASKS,
        "Principal components of descriptors as pictures, over all images together or per image.",
    ),
    Command(
        "facets",
        "facetrt.engine.cli.inspection:facets_command",
        TASKS,
        "Compare facets and layers on two images in one figure: joint PCA, and similarity to points of the first.",
    ),
    Command(
        "inspect",
        "facetrt.engine.cli.inspect:inspect",
        TASKS,
        "A page in the browser: click a point and see what is similar everywhere; matches, masks, parts, PCA, objects.",
        extra="inspect",
    ),
    Command(
        "video",
        "facetrt.engine.cli.video:video",
        VIDEO,
        "Follow points or masks through a video, segment it, or show its descriptors; an overlay video and a record.",
    ),
    Command(
        "serve",
        "facetrt.engine.cli.serve:serve",
        DATA,
        "Serve tasks by KServe's protocol, HTTP and gRPC: image files in, points, masks and boxes out. Needs Triton.",
    ),
    Command(
        "extract",
        "facetrt.engine.cli.extract:extract",
        DATA,
        "Write descriptors and saliency of images into a Zarr store, with pictures; continues an interrupted run.",
    ),
    Command(
        "eval",
        "facetrt.engine.cli.evaluation:evaluate_command",
        DATA,
        "Score a bundle on a data set and compare with the paper; run again to continue an interrupted run.",
    ),
    Command(
        "doctor",
        "facetrt.engine.cli.doctor:doctor",
        MACHINE,
        "Show which backends and kernels can run here, and how to mend the rest. Fails if none can.",
    ),
    Command(
        "bench",
        "facetrt.benchmarks.command:bench",
        MACHINE,
        "Measure everything beside baselines in the same run, and hold it against the bars; takes up to ten minutes.",
        extra="bench",
    ),
)


def program(loaded: Callable[[], None] = lambda: None) -> typer.Typer:
    """The command line, whose commands are imported when they are used.

    Args:
        loaded: called when that has happened, before the command reads its options.
    """
    from facetrt.engine.cli.app import frame

    app = frame()
    for command in COMMANDS:
        app.command(command.name, help=command.help, rich_help_panel=command.group, cls=_lazy(command, loaded))(_unused)
    return app


def _lazy(command: Command, loaded: Callable[[], None]) -> type[typer.core.TyperCommand]:
    from typer.core import TyperCommand

    class Lazy(TyperCommand):
        """A command's line in the help; its context, and so all that follows, is the real command's."""

        def make_context(self, *arguments: Any, **options: Any) -> Any:
            real = command.load()
            loaded()
            return real.make_context(*arguments, **options)

    return Lazy


def _unused() -> None:
    """What a command does is in its own module."""


def main() -> None:
    """Run the command line and end the process with its exit code."""
    _check_system()
    open_streams()
    stopping = Stopping()
    stopping.install()
    from facetrt.engine.cli.app import run

    code: str | int | None = 0
    try:
        run(program(lambda: _unwind(stopping)))
    except Stopped:
        stopping.end()
    except SystemExit as left:
        code = left.code
    finally:
        stopping.leave()
    failure = lost_output()
    if failure and not code:
        sys.stderr.write(f"error: standard output cannot be written ({failure}): what was to be printed is lost\n")
        code = 1
    sys.exit(code)


def _unwind(stopping: Stopping) -> None:
    """The libraries are there, and the command begins: from here on there may be something to undo."""
    from facetrt.engine.cli.app import interruption
    from facetrt.engine.files import discard_temporaries, is_finishing, on_finished

    on_finished(stopping.resume)
    stopping.unwind(interruption, discard_temporaries, is_finishing)


def _check_system() -> None:
    if os.name == "posix":  # on others nothing that follows can be imported
        return
    from facetrt.kernels.errors import UnsupportedSystemError
    from facetrt.kernels.machine import check_system

    try:
        check_system()
    except UnsupportedSystemError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
