"""What :class:`facetrt.engine.video.tracking.Tracker` compares frames by on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.device.transfer import to_host
from facetrt.engine.features.features import Features
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.video.blending import Blend, nonfinite
from facetrt.engine.video.comparing import Comparer, Frame, Points, Search, Trace, View, points_of
from facetrt.engine.video.descriptor_maps import Positions
from facetrt.kernels.device import track
from facetrt.kernels.device.runtime.base import Device, DeviceArray
from facetrt.kernels.device.track import Part, Patches, TrackMap
from facetrt.kernels.errors import InputError

WORDS = 4  # of 4 bytes, which arrays that go up together begin at a multiple of

Held = TypeVar("Held", TrackMap, Patches)


class DeviceFrame(Frame[DeviceArray]):
    """A frame on a lane of a device.

    Args:
        flags: as :func:`facetrt.kernels.device.track.prepare` sets them.
        name: of the frame.
        compared: whether ``flags`` tell if it is the one before it again.
    """

    waits = True

    def __init__(self, device: Device, seen: TrackMap, flags: DeviceArray, name: str, *, compared: bool) -> None:
        self._device, self.seen, self._flags, self._name = device, seen, flags, name
        self._compared = compared
        self._held: dict[int, Any] = {}

    def search(self, searches: Sequence[Search]) -> list[Trace[NDArray[np.float64]]] | None:
        """One upload and one download, the only wait."""
        given = upload_points(self._device, [points_of(search) for search in searches])
        traces = [self.trace(search, points) for search, points in zip(searches, given, strict=True)]
        (broken, changed), found = self._download(traces)
        if broken:
            raise InputError(nonfinite(self._name))
        return None if self._compared and not changed else found

    def binned(
        self,
        seen: TrackMap,
        positions: DeviceArray,
        shapes: DeviceArray | None = None,
        mixed_with: DeviceArray | None = None,
    ) -> DeviceArray:
        return track.binned(self._device, self._here(seen), positions, shapes, mixed_with)

    def find(
        self, seen: TrackMap, binned: DeviceArray, window: DeviceArray, expected: DeviceArray | None
    ) -> DeviceArray:
        """All cells of the window are compared, wherever the best one is expected."""
        return track.search(self._device, self._here(seen), binned, window)

    def align(
        self, view: View, rows: DeviceArray, start: DeviceArray, shapes: DeviceArray
    ) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        patches = self._here(view.patches(self))
        found = track.align(self._device, patches, rows, self.seen, start, shapes)
        return found.positions, found.shapes, found.similarity

    def patches(self, seen: TrackMap, positions: Positions) -> Patches:
        there = self._device.upload(positions.astype(np.float32))
        return track.patches(self._device, self._here(seen), there)

    def _here(self, held: Held) -> Held:
        """What may have been made on another lane, for this one."""
        if id(held) not in self._held:
            self._held[id(held)] = held.adopt(self._device)
        found: Held = self._held[id(held)]
        return found

    def _download(self, traces: Sequence[Trace[DeviceArray]]) -> tuple[list[int], list[Trace[NDArray[np.float64]]]]:
        """The flags, and all that was found."""
        arrays = [array for trace in traces for array in _arrays(trace)]
        flat = self._device.empty((2 + sum(array.size for array in arrays),), np.float32)
        first = 0
        for array in (self._flags, *arrays):
            self._device.copy(array, flat.rows(first, first + array.size))
            first += array.size
        values = self._device.download(flat)
        ends = np.cumsum([2, *(array.size for array in arrays)])
        parts = np.split(values[2:].astype(np.float64), ends[1:-1] - 2)
        shaped = iter([part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)])
        return values[:2].view(np.int32).tolist(), [Trace(*(next(shaped) for _ in range(4))) for _ in traces]


class DeviceComparer(Comparer):
    """Compares frames on a device. The first one's descriptors come down for their means, and no others.

    Args:
        stream: takes one of the device's streams for a while.
    """

    def __init__(self, stream: Callable[[], AbstractContextManager[Device]], facet: str) -> None:
        self._stream, self._facet = stream, facet

    def begin(self, features: DeviceFeatures) -> TrackMap:
        self._blend = Blend.fit(self._facet, self.on_host(features))
        with self._stream() as device:
            self._means = [device.upload(mean) for _, mean, _ in self._blend.terms]
            seen, flags = self._prepared(device, features, None)
            if device.download(flags)[0]:
                raise InputError(nonfinite(features.record.name))
        return seen

    @contextmanager
    def frame(self, features: DeviceFeatures, before: TrackMap | None) -> Iterator[DeviceFrame]:
        with self._stream() as device:
            seen, flags = self._prepared(device, features, before)
            yield DeviceFrame(device, seen, flags, features.record.name, compared=before is not None)

    def on_host(self, features: DeviceFeatures) -> Features:
        compared = replace(features.only(Blend.facets(self._facet)), pixels=None)
        with self._stream() as device:
            return to_host(device, compared.adopt(device))

    def _prepared(
        self, device: Device, features: DeviceFeatures, before: TrackMap | None
    ) -> tuple[TrackMap, DeviceArray]:
        flags = device.zeros((2,), np.int32)
        parts = [
            Part(device.adopt(features.map(facet)), device.adopt(mean), factor)
            for (facet, _, factor), mean in zip(self._blend.terms, self._means, strict=True)
        ]
        return track.prepare(device, parts, flags, None if before is None else before.adopt(device)), flags


def upload_points(device: Device, points: Sequence[Points[NDArray[Any]]]) -> list[Points[DeviceArray]]:
    """Integers as int32 and everything else as float32, in one upload."""
    arrays = [_four_bytes(array) for each in points for array in _arrays(each)]
    places = np.cumsum([0, *(-(-array.size // WORDS) * WORDS for array in arrays)])
    flat = np.zeros(places[-1], np.int32)
    for array, place in zip(arrays, places, strict=False):
        flat[place : place + array.size] = array.reshape(-1).view(np.int32)
    there = device.upload(flat)
    found = iter(
        replace(there.rows(int(place), int(place) + array.size).reshape(*array.shape), dtype=array.dtype)
        for array, place in zip(arrays, places, strict=False)
    )
    return [Points(*(next(found) for _ in _arrays(each))) for each in points]


def _arrays(held: Points[Any] | Trace[Any]) -> list[Any]:
    """Its fields, in order."""
    return list(vars(held).values())


def _four_bytes(array: NDArray[Any]) -> NDArray[Any]:
    kind = np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32
    return np.ascontiguousarray(array, kind)
