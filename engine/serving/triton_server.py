"""NVIDIA's Triton Inference Server as a child process: the one on the path, or that of the wheel nvidia-pytriton."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import numpy as np

from facetrt.engine.serving.tensors import MEBIBYTE
from facetrt.engine.settings import Setting, check
from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError, printable

EXECUTABLE = "tritonserver"
WHEEL = "pytriton"
READY_SECONDS = 120.0  # for opening bundles and trying each model once
STOP_SECONDS = 30  # that requests under way have when it is asked to stop
CLOSED_APIS = ("shared-memory", "trace", "logging")  # which name files and memory of this machine
CACHE_MIB = 64
PR_SET_PDEATHSIG = 1
LAST_LINES = 3  # of the log, where no model is named
FAILED = re.compile(r"failed to load '(\w+)' version \d+: \w+: (?:[\w.]+: )?(.*?)(?:\\n|\"|$)", re.MULTILINE)


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens."""

    host: Annotated[str, Setting("Address to listen at; others than this machine's own reach it from 0.0.0.0.")] = (
        "127.0.0.1"
    )
    http_port: Annotated[int, Setting("KServe v2 over HTTP; 0 for none.", minimum=0, maximum=65535)] = 8000
    grpc_port: Annotated[int, Setting("KServe v2 over gRPC; 0 for none.", minimum=0, maximum=65535)] = 8001
    metrics_port: Annotated[int, Setting("Prometheus, at /metrics; 0 for none.", minimum=0, maximum=65535)] = 8002
    response_cache: Annotated[bool, Setting("Answer repeated requests from memory.")] = False
    model_control: Annotated[bool, Setting("Let clients unload and load models.")] = False

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Installation:
    """A Triton, and what it needs to run Python models in this very environment.

    Attributes:
        backends: folder of its backends; None for its own.
        libraries: folders that its processes load from.
    """

    executable: Path
    backends: Path | None = None
    caches: Path | None = None
    libraries: tuple[Path, ...] = ()

    @staticmethod
    def find(work: Path) -> Installation:
        """The server on the path, or the wheel's.

        Args:
            work: a folder for links to what belongs together.

        Raises:
            MissingDependencyError: there is neither, or the wheel's does not fit this Python or NumPy.
        """
        if found := shutil.which(EXECUTABLE):
            return Installation(Path(found))
        spec = find_spec(WHEEL)  # is not imported: it changes settings of logging
        if spec is None or spec.origin is None:
            raise MissingDependencyError(
                "Triton is not installed: pip install 'facetrt[serve]' (Linux, x86-64), or run the repository of "
                "'facetrt export … --target triton' in NVIDIA's container"
            )
        if int(np.__version__.partition(".")[0]) > 1:
            raise MissingDependencyError(
                f"Triton of nvidia-pytriton reads arrays of NumPy 1 only, and {np.__version__} is installed: install "
                "facetrt[serve] into an environment of its own"
            )
        return _of_wheel(Path(spec.origin).parent, work)

    @cached_property
    def environment(self) -> dict[str, str]:
        """Variables of its process: this Python's environment, whose modules its models import, and libraries."""
        own = dict(os.environ)
        own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])
        folders = [*map(str, self.libraries), own.get("LD_LIBRARY_PATH", "")]
        if self.libraries:
            own["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
        return own

    def flags(self) -> Iterator[str]:
        """Where its parts are."""
        if self.backends is not None:
            yield f"--backend-directory={self.backends}"
        if self.caches is not None:
            yield f"--cache-directory={self.caches}"


def _of_wheel(package: Path, work: Path) -> Installation:
    """The wheel keeps a program for each Python apart from the rest of the backend: links bring them together."""
    home = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise MissingDependencyError(f"nvidia-pytriton has no Triton for Python {version}: use another Python")
    backend = work / "backends" / "python"
    backend.mkdir(parents=True)
    for part in (*(home / "backends" / "python").iterdir(), stub):
        (backend / part.name).symlink_to(part)
    libraries = (package.parent / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"))
    return Installation(home / "bin" / EXECUTABLE, work / "backends", home / "caches", libraries)


class TritonServer:
    """A running server; use as a context manager. Requests under way are finished when it stops.

    Attributes:
        log: the file that it writes to.

    Raises:
        MissingDependencyError: Triton is not installed.
        BackendError: it does not start: the last lines of its log say why.
    """

    def __init__(self, repository: Path, options: ServerOptions, log: Path) -> None:
        self._repository, self._options, self.log = repository, options, log
        self._stack = ExitStack()
        self._id = f"facetrt-{secrets.token_hex(4)}"  # by which it is told from others at the same port

    def __enter__(self) -> Self:
        with ExitStack() as started:
            work = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="facetrt-")))
            installation = Installation.find(work)
            _check_ports(self._options)
            output = started.enter_context(self.log.open("wb"))
            self._process = subprocess.Popen(
                [str(installation.executable), *self._flags(), *installation.flags()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=installation.environment,
                start_new_session=True,  # Ctrl-C is for us, who ask it to stop
                preexec_fn=_end_with_parent,
            )
            started.callback(self._stop)
            self._wait_until_ready()
            self._stack = started.pop_all()
        return self

    def wait(self) -> None:
        """Until the server ends by itself.

        Raises:
            BackendError: always, then.
        """
        self._process.wait()
        raise BackendError(f"Triton ended: {self._last_lines()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _flags(self) -> Iterator[str]:
        options = self._options
        yield f"--model-repository={self._repository}"
        yield f"--id={self._id}"
        yield f"--exit-timeout-secs={STOP_SECONDS}"
        yield "--log-info=false"
        closed = CLOSED_APIS if options.model_control else (*CLOSED_APIS, "model-repository")
        secret = secrets.token_hex()  # which nobody knows
        for name, port in (("http", options.http_port), ("grpc", options.grpc_port)):
            yield f"--allow-{name}={str(bool(port)).lower()}"
            if port:
                yield f"--{name}-port={port}"
                yield f"--{name}-address={options.host}"
        yield f"--http-restricted-api={','.join(closed)}:facetrt={secret}"
        yield f"--grpc-restricted-protocol={','.join(closed)}:facetrt={secret}"
        yield f"--allow-metrics={str(bool(options.metrics_port)).lower()}"
        if options.metrics_port:
            yield f"--metrics-port={options.metrics_port}"
            yield f"--metrics-address={options.host}"
        if options.response_cache:
            yield f"--cache-config=local,size={CACHE_MIB * MEBIBYTE}"
        if options.model_control:
            yield from ("--model-control-mode=explicit", "--load-model=*")

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise BackendError(f"Triton did not start: {self._last_lines()}")
            if self._ready():
                return
            time.sleep(0.1)
        raise BackendError(f"Triton was not ready after {READY_SECONDS:g} s: {self._last_lines()}")

    def _ready(self) -> bool:
        """What HTTP says, where it gives its name, or metrics if there is no HTTP."""
        if self._options.http_port:
            about = self._get(self._options.http_port, "/v2/health/ready") and self._get(self._options.http_port, "/v2")
            return bool(about) and json.loads(about).get("name") == self._id
        return bool(self._get(self._options.metrics_port, "/metrics"))

    def _get(self, port: int, path: str) -> bytes:
        """What is there, or nothing; an empty answer counts as a space."""
        host = "127.0.0.1" if self._options.host == "0.0.0.0" else self._options.host
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(host, port, timeout=2)
            connection.request("GET", path)
            response = connection.getresponse()
            return (response.read() or b" ") if response.status == http.client.OK else b""
        return b""

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS + 5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        except BaseException:  # a second Ctrl-C
            os.killpg(self._process.pid, signal.SIGKILL)
            raise

    def _last_lines(self) -> str:
        """The models that failed and why, or the end of the log."""
        text = self.log.read_text(errors="replace")
        failed = [f"{model}: {printable(why.strip())}" for model, why in FAILED.findall(text)]
        return " | ".join(failed or text.strip().splitlines()[-LAST_LINES:])


def _check_ports(options: ServerOptions) -> None:
    """Raise :class:`InputError` if another program listens where the server is to."""
    for flag, port in (("http", options.http_port), ("grpc", options.grpc_port), ("metrics", options.metrics_port)):
        if not port:
            continue
        try:
            with socket.create_server((options.host, port)):
                pass
        except OSError as error:
            raise InputError(
                f"cannot listen at {options.host}:{port} ({error.strerror}): choose another --{flag}-port or --host"
            ) from error


def _end_with_parent() -> None:
    """Ask Linux to stop this process when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
