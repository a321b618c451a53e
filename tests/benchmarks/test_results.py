from __future__ import annotations

import pytest

from facetrt.benchmarks.results import Bar, Row, Spread, judge

BAR = Bar("ours vs theirs", "tasks", "ours", "theirs", 2.0)


def rows(ratio: float, **changes: object) -> list[Row]:
    ours = {"section": "tasks", "name": "ours", "value": Spread(1, 0, 3), "ratios": {"theirs": Spread(ratio, 0.1, 3)}}
    theirs = Row("tasks", "theirs", Spread(2, 0, 3), extrapolated="rows: 3 of 9 timed")
    return [Row(**(ours | changes)), theirs]  # type: ignore[arg-type]


def test_spread() -> None:
    assert Spread.of([3, 1, 2, 100]) == Spread(2.5, 25.5, 4)
    assert Spread.of([3]) == Spread(3, None, 1)


@pytest.mark.parametrize(("ratio", "mark"), [(1.99, "✗"), (2.0, "✓"), (5.0, "✓")])
def test_at_least(ratio: float, mark: str) -> None:
    verdict = judge(BAR, rows(ratio))
    assert verdict.mark == mark and verdict.measured == Spread(ratio, 0.1, 3)
    assert verdict.extrapolated == "rows: 3 of 9 timed"


@pytest.mark.parametrize(("ratio", "mark"), [(1.99, "✓"), (2.0, "✓"), (2.01, "✗")])
def test_at_most(ratio: float, mark: str) -> None:
    assert judge(Bar("time", "tasks", "ours", "theirs", 2.0, at_most=True), rows(ratio)).mark == mark


def test_what_was_not_run_is_not_shown() -> None:
    verdict = judge(BAR, rows(9, value=None, reason="no bf16", ratios={}))
    assert verdict.mark == "–" and verdict.met is None and "no bf16" in str(verdict.reason)
    missing_baseline = [rows(9, ratios={})[0], Row("tasks", "theirs", None, reason="no library")]
    assert "no library" in str(judge(BAR, missing_baseline).reason)
    assert judge(BAR, []).met is None
    assert judge(BAR, rows(9, section="other")).met is None  # a row of the same name elsewhere is another row


def test_other_sizes_are_not_judged() -> None:
    verdict = judge(BAR, rows(9), comparable=False)
    assert verdict.met is None and verdict.measured is not None and "sizes" in str(verdict.reason)
