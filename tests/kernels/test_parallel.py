from __future__ import annotations

import threading
import time

import pytest
from threadpoolctl import threadpool_info

from facetrt.kernels import parallel
from facetrt.kernels.parallel import MAX_THREADS, map_threads, one_blas_thread


def test_results_keep_their_order() -> None:
    def late_first(number: int) -> int:
        time.sleep(0.02 * (3 - number))
        return number * number

    calls: list[tuple[int, int]] = []
    assert map_threads(late_first, range(4), lambda *done: calls.append(done), threads=4) == [0, 1, 4, 9]
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert map_threads(late_first, []) == []


@pytest.mark.parametrize("threads", [1, 3, 100])
def test_no_more_items_at_work_than_threads(threads: int) -> None:
    lock, at_work, most = threading.Lock(), 0, 0

    def work(number: int) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.005)
        with lock:
            at_work -= 1

    map_threads(work, range(30), threads=threads)
    assert most <= min(threads, MAX_THREADS) and (threads == 1 or most > 1)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["function", "progress"])
def test_an_error_ends_it_and_its_threads(error: type[BaseException], where: str) -> None:
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.005)
        if where == "function" and number == 1:
            raise error("here")

    def progress(done: int, total: int) -> None:
        if where == "progress":
            raise error("here")

    before = threading.active_count()
    with pytest.raises(error, match="here"):
        map_threads(work, range(1000), progress, threads=2)
    assert len(begun) < 100 and threading.active_count() == before


def test_blas_gets_its_threads_back_after_the_last_user() -> None:
    def threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    parallel._blas.cache_clear()  # so that libraries which other tests loaded are found as well
    before = threads()
    with one_blas_thread:
        with one_blas_thread:
            pass
        assert threads() == {1}
    assert threads() == before
