"""What every method of discovery has in common: how its image is loaded, what it reads, and what it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.encoding.encoder import EncodeOptions
from facetrt.engine.features.features import Features, Float, SaliencyMode
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.loading import DEFAULT_SIZE, AtMost, DefaultSize, LoadSize, Pixels
from facetrt.engine.settings import check, parse
from facetrt.engine.tasks.discovery.objects import Bools, Found
from facetrt.engine.tasks.discovery.segmenter import Segmenter
from facetrt.engine.tasks.masks import bilateral_mask, maskcut_crf
from facetrt.kernels.affinity import CutGraph, threshold_graph

OWN_SIZE = AtMost(512)
GraphMaker = Callable[[Float, float, float], CutGraph]  # as threshold_graph, which is the host's


@dataclass(frozen=True)
class Scene:
    """One image, as a method sees it.

    Attributes:
        features: of the image, with the facets that :meth:`Method.facets` asks for.
        parts: ``(cells, C)`` float32 of each facet to work on, as the encoder makes them, head-major.
        rows: the same of one facet, or of several that were fused.
        facet: what the rows are called.
        manifest: of the bundle.
        segmenter: SelfMask's, if the method uses it and the bundle holds one.
        graph: makes the graph of cells that are alike, where the engine's tasks run.
    """

    features: Features
    parts: Sequence[Float]
    rows: Float
    facet: str
    manifest: Manifest
    segmenter: Segmenter | None = None
    graph: GraphMaker = threshold_graph


@dataclass(frozen=True)
class Method(ABC):
    """A method's options, with its publication's defaults, and what it does with them. Instances can be shared.

    Attributes:
        name: what users type.
        load_size: how images are loaded unless one says otherwise. Most methods are published at the images' own size,
            on data sets whose shorter sides are of 500 pixels at most; larger photographs are loaded at 512.
        uses_segmenter: whether it is given the bundle's segmenter, which is read for it alone.
    """

    name: ClassVar[str]
    load_size: ClassVar[LoadSize] = OWN_SIZE
    uses_segmenter: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    @property
    @abstractmethod
    def fit(self) -> Fit:
        """How images are fitted to whole patches unless one says otherwise."""

    def facet(self, manifest: Manifest) -> str:
        """Whose rows it works on unless one says otherwise."""
        return manifest.default_facet("discover")

    def facets(self, manifest: Manifest) -> list[str]:
        """Facets that it reads beside the rows; none by default. Raises :class:`InputError` if the bundle lacks one."""
        return []

    def encoding(
        self, manifest: Manifest, load_size: LoadSize = DEFAULT_SIZE, fit: str | None = None, stride: int | None = None
    ) -> EncodeOptions:
        """How images are encoded for it: as published, but for what is given.

        Its stride is the patch size, or the bundle's own where that is fixed.
        """
        if stride is None:
            stride = manifest.architecture.patch if manifest.dynamic else manifest.stride
        size = self.load_size if isinstance(load_size, DefaultSize) else load_size
        return EncodeOptions(size, SaliencyMode.FULL, stride, self.fit if fit is None else parse(Fit, fit, "fit"))

    def smooth(self, pixels: Pixels, mask: Bools) -> Bools:
        """A mask ``(height, width)`` by the dense CRF, in MaskCut's setting unless the method has its own."""
        return maskcut_crf(pixels, mask)

    def solve(self, pixels: Pixels, mask: Bools) -> tuple[Bools, Float | None]:
        """A mask ``(height, width)`` by the bilateral solver, and the soft map if that is what is scored."""
        return bilateral_mask(pixels, mask)

    @abstractmethod
    def find(self, scene: Scene) -> Found:
        """The objects of one image. May be called from several threads."""
