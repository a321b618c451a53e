"""``facetrt doctor``: what can run here, and what mends the rest. Parse, call, print."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from facetrt.engine.cli.app import BUNDLE_VARIABLE, console, errors
from facetrt.engine.doctor.diagnosis import Diagnosis, Finding, State, diagnose

STYLES = {State.WORKS: "green", State.MISSING: "red", State.NOT_HERE: "dim"}


def doctor(
    bundle: Annotated[
        str | None,
        typer.Option("--bundle", "-b", help="Also look at what of this bundle can run here.", envvar=BUNDLE_VARIABLE),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show which backends and kernels can run here, and how to mend the rest. Fails if none can."""
    with errors.status("looking at this machine"):
        diagnosis = diagnose(bundle)
    if json:
        console.print(json_format.dumps(document(diagnosis), indent=2), soft_wrap=True)
    else:
        _print(diagnosis)
    raise typer.Exit(0 if diagnosis.runs else 1)


def document(diagnosis: Diagnosis) -> dict[str, Any]:
    """The findings as plain data."""
    return {"tool": "facetrt", "command": "doctor", **asdict(diagnosis), "runs": diagnosis.runs}


def _print(diagnosis: Diagnosis) -> None:
    console.print(_facts(diagnosis))
    findings = [*diagnosis.clashes, *diagnosis.backends, diagnosis.kernels]
    console.print(_table("this machine", findings))
    bundle = diagnosis.bundle
    if bundle is not None:
        title = f"{bundle.path}: {bundle.model}, {bundle.precision}"
        findings += [*bundle.backends, bundle.kernels, *bundle.plans]
        console.print(_table(title, [*bundle.backends, bundle.kernels, *bundle.plans]))
    for remedy in dict.fromkeys(finding.remedy for finding in findings if finding.remedy):
        console.print(f"to mend: {remedy}", soft_wrap=True)


def _facts(diagnosis: Diagnosis) -> Table:
    driver = diagnosis.driver
    table = Table(title="found", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in diagnosis.packages.items()))
    table.add_row("processor", " ".join([diagnosis.processor, *(f"[{flag}]" for flag in diagnosis.flags)]))
    table.add_row("driver", _driver(diagnosis))
    for gpu in driver.gpus:
        table.add_row("GPU", f"{gpu.name}, {gpu.arch}, {gpu.memory / 2**30:.1f} GiB")
    return table


def _driver(diagnosis: Diagnosis) -> str:
    driver = diagnosis.driver
    if driver.cuda is None:
        return driver.problem or "none"
    text = f"{driver.version or 'unknown version'}, runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    return f"{text}; {driver.problem}" if driver.problem else text


def _table(title: str, findings: Iterable[Finding]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        table.add_row(Text(finding.state.mark, STYLES[finding.state]), finding.name, finding.detail)
    return table
