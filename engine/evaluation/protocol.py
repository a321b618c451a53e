"""What every evaluation has in common: options, items that can be done one by one, and a summary of their records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.settings import BUNDLES_CHOICE, FacetChoice, Setting, check
from facetrt.kernels.errors import InputError

Record = dict[str, Any]  # what one item came to; plain JSON
Tick = Callable[[int], None]  # called with the number of steps just finished


@dataclass(frozen=True)
class Choice:
    """A decision that the published protocol leaves open, what was chosen, and what else could be."""

    topic: str
    chosen: str
    otherwise: str = ""


@dataclass(frozen=True)
class Row:
    """A named line of figures; None where a figure does not exist."""

    name: str
    figures: Mapping[str, float | None]
    source: str = ""


@dataclass(frozen=True)
class Summary:
    """An evaluation's outcome: figures of this run (``overall``, None for baselines alone), trivial or derived
    ``baselines`` on the same items, figures per category, and counts worth stating.
    """

    metrics: list[str]
    overall: Row | None
    baselines: list[Row]
    categories: list[Row]
    counts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """Options that every evaluation has; all others are those of its task, or its protocol's own."""

    facet: FacetChoice = BUNDLES_CHOICE
    limit: Annotated[int | None, Setting("At most this many items per category.", minimum=1)] = None

    def __post_init__(self) -> None:
        check(self)


class Evaluation(ABC):
    """One data set under one protocol.

    An evaluation is made of items with distinct ``keys``; each gives a :data:`Record`, alone, so that an interrupted
    run can go on where it stopped. :meth:`summarise` needs nothing but records.
    """

    name: ClassVar[str]
    task: ClassVar[str]  # whose default facet is used
    category_word: ClassVar[str] = "categories"  # what the summary's categories are
    options: Options

    @property
    @abstractmethod
    def keys(self) -> list[str]:
        """Items in the order in which they are computed."""

    @abstractmethod
    def steps(self, key: str) -> int:
        """How much work an item is, in the units of the progress bar."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What was found in the folder: counts, and a digest of the files."""

    @abstractmethod
    def choices(self) -> list[Choice]:
        """Decisions that the published protocol leaves open."""

    @abstractmethod
    def run(self, engine: Engine | None, todo: Sequence[str], out: Path, tick: Tick) -> Iterator[tuple[str, Record]]:
        """Records of the items ``todo``, in order; of the trivial baseline alone without an engine.

        ``out`` is a folder for pictures; files there are overwritten.
        """

    @abstractmethod
    def summarise(self, records: Mapping[str, Record]) -> Summary:
        """Figures from the records of all items."""

    @property
    def facet(self) -> str:
        """The facet that was resolved by :meth:`resolve`."""
        if not self.options.facet:
            raise InputError(f"{self.name}: no facet has been chosen yet; call resolve(manifest) first")
        return self.options.facet

    def resolve(self, manifest: Manifest) -> None:
        """Fill in what only the bundle knows.

        Raises:
            InputError: the bundle has no default facet for the task, or was exported without the facet.
        """
        facet = self.options.facet or manifest.defaults.get(self.task)
        exported = ", ".join(manifest.facets)
        if facet is None:
            raise InputError(f"the bundle names no facet for '{self.task}': choose one of {exported} with --facet")
        if missing := [name for name in self.facets_in(facet) if name not in manifest.facets]:
            raise InputError(f"{manifest.missing_facet(*missing)}; or choose another with --facet")
        self.options = replace(self.options, facet=facet)

    def facets_in(self, facet: str) -> list[str]:
        """The names of what the bundle must have exported; a task that blends facets has several."""
        return [facet]

    def options_record(self) -> dict[str, Any]:
        """The options as plain JSON."""
        return asdict(self.options)


def by_category(records: Mapping[str, Record]) -> dict[str, list[Record]]:
    """Records grouped by their ``category``, in order of appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records.values():
        groups.setdefault(record["category"], []).append(record)
    return groups


def mean_row(name: str, rows: Sequence[Row], metrics: Sequence[str]) -> Row:
    """Mean over rows of each metric; rows without it are left out."""
    figures: dict[str, float | None] = {}
    for metric in metrics:
        values = [value for row in rows if (value := row.figures.get(metric)) is not None]
        figures[metric] = sum(values) / len(values) if values else None
    return Row(name, figures)


def only(features: Features, facet: str) -> Features:
    """``features`` without the other facets, so that a whole category can be held."""
    features.map(facet)  # the error that names what was exported
    return replace(features, tokens={facet: features.tokens[facet]})
