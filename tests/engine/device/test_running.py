"""The tasks on a device against those on the host: kernels in the interpreter, the encoder on ONNX Runtime's CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from helpers import photo

from facetrt.engine import Engine
from facetrt.engine.backends.run_options import Precision
from facetrt.engine.device import running
from facetrt.engine.device.cosegmentation import DeviceImages
from facetrt.engine.device.encoding import DeviceEncoder
from facetrt.engine.device.running import DeviceRunner
from facetrt.engine.encoding.encoder import EncodeOptions, OnBroken, Progress
from facetrt.engine.features.features import Features, SaliencyMode
from facetrt.engine.tasks import clustering, cosegmentation, refinement
from facetrt.engine.tasks.cosegmentation import CosegmentOptions, Masks, cosegment_images
from facetrt.engine.tasks.matching import Matches, MatchOptions, match_pair
from facetrt.engine.tasks.refinement import Refinement
from facetrt.engine.tasks.running import Runner
from facetrt.kernels import InputError
from facetrt.kernels.device import Device, DeviceArray, kmeans, refine
from facetrt.kernels.device.runtime.exchange import HOST
from facetrt.kernels.kmeans import kmeans_each

MATCH = "key@1"
FEW_VOTES = {"sample_interval": 5, "saliency_threshold": 0.25, "votes_percentage": 50}  # some clusters are salient
OPTIONS = CosegmentOptions("key@1", sample_interval=5, refine=Refinement.NONE)


class HostLane:
    """Runs the encoder on the host, behind the interface of a lane."""

    def __init__(self, engine: Engine, device: Device) -> None:
        self.device, self._backend = device, engine._encoder.backend
        self.batches: list[int] = []

    def run(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        self.batches.append(inputs["images"].shape[0])
        outputs = self._backend.run({name: self.device.download(array) for name, array in inputs.items()})
        return {name: self.device.upload(array) for name, array in outputs.items()}


class HostBackend:
    """Hands out lanes, as many as ``streams``."""

    def __init__(self, engine: Engine, device: Device, streams: int = 1) -> None:
        self.lanes = [HostLane(engine, device) for _ in range(streams)]
        self._free = list(self.lanes)
        self.options = SimpleNamespace(streams=streams, precision=Precision.FP32)

    def activate(self) -> None:
        """Nothing to open."""

    @contextmanager
    def lane(self) -> Iterator[HostLane]:
        lane = self._free.pop(0)
        try:
            yield lane
        finally:
            self._free.append(lane)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusterings small enough for an interpreter, on both sides alike."""
    monkeypatch.setattr(cosegmentation, "MAX_CLUSTERS", 3)
    monkeypatch.setattr(clustering, "kmeans_each", partial(kmeans_each, restarts=2, iterations=6))
    monkeypatch.setattr(kmeans, "kmeans_each", partial(kmeans.kmeans_each, restarts=2, iterations=6))


