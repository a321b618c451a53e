from __future__ import annotations

from pathlib import Path

import pytest
from none_skipped import problems

CASE = '<testcase classname="tests.gpu" name="test_a" time="0.1">{}</testcase>'
SKIPPED = CASE.format('<skipped type="pytest.skip" message="no GPU"/>')


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        (CASE.format(""), []),
        (CASE.format("") + SKIPPED, ["skipped: tests.gpu::test_a"]),
        ("", ["no test ran"]),
    ],
)
def test_a_skipped_test_is_a_problem(tmp_path: Path, cases: str, expected: list[str]) -> None:
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert problems(report) == expected
