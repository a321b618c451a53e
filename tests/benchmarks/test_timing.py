from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from facetrt.benchmarks.timing import Clock, Contestant, compare, ratio, rows_of
from facetrt.kernels.errors import InputError


class Time:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(time, "sleep", made.pass_by)
    return made


def takes(clockwork: Time, seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[Clock], str]:
    def run(clock: Clock) -> str:
        clockwork.pass_by(seconds)
        if log is not None:
            log.append(name)
        return name

    return run


def test_a_sampled_loop_is_charged_in_full(clockwork: Time) -> None:
    clock, seen = Clock(sampling=True), []
    for item in clock.loop("cells", range(100), 5):
        seen.append(item)
        clockwork.pass_by(2)
    clockwork.pass_by(7)
    with clock.free():
        clockwork.pass_by(1000)
    assert seen[0] == 0 and seen[-1] == 99 and len(seen) == 5
    assert clock.seconds == pytest.approx(100 * 2 + 7)
    assert clock.extrapolated == ["cells: 5 of 100 timed"]


def test_without_sampling_every_item_runs(clockwork: Time) -> None:
    clock = Clock()
    assert len(list(clock.loop("cells", range(100), 5))) == 100
    assert clock.extrapolated == [] and clock.seconds == 0


def test_short_loops_are_not_sampled(clockwork: Time) -> None:
    clock = Clock(sampling=True)
    assert list(clock.loop("cells", range(3), 5)) == [0, 1, 2] and not clock.extrapolated
    assert list(clock.loop("cells", [], 5)) == []


def test_charge_replaces_what_went_by(clockwork: Time) -> None:
    clock = Clock()
    clockwork.pass_by(50)
    clock.charge(3)
    clockwork.pass_by(1)
    assert clock.seconds == pytest.approx(4)


def test_contestants_take_turns(clockwork: Time) -> None:
    log: list[str] = []
    contestants = [Contestant(name, takes(clockwork, 1, log, name)) for name in "ab"]
    timings = compare(contestants, rounds=3, budget=1000)
    assert log == ["a", "b"] * 4  # a round of warming up, and three
    assert timings["a"].seconds == [1, 1, 1] and timings["a"].result == "a"


def test_time_running_out_drops_slow_contestants_first(clockwork: Time) -> None:
    slow = Contestant("slow", takes(clockwork, 50), rounds=5, prepare=lambda: None)
    timings = compare([Contestant("quick", takes(clockwork, 1)), slow], rounds=4, budget=70)
    assert len(timings["slow"].seconds) == 1 and len(timings["quick"].seconds) == 4
    timings = compare([Contestant("quick", takes(clockwork, 1)), slow], rounds=4, budget=0)
    assert len(timings["quick"].seconds) == len(timings["slow"].seconds) == 1  # there is always one


@pytest.mark.parametrize("fails_at", [0, 1])
def test_what_cannot_run_says_why(clockwork: Time, fails_at: int) -> None:
    calls = 0

    def broken(clock: Clock) -> None:
        nonlocal calls
        calls += 1
        if calls > fails_at:
            raise InputError("no such instructions here")

    timings = compare([Contestant("broken", broken), Contestant("a", takes(clockwork, 1))], rounds=2, budget=100)
    assert timings["broken"].spread is None and timings["broken"].reason == "no such instructions here"
    rows = rows_of("test", timings, ["broken"], quality=lambda name, result: {"right": 1.0})
    assert rows[0].reason == "no such instructions here" and rows[0].value is None and not rows[0].quality
    assert rows[1].value is not None and not rows[1].ratios and rows[1].quality == {"right": 1.0}


def test_ratios_pair_rounds(clockwork: Time) -> None:
    timings = compare([Contestant("a", takes(clockwork, 1)), Contestant("b", takes(clockwork, 1))], rounds=1, budget=9)
    timings["a"].seconds, timings["b"].seconds = [1, 10, 4, 9], [2, 30, 16]
    found = ratio(timings, "b", "a")
    assert found is not None and found.median == 3 and found.rounds == 3 and found.iqr == pytest.approx(1)


def test_clock_without_a_fake_measures_time() -> None:
    clock = Clock()
    time.sleep(0.01)
    assert 0.01 <= clock.seconds < 1
