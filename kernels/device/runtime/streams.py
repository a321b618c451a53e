"""What pycuda has no calls for, through NVIDIA's ``cuda.bindings``: order between foreign streams, captured graphs.

Streams are plain handles here, and the context that they belong to must be current.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError


def context_of(stream: int) -> int:
    """Handle of the context that a stream belongs to; that of the current context for the default stream."""
    return int(_call("cuStreamGetCtx", _stream(stream)))


def order(first: int, then: int) -> None:
    """Let everything put on stream ``then`` from now on wait for what is on stream ``first`` by now."""
    event = _call("cuEventCreate", int(_driver().CUevent_flags.CU_EVENT_DISABLE_TIMING))
    try:
        _call("cuEventRecord", event, _stream(first))
        _call("cuStreamWaitEvent", _stream(then), event, 0)
    finally:
        _call("cuEventDestroy", event)  # the driver keeps it until the wait is over


class CapturedGraph:
    """Work recorded from a stream, launched again as a whole: one call to the driver for all of its kernels.

    Addresses are recorded, not contents: inputs are replaced by copying into the same arrays. ``kept`` holds what the
    recorded work uses, so that its memory is not handed out again while the graph can be launched.
    """

    def __init__(self, stream: int) -> None:
        self.kept: list[Any] = []
        self._stream = _stream(stream)
        self._executable: Any = None
        # Relaxed, because allocations while recording are meant: they are not part of the recorded work.
        _call("cuStreamBeginCapture", self._stream, _driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)

    def finish(self) -> None:
        """End recording, and prepare for launches."""
        graph = _call("cuStreamEndCapture", self._stream)
        try:
            self._executable = _call("cuGraphInstantiate", graph, 0)
        finally:
            _call("cuGraphDestroy", graph)

    def abandon(self) -> None:
        """End recording after a failure; what was recorded is dropped."""
        result, graph = _driver().cuStreamEndCapture(self._stream)
        if result == _driver().CUresult.CUDA_SUCCESS:
            _call("cuGraphDestroy", graph)
        self.kept.clear()

    def launch(self) -> None:
        """Put the recorded work on the stream that it was recorded from.

        Raises:
            InputError: recording has not ended, failed, or the graph was closed.
        """
        if self._executable is None:
            raise InputError("a graph can be launched from the end of its recording until it is closed")
        _call("cuGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Give back the graph and the memory that it kept. Its launches must have ended."""
        if self._executable is not None:
            executable, self._executable = self._executable, None
            _call("cuGraphExecDestroy", executable)
        self.kept.clear()


def _stream(handle: int) -> Any:
    return _driver().CUstream(handle)


def _call(name: str, *arguments: Any) -> Any:
    driver = _driver()
    result, *values = getattr(driver, name)(*arguments)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"CUDA: {name} answered {result.name}")
    return values[0] if values else None


def _driver() -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingDependencyError(
            "CUDA graphs and the order between streams need cuda-bindings: pip install 'facetrt[gpu]'"
        ) from error
