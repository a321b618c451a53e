"""``facetrt eval``: the paper's tables, re-run on a data set's own folder."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.cli.app import (
    BUNDLE_HELP,
    BUNDLE_VARIABLE,
    console,
    errors,
    progress_bar,
)
from facetrt.engine.cli.opening import open_engine
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.evaluation.catalogue import EVALUATIONS, open_evaluation
from facetrt.engine.evaluation.protocol import Options
from facetrt.engine.evaluation.report import notes, tables
from facetrt.engine.evaluation.resume import RESULTS
from facetrt.engine.evaluation.running import evaluate
from facetrt.engine.settings import options_of, split_settings
from facetrt.kernels.errors import InputError

FACET = options_of(Options)["facet"].setting

ScoredOption = Annotated[
    str | None, typer.Option("--bundle", "-b", help=f"{BUNDLE_HELP} Not with --baseline.", envvar=BUNDLE_VARIABLE)
]
NameArgument = Annotated[
    str, typer.Argument(help="Which evaluation.", metavar=f"[{'|'.join(EVALUATIONS)}]", show_default=False)
]


@dataclass(frozen=True)
class Changes:
    """What differs from the protocol's own options; texts are read by their types."""

    load_size: Annotated[
        str | None, typer.Option("--load-size", help="Shorter side, HEIGHTxWIDTH, or none; the protocol's by default.")
    ] = None
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most this many items per category.")] = None
    facet: Annotated[str | None, typer.Option("--facet", help=FACET.help)] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, any option of the protocol; may be repeated.")
    ] = None

    @property
    def by_name(self) -> dict[str, Any]:
        """What was given, by the option's name."""
        named = {"load_size": self.load_size, "limit": self.limit, "facet": self.facet}
        return split_settings(self.settings or []) | {name: value for name, value in named.items() if value is not None}


@expanded
def evaluate_command(
    name: NameArgument,
    data: Annotated[Path, typer.Argument(help="The data set's folder, in its official layout.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results; an interrupted run continues there.")],
    changes: Changes,
    running: RunOptions,
    bundle: ScoredOption = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Score the trivial baseline alone, no model.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start again instead of continuing an earlier run.")] = False,
) -> None:
    """Score a bundle on a data set and compare with the paper; run again to continue an interrupted run."""
    scored = choose_bundle(bundle, baseline=baseline)
    evaluation = open_evaluation(name, data, changes.by_name)
    opened = nullcontext() if scored is None else open_engine(scored, running)
    with opened as engine, progress_bar(f"evaluating {name}") as update:
        outcome = evaluate(evaluation, engine, out, force=force, progress=update, started=_say_resumed)
    for table in tables(evaluation, outcome.summary):
        console.print(table)
    for note in notes(evaluation):
        console.print(note)
    console.print(f"{outcome.items} items; options, choices, facts and figures: {out / RESULTS}")


def choose_bundle(bundle: str | None, *, baseline: bool) -> str | None:
    """The bundle to score, or None for the trivial baseline alone; one of the two must have been asked for."""
    if baseline and bundle == os.environ.get(BUNDLE_VARIABLE):
        bundle = None  # the variable is for commands that open one
    if (bundle is None) != baseline:
        raise InputError(f"choose what to score: either --bundle BUNDLE (or {BUNDLE_VARIABLE}) or --baseline")
    return bundle


def _say_resumed(done: int, total: int) -> None:
    if done:
        errors.print(f"continuing: {done} of {total} items were done by an earlier run")
