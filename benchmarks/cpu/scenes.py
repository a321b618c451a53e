"""Descriptors made without a model, whose cells are alike as far as the parts of a photograph are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.samples import sample_images

COLOUR, PLACE, NOISE = 2.5, 1.5, 0.3  # how fast cosines fall with colour and with distance; noise of each entry


def scene_rows(grid: tuple[int, int], channels: int) -> NDArray[np.float32]:
    """``(grid_h · grid_w, channels)``: the cosine of two cells falls with the distance of their places and colours."""
    random = np.random.RandomState(0)  # the same numbers in every version of NumPy
    picture = sample_images()["chelsea"].resize((grid[1], grid[0]), Image.Resampling.BOX)
    colours = np.asarray(picture, np.float64).reshape(-1, 3) / 255
    places = np.indices(grid).reshape(2, -1).T / max(grid)
    seen = np.concatenate([COLOUR * colours, PLACE * places], axis=1) @ random.normal(size=(5, channels))
    waves = np.cos(seen + random.uniform(0, 2 * np.pi, channels))
    return (waves + NOISE * random.normal(size=waves.shape)).astype(np.float32)
