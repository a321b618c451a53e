from __future__ import annotations

from pathlib import Path

import pytest

from facetrt.benchmarks import serve_suite
from facetrt.benchmarks.report import write_report
from facetrt.benchmarks.serve_suite import ALONE, BATCHED, QUICK_SERVE, UNBATCHED, ServeBench, run_serve
from facetrt.engine.serving import triton_server


def test_without_triton_rows_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_suite, "import_library", lambda name, extra: None)
    monkeypatch.setattr(triton_server, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with ServeBench("builtin", tmp_path, QUICK_SERVE, rounds=1) as bench:
        report = run_serve(bench)
    reasons = {row.name: row.reason for row in report.rows}
    assert reasons[ALONE] is None
    assert all("Triton is not installed" in str(reasons[name]) for name in (BATCHED, UNBATCHED))
    (tmp_path / "report").mkdir()
    write_report(tmp_path / "report", report)  # which checks it against the schema
