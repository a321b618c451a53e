"""Entry point of the ``facetrt`` command: signals and streams first, then everything that takes time to import."""

from __future__ import annotations

import os
import sys

from facetrt.engine.cli.stopping import Stopped, Stopping
from facetrt.engine.cli.streams import lost_output, open_streams


def main() -> None:
    """Run the command line and end the process with its exit code."""
    _check_system()
    open_streams()
    stopping = Stopping()
    stopping.install()
    from facetrt.engine.cli.app import app, interruption, run
    from facetrt.engine.files import discard_temporaries, is_finishing, on_finished
    from facetrt.export import cli  # noqa: F401  (it registers the commands)

    on_finished(stopping.resume)
    stopping.unwind(interruption, discard_temporaries, is_finishing)
    code: object = 0
    try:
        run(app)
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
    sys.exit(code)  # type: ignore[arg-type]


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
