"""``facetrt serve``: tasks of a bundle behind Triton, until it is stopped. Parse, write a repository, run it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.cli.app import BUNDLE_HELP, BUNDLE_VARIABLE, console, errors, no_bundle
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.engine import Engine
from facetrt.engine.serving.tasks import TaskOptions, make_tasks
from facetrt.engine.serving.triton_config import EncoderPlatform, QueueOptions, RepositoryOptions
from facetrt.engine.serving.triton_repository import write_repository
from facetrt.engine.serving.triton_server import ServerOptions, TritonServer
from facetrt.engine.settings import values_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Served:
    """What is served."""

    bundle: Annotated[
        str,
        typer.Argument(
            help=f"{BUNDLE_HELP} Required, here or in the variable.",
            envvar=BUNDLE_VARIABLE,
            default_factory=lambda: no_bundle(""),
            show_default=False,
        ),
    ]


@expanded
def serve(served: Served, tasks: TaskOptions, queue: QueueOptions, server: ServerOptions, running: RunOptions) -> None:
    """Serve tasks by KServe's protocol, HTTP and gRPC: image files in, points, masks and boxes out. Needs Triton.

    Ctrl-C stops it when the requests under way are answered. Clients: tritonclient, or any other of the protocol.
    """
    with Engine.open(served.bundle, **values_of(running)) as engine:
        make_tasks(engine, tasks)  # what cannot be served is said here, in one line
    with tempfile.TemporaryDirectory(prefix="facetrt-serve-") as folder:
        repository = Path(folder) / "models"
        options = RepositoryOptions(encoder=EncoderPlatform.INSIDE, **values_of(queue))
        write_repository(served.bundle, repository, tasks, options, running)
        if server.host not in LOOPBACK:
            errors.print(f"anybody who reaches {server.host} can use it: there is no password")
        with ExitStack() as stack:
            with errors.status("starting Triton"):
                started = stack.enter_context(TritonServer(repository, server, Path(folder) / "triton.log"))
            console.print(_places(server, tasks), soft_wrap=True)
            started.wait()


def _places(server: ServerOptions, tasks: TaskOptions) -> str:
    ports = (("HTTP", server.http_port), ("gRPC", server.grpc_port), ("metrics", server.metrics_port))
    places = ", ".join(f"{name} at {server.host}:{port}" for name, port in ports if port)
    return f"serving {', '.join(tasks.tasks)}: {places}"
