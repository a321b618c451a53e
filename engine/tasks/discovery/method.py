"""What every method of discovery has in common: how its image is loaded, what it reads, and what it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.loading import LoadSize
from facetrt.engine.settings import check
from facetrt.engine.tasks.discovery.objects import Found


@dataclass(frozen=True)
class Scene:
    """One image, as a method sees it.

    Attributes:
        features: of the image, with the facets that :meth:`Method.facets` asks for.
        rows: ``(cells, C)`` float32, the descriptors to work on: of one facet as the encoder makes them, head-major, or
            of several that were fused.
        facet: what the rows are called.
        manifest: of the bundle.
    """

    features: Features
    rows: Float
    facet: str
    manifest: Manifest


@dataclass(frozen=True)
class Method(ABC):
    """A method's options, with its publication's defaults, and what it does with them. Instances can be shared.

    Attributes:
        name: what users type.
        load_size: how images are loaded unless one says otherwise; None for their own size.
    """

    name: ClassVar[str]
    load_size: ClassVar[LoadSize] = None

    def __post_init__(self) -> None:
        check(self)

    @property
    @abstractmethod
    def fit(self) -> Fit:
        """How images are fitted to whole patches unless one says otherwise."""

    def facets(self, manifest: Manifest) -> list[str]:
        """Facets that it reads beside the rows; none by default. Raises :class:`InputError` if the bundle lacks one."""
        return []

    @abstractmethod
    def find(self, scene: Scene) -> Found:
        """The objects of one image. May be called from several threads."""
