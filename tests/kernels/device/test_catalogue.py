"""Export compiles what the catalogue lists, and nothing else could be launched from a bundle."""

from __future__ import annotations

from pathlib import Path

from facetrt.kernels.device import programs
from facetrt.kernels.device.catalogue import OPERATIONS


def test_every_file_of_programs_is_listed() -> None:
    written = {path.stem for path in Path(programs.__file__).parent.glob("*.py")} - {"__init__"}
    assert written == set(OPERATIONS) and len(OPERATIONS) == len(written)
