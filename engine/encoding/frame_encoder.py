"""Encoding frames one by one, for streams: what each of a stream's threads does with a frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from facetrt.engine.encoding.encoder import EncodeOptions, Encoder
from facetrt.engine.features.features import Features
from facetrt.engine.images.loading import LoadedImage, Pixels

Loaded = TypeVar("Loaded")
Encoded = TypeVar("Encoded")


class FrameEncoder(ABC, Generic[Loaded, Encoded]):
    """Where a stream's frames are encoded. Several threads use it, each its own method."""

    @abstractmethod
    def activate(self) -> None:
        """Load the encoder, if that was not done yet."""

    @abstractmethod
    def load(self, pixels: Pixels, name: str) -> Loaded:
        """What is done with a frame before it is encoded, while another one is."""

    @abstractmethod
    def encode(self, loaded: Loaded) -> Encoded:
        """A frame's features."""

    def transfers(self) -> tuple[float, float]:
        """Seconds spent until now on ways to a device and back."""
        return 0.0, 0.0


class HostFrameEncoder(FrameEncoder[LoadedImage, Features]):
    """Gives features in the processor's memory, wherever the encoder runs."""

    def __init__(self, encoder: Encoder, options: EncodeOptions) -> None:
        encoder.check_options(options)
        self._encoder, self._options = encoder, options

    def activate(self) -> None:
        self._encoder.backend.activate()

    def load(self, pixels: Pixels, name: str) -> LoadedImage:
        """Resized."""
        return self._encoder.load(pixels, self._options, name=name)

    def encode(self, loaded: LoadedImage) -> Features:
        return self._encoder.encode_loaded(loaded, self._options)

    def transfers(self) -> tuple[float, float]:
        return self._encoder.backend.transfers()
