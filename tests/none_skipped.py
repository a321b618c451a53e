"""Fails if a JUnit report holds a skipped test, or no test at all: ``python none_skipped.py REPORT.xml``."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def problems(report: Path) -> list[str]:
    """What keeps the report from showing that everything ran."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    found = [
        f"skipped: {case.get('classname')}::{case.get('name')}" for case in cases if case.find("skipped") is not None
    ]
    return found if cases else ["no test ran"]


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    if found:
        sys.exit("\n".join(found))
