from __future__ import annotations

import numpy as np
import pytest

from facetrt.benchmarks.cpu.child import peak_mib, run_job
from facetrt.kernels.errors import FacetrtError


def test_a_job_reports_its_own_time_and_memory() -> None:
    ballast = np.ones(400 << 17)  # 400 MiB that must not count as the child's
    result = run_job("best_buddies", grid=9, channels=8)
    assert 0 < result["seconds"] < 20
    assert 20 < result["peak_mib"] < 400 < peak_mib()
    assert ballast[0] == 1


def test_a_job_that_fails_says_why() -> None:
    with pytest.raises(FacetrtError, match="/nowhere is not a bundle"):
        run_job("match", bundle="/nowhere", paths=[], side=32, precision="fp32")
    with pytest.raises(FacetrtError, match="job 'nonsense': expected one of match"):
        run_job("nonsense")
