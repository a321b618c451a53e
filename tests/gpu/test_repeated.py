"""A thousand runs give the same bytes: no race, no use of memory that is not written yet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import Engine

pytestmark = pytest.mark.gpu

RUNS = 1000
IMAGES = [photo(96, 128, seed) for seed in range(4)]


def digest(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(values).tobytes() for values in arrays)).hexdigest()


def encode(engine: Engine) -> str:
    found = engine.encode(IMAGES, load_size=None)
    return digest(*(item.attention for item in found), *(rows for item in found for rows in item.tokens.values()))


def match(engine: Engine) -> str:
    found = engine.match(IMAGES[0], IMAGES[1], load_size=None)
    return digest(found.cells_a, found.cells_b, found.similarity, found.clusters, found.selected)


def cosegment(engine: Engine) -> str:
    found = engine.cosegment(IMAGES, load_size=None, sample_interval=10, refine="none")
    return digest(found.clustering.centroids, found.votes.mean_saliency, *(mask.labels for mask in found))


@pytest.mark.parametrize("task", [encode, match, cosegment])
def test_the_same_bytes_every_time(engine: Engine, task: Callable[[Engine], str]) -> None:
    assert len({task(engine) for _ in range(RUNS)}) == 1
