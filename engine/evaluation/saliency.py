"""Scores of what is found as saliency maps: ECSSD, DUTS-TE, DUT-OMRON, or any images with masks.

Source: specification, common-evaluation §2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.evaluation.cosegmentation import centred_box
from facetrt.engine.evaluation.datasets import objects as reader
from facetrt.engine.evaluation.datasets.reading import digest, read_grey
from facetrt.engine.evaluation.discovery import BOX, DiscoveryEvaluation, DiscoveryOptions
from facetrt.engine.evaluation.protocol import Choice, Record, Row, Summary, by_category
from facetrt.engine.evaluation.saliency_scores import Variant
from facetrt.engine.evaluation.scores import mean_of
from facetrt.engine.settings import Setting
from facetrt.engine.tasks.discovery.method import Method
from facetrt.engine.tasks.discovery.objects import Objects
from facetrt.engine.tasks.discovery.tokencut import TokenCut, TokenCutForm


@dataclass(frozen=True)
class SaliencyOptions(DiscoveryOptions):
    """Options of the scores of saliency maps."""

    variant: Annotated[Variant, Setting("Whose scores: they are on different scales.")] = Variant.TOKENCUT

    def chosen_method(self) -> Method:
        """TokenCut's masks are those of its saliency task, unless its form is named."""
        method = super().chosen_method()
        named = "form" in self.settings
        return replace(method, form=TokenCutForm.MASK) if isinstance(method, TokenCut) and not named else method


class Saliency(DiscoveryEvaluation):
    """Masks, or soft maps, against grey annotations. Source: common-evaluation §2."""

    name = "saliency"

    def __init__(self, root: Path, options: SaliencyOptions) -> None:
        self.options: SaliencyOptions = options
        self.root = root
        self._items = {f"{item.category}/{item.name}": item for item in reader.read_annotated(root, options.limit)}

    @property
    def images(self) -> Mapping[str, Path]:
        """See :class:`DiscoveryEvaluation`."""
        return {key: item.image for key, item in self._items.items()}

    def facts(self) -> dict[str, Any]:
        """See :class:`Evaluation`."""
        files = [path for item in self._items.values() for path in (item.image, item.mask)]
        return {"data_set": self.name, "images": len(self._items), "digest": digest(self.root, files)}

    def choices(self) -> list[Choice]:
        """See :class:`Evaluation`."""
        variant = self.options.variant
        square = "0.3, squared once more to 0.09" if variant.beta_squared < 0.1 else "0.3"
        best = "of each image, then the mean" if variant is not Variant.TOKENCUT else "of the mean over images"
        return [
            *super().choices(),
            Choice("scores of", variant, "variant"),
            Choice("β² of the F-measure", square),
            Choice("maximum over thresholds", best),
            Choice("IoU where both masks are empty", "0; TokenCut's own code gives NaN, which spoils the mean"),
            Choice("several objects", "their union; the largest of their soft values"),
        ]

    def score(self, key: str, found: Objects | None) -> Record:
        """See :class:`DiscoveryEvaluation`."""
        item, variant = self._items[key], self.options.variant
        grey = read_grey(item.mask)
        baseline = variant.score(centred_box(grey.shape).astype(np.float32), grey)
        record: Record = {"category": item.category, "baseline": baseline}
        return record if found is None else record | {"scores": variant.score(saliency_of(found), grey)}

    def summarise(self, records: Mapping[str, Record]) -> Summary:
        """See :class:`Evaluation`."""
        metrics, values = self.options.variant.metrics, list(records.values())
        kind = "scores" if values and "scores" in values[0] else "baseline"
        rows = [_mean_scores(name, [r[kind] for r in group], metrics) for name, group in by_category(records).items()]
        overall = _mean_scores("this run", [r["scores"] for r in values], metrics) if kind == "scores" else None
        baseline = _mean_scores(BOX, [record["baseline"] for record in values], metrics)
        return Summary(metrics, overall, [baseline], rows, {"images": len(values)})


def saliency_of(found: Objects) -> NDArray[np.float32]:
    """One map of all objects, ``(height, width)`` float32: the soft one where there is one."""
    size = found.geometry.original_size
    if not len(found):
        return np.zeros(size, np.float32)
    return np.asarray((found.masks if found.soft is None else found.soft).max(axis=0), np.float32)


def _mean_scores(name: str, scores: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Row:
    """Means over images; F's maximum is taken of the mean curve where there is one."""
    figures: dict[str, float | None] = {}
    for metric in metrics:
        if metric == "maxF" and scores and "curve" in scores[0]:
            figures[metric] = float(np.mean([score["curve"] for score in scores], axis=0).max())
        else:
            figures[metric] = mean_of([float(score[metric]) for score in scores])
    return Row(name, figures)
