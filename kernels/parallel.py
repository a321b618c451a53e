"""Threads for work that leaves Python: NumPy, OpenCV and FAISS let other threads run while they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import numpy  # noqa: F401  # its matrix library must be loaded before it is looked for
from threadpoolctl import ThreadpoolController

from facetrt.kernels.machine import processors

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 8  # each holds one item's working memory, and what runs here is soon bound by memory bandwidth


def map_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int | None = None,
) -> list[Result]:
    """``function`` of each item, in order, on as many threads as there are processors (at most 8).

    Where items are large, let ``items`` be numbers and ``function`` load: then one item per thread is held.

    Args:
        progress: called in this thread with (items done, items in all).

    Raises:
        BaseException: the first error of ``function`` or ``progress``, or Ctrl-C, once the items at work are done; no
            further one is begun.
    """
    with ThreadPoolExecutor(min(threads or processors(), MAX_THREADS), "facetrt") as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for what is at work
            raise
    return [future.result() for future in futures]


@cache
def _blas() -> ThreadpoolController:
    """The matrix libraries of the process; looking for them takes thirty times as long as setting their threads."""
    return ThreadpoolController().select(user_api="blas")


class _OneBlasThread:
    """Limits NumPy's matrix library to one thread while anybody wants that; the last one gives the threads back."""

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0
        self._limits: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._limits = _blas().limit(limits=1)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._limits is not None:
                self._limits.restore_original_limits()


#: For products whose bits must not depend on the number of threads, and for many small ones beside other work: the
#: library's idle workers spin, which made small products five times as slow beside a running encoder. It holds for the
#: whole process.
one_blas_thread = _OneBlasThread()
