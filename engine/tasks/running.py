"""Where an engine's tasks run: one contract, of which the engine chooses an implementation when it opens.

What the tasks do is written once, in their own modules: a runner brings images to where it works and hands them over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from facetrt.engine.encoding.encoder import EncodeOptions, Encoder, OnBroken, Progress
from facetrt.engine.encoding.frame_encoder import FrameEncoder
from facetrt.engine.features.collection import MEMORY_LIMIT, FeatureCollection
from facetrt.engine.features.features import Features
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.images.loading import ImageLike
from facetrt.engine.tasks.cosegmentation import CosegmentOptions, HostImages, Images, Mask
from facetrt.engine.tasks.discovery.method import GraphMaker
from facetrt.engine.tasks.matching import HostPair, Pair
from facetrt.engine.tasks.models import Model
from facetrt.engine.tasks.parts import PartMap
from facetrt.engine.tasks.refinement import Refinement, Refiner, refine_labels
from facetrt.engine.tasks.smoothing import Smoother
from facetrt.kernels.affinity import threshold_graph
from facetrt.kernels.errors import InputError

Held = TypeVar("Held")  # features, wherever a runner holds them


class Runner(ABC):
    """Brings images and features to where an engine's tasks run. May be called from several threads."""

    @abstractmethod
    def encode_on_device(
        self, images: Iterable[ImageLike], facets: Sequence[str], encoding: EncodeOptions, progress: Progress | None
    ) -> list[DeviceFeatures]:
        """See ``Engine.encode_on_device``."""

    @abstractmethod
    def frame_encoder(self, facets: Sequence[str], encoding: EncodeOptions) -> FrameEncoder[Any, DeviceFeatures]:
        """See ``Engine.stream_on_device``."""

    @abstractmethod
    def to_host(self, features: DeviceFeatures) -> Features:
        """See ``Engine.to_host``."""

    @abstractmethod
    def pair(
        self,
        image_a: ImageLike | Features,
        image_b: ImageLike | Features,
        facet: str,
        encoding: EncodeOptions,
        progress: Progress | None,
    ) -> AbstractContextManager[Pair[Any, Any, Any]]:
        """Two images for :func:`facetrt.engine.tasks.matching.match_pair`; what is no features yet is encoded."""

    @abstractmethod
    def encoded(
        self,
        images: Iterable[ImageLike],
        options: CosegmentOptions,
        encoding: EncodeOptions,
        progress: Progress | None,
        on_broken: OnBroken | None,
    ) -> AbstractContextManager[Images[Any, Any, Any, Any]]:
        """Images to encode, for :func:`facetrt.engine.tasks.cosegmentation.cosegment_images`."""

    @abstractmethod
    def given(
        self, features: Sequence[Features], options: CosegmentOptions
    ) -> AbstractContextManager[Images[Any, Any, Any, Any]]:
        """Features that were encoded before, for :func:`facetrt.engine.tasks.cosegmentation.cosegment_images`."""

    @abstractmethod
    def refiner(self) -> AbstractContextManager[Refiner]:
        """What runs the CRF."""

    @abstractmethod
    def apply(
        self, model: Model, features: DeviceFeatures, refine: Refinement, smoother: Smoother | None
    ) -> Mask | PartMap:
        """See ``Engine.apply``; features in host memory need no runner."""

    @abstractmethod
    def graphs(self) -> AbstractContextManager[GraphMaker]:
        """What makes and solves the graphs of cells that discovery cuts."""

    def check(self, options: CosegmentOptions) -> None:  # noqa: B027
        """Raise :class:`InputError` for options that this runner lacks."""

    def close(self) -> None:  # noqa: B027
        """Let go of what is kept between calls."""


class HostRunner(Runner):
    """Runs the tasks on the processor, in bounded memory."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode_on_device(
        self, images: Iterable[ImageLike], facets: Sequence[str], encoding: EncodeOptions, progress: Progress | None
    ) -> list[DeviceFeatures]:
        """There is none."""
        raise InputError(self._no_device)

    def frame_encoder(self, facets: Sequence[str], encoding: EncodeOptions) -> FrameEncoder[Any, DeviceFeatures]:
        """There is no device."""
        raise InputError(self._no_device)

    def to_host(self, features: DeviceFeatures) -> Features:
        """There is no device that they could lie on."""
        raise InputError(self._no_device)

    @property
    def _no_device(self) -> str:
        return (
            f"this engine is on {self._encoder.backend.options.device}, its kernels on the host: open it with "
            "device='cuda' and kernels='device'"
        )

    @contextmanager
    def pair(
        self,
        image_a: ImageLike | Features,
        image_b: ImageLike | Features,
        facet: str,
        encoding: EncodeOptions,
        progress: Progress | None,
    ) -> Iterator[HostPair]:
        a, b = encode_missing((image_a, image_b), lambda images: list(self._encoder.encode(images, encoding, progress)))
        yield HostPair(a, b, facet)

    @contextmanager
    def encoded(
        self,
        images: Iterable[ImageLike],
        options: CosegmentOptions,
        encoding: EncodeOptions,
        progress: Progress | None,
        on_broken: OnBroken | None,
    ) -> Iterator[HostImages]:
        with collect(self._encoder, images, [options.facet], encoding, progress, on_broken) as collection:
            yield HostImages(collection, options.facet, options.hierarchy)

    def given(self, features: Sequence[Features], options: CosegmentOptions) -> AbstractContextManager[HostImages]:
        return nullcontext(HostImages(features, options.facet, options.hierarchy))

    def refiner(self) -> AbstractContextManager[Refiner]:
        return nullcontext(refine_labels)

    def apply(
        self, model: Model, features: DeviceFeatures, refine: Refinement, smoother: Smoother | None
    ) -> Mask | PartMap:
        """There is no device that features could lie on."""
        raise InputError(f"the features of {features.record.name} lie on a device, and {self._no_device}")

    def graphs(self) -> AbstractContextManager[GraphMaker]:
        return nullcontext(threshold_graph)


def encode_missing(
    items: Sequence[ImageLike | Features], encode: Callable[[list[ImageLike]], list[Held]]
) -> list[Features | Held]:
    """``items`` with the images among them encoded, all at once."""
    encoded = iter(encode([item for item in items if not isinstance(item, Features)]))
    return [item if isinstance(item, Features) else next(encoded) for item in items]


def collect(
    encoder: Encoder,
    images: Iterable[ImageLike],
    facets: Iterable[str],
    encoding: EncodeOptions,
    progress: Progress | None = None,
    on_broken: OnBroken | None = None,
    *,
    memory_limit: int = MEMORY_LIMIT,
) -> FeatureCollection:
    """See ``Engine.collect``."""
    collection = FeatureCollection(facets, memory_limit=memory_limit)
    try:
        for item in encoder.encode(images, encoding, progress, on_broken):
            collection.append(item)
    except BaseException:
        collection.close()
        raise
    return collection