@pytest.fixture
def one_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CRF, on both sides."""
    monkeypatch.setattr(refinement, "dense_crf", partial(refinement.dense_crf, iterations=1))
    monkeypatch.setattr(refine, "mean_field", partial(refine.mean_field, iterations=1))


@pytest.fixture
def runner(tiny_engine: Engine, device: Device) -> DeviceRunner:
    return DeviceRunner(tiny_engine._encoder, HostBackend(tiny_engine, device))  # type: ignore[arg-type]


def match(
    runner: Runner, a: Any, b: Any, encoding: EncodeOptions, options: MatchOptions, progress: Progress | None = None
) -> Matches:
    with runner.pair(a, b, options.facet, encoding, progress) as pair:
        return match_pair(pair, options)


def cosegment(
    runner: Runner,
    images: Sequence[Any],
    encoding: EncodeOptions,
    options: CosegmentOptions,
    on_broken: OnBroken | None = None,
) -> Masks:
    with runner.encoded(images, options, encoding, None, on_broken) as held:
        return cosegment_images(held, options)


def cosegment_given(runner: Runner, features: Sequence[Features], options: CosegmentOptions) -> Masks:
    with runner.given(features, options) as held:
        return cosegment_images(held, options)


@pytest.mark.parametrize("hierarchy", [0, 2])
@pytest.mark.parametrize("sizes", [((90, 120), (90, 120)), ((70, 64), (64, 101))])
def test_match_gives_the_hosts_pairs(
    tiny_engine: Engine, runner: DeviceRunner, sizes: tuple[tuple[int, int], ...], hierarchy: int
) -> None:
    a, b = (photo(*size, seed=i) for i, size in enumerate(sizes))
    expected = tiny_engine.match(a, b, facet=MATCH, load_size=24, hierarchy=hierarchy, num_pairs=3)
    found = match(runner, a, b, EncodeOptions(24), MatchOptions(MATCH, 3, hierarchy))
    np.testing.assert_array_equal(found.cells_a, expected.cells_a)
    np.testing.assert_array_equal(found.cells_b, expected.cells_b)
    np.testing.assert_allclose(found.similarity, expected.similarity, atol=1e-5)
    np.testing.assert_array_equal(found.clusters, expected.clusters)
    np.testing.assert_allclose(found.points_b_xy, expected.points_b_xy)


def test_match_takes_features_and_images_alike(tiny_engine: Engine, runner: DeviceRunner) -> None:
    a, b = photo(60, 60), photo(60, 64, seed=1)
    features = tiny_engine.encode([a], load_size=24)[0]
    mixed = match(runner, features, b, EncodeOptions(24), MatchOptions(MATCH, 2))
    plain = match(runner, a, b, EncodeOptions(24), MatchOptions(MATCH, 2))
    np.testing.assert_array_equal(mixed.cells_a, plain.cells_a)
    np.testing.assert_array_equal(mixed.points_b_xy, plain.points_b_xy)


def test_match_waits_once(
    tiny_engine: Engine, runner: DeviceRunner, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes down does so after everything has been launched."""
    features, events = tiny_engine.encode([photo(60, 60), photo(60, 64, seed=1)], load_size=24), []

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(device, name)
        return lambda *arguments: events.append(name) or real(*arguments)

    with runner.pair(*features, MATCH, EncodeOptions(24), None) as pair:
        for name in ("launch", "download"):
            monkeypatch.setattr(device, name, noted(name))
        match_pair(pair, MatchOptions(MATCH, 2))
    assert "launch" in events and "launch" not in events[events.index("download") :]


def test_nothing_salient_gives_no_pairs(runner: DeviceRunner) -> None:
    found = match(
        runner, photo(60, 60), photo(60, 64), EncodeOptions(24), MatchOptions(MATCH, 3, saliency_threshold=1.5)
    )
    assert len(found) == 0 and found.cells_a.size == 0 and found.points_a_xy.shape == (0, 2)


@pytest.mark.parametrize("mode", list(SaliencyMode))
def test_cosegment_gives_the_hosts_masks(tiny_engine: Engine, runner: DeviceRunner, mode: SaliencyMode) -> None:
    images = [photo(64, 80, seed=i) for i in range(3)] + [photo(70, 64, seed=9)]
    expected = tiny_engine.cosegment(
        images,
        load_size=32,
        facet="key@1",
        sample_interval=5,
        refine="none",
        saliency=mode,
    )
    found = cosegment(runner, images, EncodeOptions(32, mode), OPTIONS)
    assert found.clustering.tried_k == expected.clustering.tried_k
    np.testing.assert_allclose(found.clustering.objectives, expected.clustering.objectives, rtol=1e-5)
    np.testing.assert_allclose(found.clustering.centroids, expected.clustering.centroids, atol=1e-5)
    np.testing.assert_array_equal(found.votes.salient_labels, expected.votes.salient_labels)
    np.testing.assert_allclose(found.votes.mean_saliency, expected.votes.mean_saliency, atol=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.labels == theirs.labels).mean() > 0.999
        np.testing.assert_array_equal(mine.loaded_mask, theirs.loaded_mask)


