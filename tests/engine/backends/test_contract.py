"""What every backend does alike, whatever runs underneath."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, require_openvino

from facetrt.engine.backends.base import Backend, Tensors
from facetrt.engine.backends.choice import BACKENDS
from facetrt.engine.backends.flavours import FLAVOURS
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.openvino import runs_bf16
from facetrt.engine.backends.parity import CONTRACTS, compare
from facetrt.engine.backends.run_options import (
    BackendName,
    DeviceName,
    Hint,
    Precision,
    RunOptions,
    Specialisation,
)
from facetrt.engine.bundle.bundle import Bundle
from facetrt.export.mending import file_entry
from facetrt.kernels.errors import BackendError, BundleError

OPTIONS = {
    "onnxruntime": RunOptions(BackendName.ONNXRUNTIME, DeviceName.CPU, precision=Precision.FP32),
    "openvino": RunOptions(BackendName.OPENVINO, DeviceName.CPU, precision=Precision.FP32),
    "openvino-bf16": RunOptions(BackendName.OPENVINO, DeviceName.CPU, precision=Precision.BF16),
    "openvino-eager": RunOptions(
        BackendName.OPENVINO, DeviceName.CPU, precision=Precision.FP32, specialisation=Specialisation.EAGER
    ),
    "openvino-throughput": RunOptions(
        BackendName.OPENVINO, DeviceName.CPU, precision=Precision.FP32, hint=Hint.THROUGHPUT
    ),
    "openvino-one-thread": RunOptions(BackendName.OPENVINO, DeviceName.CPU, precision=Precision.FP32, threads=1),
    "onnxruntime-cuda": RunOptions(BackendName.ONNXRUNTIME, DeviceName.CUDA, precision=Precision.FP32),
    "tensorrt": RunOptions(BackendName.TENSORRT, DeviceName.CUDA, precision=Precision.FP32),
    "tensorrt-two-streams": RunOptions(BackendName.TENSORRT, DeviceName.CUDA, precision=Precision.FP32, streams=2),
    "tensorrt-rtx": RunOptions(
        BackendName.TENSORRT_RTX, DeviceName.CUDA, precision=Precision.FP32, specialisation=Specialisation.EAGER
    ),
}


@dataclass
class Case:
    bundle: Bundle
    options: RunOptions

    def make(self, **changes: object) -> Backend:
        backend = BACKENDS[self.options.backend, self.options.device]
        return backend(replace(self.bundle, **changes), self.options)  # type: ignore[arg-type]

    def damaged(self, folder: Path, encoder: bytes) -> Backend:
        """A backend on a bundle whose encoder, or plan, holds these bytes."""
        if self.options.backend not in FLAVOURS:
            return self.make(encoder=encoder)
        ((name, _),) = self.bundle.manifest.plans.items()
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(encoder)
        files = {**self.bundle.manifest.files, name: file_entry(folder / name)}
        return self.make(path=folder, manifest=replace(self.bundle.manifest, files=files))


@pytest.fixture(params=OPTIONS)
def case(request: pytest.FixtureRequest, tiny_bundle: Path) -> Case:
    options = OPTIONS[request.param]
    if options.backend is BackendName.TENSORRT_RTX:
        opened = Bundle.open(request.getfixturevalue("rtx_bundle"))
        request.getfixturevalue("fake_rtx")
        return Case(opened, options)
    if options.device is DeviceName.CUDA:  # over the fakes; the same tests run on a real GPU
        folder: Path = request.getfixturevalue("planned_bundle")
        request.getfixturevalue("fake_gpu")
        return Case(Bundle.open(folder), options)
    if options.backend is BackendName.OPENVINO:
        require_openvino()
        if options.precision is Precision.BF16 and not runs_bf16():
            pytest.skip("this processor has no bf16 arithmetic")
    return Case(Bundle.open(tiny_bundle), options)


@pytest.fixture
def backend(case: Case) -> Iterator[Backend]:
    made = case.make()
    yield made
    made.close()


def tensors(batch: int = 1, grid: tuple[int, int] = (6, 9), seed: int = 0, step: int = 1) -> Tensors:
    rng = np.random.default_rng(seed)
    conv_h, conv_w = ((cells - 1) * step + 1 for cells in grid)
    return {
        "images": rng.integers(0, 256, (batch, 4 * conv_h + 4, 4 * conv_w + 4, 3), np.uint8),
        "positional": rng.standard_normal((1, *grid, TINY.dim)).astype(np.float32),
        "rows": np.arange(grid[0]) * step,
        "cols": np.arange(grid[1]) * step,
    }


def tolerance(backend: Backend) -> float:
    return 0.1 if backend.options.precision is Precision.BF16 else 1e-4


def test_every_backend_is_held_to_all_this() -> None:
    assert {(options.backend, options.device) for options in OPTIONS.values()} == set(BACKENDS)
    assert {name for name, _ in BACKENDS} == set(BackendName) - {BackendName.AUTO}
    assert all(backend.name is name for (name, _), backend in BACKENDS.items())


def test_nothing_is_loaded_before_the_first_run(case: Case) -> None:
    backend = case.make(encoder=b"not a graph")
    backend.close()


def test_shapes_types_and_order_follow_the_manifest(backend: Backend) -> None:
    outputs = backend.run(tensors(batch=2))
    assert list(outputs) == backend.bundle.manifest.outputs
    for name in backend.bundle.manifest.facets:
        assert outputs[name].shape == (2, 1 + 54, TINY.dim) and outputs[name].dtype == np.float32
    assert outputs["cls_attention"].shape == (2, 54)


def test_it_keeps_the_parity_contract(backend: Backend, tiny_bundle: Path) -> None:
    oracle = OnnxRuntimeBackend(Bundle.open(tiny_bundle), OPTIONS["onnxruntime"])
    contract = CONTRACTS[backend.options.precision]
    for grid, step in (((6, 9), 1), ((1, 1), 1), ((13, 7), 1), ((5, 4), 2)):
        given = tensors(grid=grid, step=step, seed=grid[0])
        for name, metrics in compare(backend.run(given), oracle.run(given)).items():
            assert not contract.violations(metrics), (grid, name, metrics)


def test_a_batch_equals_its_images(backend: Backend) -> None:
    whole = tensors(batch=3)
    together = backend.run(whole)
    for i in range(3):
        alone = backend.run({**whole, "images": whole["images"][i : i + 1]})
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][i], values[0], atol=tolerance(backend))


def test_repeated_runs_are_equal_whatever_ran_between(backend: Backend) -> None:
    first = backend.run(tensors())
    backend.run(tensors(batch=2, grid=(8, 3), seed=1))
    for name, values in backend.run(tensors()).items():
        np.testing.assert_array_equal(values, first[name])


def test_results_belong_to_the_caller(backend: Backend) -> None:
    given = tensors()
    first = backend.run(given)
    kept = {name: values.copy() for name, values in first.items()}
    second = backend.run(tensors(seed=5))
    for name, values in first.items():
        np.testing.assert_array_equal(values, kept[name])
        values[...] = 7
    for name, values in backend.run(tensors(seed=5)).items():
        np.testing.assert_array_equal(values, second[name])


def test_several_threads_get_their_own_results(backend: Backend) -> None:
    expected = [backend.run(tensors(seed=seed)) for seed in range(4)]

    def work(seed: int) -> None:
        for _ in range(3):
            for name, values in backend.run(tensors(seed=seed)).items():
                np.testing.assert_array_equal(values, expected[seed][name])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread raised


def test_closing_while_others_run_ends_them(case: Case) -> None:
    backend = case.make()
    backend.run(tensors())
    ended: list[str] = []

    def work() -> None:
        try:
            while True:
                backend.run(tensors(grid=(9, 9)))
        except BackendError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    backend.close()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    assert len(ended) == 3 and all("this engine is closed" in message for message in ended)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((1, 28, 40, 3), np.float32)}, "type float32: expected uint8"),
        ({"images": np.zeros((28, 40, 3), np.uint8)}, r"expected \(B, H, W, 3\)"),
        ({"rows": np.arange(6, dtype=np.int32)}, "input rows has type int32"),
        ({"rows": np.arange(7)}, r"positional has shape \(1, 6, 9, 48\): expected \(1, 7, 9, 48\)"),
        ({"rows": np.arange(1, 7)}, r"rows do not all lie in 0\.\.5"),
        ({"cols": np.arange(9)[None]}, "cols do not all lie"),
        ({"extra": np.zeros(1)}, "expected"),
    ],
)
def test_inputs_that_do_not_fit(backend: Backend, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        backend.run({**tensors(), **change})
    assert backend.run(tensors())  # and it still works


@pytest.mark.parametrize("encoder", [b"", b"not a graph", b"\x08\x07" * 50])
def test_a_damaged_graph_is_an_error_of_the_bundle(case: Case, tmp_path: Path, encoder: bytes) -> None:
    with pytest.raises(BundleError, match="the encoder cannot be loaded"):
        case.damaged(tmp_path, encoder).run(tensors())


def test_a_graph_of_another_bundle_is_found_out(case: Case) -> None:
    other = replace(case.bundle.manifest, facets=["key@0"])
    with pytest.raises(BundleError, match="the encoder has no output"):
        case.make(manifest=other).run(tensors())


def test_closing(case: Case) -> None:
    backend = case.make()
    backend.run(tensors())
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="this engine is closed"):
        backend.run(tensors())


def test_a_few_streams_are_named_once_active(backend: Backend) -> None:
    backend.activate()
    assert backend.streams >= 1
    if backend.options.hint is Hint.LATENCY:
        assert backend.streams == backend.options.streams
