"""Run an evaluation item by item into a folder, continuing where an earlier run stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.protocol import Evaluation, Summary
from facetrt.engine.evaluation.report import fingerprint, results, to_json
from facetrt.engine.evaluation.resume import ITEMS, RESULTS, ItemStore, write_atomically
from facetrt.kernels.errors import reading

Progress = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Outcome:
    """A finished run: its figures, and how many of its ``items`` an earlier run had already done."""

    summary: Summary
    items: int
    resumed: int


def evaluate(
    evaluation: Evaluation,
    engine: Engine | None,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    started: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Compute the items that ``out`` lacks and write ``out/results.json``.

    Args:
        engine: None scores the trivial baseline alone.
        force: start again, whatever ``out`` holds of an earlier run.
        progress: called with (steps done, steps in all), earlier runs included.
        started: called once with (items already done, items in all).

    Raises:
        OutputError: ``out`` holds a run with another fingerprint, or something else.
        InputError: the bundle does not fit the evaluation.
    """
    if engine is not None:
        evaluation.resolve(engine.manifest)
    with ItemStore(out, fingerprint(evaluation, engine), force=force) as store:
        todo = [key for key in evaluation.keys if key not in store.records]
        if started is not None:
            started(store.resumed, len(evaluation.keys))
        steps = _Steps(evaluation, todo, progress)
        for key, record in evaluation.run(engine, todo, store.pictures, steps):
            store.add(key, record)
        records = {key: store.records[key] for key in evaluation.keys}
        with reading(out / ITEMS, "items of this evaluation"):  # those of an earlier run say what they like
            summary = evaluation.summarise(records)
        report = results(evaluation, engine, records, summary, resumed=store.resumed)
        write_atomically(out / RESULTS, to_json(report))
        return Outcome(summary, len(records), store.resumed)


class _Steps:
    """Counts the steps of all items, those of an earlier run included."""

    def __init__(self, evaluation: Evaluation, todo: list[str], progress: Progress | None) -> None:
        self.total = sum(evaluation.steps(key) for key in evaluation.keys)
        self.done = self.total - sum(evaluation.steps(key) for key in todo)
        self.progress = progress
        self(0)

    def __call__(self, steps: int) -> None:
        self.done += steps
        if self.progress is not None:
            self.progress(self.done, self.total)
