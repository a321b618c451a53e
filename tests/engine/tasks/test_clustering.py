"""Clusters trained by FAISS's index of a GPU; its index of a processor, of the same interface, stands in for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from facetrt.engine import Engine
from facetrt.engine.samples import sample_images
from facetrt.engine.tasks.clustering import ClusteringMethod, cluster_elbow
from facetrt.engine.tasks.cosegmentation import CosegmentOptions
from facetrt.engine.tasks.descriptors import normalise
from facetrt.engine.tasks.parts import PartsOptions
from facetrt.kernels.errors import MissingDependencyError

PICTURES = [np.asarray(picture) for picture in list(sample_images().values())[:2]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the devices on which an index was made."""
    made: list[int] = []

    def index(resources: Any, channels: int, config: Any) -> Any:
        made.append(config.device)
        return faiss.IndexFlatL2(channels)

    module = SimpleNamespace(
        **{name: getattr(faiss, name) for name in dir(faiss) if not name.startswith("__")}
        | {
            "get_num_gpus": lambda: 1,
            "StandardGpuResources": SimpleNamespace,
            "GpuIndexFlatConfig": SimpleNamespace,
            "GpuIndexFlatL2": index,
        }
    )
    monkeypatch.setitem(sys.modules, "faiss", module)
    return made


def test_a_sweep_by_faiss_is_the_sweep(gpu: list[int]) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 8))
    rows = [normalise((centres[rng.integers(4, size=200)] + 0.05 * rng.standard_normal((200, 8))).astype("f4"))] * 2
    own = cluster_elbow(rows, sample_interval=2)
    assert not gpu
    found = cluster_elbow(rows, sample_interval=2, method=ClusteringMethod.FAISS)
    assert set(gpu) == {0} and found.tried_k == own.tried_k
    np.testing.assert_allclose(found.objectives, own.objectives, rtol=1e-4)
    nearest = ((found.centroids[:, None] - own.centroids) ** 2).sum(axis=2).argmin(axis=1)
    assert sorted(nearest) == list(range(len(own.centroids)))
    np.testing.assert_allclose(found.centroids, own.centroids[nearest], atol=1e-4)


def test_tasks_take_it(gpu: list[int]) -> None:
    options: dict[str, Any] = {"load_size": 64, "sample_interval": 3, "clustering": "faiss", "refine": "none"}
    with Engine.open("builtin", threads=1) as engine:
        masks = engine.cosegment(PICTURES, **options)
        assert gpu and len(masks) == 2
        before = len(gpu)
        parts = engine.segment_parts(PICTURES, num_parts=2, **options)
        assert len(gpu) > before and len(parts) == 2
        with pytest.raises(ValueError, match=r"clustering.*expected.*facetrt.*faiss"):
            engine.cosegment(PICTURES, **options | {"clustering": "sklearn"})


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss has GPU support")
@pytest.mark.parametrize("kind", [CosegmentOptions, PartsOptions])
def test_without_a_gpu_it_is_an_error_that_names_the_extra(kind: type[CosegmentOptions] | type[PartsOptions]) -> None:
    with pytest.raises(MissingDependencyError, match=r"without GPU support.*facetrt\[gpu\]"):
        kind(clustering=ClusteringMethod.FAISS)
