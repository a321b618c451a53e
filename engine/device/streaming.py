"""Frames of a video in, descriptors out, all of it on the device: uploads overlap what is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from facetrt.engine.backends.cuda import CudaBackend
from facetrt.engine.device.encoding import DecodedImage, decode
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder
from facetrt.engine.encoding.frame_encoder import FrameEncoder
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.images.loading import Pixels

EncodeBatch = Callable[[Sequence[DecodedImage], Sequence[str], EncodeOptions], list[DeviceFeatures]]


class DeviceFrameEncoder(FrameEncoder[DecodedImage, DeviceFeatures]):
    """Gives features that stay on the device. Nothing here waits for it.

    Args:
        encode_batch: encodes frames of one size on a lane.
    """

    def __init__(
        self,
        encoder: Encoder,
        backend: CudaBackend,
        encode_batch: EncodeBatch,
        facets: Sequence[str],
        options: EncodeOptions,
    ) -> None:
        self._encoder, self._backend, self._encode_batch = encoder, backend, encode_batch
        self._facets, self._options = facets, options

    def activate(self) -> None:
        self._backend.activate()

    def load(self, pixels: Pixels, name: str) -> DecodedImage:
        """Uploaded, on a stream beside the encoder's."""
        frame = decode(self._encoder, name, pixels, self._options)
        if not isinstance(frame.pixels, np.ndarray):
            return frame
        with self._backend.stream() as device:
            return replace(frame, pixels=device.upload(frame.pixels))

    def encode(self, loaded: DecodedImage) -> DeviceFeatures:
        """Resized and encoded."""
        return self._encode_batch([loaded], self._facets, self._options)[0]

    def transfers(self) -> tuple[float, float]:
        return self._backend.transfers()
