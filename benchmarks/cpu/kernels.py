"""Kernels on descriptors of the co-segmentation's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from facetrt.benchmarks.baselines.common import Sweep, elbow_sweep
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.benchmarks.missing import import_library
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Contestant, rows_of
from facetrt.engine.images.loading import resize
from facetrt.engine.samples import sample_images
from facetrt.engine.tasks.clustering import cluster_elbow
from facetrt.engine.tasks.descriptors import normalise
from facetrt.kernels import best_buddies, dense_crf, log_bin

SECTION = "kernels"
LABELS = 5  # of the CRF
FAISS = "elbow sweep, FAISS with all rounds"
WIDE = "best_buddies, one wide product (torch)"

Float = NDArray[np.float32]


def measure(bench: Workbench, rows: Sequence[Float], grid: tuple[int, int]) -> list[Row]:
    """``rows``: descriptors ``(cells, C)`` of each image."""
    maps = [np.ascontiguousarray(values).reshape(*grid, -1) for values in rows[:2]]
    return [*_log_bin(bench, maps[0]), *_best_buddies(bench, maps), *_elbow(bench, rows), *_dense_crf(bench)]


def _log_bin(bench: Workbench, key_map: Float) -> list[Row]:
    from facetrt.benchmarks.baselines import research_style, strong_glue

    tensor = bench.torch.from_numpy(key_map)
    contestants = [
        Contestant("log_bin", lambda clock: log_bin(key_map)),
        Contestant("log_bin, strong glue", lambda clock: strong_glue.log_bin(tensor).numpy()),
        Contestant(
            "log_bin, research style", lambda clock: research_style.log_bin(tensor, clock, log_bin), sampling=True
        ),
    ]
    timings = bench.compare(SECTION, contestants, share=0.01)
    expected = timings["log_bin, strong glue"].result

    def quality(name: str, result: Any) -> Mapping[str, float]:
        return {"largest difference": float(np.abs(result - expected).max())} if name == "log_bin" else {}

    return rows_of(SECTION, timings, [c.name for c in contestants[1:]], quality=quality)


def _best_buddies(bench: Workbench, maps: Sequence[Float]) -> list[Row]:
    """Binning included on both sides."""
    from facetrt.benchmarks.baselines import strong_glue

    tensors = [bench.torch.from_numpy(values) for values in maps]

    def glue() -> tuple[NDArray[Any], NDArray[Any]]:
        nn_ab, nn_ba = strong_glue.best_buddies(*(strong_glue.log_bin(values) for values in tensors))
        return nn_ab.numpy(), nn_ba.numpy()

    def numpy() -> tuple[NDArray[Any], NDArray[Any]]:
        unit = [normalise(log_bin(values)) for values in maps]
        cosines = unit[0] @ unit[1].T
        return cosines.argmax(axis=1), cosines.argmax(axis=0)

    contestants = [
        Contestant("best_buddies", lambda clock: best_buddies(maps[0], maps[1])),
        Contestant(WIDE, lambda clock: glue()),
        Contestant("best_buddies, one wide product (NumPy)", lambda clock: numpy()),
    ]
    timings = bench.compare(SECTION, contestants, share=0.03, rounds=bench.rounds + 2)
    expected = timings[WIDE].result

    def quality(name: str, result: Any) -> Mapping[str, float]:
        if name != "best_buddies":
            return {}
        pairs = ((result.nn_ab, expected[0]), (result.nn_ba, expected[1]))
        return {"equal neighbours": min(float((got == wanted).mean()) for got, wanted in pairs)}

    return rows_of(SECTION, timings, [c.name for c in contestants[1:]], quality=quality)


def _elbow(bench: Workbench, rows: Sequence[Float]) -> list[Row]:
    """The co-segmentation's sweep, row normalisation included on both sides."""
    contestants = [
        Contestant("elbow sweep", lambda clock: cluster_elbow([normalise(values) for values in rows])),
        Contestant(FAISS, lambda clock: elbow_sweep(rows, all_rounds=True)),
        Contestant("elbow sweep, FAISS stopping early", lambda clock: elbow_sweep(rows, all_rounds=False)),
    ]
    timings = bench.compare(SECTION, contestants, share=0.03)
    expected: Sweep = timings[FAISS].result

    def quality(name: str, result: Any) -> Mapping[str, float]:
        if name != "elbow sweep":
            return {}
        same = result.tried_k == expected.tried_k
        pairs = zip(result.labels, expected.labels, strict=True)
        return {"equal labels": min(float((got == wanted).mean()) for got, wanted in pairs) if same else 0.0}

    def details(name: str, result: Any) -> Mapping[str, Any]:
        return {"k": result.tried_k[-1], "rows": sum(map(len, rows))}

    return rows_of(SECTION, timings, [c.name for c in contestants[1:]], quality=quality, details=details)


def _dense_crf(bench: Workbench) -> list[Row]:
    image = resize(next(iter(sample_images().values())), bench.size).copy()  # pydensecrf wants it writable
    energy = crf_energy(image, LABELS)
    contestants = [
        Contestant("dense_crf", lambda clock: dense_crf(image, energy)),
        Contestant("dense_crf, pydensecrf", lambda clock: _pydensecrf(image, energy)),
    ]
    timings = bench.compare(SECTION, contestants, share=0.01)
    expected = timings[contestants[1].name].result

    def quality(name: str, result: Any) -> Mapping[str, float]:
        if name != "dense_crf" or expected is None:
            return {}
        return {"equal labels": float((result.argmax(axis=0) == expected.argmax(axis=0)).mean())}

    return rows_of(SECTION, timings, [contestants[1].name], quality=quality, details=lambda n, r: {"labels": LABELS})


def crf_energy(image: NDArray[np.uint8], labels: int) -> Float:
    """``(labels, H, W)`` in [-1.5, 0]: colour distances to a few pixels at stride 4, enlarged."""
    height, width = image.shape[:2]
    grid = cv2.resize(image, (width // 4, height // 4), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    prototypes = grid.reshape(-1, 3)[:: -(-grid.shape[0] * grid.shape[1] // labels)]
    distances = ((grid[None] - prototypes[:, None, None]) ** 2).sum(axis=3)
    distances -= distances.max(axis=0)
    distances *= 1.5 / max(-float(distances.min()), 1e-6)
    enlarge = partial(cv2.resize, dsize=(width, height), interpolation=cv2.INTER_NEAREST)
    return np.stack([enlarge(plane) for plane in distances]).astype(np.float32)


def _pydensecrf(image: NDArray[np.uint8], energy: Float) -> Float:
    densecrf = import_library("pydensecrf.densecrf", extra="crf")
    labels, height, width = energy.shape
    model = densecrf.DenseCRF2D(width, height, labels)
    model.setUnaryEnergy(np.ascontiguousarray(energy.reshape(labels, -1)))
    model.addPairwiseGaussian(sxy=3, compat=50)
    model.addPairwiseBilateral(sxy=5, srgb=13, rgbim=image, compat=15)
    return np.array(model.inference(10), np.float32).reshape(energy.shape)
