"""Small runs of everything that multiplies matrices, in a process whose matrix library was chosen by its environment.

``python portable.py OUT.npz`` checks that grouping and thread counts change no bit, and writes what machines should
agree on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import faiss
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits

from facetrt.engine import Engine, Features, fit_pca, self_similarity, similarity_map
from facetrt.engine.engine import FeatureCollection
from facetrt.engine.samples import sample_images, second_view
from facetrt.engine.video.alignment import Patches, Slopes, align
from facetrt.engine.video.descriptor_maps import DescriptorMap
from facetrt.kernels import best_buddies, kmeans
from facetrt.kernels.propagate import propagate

Arrays = dict[str, NDArray[Any]]

THREADS = (1, 2, 4)
SIZE = 84


def pictures() -> list[NDArray[np.uint8]]:
    """Two photographs, each with a second view of it."""
    photos = [cv2.resize(np.asarray(sample_images()[name]), (SIZE, SIZE)) for name in ("cat", "chelsea")]
    return [view for photo in photos for view in (photo, second_view(photo)[0])]


def kernels() -> Arrays:
    """Of descriptors whose lengths are not multiples of a vector register, and large enough for several threads."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((6, 600)).astype(np.float32)
    maps = [centres[random.integers(6, size=(19, 17))] + random.standard_normal((19, 17, 600)) for _ in range(2)]
    a, b = (values.astype(np.float32) for values in maps)
    soft = random.random((1, 19, 17, 3)).astype(np.float32)
    found, clusters = best_buddies(a, b), kmeans(a.reshape(-1, 600)[::2].copy(), 6)
    return {
        "nn_ab": found.nn_ab,
        "nn_ba": found.nn_ba,
        "~sim_ab": found.sim_ab,
        "~centroids": clusters.centroids,
        "~propagated": propagate(a, [b], soft, radius=3),
    }


def tasks(engine: Engine, features: list[Features]) -> Arrays:
    """One of each task on the same features."""
    facet = engine.manifest.facets[0]
    matches = engine.match(*features[:2])
    masks = engine.cosegment(features, sample_interval=3)
    parts = engine.segment_parts(features, sample_interval=3, num_parts=3)
    similar = similarity_map(*features[:2], facet=facet, point_xy=(40, 50), hierarchy=2, top_k=5)
    pca, (first, second) = fit_pca(features, facet), (DescriptorMap.of(item.map(facet)) for item in features[:2])
    at = np.array([[5.0, 6.0], [9.0, 4.0]])
    followed = align(Patches.around(first, at), Slopes.of(second), at, np.tile(np.eye(2), (2, 1, 1)))
    return {
        "matched_a": matches.cells_a,
        "matched_b": matches.cells_b,
        "matches": matches.points_a_xy,
        "masks": np.stack([mask.loaded_mask for mask in masks]),
        "clusters": np.stack([mask.labels for mask in masks]),
        "parts": np.stack([part.cells for part in parts]),
        "similar": similar.cells,
        "~similarity": similar.values,
        "~objectives": np.array(masks.clustering.objectives),
        "~projected": pca.project(features[0]),
        "~self_similarity": self_similarity(features[0], facet),
        "~followed": followed.positions,
    }


def groupings(engine: Engine, features: list[Features]) -> None:
    """Features in memory, spilled to a folder and in a store give the same bits; so does any block of a matrix."""
    expected = tasks(engine, features)
    with FeatureCollection(engine.manifest.facets, memory_limit=1) as spilled:
        for item in features:
            spilled.append(item)
        same("features that were spilled", expected, tasks(engine, spilled))
    facet = engine.manifest.facets[0]
    for block in (1, 100, 300):
        same(f"blocks of {block}", {"~self_similarity": self_similarity(features[0], facet, block=block)}, expected)


def same(what: str, found: Arrays, expected: Arrays) -> None:
    """Raise unless ``found`` is bit for bit the same."""
    changed = [name for name, values in found.items() if values.tobytes() != expected[name].tobytes()]
    if changed:
        raise AssertionError(f"{what} changed {', '.join(changed)}")


def with_threads(threads: int, run: Callable[[], Arrays]) -> Arrays:
    """``run()`` while NumPy's matrix library and FAISS may use so many threads."""
    faiss.omp_set_num_threads(threads)
    with threadpool_limits(threads):
        return run()


def main(out: Path) -> None:
    with Engine.open("builtin", threads=1) as engine, tempfile.TemporaryDirectory() as folder:
        stored = engine.extract(pictures(), Path(folder) / "store", load_size=None)
        features = [stored[i] for i in range(len(stored))]
        results = [with_threads(n, lambda: {**kernels(), **tasks(engine, features)}) for n in THREADS]
        for number, result in zip(THREADS, results, strict=True):
            same(f"{number} threads", result, results[0])
        same("features in a store", tasks(engine, stored), results[0])
        groupings(engine, features)
    names = [library["architecture"] for library in threadpool_info() if library.get("architecture")]
    np.savez(out, architectures=np.array(names), **results[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
