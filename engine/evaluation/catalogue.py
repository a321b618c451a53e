"""Evaluations by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facetrt.engine.evaluation.class_agnostic import ClassAgnostic, ClassAgnosticOptions
from facetrt.engine.evaluation.correspondence import CorrespondenceOptions, PfWillow, SPair, SPairOptions
from facetrt.engine.evaluation.cosegmentation import (
    CosegmentationOptions,
    Internet300,
    InternetOptions,
    Msrc,
    PascalCo,
    PascalCoseg,
)
from facetrt.engine.evaluation.davis import Davis, DavisOptions
from facetrt.engine.evaluation.discovery import CorLoc, CorLocOptions
from facetrt.engine.evaluation.landmarks import CelebA, Cub, LandmarkOptions
from facetrt.engine.evaluation.protocol import Evaluation, Options
from facetrt.engine.evaluation.saliency import Saliency, SaliencyOptions
from facetrt.engine.evaluation.tapvid import TapVid, TapVidOptions
from facetrt.engine.settings import read_options
from facetrt.kernels.errors import InputError, reading


@dataclass(frozen=True)
class Entry:
    """How to make an evaluation: ``make(root, options)`` with ``options`` of type ``kind``."""

    make: Callable[[Path, Any], Evaluation]
    kind: type[Options]


EVALUATIONS: dict[str, Entry] = {
    PfWillow.name: Entry(PfWillow, CorrespondenceOptions),
    SPair.name: Entry(SPair, SPairOptions),
    PascalCoseg.name: Entry(PascalCoseg, CosegmentationOptions),
    Msrc.name: Entry(Msrc, CosegmentationOptions),
    Internet300.name: Entry(Internet300, InternetOptions),
    PascalCo.name: Entry(PascalCo, CosegmentationOptions),
    Cub.name: Entry(Cub, LandmarkOptions),
    CelebA.name: Entry(CelebA, LandmarkOptions),
    Davis.name: Entry(Davis, DavisOptions),
    TapVid.name: Entry(TapVid, TapVidOptions),
    CorLoc.name: Entry(CorLoc, CorLocOptions),
    Saliency.name: Entry(Saliency, SaliencyOptions),
    ClassAgnostic.name: Entry(ClassAgnostic, ClassAgnosticOptions),
}


def open_evaluation(name: str, data: Path | str, options: Mapping[str, Any] | None = None) -> Evaluation:
    """An evaluation of the data set in folder ``data``.

    Args:
        name: one of :data:`EVALUATIONS`.
        options: fields of the evaluation's options that differ from the protocol's; texts are read by their type.

    Raises:
        InputError: an unknown name or option, annotations that do not fit their images.
        MissingFileError: the folder is not that data set; the message says which file was expected where.
    """
    if name not in EVALUATIONS:
        raise InputError(f"there is no evaluation {name!r}: expected one of {', '.join(EVALUATIONS)}")
    entry = EVALUATIONS[name]
    chosen = read_options(entry.kind, options or {})
    with reading(data, f"the data set of {name}"):
        return entry.make(Path(data), chosen)