def test_cosegment_on_two_streams_equals_one(tiny_engine: Engine, device: Device) -> None:
    images = [photo(24, 28, seed=i) for i in range(4)]
    encoding = EncodeOptions(24)
    one, two = (
        cosegment(
            DeviceRunner(tiny_engine._encoder, HostBackend(tiny_engine, device, streams)), images, encoding, OPTIONS
        )  # type: ignore[arg-type]
        for streams in (1, 2)
    )
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first.labels, second.labels)


def test_features_stay_the_callers(runner: DeviceRunner, device: Device) -> None:
    features = runner.encode_on_device([photo(24, 28, seed=i) for i in range(2)], [MATCH], EncodeOptions(24), None)
    before = list(features)
    cosegment_images(DeviceImages(device, features, (), MATCH), OPTIONS)
    assert all(now is then for now, then in zip(features, before, strict=True))


def test_nothing_to_share_is_the_hosts_answer(tiny_engine: Engine, runner: DeviceRunner) -> None:
    images = [np.zeros((48, 48, 3), np.uint8)] * 2
    expected = tiny_engine.cosegment(images, load_size=24, facet=MATCH, refine="none")
    found = cosegment(runner, images, EncodeOptions(24), OPTIONS)
    assert found.clustering.tried_k == expected.clustering.tried_k == []
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.confidence, mine.why_empty, mine.inlier) == (theirs.confidence, theirs.why_empty, theirs.inlier)
        np.testing.assert_array_equal(mine.loaded_mask, theirs.loaded_mask)


