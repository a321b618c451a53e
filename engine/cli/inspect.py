"""``facetrt inspect``: a page in the browser. Parse, encode, serve."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.cli.app import BundleOption, console, errors, progress_bar
from facetrt.engine.cli.opening import open_engine
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.images.finding import find_images
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSizeChoice
from facetrt.engine.inspector.gallery import MAX_PHOTOS, Gallery, named
from facetrt.engine.inspector.server import make_app
from facetrt.engine.settings import Setting, check
from facetrt.kernels.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Shown:
    """What is shown, and where."""

    bundle: BundleOption
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files or folders of images; more may be dropped on the page.")
    ] = None
    load_size: LoadSizeChoice = DEFAULT_SIZE
    host: Annotated[str, Setting("Address to listen at.")] = "127.0.0.1"
    port: Annotated[int, Setting("Port; 0 for any that is free.", minimum=0, maximum=65535)] = 8700

    def __post_init__(self) -> None:
        check(self)


@expanded
def inspect(shown: Shown, running: RunOptions) -> None:
    """A page in the browser: click a point and see what is similar everywhere; matches, masks, parts, PCA, objects.

    Ctrl-C ends it. Nothing but this machine reaches it unless --host says so, and it asks no other.
    """
    paths = find_images(shown.images) if shown.images else []
    if len(paths) > MAX_PHOTOS:
        raise InputError(f"{len(paths)} images were given: a page shows at most {MAX_PHOTOS}")
    with open_engine(shown.bundle, running) as engine:
        gallery = Gallery(engine, shown.bundle, shown.load_size)
        with progress_bar("encoding", len(paths)) as update:
            for number, image in enumerate(named(paths)):
                for line in gallery.add([image]):
                    errors.print(f"left out: {line}")
                update(number + 1, len(paths))
        with _listening(shown) as listening:
            host, port = shown.host, listening.getsockname()[1]
            if host not in LOOPBACK:
                errors.print(f"anybody who reaches {host} sees these photographs: there is no password")
            hosts = [*LOOPBACK, host] if host != "0.0.0.0" else ["*"]
            console.print(f"http://{host}:{port} (Ctrl-C ends it)", soft_wrap=True)
            config = uvicorn.Config(make_app(gallery, hosts), log_level="warning", access_log=False, lifespan="off")
            uvicorn.Server(config).run([listening])


def _listening(shown: Shown) -> socket.socket:
    try:
        return socket.create_server((shown.host, shown.port))
    except OSError as error:
        raise InputError(
            f"cannot listen at {shown.host}:{shown.port} ({error.strerror}): choose another --port or --host"
        ) from error
