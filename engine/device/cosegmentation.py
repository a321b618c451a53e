"""Co-segmentation on the device: the steps of :mod:`facetrt.engine.tasks.cosegmentation`, one download at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import numpy as np

from facetrt.engine.device.encoding import DeviceFeatures
from facetrt.engine.device.refinement import device_refiner
from facetrt.engine.features.features import Features
from facetrt.engine.tasks.cosegmentation import (
    MAX_CLUSTERS,
    Clustering,
    CosegmentOptions,
    Mask,
    Masks,
    choose_images,
    make_mask,
    nothing_shared,
    too_few_descriptors,
)
from facetrt.engine.tasks.refinement import Progress
from facetrt.kernels.device import kmeans, select, vote
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.errors import InputError
from facetrt.kernels.parallel import map_threads
from facetrt.kernels.vote import Votes

RESTARTS = 10
ITERATIONS = 300


@dataclass(frozen=True)
class _Rows:
    """Unit descriptors of all images that take part, one after the other; image i has rows ``bounds[i:i + 2]``."""

    rows: DeviceArray = field(repr=False)  # (n, C) float32
    saliency: DeviceArray = field(repr=False)  # (n,) float32
    bounds: list[int]


@dataclass(frozen=True)
class _Found:
    """What came down: the sweep, each cell's cluster ``(n,)``, and the votes."""

    clustering: Clustering
    votes: Votes


def cosegment_on_device(
    device: Device,
    features: list[DeviceFeatures],
    options: CosegmentOptions,
    progress: Progress | None = None,
    originals: Sequence[Features] | None = None,
) -> Masks:
    """Masks of the objects that the images share; see ``Engine.cosegment``.

    Outlier removal decides on the host which images take part, and waits once for that. GrabCut and the
    CRF's lattices are the host's as well: they get the loaded pixels after everything else has come down.

    Args:
        features: consumed: their descriptors make way for unit ones, or there would be two copies of all.
        originals: what the features were uploaded from, if they were: read once more where masks are refined.

    Raises:
        InputError: fewer than two images, or too few descriptors for the clusters.
    """
    hosts = [item.host for item in features]
    similarity, chosen = choose_images(
        [item.why_empty for item in hosts],
        lambda shown: np.concatenate([device.download(features[i].cls) for i in shown]),
        options,
    )
    if not chosen:
        return nothing_shared(hosts, options)
    found = _cluster(device, _gather(device, features, chosen), options)
    labels = dict(zip(chosen, found.clustering.labels, strict=True))

    one_at_a_time = Lock()
    refiner = device_refiner(device, one_at_a_time)

    def mask(number: int) -> Mask:
        if originals is not None:
            item, saliency = originals[number], None
        else:
            with one_at_a_time:
                item = features[number].to_host(device, options.facet, options.refine)
                saliency = device.download(features[number].saliency)
        return make_mask(item, labels.get(number), found.clustering.centroids, found.votes, options, refiner, saliency)

    masks = map_threads(mask, range(len(features)), progress, threads=options.refine.threads)
    return Masks(masks, found.clustering, found.votes, similarity)


def _gather(device: Device, features: list[DeviceFeatures], chosen: Sequence[int]) -> _Rows:
    """Unit descriptors of the chosen images, which from now on refer to these instead of their own."""
    bounds = np.cumsum([0] + [len(features[i].rows) for i in chosen]).tolist()
    rows = device.empty((bounds[-1], features[0].rows.shape[1]), np.float32)
    saliency = device.empty((bounds[-1],), np.float32)
    for low, high, i in zip(bounds, bounds[1:], chosen, strict=False):
        own = rows.rows(low, high)
        device.copy(select.normalise_rows(device, features[i].rows), own)
        device.copy(features[i].saliency, saliency.rows(low, high))
        cls = device.empty(features[i].cls.shape, np.float32)  # or it would keep all of the encoder's output
        device.copy(features[i].cls, cls)
        features[i] = replace(features[i], rows=own, cls=cls)
    return _Rows(rows, saliency, bounds)


def _cluster(device: Device, rows: _Rows, options: CosegmentOptions) -> _Found:
    """The elbow sweep and the vote. Every k is tried, and the device chooses: waiting to stop early costs more."""
    steps = options.sample_interval
    sampled = np.concatenate(
        [np.arange(low, high, steps, dtype=np.int32) for low, high in zip(rows.bounds, rows.bounds[1:], strict=False)]
    )
    samples = select.gather_rows(device, rows.rows, device.upload(sampled))
    counts = range(1, min(MAX_CLUSTERS, len(sampled)) + 1)
    fits = kmeans.kmeans_each(device, samples, counts, iterations=ITERATIONS, restarts=RESTARTS)
    assigned = kmeans.assign_each(device, rows.rows, [fit.centroids for fit in fits])
    chosen = kmeans.elbow(device, assigned.objectives, rows.bounds[-1], options.elbow)
    winning = kmeans.select_labels(device, assigned.labels, chosen)
    votes = vote.vote(
        device,
        winning,
        rows.saliency,
        rows.bounds,
        len(counts),
        threshold=options.saliency_threshold,
        percentage=options.votes_percentage,
    )
    number = int(device.download(chosen)[0])  # the wait; the rest has been computed by now
    objectives = (device.download(assigned.objectives)[: number + 1] / rows.bounds[-1]).tolist()
    if len(counts) < MAX_CLUSTERS and not (number and objectives[-1] > options.elbow * objectives[-2]):
        raise InputError(too_few_descriptors(len(sampled), steps))
    cells = device.download(winning).astype(np.int64)
    clustering = Clustering(
        list(counts[: number + 1]),
        objectives,
        device.download(fits[number].centroids),
        np.split(cells, rows.bounds[1:-1]),
    )
    mean = device.download(votes.mean_saliency)[:, : number + 1]
    return _Found(clustering, Votes(mean, device.download(votes.counts)[: number + 1].astype(np.int64), votes.needed))
