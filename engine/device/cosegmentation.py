"""The steps of :func:`facetrt.engine.tasks.cosegmentation.cosegment_images` on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.device.refinement import device_refiner
from facetrt.engine.features.features import Features, Float, ImageRecord
from facetrt.engine.features.on_device import DeviceFeatures, FacetRows
from facetrt.engine.images.loading import Pixels
from facetrt.engine.tasks.clustering import Clustering, ClusteringMethod
from facetrt.engine.tasks.cosegmentation import HostPicture, Images, Picture
from facetrt.engine.tasks.descriptors import distances_to, normalise
from facetrt.kernels.device import kmeans, select
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.vote import DeviceVotes
from facetrt.kernels.device.vote import vote as count_votes
from facetrt.kernels.vote import Votes


@dataclass(frozen=True)
class _Gathered:
    """Unit descriptors of all images that take part, one after the other; image i has rows ``bounds[i:i + 2]``."""

    rows: DeviceArray = field(repr=False)  # (n, C) float32
    saliency: DeviceArray = field(repr=False)  # (n,) float32
    bounds: list[int]


@dataclass(frozen=True)
class _Sweep:
    """Every k's centroids, what assigning all rows gave, which k was chosen ``(1,)``, and its labels ``(n,)``."""

    centroids: list[DeviceArray]
    assigned: kmeans.DeviceAssignment
    chosen: DeviceArray
    labels: DeviceArray
    bounds: list[int]


@dataclass(frozen=True)
class DevicePicture:
    """An image on the device, whose stream ``lock`` guards: pictures are used by several threads."""

    features: DeviceFeatures
    facet: str
    loaded: DeviceArray
    device: Device
    lock: Lock

    @property
    def record(self) -> ImageRecord:
        """What the image is."""
        return self.features.record

    @property
    def saliency(self) -> Float:
        """Downloaded."""
        return self._download(self.features.saliency)

    @property
    def pixels(self) -> Pixels:
        """Downloaded."""
        return self._download(self.loaded)

    def distances(self, centroids: Float) -> Float:
        """Distances on the host, whose CRF they are for."""
        return distances_to(normalise(self._download(self.features[self.facet])), centroids)[0]

    def _download(self, values: DeviceArray) -> NDArray[Any]:
        with self.lock:
            return self.device.download(values)


class DeviceImages(Images[_Gathered, DeviceArray, _Sweep, DeviceVotes]):
    """Descriptors on a device. GrabCut is the host's: it gets pixels after everything else has come down.

    Descriptors of images that take part make way for unit ones: nobody else should hold ``features`` by then, or there
    would be two copies of all.

    Args:
        originals: what features without pixels were uploaded from: read once more where masks are made.
    """

    def __init__(
        self, device: Device, features: Iterable[DeviceFeatures], originals: Sequence[Features], facet: str
    ) -> None:
        self._device, self._features, self._lock = device, list(features), Lock()
        self._originals, self._facet = originals, facet
        self.records = [item.record for item in self._features]
        self.refiner = device_refiner(device, self._lock)

    def cls_rows(self, numbers: Sequence[int]) -> Float:
        return np.concatenate([self._device.download(self._cls(i)) for i in numbers])

    def _cls(self, number: int) -> DeviceArray:
        """``(1, C)``."""
        return self._features[number].prefix(self._facet).rows(0, 1)

    def gather(self, numbers: Sequence[int]) -> _Gathered:
        device, features = self._device, self._features
        bounds = np.cumsum([0] + [len(features[i][self._facet]) for i in numbers]).tolist()
        rows = device.empty((bounds[-1], features[0][self._facet].shape[1]), np.float32)
        saliency = device.empty((bounds[-1],), np.float32)
        for low, high, i in zip(bounds, bounds[1:], numbers, strict=False):
            own = rows.rows(low, high)
            device.copy(select.normalise_rows(device, features[i][self._facet]), own)
            device.copy(features[i].saliency, saliency.rows(low, high))
            cls = device.empty(self._cls(i).shape, np.float32)  # or it would keep all of the encoder's output
            device.copy(self._cls(i), cls)
            features[i] = replace(features[i], facets={self._facet: FacetRows(cls, own)})
        return _Gathered(rows, saliency, bounds)

    def sample(self, gathered: _Gathered, interval: int) -> DeviceArray:
        bounds = zip(gathered.bounds, gathered.bounds[1:], strict=False)
        numbers = np.concatenate([np.arange(low, high, interval, dtype=np.int32) for low, high in bounds])
        return select.gather_rows(self._device, gathered.rows, self._device.upload(numbers))

    def sweep(
        self, gathered: _Gathered, samples: DeviceArray, elbow: float, max_clusters: int, method: ClusteringMethod
    ) -> _Sweep:
        """Every k is tried, and the device chooses: waiting to stop early costs more."""
        device, rows = self._device, gathered.rows
        centroids = self._train(samples, range(1, min(max_clusters, len(samples)) + 1), method)
        assigned = kmeans.assign_each(device, rows, centroids)
        chosen = kmeans.elbow(device, assigned.objectives, len(rows), elbow)
        labels = kmeans.select_labels(device, assigned.labels, chosen)
        return _Sweep(centroids, assigned, chosen, labels, gathered.bounds)

    def _train(self, samples: DeviceArray, counts: Sequence[int], method: ClusteringMethod) -> list[DeviceArray]:
        """FAISS takes rows of the host."""
        device = self._device
        if method is ClusteringMethod.FACETRT:
            return [fit.centroids for fit in kmeans.kmeans_each(device, samples, counts)]
        found = method.train(device.download(samples), counts, gpu=device.ordinal)
        return [device.upload(centroids) for centroids in found]

    def vote(self, gathered: _Gathered, sweep: _Sweep, threshold: float, percentage: float) -> DeviceVotes:
        """Vote on as many clusters as there may be; those beyond the chosen k are empty."""
        return count_votes(
            self._device,
            sweep.labels,
            gathered.saliency,
            gathered.bounds,
            len(sweep.centroids),
            threshold=threshold,
            percentage=percentage,
        )

    def clustering(self, sweep: _Sweep) -> Clustering:
        device = self._device
        number = int(device.download(sweep.chosen)[0])  # the wait; the rest has been computed by now
        objectives = device.download(sweep.assigned.objectives)[: number + 1] / sweep.bounds[-1]
        centroids = sweep.centroids[: number + 1]
        labels = device.download(sweep.labels).astype(np.int64)
        return Clustering(
            tried_k=[len(each) for each in centroids],
            objectives=objectives.tolist(),
            centroids=device.download(centroids[-1]),
            labels=np.split(labels, sweep.bounds[1:-1]),
        )

    def votes(self, ballot: DeviceVotes, num_clusters: int) -> Votes:
        mean = self._device.download(ballot.mean_saliency)[:, :num_clusters]
        counts = self._device.download(ballot.counts)[:num_clusters]
        return Votes(mean, counts.astype(np.int64), ballot.needed)

    def picture(self, number: int) -> Picture:
        features = self._features[number]
        if features.pixels is None:
            return HostPicture(self._originals[number], self._facet, 0)
        return DevicePicture(features, self._facet, features.pixels, self._device, self._lock)
