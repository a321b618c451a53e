from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import HERE
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


def test_every_test_for_a_gpu_is_run_by_the_script() -> None:
    line = re.search(r"^run tests .*$", (HERE / "run_gpu.sh").read_text(), re.MULTILINE)
    assert line is not None
    folders = [HERE.parent / name for name in re.findall(r"(?<!=)\btests/\S+", line[0])]
    # Fixtures of folders and files aside, a test is for a GPU by its mark or by the fixture that has it.
    for path in HERE.rglob("test_*.py"):
        if re.search(r"^(@pytest|pytestmark).*mark\.gpu|^def test.*\bdevice: Device\b", path.read_text(), re.MULTILINE):
            assert any(path.is_relative_to(folder) for folder in folders), path
