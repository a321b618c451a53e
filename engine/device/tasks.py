"""The engine's tasks where the kernels run on the device."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from threading import Lock

from facetrt.engine.backends.cuda import CudaBackend
from facetrt.engine.backends.run_options import Precision
from facetrt.engine.device.cosegmentation import cosegment_on_device
from facetrt.engine.device.encoding import DeviceEncoder, DeviceFeatures, Frame, Lane, batches, decode
from facetrt.engine.device.matching import match_on_device
from facetrt.engine.device.refinement import device_refiner
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder, OnBroken, Progress, Tally
from facetrt.engine.features.features import Features
from facetrt.engine.images.loading import ImageLike
from facetrt.engine.images.reading_ahead import read_ahead
from facetrt.engine.tasks.cosegmentation import CosegmentOptions, Masks
from facetrt.engine.tasks.matching import Matches, MatchOptions
from facetrt.engine.tasks.refinement import Refiner
from facetrt.kernels.errors import FacetrtError


class DeviceTasks:
    """Runs tasks on the lanes of a GPU backend. May be called from several threads: each call takes a free lane."""

    def __init__(self, encoder: Encoder, backend: CudaBackend) -> None:
        self._encoder, self._backend = encoder, backend
        self._encoders: dict[int, DeviceEncoder] = {}  # by lane, so that tables stay on the device between calls

    def encode(
        self,
        images: Iterable[ImageLike],
        facet: str,
        encoding: EncodeOptions,
        progress: Progress | None,
        on_broken: OnBroken | None = None,
    ) -> list[DeviceFeatures]:
        """See ``Engine.encode_on_device``.

        Batches take turns on the lanes: one is uploaded while another is computed. No lane is held while images are
        asked for, which may use this engine themselves.
        """
        self._encoder.check_options(encoding)
        self._backend.activate()
        features: list[DeviceFeatures] = []
        with closing(self._frames(images, encoding, Tally(images, progress), on_broken)) as frames:
            for batch in batches(self._encoder, frames, encoding):
                with self._backend.lane() as lane:
                    features += self._encoder_of(lane).encode(batch, facet, encoding)
        return features

    def match(
        self,
        image_a: ImageLike | Features,
        image_b: ImageLike | Features,
        encoding: EncodeOptions,
        options: MatchOptions,
        progress: Progress | None = None,
    ) -> Matches:
        """See ``Engine.match``."""
        images = [item for item in (image_a, image_b) if not isinstance(item, Features)]
        encoded = iter(self.encode(images, options.facet, encoding, progress))
        with self._backend.lane() as lane:
            encoder = self._encoder_of(lane)
            a, b = (
                encoder.upload(item, options.facet) if isinstance(item, Features) else next(encoded).adopt(lane.device)
                for item in (image_a, image_b)
            )
            return match_on_device(lane.device, a, b, options, half=self._half)

    def cosegment_images(
        self,
        images: Iterable[ImageLike],
        encoding: EncodeOptions,
        options: CosegmentOptions,
        progress: Progress | None,
        on_broken: OnBroken | None,
    ) -> Masks:
        """See ``Engine.cosegment``."""
        features = self.encode(images, options.facet, encoding, progress, on_broken)
        with self._backend.lane() as lane:
            for i, item in enumerate(features):
                features[i] = item.adopt(lane.device)
            return cosegment_on_device(lane.device, features, options, progress)

    def cosegment_features(
        self, features: Sequence[Features], options: CosegmentOptions, progress: Progress | None
    ) -> Masks:
        """See ``Engine.cosegment``."""
        with self._backend.lane() as lane:
            encoder = self._encoder_of(lane)
            uploaded = [encoder.upload(item, options.facet) for item in features]
            return cosegment_on_device(lane.device, uploaded, options, progress, features)

    @contextmanager
    def refiner(self) -> Iterator[Refiner]:
        """The CRF on a lane that is taken for the while."""
        with self._backend.lane() as lane:
            yield device_refiner(lane.device, Lock())

    @property
    def _half(self) -> bool:
        """An encoder in half precision has no more digits to compare."""
        return self._backend.options.precision is not Precision.FP32

    def _frames(
        self, images: Iterable[ImageLike], encoding: EncodeOptions, tally: Tally, on_broken: OnBroken | None
    ) -> Generator[Frame]:
        load = partial(decode, self._encoder, options=encoding)
        with closing(read_ahead(enumerate(images), load)) as items:
            for item in items:
                if not isinstance(item.loaded, FacetrtError):
                    yield item.loaded
                elif on_broken is None:
                    raise item.loaded
                else:
                    on_broken(item.image, item.loaded)
                tally.add()

    def _encoder_of(self, lane: Lane) -> DeviceEncoder:
        return self._encoders.setdefault(id(lane), DeviceEncoder(self._encoder, lane))

    def close(self) -> None:
        """Let go of what is kept on the device between calls."""
        self._encoders.clear()
