"""Timing contestants in turn: on shared, noisy machines only ratios from one run mean something."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from facetrt.benchmarks.results import Row, Spread
from facetrt.kernels.errors import FacetrtError

Item = TypeVar("Item")

MAX_QUEUED = 2000  # calls
WARM_UPS = 3
PAUSE = 0.1  # seconds before each timed run, so that worker threads of the run before it have gone to sleep


class Clock:
    """The time of one run. A slow loop can be run on a sample of its items and is charged as if all had run.

    Args:
        sampling: whether loops are sampled; without it every loop runs in full.
    """

    def __init__(self, *, sampling: bool = False) -> None:
        self.sampling = sampling
        self.extrapolated: list[str] = []
        self._start, self._extra = time.perf_counter(), 0.0

    def loop(self, what: str, items: Sequence[Item], at_most: int) -> Iterator[Item]:
        """The items, or ``at_most`` of them evenly spread, charged in proportion."""
        chosen = items
        if self.sampling and len(items) > at_most:
            chosen = [items[int(i)] for i in np.linspace(0, len(items) - 1, at_most).round()]
            self.extrapolated.append(f"{what}: {at_most} of {len(items)} timed")
        start = time.perf_counter()
        yield from chosen
        self._extra += (time.perf_counter() - start) * (len(items) / max(len(chosen), 1) - 1)

    @contextmanager
    def free(self) -> Iterator[None]:
        """What runs inside is not charged: it makes up for items that a sampled loop left out."""
        start = time.perf_counter()
        yield
        self._extra -= time.perf_counter() - start

    def charge(self, seconds: float) -> None:
        """Count so many seconds for everything up to now, in place of what went by."""
        self._start, self._extra = time.perf_counter(), seconds

    @property
    def seconds(self) -> float:
        """Charged so far."""
        return time.perf_counter() - self._start + self._extra


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        run: one whole run; its result is kept for the quality column.
        rounds: at most so many, for slow ones; they are also the first to be left out when time runs short.
        sampling: whether its slow loops are sampled.
        prepare: what to do before the first timed run, in place of one run for warming up.
    """

    name: str
    run: Callable[[Clock], Any]
    rounds: int | None = None
    sampling: bool = False
    prepare: Callable[[], object] | None = None


@dataclass
class Timing:
    """What was measured of one contestant: seconds of each round, the last result, or why it was not run."""

    seconds: list[float] = field(default_factory=list)
    result: Any = None
    extrapolated: str | None = None
    reason: str | None = None
    wall: float = 0.0

    @property
    def spread(self) -> Spread | None:
        """Median and interquartile range, or None if it was not run."""
        return Spread.of(self.seconds) if self.seconds else None


Timings = Mapping[str, Timing]


def compare(
    contestants: Sequence[Contestant], *, rounds: int, budget: float, report: Callable[[str], None] = lambda text: None
) -> dict[str, Timing]:
    """Run the contestants in turn (A B C A B C …) after a warm-up each.

    Ends after ``rounds``, or when another round would exceed ``budget`` seconds in all; there is always one. A
    contestant that this machine cannot run (a library or instruction set is missing) is left out, with the reason.
    """
    start = time.perf_counter()
    timings = {contestant.name: Timing() for contestant in contestants}
    for contestant in contestants:
        report(f"warming up {contestant.name}")
        _warm_up(contestant, timings[contestant.name])
    for number in range(rounds):
        left = budget - (time.perf_counter() - start)
        for contestant in _due(contestants, timings, number, left):
            report(f"round {number + 1} of {rounds}, {contestant.name}")
            _run(contestant, timings[contestant.name])
    return timings


def _due(contestants: Sequence[Contestant], timings: Timings, number: int, left: float) -> list[Contestant]:
    """Who runs in this round: all in the first; later all, the quick ones, or none, as fits into ``left`` seconds."""
    able = [c for c in contestants if timings[c.name].reason is None]
    for candidates in ([c for c in able if c.rounds is None or number < c.rounds], [c for c in able if not c.rounds]):
        if number == 0 or sum(timings[c.name].wall for c in candidates) <= left:
            return candidates
    return []