def test_a_lane_keeps_its_encoder(runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tables that it has on the device: one built anew for each call would upload them again."""
    built: list[object] = []

    def build(*arguments: Any) -> DeviceEncoder:
        built.append(arguments)
        return DeviceEncoder(*arguments)

    monkeypatch.setattr(running, "DeviceEncoder", build)
    for _ in range(2):
        runner.encode_on_device([photo(24, 28)], [MATCH], EncodeOptions(24), None)
    assert len(built) == 1


@pytest.mark.parametrize(("most", "batches"), [(None, [3]), (2, [2, 1])])
def test_images_of_one_size_share_a_batch(
    tiny_engine: Engine, device: Device, most: int | None, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_engine._encoder.backend, "max_batch", most)
    backend = HostBackend(tiny_engine, device)
    runner = DeviceRunner(tiny_engine._encoder, backend)  # type: ignore[arg-type]
    runner.encode_on_device([photo(24, 28, seed=i) for i in range(3)], [MATCH], EncodeOptions(24), None)
    assert backend.lanes[0].batches == batches


def test_too_few_descriptors_is_the_hosts_message(runner: DeviceRunner) -> None:
    options = CosegmentOptions("key@1", elbow=5, sample_interval=1000, refine=Refinement.NONE)
    with pytest.raises(InputError, match="too few"):
        cosegment(runner, [photo(48, 48), photo(48, 48)], EncodeOptions(24), options)


def test_broken_images_are_left_out_or_raise(runner: DeviceRunner, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = [photo(48, 48), str(broken), photo(48, 48, seed=1)]
    seen: list[object] = []
    masks = cosegment(runner, images, EncodeOptions(24), OPTIONS, lambda image, error: seen.append(image))
    assert len(masks) == 2 and seen == [str(broken)]
    with pytest.raises(InputError, match="broken"):
        cosegment(runner, images, EncodeOptions(24), OPTIONS)


def test_features_are_read_one_at_a_time(tiny_engine: Engine, runner: DeviceRunner) -> None:
    images = [photo(64, 80, seed=i) for i in range(3)]
    features = tiny_engine.encode(images, load_size=32)
    alive: list[ref[Features]] = []
    most = 0

    class Stored(Sequence[Features]):
        def __len__(self) -> int:
            return len(features)

        def __getitem__(self, index: Any) -> Any:
            nonlocal most
            alive.append(ref(item := replace(features[index])))
            most = max(most, sum(known() is not None for known in alive))
            return item

    options = CosegmentOptions("key@1", sample_interval=5, refine=Refinement.GRABCUT)
    found = cosegment_given(runner, Stored(), options)
    assert most <= 2  # one that is dropped while the next is read
    for mine, theirs in zip(found, cosegment_given(runner, features, options), strict=True):
        np.testing.assert_array_equal(mine.loaded_mask, theirs.loaded_mask)


@pytest.mark.usefixtures("one_iteration")
@pytest.mark.parametrize("how", [Refinement.GRABCUT, Refinement.CRF])
def test_masks_are_refined_as_on_the_host(tiny_engine: Engine, runner: DeviceRunner, how: Refinement) -> None:
    images = [photo(64, 80, seed=i) for i in range(2)]
    options = CosegmentOptions("key@1", **FEW_VOTES, refine=how)
    expected = tiny_engine.cosegment(images, load_size=32, facet="key@1", saliency="full", refine=how, **FEW_VOTES)
    found = cosegment(runner, images, EncodeOptions(32), options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.refinement == theirs.refinement == how
        np.testing.assert_array_equal(mine.loaded_mask, theirs.loaded_mask)


class OnDevice:
    """An array as another library would give it: DLPack for sharing, the CUDA array interface to say where it lies."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self.__cuda_array_interface__ = {"shape": array.shape, "version": 3}

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_frames_that_lie_on_the_device_are_encoded_as_they_lie(device: Device, runner: DeviceRunner) -> None:
    image = photo(40, 52)
    lying = OnDevice(image) if device.exchange_device[0] == HOST else torch.from_numpy(image).cuda()
    there, here = runner.encode_on_device([lying, image], [MATCH], EncodeOptions(24), None)  # type: ignore[list-item]
    np.testing.assert_array_equal(device.download(there[MATCH]), device.download(here[MATCH]))
    shared = torch.from_dlpack(there[MATCH])  # and out again
    np.testing.assert_array_equal(shared.cpu(), device.download(here[MATCH]))


@pytest.mark.parametrize("array", [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.float32)])
def test_frames_on_the_device_that_are_no_images(runner: DeviceRunner, array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"expected \(height, width, 3\) uint8"):
        runner.encode_on_device([OnDevice(array)], [MATCH], EncodeOptions(24), None)  # type: ignore[list-item]


@pytest.mark.usefixtures("one_iteration")
def test_parts_are_refined_on_the_device(
    tiny_engine: Engine, runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [photo(64, 80, seed=i) for i in range(2)]
    options = {"load_size": 32, "facet": "key@1", "num_parts": 2, "saliency": "full", **FEW_VOTES}
    expected = tiny_engine.segment_parts(images, **options)
    monkeypatch.setattr(tiny_engine, "_runner", runner)
    for mine, theirs in zip(tiny_engine.segment_parts(images, **options), expected, strict=True):
        assert mine.refinement == Refinement.CRF
        np.testing.assert_array_equal(mine.loaded_labels, theirs.loaded_labels)


def test_images_may_come_from_the_same_engine(runner: DeviceRunner) -> None:
    """No lane is held while they are asked for."""

    def images() -> Iterator[np.ndarray]:
        for seed in range(2):
            image = photo(24, 28, seed=seed)
            runner.encode_on_device([image], [MATCH], EncodeOptions(24), None)
            yield image

    assert len(runner.encode_on_device(images(), [MATCH], EncodeOptions(24), None)) == 2


def test_progress_counts_images(runner: DeviceRunner) -> None:
    seen: list[tuple[int, int | None]] = []
    images = [photo(24, 28), photo(24, 28, seed=1)]
    match(runner, *images, EncodeOptions(24), MatchOptions(MATCH, 2), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
