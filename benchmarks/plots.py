"""Pictures of a run: the bars, and the scaling curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from facetrt.benchmarks.cpu.scaling import NUMBERS, SIZES, STRIDES
from facetrt.benchmarks.cpu.suite import Report
from facetrt.benchmarks.missing import import_library
from facetrt.benchmarks.report import bar_cells, title
from facetrt.benchmarks.results import Row

MET, MISSED, UNKNOWN = "#2a7f62", "#b5403a", "#9a9a9a"
CURVES = ((SIZES, "side", "side of the image, pixels"), (STRIDES, "cells", "cells (stride 8, stride 4)"))


def draw(folder: Path, report: Report) -> None:
    """``bars.png``, and ``scaling.png`` where a suite measured how time grows."""
    import_library("matplotlib").use("Agg")
    plt = import_library("matplotlib.pyplot")
    drawings = {"bars.png": _bars}
    if {SIZES, STRIDES, NUMBERS} & set(report.sections):
        drawings["scaling.png"] = _scaling
    for name, drawing in drawings.items():
        figure = drawing(plt, report)
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)


def _bars(plt: Any, report: Report) -> Any:
    """What was measured as a share of what is wanted, on a logarithmic scale; right of 1 is met."""
    figure, axes = plt.subplots(figsize=(10, 0.45 * len(report.verdicts) + 1.6), layout="constrained")
    for place, verdict in enumerate(report.verdicts):
        share = 1.0
        if verdict.measured is not None:
            share = verdict.measured.median / verdict.bar.wanted
            share = 1 / share if verdict.bar.at_most else share
        colour = {True: MET, False: MISSED, None: UNKNOWN}[verdict.met]
        axes.barh(place, share - 1, left=1, color=colour)
        _, _, wanted, found, _ = bar_cells(verdict)
        text = found if verdict.measured is None else f"{found} ({wanted})"
        axes.annotate(f" {text} ", (share, place), va="center", ha="left" if share >= 1 else "right", fontsize=8)
    axes.set_yticks(range(len(report.verdicts)), [f"{v.bar.what} {v.mark}" for v in report.verdicts])
    axes.set(xscale="log", xlabel="measured / wanted (1 = met)", title=title(report))
    axes.margins(x=0.3)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    return figure


def _scaling(plt: Any, report: Report) -> Any:
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, (section, key, label) in zip(panels, CURVES, strict=False):
        rows = report.sections.get(section, [])
        for name in dict.fromkeys(row.name.split(",")[0] for row in rows):
            _curve(axes, [row for row in rows if row.name.startswith(f"{name},")], key, name)
        axes.set(title=section, xlabel=label, ylabel="seconds per image")
    _curve(panels[2], report.sections.get(NUMBERS, []), "images", "built-in model")
    panels[2].set(title=NUMBERS, xlabel="images", ylabel="seconds per image")
    panels[2].set_ylim(0, 1.3 * panels[2].get_ylim()[1])
    for axes in panels:
        if axes.lines:
            axes.legend()
    return figure


def _curve(axes: Any, rows: Sequence[Row], key: str, label: str) -> None:
    points = sorted((row.details[key], row.value.median) for row in rows if row.value is not None)
    axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
