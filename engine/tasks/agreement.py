"""Whether tasks come to the same with rounded descriptors as with exact ones: what an error of features is worth.

Half precision moves every descriptor a little. What a user sees of it is which points match, which cells form a cluster
and what a picture of the principal components looks like, so that is compared: the same photographs, both ways, by the
tasks as they run on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import Manifest, TaskAgreement
from facetrt.engine.features.features import Features
from facetrt.engine.tasks.cosegmentation import CosegmentOptions, HostImages, Masks, cosegment_images
from facetrt.engine.tasks.matching import HostPair, Matches, MatchOptions, match_pair
from facetrt.engine.tasks.pca import fit_pca
from facetrt.engine.tasks.refinement import Refinement
from facetrt.kernels.errors import InputError

BOUNDS = {"buddies": 0.9, "points": 0.7, "labels": 0.9, "masks": 0.95, "pca": 0.99}  # the least of each figure
SAMPLE_INTERVAL = 10  # small photographs have few cells, and clusters are trained on every tenth
COMPONENTS = 3  # as many as a picture of them has colours

TASKS = {"matches": "match", "co-segmentation": "cosegment", "PCA": "cosegment"}  # whose default facet each takes

Cells = NDArray[np.int64]
FeaturePair = tuple[Features, Features]
Figures = dict[str, float]


def compare_tasks(
    exact: Sequence[FeaturePair], rounded: Sequence[FeaturePair], manifest: Manifest, measured: str
) -> TaskAgreement:
    """How far tasks agree, by the figures that :class:`facetrt.engine.bundle.manifest.TaskAgreement` explains.

    Pairs are matched, the first images of all are co-segmented and have their principal components taken.

    Args:
        exact: pairs of views of one thing, in fp32.
        rounded: the same in half precision.
        measured: how, in words.
    """
    firsts = [[first for first, _ in pairs] for pairs in (exact, rounded)]
    compare: dict[str, Callable[[str], Figures]] = {
        "matches": lambda facet: _matches(exact, rounded, facet),
        "co-segmentation": lambda facet: _cosegmentation(firsts[0], firsts[1], facet),
        "PCA": lambda facet: {"pca": _pca(firsts[0], firsts[1], facet)},
    }
    figures: Figures = {}
    absent = absent_tasks(manifest)
    for task in [task for task in TASKS if task not in absent]:
        try:
            figures |= compare[task](manifest.default_facet(TASKS[task]))
        except InputError as error:  # nothing in common, too few cells
            absent[task] = str(error)
    figures = {name: figures[name] for name in BOUNDS if name in figures}
    return TaskAgreement(measured, figures, absent, violation(figures))


def absent_tasks(manifest: Manifest) -> dict[str, str]:
    """Tasks that a bundle cannot run with its model's default facets, and why."""
    absent = {}
    for task, default in TASKS.items():
        facet = manifest.default_facet(default)
        if facet not in manifest.facets:
            absent[task] = f"{facet} was not exported"
        elif task != "PCA" and manifest.saliency_heads is None:
            absent[task] = "saliency was not exported"
    return absent


def describe(tasks: TaskAgreement) -> str:
    """Figures, those out of bounds with their bounds, and what is absent, in one line."""
    figures = [f"{name} {value:.3f}" for name, value in tasks.figures.items()]
    absent = [f"{task} not compared ({why})" for task, why in tasks.absent.items()]
    verdict = f"tasks differ from fp32 ({tasks.missed})" if tasks.missed else "tasks agree with fp32"
    return "; ".join([f"{verdict}: {', '.join(figures)}" if figures else "no task was compared", *absent])


def violation(figures: Mapping[str, float]) -> str:
    """What is out of ``BOUNDS``, in words; empty if nothing is. NaN always is."""
    return ", ".join(f"{name} {figures[name]:.3f} < {BOUNDS[name]:g}" for name in figures if not holds(name, figures))


def holds(name: str, figures: Mapping[str, float]) -> bool:
    """Whether a figure is within its bound."""
    return figures[name] >= BOUNDS[name]


