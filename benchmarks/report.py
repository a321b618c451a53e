"""A run of the suite as JSON (checked against a schema), Markdown and a table for the terminal."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from facetrt.benchmarks.cpu.suite import SCHEMA, Report
from facetrt.benchmarks.missing import import_library
from facetrt.benchmarks.results import Row, Spread, Verdict
from facetrt.engine.files import write_results
from facetrt.kernels.errors import InputError

TABLE = "table.md"
BAR_COLUMNS = ("", "bar", "wanted", "measured", "spread")
ROW_COLUMNS = ("row", "median", "spread", "rounds", "times as fast as", "quality", "details")


def write_report(folder: Path, report: Report) -> None:
    """``results.json`` and ``table.md``."""
    data = document(report)
    validate(data)
    write_results(folder, data)
    (folder / TABLE).write_text(markdown(report), encoding="utf-8")


def document(report: Report) -> dict[str, Any]:
    """What ``results.json`` holds."""
    rows = [asdict(row) for row in report.rows]
    verdicts = [
        {**asdict(v.bar), "measured": None if v.measured is None else asdict(v.measured), "met": v.met}
        | {"reason": v.reason, "extrapolated": v.extrapolated}
        for v in report.verdicts
    ]
    return {
        "tool": "facetrt",
        "command": "bench",
        "schema": SCHEMA,
        **report.facts,
        "notes": list(report.notes),
        "bars": verdicts,
        "rows": rows,
    }


def validate(data: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` unless ``data`` fits the schema of ``results.json``."""
    jsonschema = import_library("jsonschema")
    schema = json.loads((importlib.resources.files("facetrt.benchmarks") / "schema.json").read_text())
    plain = json.loads(json.dumps(data))  # tuples are arrays only once they are JSON
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(plain))
    if error is not None:
        place = "/".join(map(str, error.absolute_path)) or "the document"
        raise InputError(f"benchmark results do not fit their schema: {place}: {error.message:.200}")


def bar_cells(verdict: Verdict) -> list[str]:
    """One line of the table of bars, in the order of :data:`BAR_COLUMNS`."""
    bar, measured = verdict.bar, verdict.measured
    wanted = f"{'≤' if bar.at_most else '≥'} {_figure(bar.wanted, bar.unit)}"
    if measured is None:
        return [verdict.mark, bar.what, wanted, "not run", verdict.reason or ""]
    note = " (extrapolated)" if verdict.extrapolated else ""
    spread = _spread(measured, bar.unit)
    return [verdict.mark, bar.what, wanted, _figure(measured.median, bar.unit) + note, verdict.reason or spread]


def bar_table(report: Report) -> Table:
    """The bars for the terminal."""
    table = Table(title=title(report), title_justify="left")
    for name in BAR_COLUMNS:
        table.add_column(name)
    for verdict in report.verdicts:
        table.add_row(*bar_cells(verdict))
    return table


def title(report: Report) -> str:
    """What was measured, on what and when."""
    facts = report.facts
    system = facts["machine"]
    where = system["gpu"]["name"] if "gpu" in system else f"{system['cores']} cores of {system['cpu']}"
    return f"{facts['model']}, stride {facts['stride']}, {facts['sizes']['side']} pixels; {where}; {facts['date'][:10]}"


def markdown(report: Report) -> str:
    """The bars and all rows, section by section."""
    facts = report.facts
    system = facts["machine"]
    parts = [
        "# facetrt bench",
        f"{title(report)}. {_gpu(system)}{system['memory_gib']} GiB, {', '.join(system['flags'])}. "
        f"Commit {facts['commit'] or '–'}; "
        f"{', '.join(f'{name} {version}' for name, version in facts['versions'].items())}.",
        "Ratios are medians over rounds in which all contestants of a section ran in turn; the spread is the "
        "interquartile range.",
        *report.notes,
        "## Bars",
        _table(BAR_COLUMNS, [bar_cells(verdict) for verdict in report.verdicts]),
    ]
    for section, rows in report.sections.items():
        parts += [f"## {section[0].upper()}{section[1:]}", _table(ROW_COLUMNS, [row_cells(row) for row in rows])]
        parts += [f"\\* {row.name}: extrapolated ({row.extrapolated})." for row in rows if row.extrapolated]
    return "\n\n".join(parts) + "\n"


def _gpu(system: Mapping[str, Any]) -> str:
    """What the title leaves out about a machine with a GPU."""
    if "gpu" not in system:
        return ""
    gpu = system["gpu"]
    return (
        f"{gpu['arch']}, {gpu['memory_gib']} GiB, driver {gpu['driver'] or 'unknown'}, CUDA up to {gpu['cuda']}; "
        f"{system['cores']} cores of {system['cpu']}, "
    )


def row_cells(row: Row) -> list[str]:
    """One line of a section's table, in the order of :data:`ROW_COLUMNS`."""
    if row.value is None:
        return [row.name, f"not run: {row.reason}", "", "", "", "", ""]
    ratios = ", ".join(f"{name}: {spread.median:.3g}" for name, spread in row.ratios.items())
    return [
        row.name,
        _amount(row.value.median, row.unit) + (" *" if row.extrapolated else ""),
        _spread(row.value, row.unit),
        str(row.value.rounds),
        ratios,
        _pairs(row.quality),
        _pairs(row.details),
    ]


def _figure(value: float, unit: str) -> str:
    """A bar's figure: a ratio, or an amount."""
    return f"{value:.3g} ×" if unit == "×" else _amount(value, unit)


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    return f"{value:,.0f} {unit}"


def _spread(spread: Spread, unit: str) -> str:
    if spread.iqr is None:
        return "one round"
    return f"± {spread.iqr:.2g} ×" if unit == "×" else f"± {_amount(spread.iqr, unit)}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {f'{v:.5g}' if isinstance(v, float) else v}" for name, v in values.items())


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
