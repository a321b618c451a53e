"""TensorRT and TensorRT for RTX: one interface, and what differs between the two, in one table."""

from __future__ import annotations

import importlib
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from facetrt.engine.backends.base import first_line
from facetrt.engine.backends.run_options import BackendName
from facetrt.kernels.errors import MissingDependencyError

NO_MEMORY = re.compile(r"out ?of ?memory|memory .*could not be allocated|MemoryAllocation", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    Attributes:
        backend: the backend that runs its plans, and the export target that builds them.
        title: its name in messages.
        modules: where it may be, the first that imports being taken.
        oldest, newest_major: versions that this was written for.
        install: the command that installs it.
        requirement: what pip takes for a version that fits.
        architectures: all that it runs on; None for any.
        ahead_of_time: whether plans are built anywhere, for a list of architectures, from which the user's GPU gets
            its kernels when they are first needed; otherwise on the GPU that runs them, for it alone.
    """

    backend: BackendName
    title: str
    modules: tuple[str, ...]
    oldest: tuple[int, int]
    newest_major: int
    install: str
    requirement: str
    architectures: tuple[str, ...] | None
    ahead_of_time: bool

    def build_command(self, bundle: object) -> str:
        """The command that builds a plan into a bundle."""
        return f"facetrt export {bundle} --target {self.backend}"

    def covers(self, architecture: str) -> bool:
        """Whether it runs on GPUs of an architecture, like ``sm_90``, at all."""
        return self.architectures is None or architecture in self.architectures


TENSORRT = Flavour(
    backend=BackendName.TENSORRT,
    title="TensorRT",
    modules=("tensorrt",),
    oldest=(10, 16),
    newest_major=11,
    install="pip install 'facetrt[gpu]'",
    requirement="tensorrt>=10.16,<12",
    architectures=None,
    ahead_of_time=False,
)
RTX = Flavour(
    backend=BackendName.TENSORRT_RTX,
    title="TensorRT for RTX",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    oldest=(1, 7),
    newest_major=1,
    install="pip install 'facetrt[rtx]'",
    requirement="tensorrt-rtx-cu13-bindings>=1.7,<2",
    architectures=("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    ahead_of_time=True,
)
FLAVOURS = {flavour.backend: flavour for flavour in (TENSORRT, RTX)}


def import_library(flavour: Flavour) -> Any:
    """The library's module.

    Raises:
        MissingDependencyError: it is not installed, or in a version that this was not written for.
    """
    reasons = []
    for name in flavour.modules:
        try:
            library = importlib.import_module(name)
            break
        except ImportError as error:
            reasons.append(first_line(error))
    else:
        raise MissingDependencyError(
            f"{flavour.title} cannot be imported ({reasons[-1]}): {flavour.install}, or use backend onnxruntime"
        )
    version = version_numbers(library.__version__)
    if version < flavour.oldest or version[0] > flavour.newest_major:
        oldest = ".".join(map(str, flavour.oldest))
        raise MissingDependencyError(
            f"{flavour.title} {library.__version__} is installed: expected {oldest} or newer, up to "
            f"{flavour.newest_major}.x; pip install '{flavour.requirement}'"
        )
    return library


def version_numbers(text: str) -> tuple[int, ...]:
    """``11.4.0.106`` as numbers, so that they compare."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def make_log(library: Any, notes: re.Pattern[str] | None = None) -> Any:
    """A logger that keeps errors, instead of printing them: a call that fails only returns nothing.

    Args:
        notes: also keep what is found in messages of any severity, in ``log.notes``.
    """

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)
            self.notes: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self.errors.append(msg.strip())
            if notes is not None:
                self.notes += notes.findall(msg)

        def last(self) -> str:
            """The last error, which is then forgotten."""
            return self.errors.pop() if self.errors else "TensorRT gave no reason"

        def lacks_memory(self) -> bool:
            """Whether one of the errors is about memory; they are then forgotten."""
            found = any(NO_MEMORY.search(error) for error in self.errors)
            if found:
                self.errors.clear()
            return found

    return Log()
