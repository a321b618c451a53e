"""Animated pictures as clips: GIF, PNG, WebP and AVIF, read by Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facetrt.engine.images.loading import Pixels, check_pixels, decoding, open_image, orientation, turned

ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
UNTIMED = 0.1  # seconds of a picture that says none, or less than a hundredth, as browsers have it
SHORTEST = 0.01
SAMPLE = 300  # pictures that an average is taken of; all must be decoded for it


@dataclass(frozen=True)
class TimedPicture:
    """One picture of an animation: RGB pixels, and the seconds that it is shown."""

    pixels: Pixels
    duration: float


class Animation:
    """An animated picture file; close it.

    Attributes:
        count: pictures.
    """

    def __init__(self, path: Path) -> None:
        self._name = str(path)
        with decoding(self._name):
            self._image = open_image(path)
            check_pixels(self._image, self._name)
            self.count = pictures(self._image)
        self._first = 1 if getattr(self._image, "default_image", False) else 0  # shown where animations are not

    def __iter__(self) -> Iterator[TimedPicture]:
        """All pictures; a damaged one ends them by an error.

        Raises:
            InputError: a picture that cannot be decoded.
        """
        for number in range(self._first, self._first + self.count):
            with decoding(self._name):
                self._image.seek(number)
                self._image.load()
                shown = turned(self._image, orientation(self._image))
                pixels = np.asarray(shown.convert("RGB"))
            yield TimedPicture(pixels, _duration(self._image))

    def durations(self) -> list[float]:
        """Seconds of each of the first few hundred pictures, as far as they can be read."""
        found: list[float] = []
        try:
            for number in range(self._first, self._first + min(self.count, SAMPLE)):
                self._image.seek(number)
                self._image.load()
                found.append(_duration(self._image))
        except Exception:  # noqa: BLE001  (damage is said when the picture is asked for)
            return found
        return found

    def close(self) -> None:
        """Give the file back."""
        self._image.close()


def pictures(image: Any) -> int:
    """How many pictures an open file shows one after the other; 1 if it is no animation."""
    if image.format not in ANIMATED:
        return 1
    return int(getattr(image, "n_frames", 1)) - bool(getattr(image, "default_image", False))


def _duration(image: Any) -> float:
    try:
        seconds = float(image.info.get("duration", 0)) / 1000
    except (TypeError, ValueError):
        return UNTIMED
    return seconds if SHORTEST <= seconds < 1e6 else UNTIMED
