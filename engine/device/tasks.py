"""The engine's tasks where the kernels run on the device."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import chain, islice
from threading import Lock

from facetrt.engine.backends import Precision
from facetrt.engine.backends.cuda import CudaBackend
from facetrt.engine.cosegmentation import CosegmentOptions, Masks
from facetrt.engine.device.cosegmentation import cosegment_on_device
from facetrt.engine.device.encoding import DeviceEncoder, DeviceFeatures, Frame, Lane, decode
from facetrt.engine.device.matching import match_on_device
from facetrt.engine.encoding import EncodeOptions, Encoder, OnBroken, Progress, Tally
from facetrt.engine.features import Features
from facetrt.engine.images import ImageLike
from facetrt.engine.loading import read_ahead
from facetrt.engine.matching import Matches, MatchOptions
from facetrt.kernels.errors import FacetrtError


class DeviceTasks:
    """Runs tasks on the lanes of a GPU backend. May be called from several threads: each call takes a free lane."""

    def __init__(self, encoder: Encoder, backend: CudaBackend) -> None:
        self._encoder, self._backend = encoder, backend
        self._encoders: dict[int, DeviceEncoder] = {}  # by lane, so that tables stay on the device between calls
        self._several = Lock()  # of a call that takes more lanes than one

    def encode(
        self, images: Iterable[ImageLike], facet: str, encoding: EncodeOptions, progress: Progress | None
    ) -> list[DeviceFeatures]:
        """See ``Engine.encode_on_device``."""
        self._encoder.check_options(encoding)
        with (
            self._backend.lane() as lane,
            closing(self._frames(images, encoding, Tally(images, progress), None)) as frames,
        ):
            return list(self._encoder_of(lane).encode(frames, facet, encoding))

    def match(
        self,
        image_a: ImageLike | Features,
        image_b: ImageLike | Features,
        encoding: EncodeOptions,
        options: MatchOptions,
    ) -> Matches:
        """See ``Engine.match``."""
        self._encoder.check_options(encoding)
        images = [item for item in (image_a, image_b) if not isinstance(item, Features)]
        frames = [decode(self._encoder, number, image, encoding) for number, image in enumerate(images)]
        with self._backend.lane() as lane:
            encoder = self._encoder_of(lane)
            encoded = encoder.encode(frames, options.facet, encoding)
            a, b = (
                encoder.upload(item, options.facet) if isinstance(item, Features) else next(encoded)
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
        """See ``Engine.cosegment``. Batches take turns on the lanes: one is uploaded while another is computed."""
        self._encoder.check_options(encoding)
        tally = Tally(images, progress)
        with self._lanes() as lanes, closing(self._frames(images, encoding, tally, on_broken)) as frames:
            features: list[DeviceFeatures] = []
            turn = 0
            while batch := list(islice(frames, 1)):
                encoder = self._encoder_of(lanes[turn % len(lanes)])
                same = islice(frames, encoder.batch_size(batch[0], encoding) - 1)
                features += encoder.encode(chain(batch, same), options.facet, encoding)
                turn += 1
            first = lanes[0].device
            return cosegment_on_device(first, [item.adopt(first) for item in features], options, progress)

    def cosegment_features(
        self, features: Sequence[Features], options: CosegmentOptions, progress: Progress | None
    ) -> Masks:
        """See ``Engine.cosegment``."""
        with self._backend.lane() as lane:
            encoder = self._encoder_of(lane)
            uploaded = [encoder.upload(item, options.facet) for item in features]
            return cosegment_on_device(lane.device, uploaded, options, progress)

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
        return self._encoders.setdefault(id(lane), DeviceEncoder(self._encoder, lane, self._backend.max_batch))

    @contextmanager
    def _lanes(self) -> Iterator[list[Lane]]:
        """All lanes; calls that take them all wait for one another, or each might hold what the other wants."""
        with self._several, ExitStack() as stack:
            yield [stack.enter_context(self._backend.lane()) for _ in range(self._backend.options.streams)]
