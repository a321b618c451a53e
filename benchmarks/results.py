"""What a benchmark reports: rows of figures, and bars that they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range over rounds; the range is None after a single round."""

    median: float
    iqr: float | None
    rounds: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        low, middle, high = np.percentile(values, (25, 50, 75))
        return Spread(float(middle), float(high - low) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Row:
    """One measured thing.

    Attributes:
        unit: of ``value``: ``s``, ``MiB``, ``frames`` or ``registers``.
        value: None if it was not run; ``reason`` says why.
        extrapolated: which loops were timed on a sample, if any.
        ratios: baseline → how many times this row's value the baseline's is, measured in the same rounds.
        quality: how close the result is to the baseline's; cosines, shares and IoUs are 1 at best, differences 0.
        details: anything else that belongs to the row, such as GFLOP/s.
    """

    section: str
    name: str
    value: Spread | None
    unit: str = "s"
    reason: str | None = None
    extrapolated: str | None = None
    ratios: Mapping[str, Spread] = field(default_factory=dict)
    quality: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bar:
    """A figure that is wanted of a row, at least (or at most) ``wanted``.

    It is the row's ratio to ``baseline``, in ``×``, or without a baseline its value, in the row's unit.
    """

    what: str
    section: str
    row: str
    baseline: str | None
    wanted: float
    at_most: bool = False
    unit: str = "×"


@dataclass(frozen=True)
class Verdict:
    """A bar beside what was measured. ``met`` is None where nothing was shown; ``reason`` says why."""

    bar: Bar
    measured: Spread | None
    met: bool | None
    reason: str | None = None
    extrapolated: str | None = None

    @property
    def mark(self) -> str:
        """``✓``, ``✗`` or ``–``."""
        return "–" if self.met is None else "✓" if self.met else "✗"


def judge(bar: Bar, rows: Sequence[Row], *, comparable: bool = True) -> Verdict:
    """Hold a bar against the rows. ``comparable`` is False for runs at other sizes than the bar's."""
    found = {row.name: row for row in rows if row.section == bar.section}
    for name in (bar.row, bar.baseline or bar.row):
        if name in found and found[name].reason is not None:
            return Verdict(bar, None, None, f"{name} was not run: {found[name].reason}")
    row = found.get(bar.row)
    measured = None if row is None else row.value if bar.baseline is None else row.ratios.get(bar.baseline)
    if measured is None:
        missing = f"{bar.row} was not compared with {bar.baseline}" if bar.baseline else f"{bar.row} was not measured"
        return Verdict(bar, None, None, missing)
    baseline = found.get(bar.baseline or bar.row)
    extrapolated = None if baseline is None else baseline.extrapolated
    if not comparable:
        return Verdict(bar, measured, None, "other sizes than the bar's", extrapolated)
    met = measured.median <= bar.wanted if bar.at_most else measured.median >= bar.wanted
    return Verdict(bar, measured, met, None, extrapolated)
