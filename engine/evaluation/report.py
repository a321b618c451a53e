"""An evaluation's report: tables against the paper's rows, and JSON with everything needed to repeat it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from rich.table import Table

from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.protocol import Evaluation, Record, Row, Summary
from facetrt.engine.evaluation.published import published_categories, published_rows
from facetrt.engine.machine.processor import installed_versions
from facetrt.kernels.errors import FacetrtError

LIBRARIES = ("facetrt", "numpy", "opencv-python-headless", "pillow", "onnxruntime", "openvino", "faiss-cpu", "scipy")


def fingerprint(evaluation: Evaluation, engine: Engine | None) -> dict[str, Any]:
    """What must be equal for two runs to share items: evaluation, options, data, model."""
    return {
        "evaluation": evaluation.name,
        "options": evaluation.options_record(),
        "data": evaluation.facts(),
        "model": model_facts(engine),
        "facetrt": version("facetrt"),
    }


def model_facts(engine: Engine | None) -> dict[str, Any] | None:
    """The bundle and who runs it; None for a trivial baseline."""
    if engine is None:
        return None
    manifest = engine.manifest
    return {
        "model": manifest.title,
        "description": manifest.description,
        "checkpoint": asdict(manifest.checkpoint),
        "files": {name: entry.sha256 for name, entry in manifest.files.items()},
        "stride": manifest.stride,
        "precision": engine.precision,
        "backend": engine.backend,
    }


def results(
    evaluation: Evaluation, engine: Engine | None, records: Mapping[str, Record], summary: Summary, *, resumed: int
) -> dict[str, Any]:
    """The content of ``results.json``; per-item records stay in ``items.jsonl``."""
    return {
        "command": "eval",
        **fingerprint(evaluation, engine),
        "overall": None if summary.overall is None else _row(summary.overall),
        "baselines": [_row(row) for row in summary.baselines],
        "published": [_row(row) for row in _published(evaluation)],
        "categories": [_row(row) for row in summary.categories],
        "published_categories": published_categories(evaluation.name),
        "counts": dict(summary.counts),
        "choices": [asdict(choice) for choice in evaluation.choices()],
        "items": {"done": len(records), "all": len(evaluation.keys), "from_an_earlier_run": resumed},
        "environment": _environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def to_json(data: Mapping[str, Any]) -> str:
    """Indented JSON without NaN, which other readers refuse."""
    try:
        return json.dumps(data, indent=2, default=str, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise FacetrtError(
            "a figure is NaN or infinite: the descriptors or annotations hold no finite numbers"
        ) from error


def tables(evaluation: Evaluation, summary: Summary) -> list[Table]:
    """The outcome beside baselines and the paper's rows, then the categories beside the paper's own figures."""
    overall = [summary.overall] if summary.overall is not None else []
    compared = [*overall, *summary.baselines, *_published(evaluation)]
    title = f"{evaluation.name}: mean over {len(summary.categories)} {evaluation.category_word}"
    return [
        _table(title, summary.metrics, compared),
        _category_table(evaluation.category_word, summary, published_categories(evaluation.name)),
    ]


def notes(evaluation: Evaluation) -> list[str]:
    """What to know when reading the table."""
    rows = _published(evaluation)
    if not rows:
        return ["the paper reports no figure for this data set"]
    return ["published rows are their papers' own figures, with trained weights on the complete data sets"]


def _published(evaluation: Evaluation) -> list[Row]:
    return published_rows(evaluation.name, getattr(evaluation.options, "num_parts", None))


def _category_table(word: str, summary: Summary, published: Mapping[str, Mapping[str, float]]) -> Table:
    if not published:
        return _table(f"the {word}", summary.metrics, summary.categories)
    columns = [*summary.metrics, *(f"{metric} (paper)" for metric in summary.metrics)]
    rows = [
        Row(row.name, {**row.figures, **{f"{m} (paper)": v for m, v in published.get(row.name, {}).items()}})
        for row in summary.categories
    ]
    return _table(f"the {word}", columns, rows)


def _table(title: str, metrics: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for metric in metrics:
        table.add_column(metric, justify="right")
    for row in rows:
        table.add_row(row.name, *(_figure(row.figures.get(metric)) for metric in metrics))
    return table


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.2f}"


def _row(row: Row) -> dict[str, Any]:
    return {"name": row.name, **row.figures, **({"source": row.source} if row.source else {})}


def _environment() -> dict[str, str]:
    return {"machine": platform.machine(), **installed_versions(LIBRARIES)}
