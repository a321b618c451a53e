"""``facetrt eval``: the paper's tables, re-run on a data set's own folder."""

from __future__ import annotations

import os
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from facetrt.engine.cli.app import (
    BUNDLE_HELP,
    BUNDLE_VARIABLE,
    FACET_HELP,
    console,
    errors,
    parse_size,
    progress_bar,
)
from facetrt.engine.cli.opening import Opening, engine_options
from facetrt.engine.evaluation.catalogue import EVALUATIONS, open_evaluation
from facetrt.engine.evaluation.report import notes, tables
from facetrt.engine.evaluation.resume import RESULTS
from facetrt.engine.evaluation.running import evaluate
from facetrt.engine.settings import split_settings
from facetrt.kernels.errors import InputError

Name = StrEnum("Name", {name: name for name in EVALUATIONS})  # type: ignore[misc]


@engine_options
def evaluate_command(
    name: Annotated[Name, typer.Argument(help="Which evaluation.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="The data set's folder, in its official layout.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results; an interrupted run continues there.")],
    bundle: Annotated[
        str | None,
        typer.Option("--bundle", "-b", help=f"{BUNDLE_HELP} Not with --baseline.", envvar=BUNDLE_VARIABLE),
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Score the trivial baseline alone, no model.")] = False,
    load_size: Annotated[
        str | None, typer.Option("--load-size", help="Shorter side, HEIGHTxWIDTH, or none; the protocol's by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most this many items per category.")] = None,
    facet: Annotated[str | None, typer.Option("--facet", help=FACET_HELP)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, any option of the protocol; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start again instead of continuing an earlier run.")] = False,
    *,
    opening: Opening,
) -> None:
    """Score a bundle on a data set and compare with the paper; run again to continue an interrupted run."""
    if baseline and bundle == os.environ.get(BUNDLE_VARIABLE):
        bundle = None  # the variable is for commands that open one
    if (bundle is None) != baseline:
        raise InputError(f"choose what to score: either --bundle BUNDLE (or {BUNDLE_VARIABLE}) or --baseline")
    evaluation = open_evaluation(name.value, data, _options(load_size, limit, facet, settings))
    opened = nullcontext() if bundle is None else opening.engine(bundle)
    with opened as engine, progress_bar(f"evaluating {name.value}") as update:
        outcome = evaluate(evaluation, engine, out, force=force, progress=update, started=_say_resumed)
    for table in tables(evaluation, outcome.summary):
        console.print(table)
    for note in notes(evaluation):
        console.print(note)
    console.print(f"{outcome.items} items; options, choices, facts and figures: {out / RESULTS}")


def _options(load_size: str | None, limit: int | None, facet: str | None, settings: list[str] | None) -> dict[str, Any]:
    chosen: dict[str, Any] = {**split_settings(settings or [])}
    if load_size is not None:
        chosen["load_size"] = parse_size(load_size)
    if limit is not None:
        chosen["limit"] = limit
    if facet is not None:
        chosen["facet"] = facet
    return chosen


def _say_resumed(done: int, total: int) -> None:
    if done:
        errors.print(f"continuing: {done} of {total} items were done by an earlier run")
