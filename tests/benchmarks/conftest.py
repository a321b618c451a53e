"""A workbench around the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import TINY

from facetrt.benchmarks.cpu.workbench import QUICK, Workbench
from facetrt.export.weights import read_state_dict


@pytest.fixture(scope="session")
def workbench(work: Path, tiny_bundle: Path, tiny_weights: Path) -> Iterator[Workbench]:
    state = read_state_dict(tiny_weights)
    with Workbench(tiny_bundle, TINY, state, work / "workbench", sizes=QUICK, rounds=1) as bench:
        yield bench
