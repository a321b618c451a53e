"""What a user gets does not depend on the processor's matrix kernels, on threads or on how work is grouped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import HERE

pytestmark = pytest.mark.portable

CPU = Path("/proc/cpuinfo")
KERNELS = {"Haswell": "avx2", "Zen": "avx2", "SkylakeX": "avx512vl", "Cooperlake": "avx512_bf16"}
OWN = ("OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS")


def run(out: Path, core_type: str | None) -> dict[str, np.ndarray]:
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    if core_type is not None:
        environment["OPENBLAS_CORETYPE"] = core_type
    path = out / f"{core_type or 'own'}.npz"
    done = subprocess.run(
        [sys.executable, str(HERE / "portable.py"), str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """With the kernel that the library chooses for this processor."""
    return run(tmp_path_factory.mktemp("portable"), None)


def test_grouping_and_threads_change_no_bit(own: dict[str, np.ndarray]) -> None:
    """The run itself compares; here, that it found something to compare."""
    assert own["masks"].any() and not own["masks"].all() and own["parts"].max() == 2 and len(own["matches"]) == 10


@pytest.mark.parametrize("core_type", KERNELS)
def test_other_processors_say_the_same(own: dict[str, np.ndarray], tmp_path: Path, core_type: str) -> None:
    if not CPU.exists() or KERNELS[core_type] not in CPU.read_text().split():
        pytest.skip(f"the processor has no {KERNELS[core_type]}: {core_type}'s kernels do not run on it")
    found = run(tmp_path, core_type)
    if not len(found["architectures"]):
        pytest.skip("NumPy's matrix library is not OpenBLAS: its kernel cannot be chosen")
    for name in own.keys() - {"architectures"}:
        if name.startswith("~"):
            np.testing.assert_allclose(found[name], own[name], rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], own[name], err_msg=name)
