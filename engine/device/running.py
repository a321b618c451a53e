"""Where an engine's tasks run if the kernels run on the device."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from threading import Lock

from facetrt.engine.backends.cuda import CudaBackend
from facetrt.engine.backends.run_options import Precision
from facetrt.engine.device.applying import apply_model
from facetrt.engine.device.cosegmentation import DeviceImages
from facetrt.engine.device.encoding import DecodedImage, DeviceEncoder, EncoderLane, batches, decode
from facetrt.engine.device.matching import DevicePair
from facetrt.engine.device.refinement import device_refiner
from facetrt.engine.device.streaming import DeviceFrameEncoder
from facetrt.engine.device.transfer import to_device, to_host
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder, OnBroken, Progress, Tally
from facetrt.engine.features.features import Features
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.images.loading import ImageLike
from facetrt.engine.images.reading_ahead import read_ahead
from facetrt.engine.tasks.cosegmentation import CosegmentOptions, Mask
from facetrt.engine.tasks.discovery.method import GraphMaker
from facetrt.engine.tasks.models import Model
from facetrt.engine.tasks.parts import PartMap
from facetrt.engine.tasks.refinement import Refinement, Refiner
from facetrt.engine.tasks.running import Runner, encode_missing
from facetrt.engine.tasks.smoothing import Smoother
from facetrt.kernels.device.graph import threshold_graph
from facetrt.kernels.errors import FacetrtError, InputError


class DeviceRunner(Runner):
    """Runs tasks on the lanes of a GPU backend. May be called from several threads: each call takes a free lane."""

    def __init__(self, encoder: Encoder, backend: CudaBackend) -> None:
        self._encoder, self._backend = encoder, backend
        self._encoders: dict[EncoderLane, DeviceEncoder] = {}  # so that tables stay on the device between calls

    def encode_on_device(
        self,
        images: Iterable[ImageLike],
        facets: Sequence[str],
        encoding: EncodeOptions,
        progress: Progress | None,
        on_broken: OnBroken | None = None,
    ) -> list[DeviceFeatures]:
        """See ``Engine.encode_on_device``; ``on_broken`` as for ``Engine.encode``.

        Batches take turns on the lanes: one is uploaded while another is computed. No lane is held while images are
        asked for, which may use this engine themselves.
        """
        self._encoder.check_options(encoding)
        self._backend.activate()
        features: list[DeviceFeatures] = []
        with closing(self._frames(images, encoding, Tally(images, progress), on_broken)) as frames:
            for batch in batches(self._encoder, frames, encoding):
                features += self.encode_batch(batch, facets, encoding)
        return features

    def frame_encoder(self, facets: Sequence[str], encoding: EncodeOptions) -> DeviceFrameEncoder:
        self._encoder.check_options(encoding)
        return DeviceFrameEncoder(self._encoder, self._backend, self.encode_batch, facets, encoding)

    def to_host(self, features: DeviceFeatures) -> Features:
        with self._backend.stream() as device:
            return to_host(device, features.adopt(device))

    def encode_batch(
        self, batch: Sequence[DecodedImage], facets: Sequence[str], encoding: EncodeOptions
    ) -> list[DeviceFeatures]:
        """See :meth:`DeviceEncoder.encode`; on the next free lane."""
        with self._backend.lane() as lane:
            return self._encoder_of(lane).encode(batch, facets, encoding)

    @contextmanager
    def pair(
        self,
        image_a: ImageLike | Features,
        image_b: ImageLike | Features,
        facet: str,
        encoding: EncodeOptions,
        progress: Progress | None,
    ) -> Iterator[DevicePair]:
        """An encoder in half precision has no more digits to compare."""

        def encode(images: list[ImageLike]) -> list[DeviceFeatures]:
            return self.encode_on_device(images, [facet], encoding, progress)

        items = encode_missing((image_a, image_b), encode)
        with self._backend.lane() as lane:
            a, b = (self._bring(item, lane, facet) for item in items)
            yield DevicePair(lane.device, a, b, facet, half=self._backend.options.precision is not Precision.FP32)

    @contextmanager
    def encoded(
        self,
        images: Iterable[ImageLike],
        options: CosegmentOptions,
        encoding: EncodeOptions,
        progress: Progress | None,
        on_broken: OnBroken | None,
    ) -> Iterator[DeviceImages]:
        encoded = self.encode_on_device(images, [options.facet], encoding, progress, on_broken)
        with self._backend.lane() as lane:
            held = DeviceImages(lane.device, [item.adopt(lane.device) for item in encoded], (), options.facet)
            del encoded  # which would keep what makes way for unit descriptors
            yield held

    @contextmanager
    def given(self, features: Sequence[Features], options: CosegmentOptions) -> Iterator[DeviceImages]:
        with self._backend.lane() as lane:
            uploaded = (self._bring(item, lane, options.facet) for item in features)
            yield DeviceImages(lane.device, uploaded, features, options.facet)

    def check(self, options: CosegmentOptions) -> None:
        """There is no log-binning in :class:`DeviceImages`."""
        if options.hierarchy:
            raise InputError(
                f"hierarchy={options.hierarchy}: co-segmentation on a GPU has no log-binning: open the engine with "
                "kernels=host"
            )

    @contextmanager
    def refiner(self) -> Iterator[Refiner]:
        """The CRF on a lane that is taken for the while."""
        with self._backend.lane() as lane:
            yield device_refiner(lane.device, Lock())

    def apply(
        self, model: Model, features: DeviceFeatures, refine: Refinement, smoother: Smoother | None
    ) -> Mask | PartMap:
        with self._backend.stream() as device:
            return apply_model(device, model, features.adopt(device), refine, smoother)

    @contextmanager
    def graphs(self) -> Iterator[GraphMaker]:
        """Graphs on a lane that is taken for the while: what comes down are degrees and eigenvectors."""
        with self._backend.lane() as lane:
            yield partial(threshold_graph, lane.device)

    def _frames(
        self, images: Iterable[ImageLike], encoding: EncodeOptions, tally: Tally, on_broken: OnBroken | None
    ) -> Generator[DecodedImage]:

        def load(number: int, image: ImageLike) -> DecodedImage:
            return decode(self._encoder, f"image {number}", image, encoding)

        with closing(read_ahead(enumerate(images), load)) as items:
            for item in items:
                if not isinstance(item.loaded, FacetrtError):
                    yield item.loaded
                elif on_broken is None:
                    raise item.loaded
                else:
                    on_broken(item.image, item.loaded)
                tally.add()

    def _bring(self, item: Features | DeviceFeatures, lane: EncoderLane, facet: str) -> DeviceFeatures:
        """Features for use on a lane."""
        return to_device(lane.device, item, [facet]) if isinstance(item, Features) else item.adopt(lane.device)

    def _encoder_of(self, lane: EncoderLane) -> DeviceEncoder:
        """The lane's, made by its first user: a lane has one user at a time."""
        if lane not in self._encoders:
            self._encoders[lane] = DeviceEncoder(self._encoder, lane)
        return self._encoders[lane]

    def close(self) -> None:
        """Let go of what is kept on the device between calls."""
        self._encoders.clear()