# -------------------------------------------------------------------------------------------------------------- matches
def _matches(exact: Sequence[FeaturePair], rounded: Sequence[FeaturePair], facet: str) -> Figures:
    options = MatchOptions(facet)
    pairs = [
        (match_pair(HostPair(*ours, facet), options), match_pair(HostPair(*theirs, facet), options))
        for ours, theirs in zip(exact, rounded, strict=True)
    ]
    if not any(len(ours.cells_a) for ours, _ in pairs):
        raise InputError("in fp32 the photographs have no best buddies")
    patch = max(1, exact[0][0].patch // exact[0][0].stride)  # in cells
    return {
        "buddies": float(np.mean([_found(*pair, near=1) for pair in pairs])),
        "points": float(np.mean([_found(*map(_selected, pair), near=patch) for pair in pairs])),
    }


def _selected(matches: Matches) -> Matches:
    """Only the selected points."""
    chosen = matches.selected
    return replace(matches, cells_a=matches.cells_a[chosen], cells_b=matches.cells_b[chosen])


def _found(ours: Matches, theirs: Matches, *, near: int) -> float:
    """The share of either's pairs that the other has up to ``near`` cells at both ends, the smaller share."""
    a, b = _places(ours), _places(theirs)
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    close = np.abs(a[:, None] - b[None]).max(axis=-1) <= near
    return float(min(close.any(axis=1).mean(), close.any(axis=0).mean()))


def _places(matches: Matches) -> Cells:
    """Rows and columns in both images, ``(n, 4)``."""
    return np.stack(
        [
            *np.divmod(matches.cells_a, matches.geometry_a.grid[1]),
            *np.divmod(matches.cells_b, matches.geometry_b.grid[1]),
        ],
        axis=-1,
    )


# --------------------------------------------------------------------------------------- co-segmentation and components
def _cosegmentation(exact: Sequence[Features], rounded: Sequence[Features], facet: str) -> Figures:
    options = CosegmentOptions(facet, sample_interval=SAMPLE_INTERVAL, refine=Refinement.NONE)
    ours, theirs = (cosegment_images(HostImages(each, facet, 0), options) for each in (exact, rounded))
    same = _cells_of(ours) == _cells_of(theirs)
    return {"labels": adjusted_rand(_labels_of(ours), _labels_of(theirs)), "masks": float(same.mean())}


def _labels_of(masks: Masks) -> Cells:
    return np.concatenate([mask.labels.ravel() for mask in masks])


def _cells_of(masks: Masks) -> NDArray[np.bool_]:
    return np.concatenate([mask.cells.ravel() for mask in masks])


def adjusted_rand(a: Cells, b: Cells) -> float:
    """Adjusted Rand index of two labellings ``(n,)``: 1 for the same groups by whatever names, 0 for chance.

    Source: Hubert and Arabie, *Comparing partitions*, 1985.
    """
    _, rows = np.unique(a, return_inverse=True)
    _, columns = np.unique(b, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    both, in_a, in_b = ((each * (each - 1) / 2).sum() for each in (table, table.sum(axis=1), table.sum(axis=0)))
    expected = in_a * in_b / max(len(a) * (len(a) - 1) / 2, 1)
    most = (in_a + in_b) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


def _pca(exact: Sequence[Features], rounded: Sequence[Features], facet: str) -> float:
    ours, theirs = (
        np.concatenate([fit.project(item).reshape(-1, COMPONENTS) for item in each]).astype(np.float64)
        for each, fit in ((each, fit_pca(each, facet, COMPONENTS)) for each in (exact, rounded))
    )
    return coordinates_alike(ours, theirs)


def coordinates_alike(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """RV coefficient of coordinates ``(n, c)``: 1 if they are the same but for turns, mirrors and scale.

    Components of nearly equal variance turn into each other at the least rounding, which no picture shows as an error.
    Source: Robert and Escoufier, *A unifying tool for linear multivariate statistical methods*, 1976.
    """
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    sizes = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(a.T @ b) ** 2 / sizes) if sizes > 0 else float(np.allclose(a, b))
