"""Points followed through TAP-Vid-DAVIS, scored by AJ, δ and OA. Source: Doersch et al., TAP-Vid (arXiv 2211.03726)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.drawing import results as draw
from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.comparison import write_comparison
from facetrt.engine.evaluation.datasets.points import TAPVID, PointVideo, read_point_videos
from facetrt.engine.evaluation.datasets.reading import digest
from facetrt.engine.evaluation.protocol import (
    Choice,
    Evaluation,
    Options,
    Record,
    Row,
    Summary,
    Tick,
    by_category,
    mean_row,
)
from facetrt.engine.evaluation.track_scores import DETAILS, METRICS, SIDE, Bools, Points, track_scores
from facetrt.engine.features.features import Features
from facetrt.engine.images.loading import LoadSizeChoice, Pixels, load_image
from facetrt.engine.settings import Setting, values_of
from facetrt.engine.video.blending import Blend
from facetrt.engine.video.tracking import Tracker, TrackOptions
from facetrt.kernels.errors import InputError, OutputError

Indices = NDArray[np.int64]

EVERY = 5  # frames between queries, of strided ones
RADIUS = 3  # pixels of a drawn point


class QueryMode(StrEnum):
    """Where points are taken up: where each is visible first, or wherever it is visible in every fifth frame."""

    FIRST = "first"
    STRIDED = "strided"

    def queries(self, visible: Bools) -> Queries:
        """What is asked of points that are ``visible (N, T)``."""
        if self is QueryMode.FIRST:
            points = np.flatnonzero(visible.any(axis=1))
            return Queries(points, visible[points].argmax(axis=1))
        frames, points = np.nonzero(visible[:, ::EVERY].T)
        return Queries(points, EVERY * frames)

    def scored(self, queries: Queries, count: int) -> Bools:
        """``(Q, count)``, which frames of each query count: those after its own, or all others."""
        frames, own = np.arange(count), queries.frames[:, None]
        return np.asarray(frames > own if self is QueryMode.FIRST else frames != own)

    def passes(self, count: int) -> list[range]:
        """The orders in which the frames are gone through."""
        forwards = range(count)
        return [forwards] if self is QueryMode.FIRST else [forwards, forwards[::-1]]


@dataclass(frozen=True)
class Queries:
    """What is asked: ``points (Q,)`` of the video, each from ``frames (Q,)`` on."""

    points: Indices
    frames: Indices

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True)
class Found:
    """Where points are: ``points_xy (Q, T, 2)`` in pixels of a frame, and whether they are ``visible (Q, T)``."""

    points_xy: Points
    visible: Bools

    @classmethod
    def unmoved(cls, video: PointVideo, queries: Queries) -> Found:
        """Every point stays where it was taken up, and is never hidden: the trivial answer."""
        start = video.points_xy[queries.points, queries.frames]
        shape = (len(queries), len(video))
        return cls(np.repeat(start[:, None], shape[1], axis=1), np.ones(shape, np.bool_))


@dataclass(frozen=True)
class TapVidOptions(TrackOptions, Options):
    """Options of the scores of followed points. ``limit`` counts videos."""

    # Of six made clips of 480×854 with the built-in model: 320 adds 0.013 to AJ (0.422) and takes 3.6 times as long,
    # frames squashed to 256×256 cost 0.034.
    load_size: LoadSizeChoice = 224
    stride: Annotated[int | None, Setting("Pixels between cells; the bundle's own by default.", minimum=1)] = None
    queries: Annotated[QueryMode, Setting("Where points are taken up.")] = QueryMode.FIRST
    alone: Annotated[bool, Setting("Follow each point as if there were no others; takes longer.")] = False


class TapVid(Evaluation):
    """AJ, δ and OA of followed points; an item is a video."""

    name = "tapvid-davis"
    task: ClassVar[str] = "track"
    category_word: ClassVar[str] = "videos"

    def __init__(self, root: Path, options: TapVidOptions) -> None:
        self.options: TapVidOptions = options
        self.root = root
        self.videos = {video.name: video for video in read_point_videos(root, options.limit)}

    @property
    def keys(self) -> list[str]:
        """See :class:`Evaluation`."""
        return list(self.videos)

    def steps(self, key: str) -> int:
        """See :class:`Evaluation`."""
        count = len(self.videos[key])
        return count * len(self.options.queries.passes(count))

    def facts(self) -> dict[str, Any]:
        """See :class:`Evaluation`."""
        videos = self.videos.values()
        return {
            "data_set": TAPVID,
            "videos": {video.name: len(video) for video in videos},
            "sizes": {video.name: list(video.size) for video in videos},
            "points": {video.name: len(video.visible) for video in videos},
            "digest": digest(self.root, [path for video in videos for path in video.files]),
        }

    def choices(self) -> list[Choice]:
        """See :class:`Evaluation`."""
        shared = "one for the points of a frame; when its keyframe changes, all of them decide"
        return [
            Choice(
                "frames",
                f"encoded at load size {self.options.load_size} from their own, scored at {SIDE}×{SIDE}",
                f"load_size={SIDE}x{SIDE}, the protocol's own frames, and those of most published rows",
            ),
            Choice("trackers", "one for each point" if self.options.alone else shared, "alone=yes: one for each point"),
            Choice("visible", "found by the tracker, with its own min_confidence"),
            Choice("a query outside of its frame", "is put on the border; it is scored where it was annotated"),
            Choice("a measure of nothing in a video", "is left out of the mean; the published scorer divides by zero"),
        ]

    def facets_in(self, facet: str) -> list[str]:
        """See :class:`Evaluation`."""
        return Blend.facets(facet)

    def run(self, engine: Engine | None, todo: Sequence[str], out: Path, tick: Tick) -> Iterator[tuple[str, Record]]:
        """See :class:`Evaluation`."""
        for key in todo:
            video = self.videos[key]
            queries = self.options.queries.queries(video.visible)
            record: Record = {"category": key, "queries": len(queries)}
            record["unmoved"] = self._score(video, queries, Found.unmoved(video, queries))
            if engine is None:
                tick(self.steps(key))
            else:
                found = self._follow(engine, video, queries, out / key, tick)
                _save(out / f"{key}.npz", video, queries, found)
                record["followed"] = self._score(video, queries, found)
            yield key, record

    def _score(self, video: PointVideo, queries: Queries, found: Found) -> dict[str, float | None]:
        scored = self.options.queries.scored(queries, len(video))
        annotated = _at_side(video.points_xy[queries.points], video.size)
        visible = video.visible[queries.points]
        return track_scores(_at_side(found.points_xy, video.size), found.visible, annotated, visible, scored)

    def _follow(self, engine: Engine, video: PointVideo, queries: Queries, out: Path, tick: Tick) -> Found:
        """All queries through the video, forwards and, where they are asked for that, backwards."""
        found = Found.unmoved(video, queries)
        pictures = video.pictures()
        for order in self.options.queries.passes(len(video)):
            groups = [_Group(self._tracker(), video, queries, members) for members in self._together(queries)]
            stream = engine.encode_iter(
                (pictures[index] for index in order), load_size=self.options.load_size, stride=self.options.stride
            )
            for index, features in zip(order, stream, strict=True):
                _check_size(video, features)
                for group in groups:
                    group.step(index, features, found)
                if order.step == 1:
                    _compare(out, video, index, pictures[index], queries, found)
                tick(1)
        return found

    def _together(self, queries: Queries) -> list[Indices]:
        """Which queries share a tracker: those of one frame, or none."""
        if self.options.alone:
            return list(np.arange(len(queries))[:, None])
        return [np.flatnonzero(queries.frames == frame) for frame in np.unique(queries.frames)]

    def _tracker(self) -> Tracker:
        return Tracker(self.facet, **values_of(self.options, TrackOptions, without=["facet"]))

    def summarise(self, records: Mapping[str, Record]) -> Summary:
        """See :class:`Evaluation`."""
        rows = {
            method: [Row(name, group[0][method]) for name, group in by_category(records).items() if method in group[0]]
            for method in ("followed", "unmoved")
        }
        figures = [*METRICS, *DETAILS]
        return Summary(
            metrics=METRICS,
            overall=mean_row("this run", rows["followed"], figures) if rows["followed"] else None,
            baselines=[mean_row("points that stay (trivial)", rows["unmoved"], figures)],
            categories=rows["followed"] or rows["unmoved"],
            counts={"videos": len(records), "queries": sum(record["queries"] for record in records.values())},
        )


class _Group:
    """Queries of one frame, ``members (n,)`` of all, which one tracker follows from there."""

    def __init__(self, tracker: Tracker, video: PointVideo, queries: Queries, members: Indices) -> None:
        self.tracker, self.members = tracker, members
        self.frame = int(queries.frames[members[0]])
        self.started = False
        height, width = video.size
        self.points_xy = np.clip(video.points_xy[queries.points[members], self.frame], 0, (width, height))

    def step(self, index: int, features: Features, found: Found) -> None:
        """Write where the points are in frame ``index``; nothing before their own."""
        if not self.started and index != self.frame:
            return
        tracks = self.tracker.step(features) if self.started else self.tracker.start(features, self.points_xy)
        self.started = True
        found.points_xy[self.members, index] = tracks.points_xy
        found.visible[self.members, index] = tracks.visible


def _at_side(points_xy: Points, size: tuple[int, int]) -> Points:
    """Points of a frame of ``(height, width)``, where it is squashed to the size that is scored."""
    return np.asarray(points_xy * (SIDE / np.array(size[::-1])))


def _check_size(video: PointVideo, features: Features) -> None:
    if features.original_size != video.size:
        raise InputError(
            f"{features.name} has {features.original_size[1]}×{features.original_size[0]} pixels and the first frame "
            f"{video.size[1]}×{video.size[0]} (width × height): expected frames of one size"
        )


def _compare(out: Path, video: PointVideo, index: int, picture: Path | Pixels, queries: Queries, found: Found) -> None:
    """The frame beside its annotated points and those found; a point keeps its colour."""
    frame = draw.scaled(load_image(picture).pixels, draw.COMPARED)
    asked = np.flatnonzero(queries.frames <= index)
    annotated = asked[video.visible[queries.points[asked], index]]
    claimed = asked[found.visible[asked, index]]
    colours = draw.spread_hues(len(video.visible))[queries.points]
    scale = frame.shape[1] / video.size[1]
    truth = _with_points(frame, scale * video.points_xy[queries.points[annotated], index], colours[annotated])
    prediction = _with_points(frame, scale * found.points_xy[claimed, index], colours[claimed])
    write_comparison(out, f"{index:05}", frame, truth, prediction)


def _with_points(frame: Pixels, points_xy: Points, colours: NDArray[np.uint8]) -> Pixels:
    canvas = frame.copy()
    for (x, y), colour in zip(np.floor(points_xy).astype(int), colours, strict=True):
        draw.draw_point(canvas, (int(x), int(y)), RADIUS, tuple(map(int, colour)))
    return canvas


def _save(path: Path, video: PointVideo, queries: Queries, found: Found) -> None:
    """What TAP-Vid's own scorer takes: queries (t, y, x), tracks and occlusion of a frame of 256×256."""
    start = _at_side(video.points_xy[queries.points, queries.frames], video.size)
    asked = np.column_stack([queries.frames, start[:, ::-1]])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tracks = _at_side(found.points_xy, video.size)
        np.savez(path, query_points=asked, tracks=tracks, occluded=~found.visible, points=queries.points)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
