"""Point correspondences on the device: the steps of :mod:`facetrt.engine.tasks.matching`, one download at the end."""

from __future__ import annotations

import numpy as np

from facetrt.engine.device.encoding import DeviceFeatures
from facetrt.engine.tasks.matching import (
    Matches,
    MatchOptions,
    agreement_of,
    confidence_of,
    no_matches,
    nothing_to_match,
)
from facetrt.kernels.device import convert, kmeans, log_bin, select
from facetrt.kernels.device.best_buddies import best_buddies
from facetrt.kernels.device.runtime.base import Device, DeviceArray


def match_on_device(
    device: Device, a: DeviceFeatures, b: DeviceFeatures, options: MatchOptions, *, half: bool
) -> Matches:
    """Diverse salient best buddies.

    Args:
        half: compare in float16 with float32 sums (fp16 and bf16 encoders); otherwise in float32.
    """
    if (why := nothing_to_match(a.host, b.host)) is not None:
        return no_matches(a.geometry, b.geometry, options.facet, why)
    hierarchy, threshold, num_pairs = options.hierarchy, options.saliency_threshold, options.num_pairs
    maps = [convert.to_half(device, f.rows).reshape(*f.map.shape) if half else f.map for f in (a, b)]
    buddies = best_buddies(device, maps[0], maps[1], hierarchy)
    kept = select.keep_salient(device, buddies.nn_ab, buddies.nn_ba, a.saliency, b.saliency, threshold)
    cells_b = convert.take(device, buddies.nn_ab, kept.cells)
    joined = convert.join_rows(
        device,
        _describe(device, a, kept.cells, kept.count, hierarchy),
        _describe(device, b, cells_b, kept.count, hierarchy),
        kept.count,
    )
    clusters = kmeans.diverse_clusters(device, joined, kept.count, num_pairs)
    rank = convert.add_taken(device, a.saliency, kept.cells, b.saliency, cells_b)
    selected = select.best_of_clusters(device, clusters, rank, kept.count, num_pairs)
    similarity = convert.take(device, buddies.sim_ab, kept.cells)
    count = int(device.download(kept.count)[0])  # the only wait; the rest has been computed by now
    found = device.download(selected).astype(np.int64)
    cells_a = device.download(kept.cells)[:count].astype(np.int64)
    nearest = device.download(buddies.nn_ab).astype(np.int64)
    agreement = agreement_of(cells_a, nearest, a.geometry.grid, b.geometry.grid)
    salient = min(int((device.download(item.saliency) > threshold).sum()) for item in (a, b))
    return Matches(
        cells_a=cells_a,
        cells_b=device.download(cells_b)[:count].astype(np.int64),
        similarity=device.download(similarity)[:count],
        clusters=device.download(clusters)[:count].astype(np.int64),
        selected=found[found >= 0],
        geometry_a=a.geometry,
        geometry_b=b.geometry,
        facet=options.facet,
        agreement=agreement,
        confidence=confidence_of(agreement, salient),
    )


def _describe(
    device: Device, features: DeviceFeatures, cells: DeviceArray, count: DeviceArray, hierarchy: int
) -> DeviceArray:
    """(Binned) descriptors of the first ``count`` of ``cells``."""
    if hierarchy == 0:
        return select.gather_rows(device, features.rows, cells)
    return log_bin.gather_log_bin(device, features.map, cells, count, hierarchy)
