"""What a video can be looked at for: each task takes the frames of a stream and gives pictures and data, in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.drawing.discovery import objects_overlay
from facetrt.engine.drawing.overlays import PcaColours, cells_on_pixels, mask_overlay, object_overlay, parts_overlay
from facetrt.engine.drawing.tracks import draw_trails
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import SaliencyMode
from facetrt.engine.images.loading import LoadSize, Pixels
from facetrt.engine.learning import learn_cosegmentation, learn_parts
from facetrt.engine.settings import parse_several
from facetrt.engine.tasks.discovery.discovering import Discovery
from facetrt.engine.tasks.masks import refine_objects
from facetrt.engine.tasks.models import PartsModel, SegmentationModel
from facetrt.engine.tasks.pca import fit_pca
from facetrt.engine.tasks.refinement import Refinement
from facetrt.engine.tasks.smoothing import Smoother
from facetrt.engine.video.propagation import Labels
from facetrt.engine.video.sources import Frame, open_source
from facetrt.engine.video.stream import StreamResult
from facetrt.engine.video.tracking import Tracks

LOAD_SIZE = 224  # by default. Masks were better than at 160 and stride 4, and than at 224, 320 and 480 and stride 8
TRAIL = 24  # frames that a trail reaches back
LINGER = 6  # frames that it stays after its point was lost
SAMPLE = 16  # frames, at most, that a model is learned from
PCA_FRAMES = 8  # that components are fitted on
COMPONENTS = 3


class VideoTask(StrEnum):
    """What is shown."""

    TRACK = "track"
    MASK = "mask"
    COSEGMENT = "cosegment"
    PARTS = "parts"
    PCA = "pca"
    DISCOVER = "discover"

    @property
    def clusters(self) -> bool:
        """Whether it applies a model."""
        return self in (VideoTask.COSEGMENT, VideoTask.PARTS)

    @property
    def refinements(self) -> tuple[Refinement, ...]:
        """How what it finds can be refined on the frame."""
        if self in (VideoTask.MASK, VideoTask.DISCOVER):
            return tuple(known for known in Refinement if known is not Refinement.PYDENSECRF)
        if not self.clusters:
            return ()
        return tuple(known for known in Refinement if not (known.two_labels and self is VideoTask.PARTS))


Paint = Callable[[Pixels], Pixels]


def read_tasks(text: str) -> tuple[VideoTask, ...]:
    """See :func:`parse_several`."""
    return parse_several(VideoTask, text, "task")


@dataclass(frozen=True)
class Drawn:
    """A frame and what was found on it.

    Attributes:
        paint: draws it over a picture ``(H, W, 3)`` of the frame's size, which stays as it is, and returns that.
        data: arrays by name.
        opaque: whether what is drawn hides the picture, so that nothing else can be drawn with it.
    """

    frame: Frame
    paint: Paint = field(repr=False)
    data: Mapping[str, NDArray[Any]] = field(repr=False)
    opaque: bool = False

    @property
    def picture(self) -> Pixels:
        """The frame with what was found."""
        return self.paint(self.frame.pixels)


class Viewer(ABC):
    """Turns results into pictures. Some look at a few frames before they show the first.

    Attributes:
        on_device: whether features that stay on a GPU will do.
    """

    on_device: bool = False

    @abstractmethod
    def feed(self, result: StreamResult[Any]) -> list[Drawn]:
        """The pictures that can be shown now."""

    def finish(self) -> list[Drawn]:
        """Those that were held back when frames ended."""
        return []

    def facts(self) -> dict[str, Any]:
        """What the record says of the task."""
        return {}


class TrackViewer(Viewer):
    """Points followed, with their trails.

    Args:
        points_xy: ``(N, 2)`` in original pixels of the first frame, or how many to choose.
    """

    on_device = True

    def __init__(self, engine: Engine, points_xy: NDArray[np.float64] | int) -> None:
        self._follow = engine.tracker().following(points_xy)
        self._first: Tracks | None = None
        self._history: deque[Tracks] = deque(maxlen=TRAIL)
        self._size: tuple[int, int] | None = None

    def feed(self, result: StreamResult[Any]) -> list[Drawn]:
        """See :meth:`Viewer.feed`."""
        size = result.features.geometry.original_size
        if self._size != size:
            self._history.clear()  # other pixels: the trails so far do not lie on this frame
            self._size = size
        tracks = self._follow(result.features)
        self._first = tracks if self._first is None else self._first
        self._history.append(tracks)
        points = np.stack([past.points_xy for past in self._history])
        visible = np.stack([past.visible for past in self._history])
        visible &= visible[-LINGER:].any(axis=0)  # a trail that leads nowhere soon lies over something else
        data = {"points_xy": tracks.points_xy, "visible": tracks.visible, "confidence": tracks.confidence}
        return [Drawn(result.frame, lambda pixels: draw_trails(pixels, points, visible), data)]

    def facts(self) -> dict[str, Any]:
        """The points of the first frame, and how many are visible in the last."""
        if self._first is None or not self._history:
            return {}
        visible = int(self._history[-1].visible.sum())
        return {"points_xy": np.round(self._first.points_xy, 3), "visible_at_the_end": visible}


class MaskViewer(Viewer):
    """Objects of the first frame's mask, followed. ``labels (H, W)``: 0 background, objects from 1.

    Refinement changes what is shown and written, not what is followed.
    """

    on_device = True

    def __init__(self, engine: Engine, labels: Labels, refine: Refinement = Refinement.NONE) -> None:
        self._propagator, self._labels, self._refine = engine.propagator(), labels, refine
        self._dtype = np.uint8 if labels.max(initial=0) <= 255 else np.int32
        self._started = False

    def feed(self, result: StreamResult[Any]) -> list[Drawn]:
        """See :meth:`Viewer.feed`."""
        if self._started:
            labels = refine_objects(result.frame.pixels, self._propagator.step(result.features), self._refine)
        else:
            self._propagator.start(result.features, self._labels)
            self._started, labels = True, self._labels
        data = {"labels": labels.astype(self._dtype)}
        return [Drawn(result.frame, lambda pixels: object_overlay(pixels, labels), data)]

    def facts(self) -> dict[str, Any]:
        """Objects that are followed, and those too small for the grid."""
        given = {int(label) for label in np.unique(self._labels)} - {0}
        return {"objects": self._propagator.objects, "lost": sorted(given - set(self._propagator.objects))}


class ModelViewer(Viewer):
    """A model applied to every frame, smoothed over time.

    What is drawn has smooth borders between the cells, or those of the refinement.
    """

    on_device = True

    def __init__(
        self, engine: Engine, model: SegmentationModel | PartsModel, refine: Refinement = Refinement.NONE
    ) -> None:
        self._engine, self._model, self._refine, self._smoother = engine, model, refine, Smoother()

    def feed(self, result: StreamResult[Any]) -> list[Drawn]:
        """See :meth:`Viewer.feed`."""
        frame, features, model = result.frame, result.features, self._model
        if isinstance(model, PartsModel):
            part = self._engine.apply(model, features, refine=self._refine, smoother=self._smoother)
            labels = part.labels
            if self._refine is Refinement.NONE:
                labels = cells_on_pixels(part.cells.astype(np.int16), features.geometry)
            return [Drawn(frame, lambda pixels: parts_overlay(pixels, labels), {"labels": labels})]
        found = self._engine.apply(model, features, refine=self._refine, smoother=self._smoother)
        mask = found.mask
        if self._refine is Refinement.NONE:
            mask = cells_on_pixels(found.cells.astype(np.int8), features.geometry) > 0
        return [Drawn(frame, lambda pixels: mask_overlay(pixels, mask), {"mask": mask})]

    def facts(self) -> dict[str, Any]:
        """What the record says of the model."""
        return {
            "model": {
                "kind": self._model.kind,
                "facet": self._model.facet,
                "images": self._model.images,
                "centroids": len(self._model.centroids),
                "options": dict(self._model.options),
            }
        }


class PcaViewer(Viewer):
    """Principal components of the first few frames, shown as colours in all of them."""

    def __init__(self, engine: Engine) -> None:
        self._facet = engine.manifest.default_facet("match")
        self._waiting: list[StreamResult[Any]] = []
        self._colours: PcaColours | None = None

    def feed(self, result: StreamResult[Any]) -> list[Drawn]:
        """See :meth:`Viewer.feed`; the first pictures come with the eighth frame."""
        if self._colours is not None:
            return [self._draw(self._colours, result)]
        self._waiting.append(result)
        return self._fit() if len(self._waiting) == PCA_FRAMES else []

    def finish(self) -> list[Drawn]:
        """The frames of a video too short for :meth:`feed` to show any."""
        return self._fit() if self._waiting else []

    def _fit(self) -> list[Drawn]:
        features = [result.features for result in self._waiting]
        colours = PcaColours.fitted(fit_pca(features, self._facet, COMPONENTS), features)
        waiting, self._waiting, self._colours = self._waiting, [], colours
        return [self._draw(colours, result) for result in waiting]

    def _draw(self, colours: PcaColours, result: StreamResult[Any]) -> Drawn:
        projected, geometry = colours.pca.project(result.features), result.features.geometry
        picture = colours.picture(projected, geometry)
        return Drawn(result.frame, lambda pixels: picture, {"components": projected}, opaque=True)

    def facts(self) -> dict[str, Any]:
        """Facet and shares of the variance."""
        if self._colours is None:
            return {"facet": self._facet}
        pca = self._colours.pca
        return {"facet": pca.facet, "explained_variance_ratio": pca.explained_variance_ratio.round(4)}


class DiscoverViewer(Viewer):
    """The objects of each frame by itself, by a method of discovery."""

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery
        self._frames = self._objects = 0

    def feed(self, result: StreamResult[Any]) -> list[Drawn]:
        """See :meth:`Viewer.feed`."""
        pixels = result.frame.pixels
        found = self._discovery.find(result.features, lambda: pixels)
        self._frames += 1
        self._objects += len(found)
        data: dict[str, NDArray[Any]] = {"boxes": found.boxes, "masks": found.masks, "cells": found.cells}
        if found.scores is not None:
            data["scores"] = found.scores
        return [Drawn(result.frame, lambda pixels: objects_overlay(pixels, found), data)]

    def facts(self) -> dict[str, Any]:
        """Method, facets, and how many objects were found."""
        named = {"method": self._discovery.method.name, "facet": self._discovery.name}
        return named | {"frames": self._frames, "objects": self._objects}


class SeveralViewers(Viewer):
    """Several tasks on the same features. They are drawn over one another, in the order of ``viewers``.

    What hides the picture stands beside it, as a picture of its own. Data are named like ``track.points_xy``.
    """

    def __init__(self, viewers: Mapping[str, Viewer]) -> None:
        self._viewers = viewers
        self.on_device = all(viewer.on_device for viewer in viewers.values())
        self._waiting: dict[str, deque[Drawn]] = {name: deque() for name in viewers}

    def feed(self, result: StreamResult[Any]) -> list[Drawn]:
        """See :meth:`Viewer.feed`: what all tasks have shown."""
        return self._together({name: viewer.feed(result) for name, viewer in self._viewers.items()})

    def finish(self) -> list[Drawn]:
        """See :meth:`Viewer.finish`."""
        return self._together({name: viewer.finish() for name, viewer in self._viewers.items()})

    def facts(self) -> dict[str, Any]:
        """What the record says, by task."""
        return {name: viewer.facts() for name, viewer in self._viewers.items()}

    def _together(self, new: Mapping[str, list[Drawn]]) -> list[Drawn]:
        for name, drawn in new.items():
            self._waiting[name].extend(drawn)
        count = min(map(len, self._waiting.values()))
        return [_joined({name: queue.popleft() for name, queue in self._waiting.items()}) for _ in range(count)]


def _joined(drawn: Mapping[str, Drawn]) -> Drawn:
    """One frame's pictures and data as one."""
    over = [one for one in drawn.values() if not one.opaque]
    beside = [one for one in drawn.values() if one.opaque]
    frame = next(iter(drawn.values())).frame

    def paint(pixels: Pixels) -> Pixels:
        picture = pixels
        for one in over:
            picture = one.paint(picture)
        panels = [picture] if over else []
        return np.concatenate([*panels, *(one.paint(pixels) for one in beside)], axis=1)

    data = {f"{name}.{key}": values for name, one in drawn.items() for key, values in one.data.items()}
    return Drawn(frame, paint, data, opaque=bool(beside))


def learn_from(
    engine: Engine, source: Any, task: VideoTask, load_size: LoadSize, limit: int | None = None
) -> SegmentationModel | PartsModel:
    """A model of a video's own frames, at most 16 and evenly spread; the source is read once for it.

    Raises:
        InputError: nothing salient in them, a single frame for co-segmentation, or as :func:`open_source`.
    """
    with open_source(source) as frames:
        sample = spread_sample(islice(frames, limit), SAMPLE)
    features = engine.encode(
        [frame.pixels for frame in sample], load_size=load_size, saliency=SaliencyMode.LOW_RESOLUTION
    )
    return learn_parts(engine, features) if task is VideoTask.PARTS else learn_cosegmentation(engine, features)


def spread_sample(frames: Iterable[Frame], count: int) -> Sequence[Frame]:
    """Every n-th frame, with the smallest power of two n that gives at most ``count``; no more are held at a time."""
    kept: list[Frame] = []
    every = 1
    for number, frame in enumerate(frames):
        if number % every:
            continue
        if len(kept) == count:
            kept, every = kept[::2], 2 * every
            if number % every:
                continue
        kept.append(frame)
    return kept
