"""k-means by FAISS on one GPU: an option for clusterings too large for :func:`facetrt.kernels.kmeans.kmeans`.

The start, the subsample and the choice among restarts are the same; they come from FAISS itself. Rows are assigned on
the GPU and centroids updated by FAISS on the host, so small clusterings gain nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from facetrt.kernels.errors import BackendError, InputError, MissingDependencyError
from facetrt.kernels.kmeans import SAMPLES_PER_CENTROID, SEED, Float, KMeans, check_samples

if TYPE_CHECKING:
    from types import ModuleType


def kmeans_gpu(
    samples: Float,
    num_clusters: int,
    *,
    iterations: int = 300,
    restarts: int = 10,
    gpu: int = 0,
    stream: int | None = None,
) -> KMeans:
    """:func:`facetrt.kernels.kmeans.kmeans` with the assignments on a GPU.

    Distances are summed in another order than on a processor, so centroids agree up to rounding, and a row between two
    centroids may fall to the other one. A restart ends as soon as its objective repeats itself; versions of FAISS that
    do not know this rule run all ``iterations``.

    Args:
        samples: ``(n, C)`` float32 rows in host memory, finite. More than 256·k rows are subsampled as by FAISS.
        num_clusters: k, at least 1 and at most n.
        gpu: number of the only device that is used, as the CUDA runtime counts them.
        stream: ``cudaStream_t`` of that device, as an integer, on which FAISS is to work; None for one of its own.

    Raises:
        InputError: fewer rows than clusters, wrong shape, NaN, a device that is not there.
        MissingDependencyError: faiss is not installed, or without GPU support.
        BackendError: no CUDA device, or FAISS failed on it, for example out of memory.
    """
    rows = check_samples(samples, num_clusters)
    if iterations < 1 or restarts < 1:
        raise InputError(f"iterations={iterations}, restarts={restarts}: expected at least 1")
    faiss = import_faiss_with_gpu(gpu)
    try:
        return _train(faiss, rows, num_clusters, iterations, restarts, gpu, stream)
    except RuntimeError as error:
        raise BackendError(
            f"FAISS failed on GPU {gpu} with {len(rows)} rows of {rows.shape[1]} numbers and {num_clusters} clusters: "
            f"{error}; cluster fewer rows, or call kmeans, which runs on the processor"
        ) from error


def _train(
    faiss: ModuleType | Any,
    rows: Float,
    num_clusters: int,
    iterations: int,
    restarts: int,
    gpu: int,
    stream: int | None,
) -> KMeans:
    resources = faiss.StandardGpuResources()  # must outlive the index
    if stream is not None:
        resources.setDefaultStream(gpu, faiss.cast_integer_to_cudastream_t(stream))
    config = faiss.GpuIndexFlatConfig()
    config.device = gpu
    index = faiss.GpuIndexFlatL2(resources, rows.shape[1], config)
    parameters = faiss.ClusteringParameters()
    parameters.niter = iterations
    parameters.nredo = restarts
    parameters.seed = SEED
    parameters.max_points_per_centroid = SAMPLES_PER_CENTROID
    parameters.min_points_per_centroid = 1  # only silences a warning printed by the library
    # Not faiss.Kmeans: its `gpu` is a number of devices, and it takes all where it is true.
    trainer = faiss.Clustering(rows.shape[1], num_clusters, parameters)
    trainer.train(rows, index)
    centroids = faiss.vector_to_array(trainer.centroids).reshape(num_clusters, rows.shape[1])
    stats = trainer.iteration_stats  # of all restarts up to the best, whose last round comes last
    return KMeans(np.asarray(centroids, np.float32), float(stats.at(stats.size() - 1).obj))


def import_faiss_with_gpu(gpu: int = 0) -> ModuleType | Any:
    """The faiss module, or an error that says why it cannot cluster on this GPU; see :func:`kmeans_gpu`."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "k-means on a GPU needs faiss, which is not installed: pip install 'facetrt[gpu]'"
        ) from error
    if not hasattr(faiss, "get_num_gpus") or not hasattr(faiss, "StandardGpuResources"):
        version = getattr(faiss, "__version__", "of unknown version")
        raise MissingDependencyError(
            f"faiss {version} is installed without GPU support, and nothing was computed on the processor instead: "
            "pip uninstall faiss-cpu and pip install 'facetrt[gpu]' (both share a name), or leave clustering to facetrt"
        )
    count = faiss.get_num_gpus()
    if count == 0:
        raise BackendError(
            "faiss finds no CUDA device, and nothing was computed on the processor instead: check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or call kmeans"
        )
    if not 0 <= gpu < count:
        raise InputError(f"gpu is {gpu}: expected 0 to {count - 1}, the devices that faiss finds")
    return faiss
