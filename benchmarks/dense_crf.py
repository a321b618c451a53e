"""Dense CRF: time against pydensecrf, agreement with it and with exact Gaussians, and peak memory.

    python benchmarks/dense_crf.py [--images DIR] [--json FILE]

Runs of the two alternate (A B A B) after one warm-up each, in one process; times are medians. Without ``--images`` the
images are synthetic. Energies are colour distances to k-means prototypes at stride 4, in [-1.5, 0], enlarged by nearest
neighbour. Needs pydensecrf (``pip install pydensecrf2`` with a C++ compiler).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import pydensecrf.densecrf as densecrf
from numpy.typing import NDArray
from PIL import Image

from facetrt.kernels.dense_crf import dense_crf, dense_crf_reference

STRIDE = 4
SIDE = 224  # shorter side of the timed images
ORACLE_SIDE = 32  # shorter side for the comparison with exact Gaussians, which takes all pairs of pixels
MEMORY_SHAPE = (480, 640)
MEMORY_LABELS = 5
SUFFIXES = {".png", ".jpg", ".jpeg"}

Pixels = NDArray[np.uint8]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """Seconds are medians with the fastest and slowest run; agreements are percentages of pixels with equal label."""

    image: str
    height: int
    width: int
    labels: int
    seconds: float
    seconds_range: tuple[float, float]
    pydensecrf_seconds: float
    pydensecrf_seconds_range: tuple[float, float]
    ratio: float
    pydensecrf_agreement: float
    largest_difference: float
    oracle_agreement: float
    pydensecrf_oracle_agreement: float


def synthetic(seed: int, height: int = 480, width: int = 640) -> Pixels:
    """Discs on a gradient under smooth texture and noise."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:height, :width]
    image = np.stack([xs * 120 / width, ys * 120 / height, np.full((height, width), 60.0)], axis=2)
    for _ in range(25):
        centre, radius = rng.uniform(0, [height, width]), rng.uniform(0.03, 0.2) * height
        image[(ys - centre[0]) ** 2 + (xs - centre[1]) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    texture = cv2.GaussianBlur(rng.normal(0, 1, image.shape), (0, 0), 3) * 150
    return np.clip(image + texture + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def load_images(folder: Path | None) -> dict[str, Pixels]:
    if folder is None:
        return {f"synthetic-{seed}": synthetic(seed) for seed in range(3)}
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder} holds no image ending in {sorted(SUFFIXES)}: name another folder")
    return {path.name: np.asarray(Image.open(path).convert("RGB")) for path in paths}


def resized(image: Pixels, shorter_side: int) -> Pixels:
    height, width = image.shape[:2]
    scale = shorter_side / min(height, width)
    size = (round(width * scale), round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def coarse_energy(image: Pixels, labels: int, seed: int) -> Float:
    """``(labels, H, W)`` in [-1.5, 0]."""
    height, width = image.shape[:2]
    grid = cv2.resize(image, (width // STRIDE, height // STRIDE), interpolation=cv2.INTER_AREA)
    samples = grid.reshape(-1, 3).astype(np.float32) / 255
    cv2.setRNGSeed(seed)
    criteria = (cv2.TERM_CRITERIA_MAX_ITER, 10, 0.0)
    nearest = np.zeros((len(samples), 1), np.int32)  # filled by OpenCV
    _, _, prototypes = cv2.kmeans(samples, labels, nearest, criteria, 1, cv2.KMEANS_PP_CENTERS)
    distances = ((samples[None] - prototypes[:, None]) ** 2).sum(axis=2)
    distances += np.random.default_rng(seed).normal(0, 0.03, distances.shape).astype(np.float32)
    distances -= distances.max(axis=0)
    distances *= 1.5 / -distances.min()
    planes = distances.reshape(labels, *grid.shape[:2])
    return np.stack([cv2.resize(plane, (width, height), interpolation=cv2.INTER_NEAREST) for plane in planes])


def authors_marginals(image: Pixels, energy: Float) -> Float:
    labels, height, width = energy.shape
    model = densecrf.DenseCRF2D(width, height, labels)
    model.setUnaryEnergy(np.ascontiguousarray(energy.reshape(labels, -1)))
    options = {"kernel": densecrf.DIAG_KERNEL, "normalization": densecrf.NORMALIZE_SYMMETRIC}
    model.addPairwiseGaussian(sxy=3, compat=50, **options)
    model.addPairwiseBilateral(sxy=5, srgb=13, rgbim=image, compat=15, **options)
    return np.array(model.inference(10), np.float32).reshape(energy.shape)


def agreement(first: Float, second: Float) -> float:
    return 100 * float((first.argmax(axis=0) == second.argmax(axis=0)).mean())


def seconds(function: Callable[[Pixels, Float], Float], image: Pixels, energy: Float) -> float:
    start = time.perf_counter()
    function(image, energy)
    return time.perf_counter() - start


def measure(name: str, original: Pixels, labels: int, repeats: int) -> Row:
    image = resized(original, SIDE)
    energy = coarse_energy(image, labels, seed=labels)
    ours, theirs = dense_crf(image, energy), authors_marginals(image, energy)  # also the warm-up
    pairs = [(seconds(dense_crf, image, energy), seconds(authors_marginals, image, energy)) for _ in range(repeats)]
    our_times, their_times = zip(*pairs, strict=True)
    small = resized(original, ORACLE_SIDE)
    small_energy = coarse_energy(small, labels, seed=labels)
    exact = dense_crf_reference(small, small_energy)
    return Row(
        image=name,
        height=image.shape[0],
        width=image.shape[1],
        labels=labels,
        seconds=median(our_times),
        seconds_range=(min(our_times), max(our_times)),
        pydensecrf_seconds=median(their_times),
        pydensecrf_seconds_range=(min(their_times), max(their_times)),
        ratio=median(our_times) / median(their_times),
        pydensecrf_agreement=agreement(ours, theirs),
        largest_difference=float(np.abs(ours - theirs).max()),
        oracle_agreement=agreement(dense_crf(small, small_energy), exact),
        pydensecrf_oracle_agreement=agreement(authors_marginals(small, small_energy), exact),
    )


def peak_memory(original: Pixels) -> int:
    """Bytes that NumPy holds at most during one call at `MEMORY_SHAPE`."""
    height, width = MEMORY_SHAPE
    image = np.asarray(cv2.resize(original, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    energy = coarse_energy(image, MEMORY_LABELS, seed=0)
    tracemalloc.start()
    dense_crf(image, energy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def describe(row: Row) -> str:
    return (
        f"{row.image:18} {row.height}x{row.width} labels {row.labels:2}  {1e3 * row.seconds:6.1f} ms  "
        f"pydensecrf {1e3 * row.pydensecrf_seconds:6.1f} ms  ratio {row.ratio:4.2f}  "
        f"agreement {row.pydensecrf_agreement:7.3f} %  exact {row.oracle_agreement:6.2f} % "
        f"(pydensecrf {row.pydensecrf_oracle_agreement:6.2f} %)"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="dense CRF against pydensecrf and exact Gaussians")
    parser.add_argument("--images", type=Path, help="folder of photographs; synthetic images where absent")
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 5, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    return parser.parse_args()


def main() -> None:
    options = parse()
    images = load_images(options.images)
    rows = []
    for name, image in images.items():
        for labels in options.labels:
            rows.append(measure(name, image, labels, options.repeats))
            print(describe(rows[-1]), flush=True)
    memory = {name: peak_memory(image) for name, image in images.items()}
    print(f"median ratio {median(row.ratio for row in rows):.2f}, largest {max(row.ratio for row in rows):.2f}")
    print(f"lowest agreement with pydensecrf {min(row.pydensecrf_agreement for row in rows):.3f} %")
    print(f"peak memory at 640x480, {MEMORY_LABELS} labels: {max(memory.values()) / 1e6:.0f} MB")
    if options.json:
        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {"numpy": np.__version__, "opencv": cv2.__version__}
        result = {**machine, **versions, "rows": [asdict(row) for row in rows], "peak_memory_bytes": memory}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
