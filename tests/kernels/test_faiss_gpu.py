"""k-means on a GPU: the calls that FAISS gets, in their order; the errors; and a device where there is one."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from facetrt.kernels import kmeans
from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError
from facetrt.kernels.faiss_gpu import kmeans_gpu


def rows(count: int, channels: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)


class FakeFaiss:
    """The GPU half of faiss: records the calls, refuses those out of order, and clusters with the real CPU half."""

    ClusteringParameters = faiss.ClusteringParameters
    vector_to_array = staticmethod(faiss.vector_to_array)

    def __init__(self, gpus: int = 2, failure: str | None = None) -> None:
        self.calls: list[Any] = []
        self.gpus, self.failure = gpus, failure
        self.resources: Any = None
        self.device: int | None = None

    def get_num_gpus(self) -> int:
        return self.gpus

    def StandardGpuResources(self) -> Any:
        assert self.resources is None, "one set of resources"
        self.calls.append("resources")
        self.resources = SimpleNamespace(setDefaultStream=self._set_stream)
        return self.resources

    def cast_integer_to_cudastream_t(self, value: int) -> tuple[str, int]:
        assert isinstance(value, int)
        return "cudaStream_t", value

    def _set_stream(self, device: int, stream: tuple[str, int]) -> None:
        assert "train" not in self.calls, "the stream comes before any work"
        assert stream[0] == "cudaStream_t", "an integer must be cast"
        self.calls.append(("stream", device, stream[1]))

    def GpuIndexFlatConfig(self) -> Any:
        return SimpleNamespace(device=0)

    def GpuIndexFlatL2(self, resources: Any, channels: int, config: Any) -> Any:
        assert resources is self.resources is not None, "resources come first"
        self.calls.append(("index", config.device, channels))
        return faiss.IndexFlatL2(channels)

    def Clustering(self, channels: int, count: int, parameters: Any) -> Any:
        self.parameters = parameters
        trainer = faiss.Clustering(channels, count, parameters)
        train = trainer.train

        def recorded(samples: np.ndarray, index: Any) -> None:
            assert samples.flags.c_contiguous and samples.dtype == np.float32
            self.calls.append("train")
            if self.failure:
                raise RuntimeError(self.failure)
            train(samples, index)

        trainer.train = recorded
        return trainer


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeFaiss:
    module = FakeFaiss()
    monkeypatch.setitem(sys.modules, "faiss", module)
    return module


def test_one_device_gets_resources_then_stream_then_index_then_work(fake: FakeFaiss) -> None:
    kmeans_gpu(rows(40), 3, gpu=1, stream=0x7F00AA)
    assert fake.calls == ["resources", ("stream", 1, 0x7F00AA), ("index", 1, 8), "train"]


def test_without_a_stream_faiss_keeps_its_own(fake: FakeFaiss) -> None:
    kmeans_gpu(rows(40), 3)
    assert fake.calls == ["resources", ("index", 0, 8), "train"]


@pytest.mark.parametrize(("count", "clusters"), [(40, 3), (25, 25), (1100, 4)])
def test_starts_subsample_and_restarts_are_those_of_kmeans(
    count: int, clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = rows(count)
    expected = kmeans(samples, clusters)
    monkeypatch.setitem(sys.modules, "faiss", FakeFaiss())
    got = kmeans_gpu(samples, clusters)
    np.testing.assert_allclose(got.centroids, expected.centroids, atol=1e-5)
    assert got.objective == pytest.approx(expected.objective, rel=1e-6)
    assert got.centroids.dtype == np.float32


def test_options_reach_faiss(fake: FakeFaiss) -> None:
    kmeans_gpu(rows(40), 3, iterations=7, restarts=2)
    assert (fake.parameters.niter, fake.parameters.nredo) == (7, 2)


@pytest.mark.parametrize("gpu", [-1, 2])
def test_a_device_that_is_not_there_is_refused(fake: FakeFaiss, gpu: int) -> None:
    with pytest.raises(InputError, match=f"gpu is {gpu}: expected 0 to 1"):
        kmeans_gpu(rows(40), 3, gpu=gpu)
    assert fake.calls == []


def test_no_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", FakeFaiss(gpus=0))
    with pytest.raises(BackendError, match=r"no CUDA device.*nothing was computed on the processor"):
        kmeans_gpu(rows(40), 3)


def test_a_failure_on_the_device_says_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", FakeFaiss(failure="out of memory"))
    with pytest.raises(BackendError, match=r"GPU 0 with 40 rows of 8 numbers and 3 clusters: out of memory; cluster"):
        kmeans_gpu(rows(40), 3)


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss has GPU support")
def test_faiss_without_gpu_support_is_named_and_nothing_falls_back() -> None:
    with pytest.raises(
        MissingDependencyError, match=r"without GPU support, and nothing .* pip install 'facetrt\[gpu\]'"
    ):
        kmeans_gpu(rows(40), 3)


def test_missing_faiss_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'facetrt\[gpu\]'"):
        kmeans_gpu(rows(40), 3)


def test_bad_input_is_refused_before_any_device_is_touched(fake: FakeFaiss) -> None:
    with pytest.raises(InputError, match="41 clusters were asked of 40"):
        kmeans_gpu(rows(40), 41)
    with pytest.raises(InputError, match="iterations=0"):
        kmeans_gpu(rows(40), 3, iterations=0)
    with pytest.raises(InputError, match="NaN"):
        kmeans_gpu(np.full((4, 4), np.nan, np.float32), 2)
    assert fake.calls == []


@pytest.mark.gpu
def test_a_real_device_agrees_with_the_processor() -> None:
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        pytest.skip("no CUDA device, or a faiss without GPU support")
    centres = rows(5, 64, seed=1) * 10  # clusters far apart: rounding moves no row
    samples = centres[np.arange(2000) % 5] + rows(2000, 64)
    got, expected = kmeans_gpu(samples, 5), kmeans(samples, 5)
    np.testing.assert_allclose(got.centroids, expected.centroids, rtol=1e-4, atol=1e-4)
    assert got.objective == pytest.approx(expected.objective, rel=1e-4)