def _warm_up(contestant: Contestant, timing: Timing) -> None:
    try:
        if contestant.prepare is None:
            contestant.run(Clock(sampling=contestant.sampling))
        else:
            contestant.prepare()
    except FacetrtError as error:
        timing.reason = str(error)


def _run(contestant: Contestant, timing: Timing) -> None:
    timing.result = None  # so that two results are never held at once
    time.sleep(PAUSE)
    start = time.perf_counter()
    clock = Clock(sampling=contestant.sampling)
    try:
        timing.result = contestant.run(clock)
    except FacetrtError as error:
        timing.reason, timing.seconds = str(error), []
        return
    timing.seconds.append(clock.seconds)
    timing.wall = time.perf_counter() - start
    timing.extrapolated = "; ".join(dict.fromkeys(clock.extrapolated)) or None


def queued(clock: Clock, work: Callable[[], Any], synchronize: Callable[[], object], *, seconds: float) -> Any:
    """Charge one call of ``work`` with the mean of as many as fill ``seconds``; the device is waited for at the end.

    For work on a device whose call returns before it is done: what it costs where the device never runs dry. A call
    that fills the time alone is timed alone.
    """
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    once = time.perf_counter() - start
    count = min(MAX_QUEUED, int(seconds / once))
    if count < 2:
        clock.charge(once)
        return result
    start = time.perf_counter()
    for _ in range(count):
        result = work()
    synchronize()
    clock.charge((time.perf_counter() - start) / count)
    return result


class Latencies:
    """Calls of ``work``, each waited for: a round is charged their median, and its 99th percentile is kept.

    Attributes:
        p99: seconds, one for each round.
    """

    def __init__(self, work: Callable[[], Any], synchronize: Callable[[], object], count: int) -> None:
        self.p99: list[float] = []
        self._work, self._synchronize, self._count = work, synchronize, count

    def prepare(self) -> None:
        """Warm up, without a trace in the figures."""
        for _ in range(min(WARM_UPS, self._count)):
            self._work()
        self._synchronize()

    def run(self, clock: Clock) -> Any:
        """One round."""
        seconds = []
        for _ in range(self._count):
            start = time.perf_counter()
            result = self._work()
            self._synchronize()
            seconds.append(time.perf_counter() - start)
        median, p99 = np.percentile(seconds, (50, 99))
        self.p99.append(float(p99))
        clock.charge(float(median))
        return result

    def contestant(self, name: str, *, rounds: int | None = None) -> Contestant:
        """A contestant, to be timed beside others."""
        return Contestant(name, self.run, rounds=rounds, prepare=self.prepare)

    def row(self, section: str, name: str) -> list[Row]:
        """The 99th percentiles as a row, if there are any."""
        return [Row(section, f"{name}, p99", Spread.of(self.p99))] if self.p99 else []


def ratio(timings: Timings, slow: str, fast: str) -> Spread | None:
    """How many times as long ``slow`` takes: median over the rounds that both ran, each pair measured back to back."""
    pairs = list(zip(timings[slow].seconds, timings[fast].seconds, strict=False))
    return Spread.of([a / b for a, b in pairs]) if pairs else None


def rows_of(
    section: str,
    timings: Timings,
    baselines: Sequence[str],
    *,
    quality: Callable[[str, Any], Mapping[str, float]] = lambda name, result: {},
    details: Callable[[str, Any], Mapping[str, Any]] = lambda name, result: {},
) -> list[Row]:
    """One row per contestant; ``quality`` and ``details`` are called with its name and result where it was run."""
    rows = []
    for name, timing in timings.items():
        others = [other for other in baselines if other != name and other in timings]
        ratios = {other: found for other in others if (found := ratio(timings, other, name)) is not None}
        rows.append(
            Row(
                section,
                name,
                timing.spread,
                reason=timing.reason,
                extrapolated=timing.extrapolated,
                ratios=ratios,
                quality={} if timing.reason else quality(name, timing.result),
                details={} if timing.reason else details(name, timing.result),
            )
        )
    return rows
