"""The steps of :func:`facetrt.engine.tasks.matching.match_pair` on the device."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.tasks.matching import Kept, Pair
from facetrt.kernels.device import convert, kmeans, log_bin, select
from facetrt.kernels.device.best_buddies import DeviceBuddies, best_buddies
from facetrt.kernels.device.runtime.base import Device, DeviceArray


class DevicePair(Pair[DeviceArray, DeviceArray, DeviceBuddies]):
    """Two images on a device. A count is an array ``(1,)`` int32; rows and cells beyond it are zeros and -1.

    Args:
        half: compare in float16 with float32 sums (fp16 and bf16 encoders); otherwise in float32.
    """

    def __init__(self, device: Device, a: DeviceFeatures, b: DeviceFeatures, facet: str, *, half: bool) -> None:
        self._device, self._features, self._facet, self._half = device, (a, b), facet, half
        self.a, self.b = a.record, b.record

    @property
    def saliency_a(self) -> DeviceArray:
        return self._features[0].saliency

    @property
    def saliency_b(self) -> DeviceArray:
        return self._features[1].saliency

    def best_buddies(self, hierarchy: int) -> DeviceBuddies:
        device = self._device
        a, b = (each.map(self._facet) for each in self._features)
        if self._half:
            a, b = (convert.to_half(device, each.reshape(-1, each.shape[2])).reshape(*each.shape) for each in (a, b))
        return best_buddies(device, a, b, hierarchy)

    def keep_salient(self, buddies: DeviceBuddies, threshold: float) -> Kept[DeviceArray, DeviceArray]:
        """Keep salient pairs, in as many places as A has cells."""
        saliency = (self.saliency_a, self.saliency_b)
        kept = select.keep_salient(self._device, buddies.nn_ab, buddies.nn_ba, *saliency, threshold)
        return Kept(kept.cells, convert.take(self._device, buddies.nn_ab, kept.cells), kept.count)

    def describe(self, kept: Kept[DeviceArray, DeviceArray], hierarchy: int) -> DeviceArray:
        """Each divided by its length, which the host leaves to the clustering."""
        device, count = self._device, kept.count

        def rows(features: DeviceFeatures, cells: DeviceArray) -> DeviceArray:
            if hierarchy == 0:
                return select.gather_rows(device, features[self._facet], cells)
            return log_bin.gather_log_bin(device, features.map(self._facet), cells, count, hierarchy)

        a, b = self._features
        return convert.join_rows(device, rows(a, kept.cells_a), rows(b, kept.cells_b), count)

    def rank(self, kept: Kept[DeviceArray, DeviceArray]) -> DeviceArray:
        return convert.add_taken(self._device, self.saliency_a, kept.cells_a, self.saliency_b, kept.cells_b)

    def pick_diverse(
        self, joined: DeviceArray, rank: DeviceArray, count: DeviceArray, num_pairs: int
    ) -> tuple[DeviceArray, DeviceArray]:
        """Fill ``num_pairs`` places; those beyond ``count`` stay -1."""
        clusters = kmeans.diverse_clusters(self._device, joined, count, num_pairs)
        return clusters, select.best_of_clusters(self._device, clusters, rank, count, num_pairs)

    def take(self, values: DeviceArray, cells: DeviceArray) -> DeviceArray:
        return convert.take(self._device, values, cells)

    def number(self, count: DeviceArray) -> int:
        return int(self.to_host(count)[0])

    def to_host(self, values: DeviceArray) -> NDArray[Any]:
        return self._device.download(values)
