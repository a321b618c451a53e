"""Points followed through a video by correspondence.

Every frame is compared with the one before it and with a *keyframe*:

1. A point's log-binned descriptors in the keyframe and in the previous frame are averaged. Around where the point
   was, what is most like them is a first estimate (:func:`facetrt.engine.video.searching.find`).
2. From there, a window of the keyframe around the point is moved, turned and zoomed to lie best on the new frame
   (:func:`facetrt.engine.video.alignment.align`). This is what positions come from, so that they do not drift from
   frame to frame; turn and zoom go on to the next frame, and lay out the bins of step 1.
3. The descriptor found is searched for in the whole previous frame. Best buddies: unless it leads back to the point,
   within a cell, the point is not visible.
4. A point that is not visible keeps its last position and is searched for in the whole frame by its keyframe
   descriptor, in the same step and every one after it; the way back then leads to the keyframe.

**Keyframe.** At first the first frame. When the visible points' median similarity to it falls below
:data:`REFRESH_BELOW`, the current frame becomes the keyframe of the points visible in it; the others keep the first
frame. Each change adds its alignment error to the drift, and each delay a worse alignment.

**Confidence** is the cosine of the aligned windows, 0 where negative, times ``max(0, 1 - d / 2)``, where ``d`` is how
far, in cells, the way back ends from where it should.

All cosines are of descriptors less the first frame's mean: 0 is no more alike than two cells on average, 1 the same.
Held are three maps (first, keyframe, previous) and a few numbers for each point, however long the video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from facetrt.engine.features.features import Features, Float, ImageRecord
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.settings import BUNDLES_CHOICE, FacetChoice, Setting, check
from facetrt.engine.video.blending import Blend
from facetrt.engine.video.comparing import Comparer, Frame, HostComparer, Search, Trace, View
from facetrt.engine.video.descriptor_maps import DescriptorMap, Positions, Shapes
from facetrt.engine.video.heads import first_then
from facetrt.engine.video.propagation import Given, record_of
from facetrt.engine.video.searching import Cells, Window
from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.errors import InputError

FIND_CONFIDENCE = 0.6  # of points that come back: a whole frame offers more look-alikes than a neighbourhood
MUTUAL_DISTANCE = 1.0  # cells
# Measured on turned clips, 0.6 and 0.8 are alike and 0.9 costs 1 to 2 % of the points; where scenes change, 0.8 keeps
# more points than 0.7 (45 instead of 25 % after 24 frames of a panning camera).
REFRESH_BELOW = 0.8

CORNER_SIGMA = 2.0  # cells over which descriptors' changes count, about the window of the alignment
BORDER = 4  # cells: nearer to the border, windows are cut off
SPACING = 0.4  # of the spacing that would spread the points evenly
FLOOR = 0.02  # of the best score: below it descriptors do not change


@dataclass(frozen=True)
class TrackOptions:
    """Options of tracking; :class:`Tracker` documents them."""

    facet: FacetChoice = BUNDLES_CHOICE
    search_radius: Annotated[
        float,
        Setting("Cells that a point may move in each direction between frames and still be found nearby.", minimum=1),
    ] = 8.0
    min_confidence: Annotated[float, Setting("Below it a point counts as not visible.", minimum=0, maximum=1)] = 0.6

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Tracks:
    """Where the points are in one frame.

    Attributes:
        points_xy: ``(N, 2)`` float64, (x, y) in original pixels; the last known place where not visible.
        visible: ``(N,)`` bool.
        confidence: ``(N,)`` float32 in 0..1; of points that are not visible, that of the best candidate.
    """

    points_xy: NDArray[np.float64]
    visible: NDArray[np.bool_]
    confidence: Float

    def __post_init__(self) -> None:
        count = len(self.points_xy)
        if self.points_xy.shape != (count, 2) or self.visible.shape != (count,) or self.confidence.shape != (count,):
            raise InputError(
                f"points of shape {self.points_xy.shape}, visible {self.visible.shape}, confidence "
                f"{self.confidence.shape}: expected (N, 2), (N,) and (N,)"
            )

    def __len__(self) -> int:
        return len(self.points_xy)


@dataclass(frozen=True)
class _Found:
    """Where points were found in a frame: ``positions (n, 2)``, ``shapes (n, 2, 2)`` and so on."""

    positions: Positions
    shapes: Shapes
    similarity: NDArray[np.float64]
    confidence: NDArray[np.float64]
    visible: NDArray[np.bool_]

    @classmethod
    def nowhere(cls, count: int) -> _Found:
        """What is found where none of ``count`` points is."""
        zeros = np.zeros(count)
        return cls(np.zeros((count, 2)), _identity(count), zeros, zeros.copy(), np.zeros(count, np.bool_))

    def put(self, index: Cells, other: _Found) -> None:
        """Take over what was found of the points ``index``."""
        for name, values in vars(other).items():
            getattr(self, name)[index] = values


class Tracker:
    """Follows points through a video: :meth:`start` with a frame's features and points, :meth:`step` with the next.

    Args:
        facet: which descriptors are compared, one facet or several as in :meth:`Blend.fit`; ``Engine.tracker`` fills in
            the bundle's own for tracking.
        search_radius: cells that a visible point may move from frame to frame before it is searched for everywhere.
        min_confidence: below it a point counts as not visible.
        on_device: makes what compares frames that lie on a device; ``Engine.tracker`` fills it in.

    On a GPU whose engine has its kernels there, ``encode_on_device`` gives frames that stay: descriptors of the first
    one come down for their means, and of the others a few numbers for each point.
    """

    def __init__(
        self,
        facet: str,
        *,
        search_radius: float = TrackOptions.search_radius,
        min_confidence: float = TrackOptions.min_confidence,
        on_device: Callable[[str], Comparer] | None = None,
    ) -> None:
        options = TrackOptions(facet, search_radius, min_confidence)
        self.facet = facet
        self._radius, self._min_confidence = options.search_radius, options.min_confidence
        self._on_device = on_device
        self._state: _State | None = None

    def start(self, features: Given, points_xy: ArrayLike) -> Tracks:
        """Begin, or begin anew, with points ``(N, 2)`` as (x, y) in original pixels of this frame.

        Raises:
            InputError: no points, points of another shape, outside the image or not finite; the facet was not exported.
        """
        record = record_of(features)
        points = _check_points(points_xy, record)
        comparer = self._comparer(features)
        view = View(comparer.begin(features), record.geometry, record.geometry.positions_at(points))
        everything = np.ones(len(points), np.bool_)
        tracks = Tracks(points, everything, np.ones(len(points), np.float32))
        made_by = (record.provenance.encoder_sha256, record.stride)
        self._state = _State(made_by, comparer, view, view, view, everything, _identity(len(points)), tracks)
        return deepcopy(tracks)

    def step(self, features: Given) -> Tracks:
        """Where the points are in the next frame, whose size may differ. A repeated frame gives the same result again.

        Raises:
            InputError: :meth:`start` was not called; features of another bundle or stride, without the facet, or that
                lie elsewhere than the first frame's.
        """
        state, record = self._state, record_of(features)
        if state is None:
            raise InputError("a step before the start: call start(features, points_xy) with the first result's")
        _check_alike(state, record)
        if isinstance(features, Features) != isinstance(state.comparer, HostComparer):
            raise InputError(f"{record.name} and the first frame lie on the host and on a device: encode all alike")
        same_size = record.geometry == state.previous.geometry
        with state.comparer.frame(features, state.previous.map if same_size else None) as frame:
            known = state if same_size else state.resized(record.geometry)
            self._state = self._advance(known, frame, record.geometry)
        return deepcopy(self._state.tracks)  # whoever gets it may write into it

    def following(self, points: ArrayLike | int) -> Callable[[Given], Tracks]:
        """A head for :meth:`Stream.attach`: :meth:`start` with the first features, :meth:`step` with all others.

        Args:
            points: ``(N, 2)`` as for :meth:`start`, or how many to choose by :func:`grid_points`.
        """

        def start(features: Given) -> Tracks:
            chosen = self._chosen(features, points) if isinstance(points, int) else points
            return self.start(features, chosen)

        return first_then(start, self.step)

    def _chosen(self, features: Given, count: int) -> NDArray[np.float64]:
        return grid_points(self._comparer(features).on_host(features), count, self.facet)

    def _comparer(self, features: Given) -> Comparer:
        if isinstance(features, Features):
            return HostComparer(self.facet)
        if self._on_device is None:
            raise InputError(f"{features.record.name} lies on a device: take the tracker from Engine.tracker")
        return self._on_device(self.facet)

    def _advance(self, state: _State, frame: Frame[Any], geometry: Geometry) -> _State:
        """The state after a frame of the size that ``state`` is in.

        Points that were visible are looked for nearby, then those that were not found and all others everywhere. Where
        each search is a wait, the others join the first.
        """
        found = _Found.nowhere(len(state.shapes))
        visible = state.tracks.visible
        searches = [self._nearby(state, view, frame, index) for view, index in state.by_view(visible)]
        at_once = ~visible & frame.waits
        searches += [_everywhere(state, view, frame, index) for view, index in state.by_view(at_once)]
        if not self._look(frame, searches, found):
            return state
        missed = ~found.visible & ~at_once
        if searches := [_everywhere(state, view, frame, index) for view, index in state.by_view(missed)]:
            self._look(frame, searches, found)
        positions = np.where(found.visible[:, None], found.positions, state.previous.positions)
        points = np.where(found.visible[:, None], geometry.points_at(positions), state.tracks.points_xy)
        shapes = np.where(found.visible[:, None, None], found.shapes, state.shapes)
        tracks = Tracks(points, found.visible, found.confidence.astype(np.float32))
        now = View(frame.seen, geometry, positions)
        return replace(state, previous=now, shapes=shapes, tracks=tracks).refreshed(found.similarity)

    def _nearby(self, state: _State, view: View, frame: Frame[Any], index: Cells) -> Search:
        """Points ``index``, which were visible in the previous frame and have ``view`` as their keyframe."""
        window = Window.near(state.previous.positions[index], self._radius, frame.grid)
        return Search(index, view, state.shapes[index], window, state.previous)

    def _look(self, frame: Frame[Any], searches: list[Search], found: _Found) -> bool:
        """Put what is found of ``searches`` into ``found``; whether the frame is another than the one before it."""
        traces = frame.search(searches)
        if traces is None:
            return False
        for search, trace in zip(searches, traces, strict=True):
            found.put(search.index, self._judged(search, trace, frame.grid))
        return True

    def _judged(self, search: Search, trace: Trace[NDArray[np.float64]], grid: tuple[int, int]) -> _Found:
        """What counts as found of where a search has led."""
        distance = np.linalg.norm(trace.back - search.origin, axis=1)
        confidence = np.clip(trace.similarity, 0, 1) * np.maximum(0, 1 - distance / (2 * MUTUAL_DISTANCE))
        needed = self._min_confidence
        if search.previous is None:
            needed = max(needed, FIND_CONFIDENCE)
        inside = (np.abs(trace.positions - _centre(grid)) <= _centre(grid) + 0.5).all(axis=1)
        visible = (distance <= MUTUAL_DISTANCE) & (confidence >= needed) & inside
        return _Found(trace.positions, trace.shapes, trace.similarity, confidence, visible)


def _everywhere(state: _State, view: View, frame: Frame[Any], index: Cells) -> Search:
    """Points ``index``, which may be anywhere and have ``view`` as their keyframe."""
    return Search(index, view, state.shapes[index], Window.whole(len(index), frame.grid))


@dataclass(frozen=True)
class _State:
    """What is carried from frame to frame.

    Attributes:
        made_by: what all frames must share: the encoder's hash and the stride.
        comparer: what the frames are compared by.
        first, key, previous: frames; ``previous.positions`` are where the points are.
        in_key: ``(N,)`` which points have the keyframe as reference; the others have the first frame.
        shapes: ``(N, 2, 2)`` from a point's reference to the previous frame.
    """

    made_by: tuple[str, int]
    comparer: Comparer
    first: View
    key: View
    previous: View
    in_key: NDArray[np.bool_]
    shapes: Shapes
    tracks: Tracks

    def by_view(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[View, Cells]]:
        """Some points by their reference, where there are any."""
        for view, in_view in ((self.key, self.in_key), (self.first, ~self.in_key)):
            if (index := np.flatnonzero(chosen & in_view)).size:
                yield view, index

    def resized(self, geometry: Geometry) -> _State:
        """The state for a next frame of another size: all points are searched for anew, at its scale."""
        old = self.previous.geometry
        points = self.tracks.points_xy * (np.array(geometry.original_size) / old.original_size)[::-1]
        zoom = (np.array(geometry.image_size) / old.image_size)[::-1]
        return replace(
            self,
            previous=View(self.previous.map, geometry, geometry.positions_at(points)),
            shapes=zoom[:, None] * self.shapes,
            tracks=replace(self.tracks, points_xy=points, visible=np.zeros(len(points), np.bool_)),
        )

    def refreshed(self, similarity: NDArray[np.float64]) -> _State:
        """Take the previous frame as keyframe, if ``similarity (N,)`` to the present one has become too low."""
        visible = self.tracks.visible
        if not visible.any() or np.median(similarity[visible]) >= REFRESH_BELOW:
            return self
        shapes = np.where((visible | self.in_key)[:, None, None], _identity(len(visible)), self.shapes)
        return replace(self, key=self.previous, in_key=visible, shapes=shapes)


def grid_points(features: Features, count: int, facet: str | None = None) -> NDArray[np.float64]:
    """At most ``count`` points worth following, ``(n, 2)`` as (x, y) in original pixels, the best first.

    A cell's score is how much the descriptors around it change in the direction in which they change least (the corner
    measure of Shi and Tomasi, on descriptors), weighted by its saliency where that is known. Points keep a distance so
    that they spread over the image; where little can be followed there are fewer.

    Args:
        facet: as for :class:`Tracker`; the first that the features have if None.

    Raises:
        InputError: ``count`` is not positive, the facet is not at hand, or nothing in the image can be followed.
    """
    if count < 1:
        raise InputError(f"count={count}: expected at least 1 point")
    chosen = features.facets[0] if facet is None else facet
    score = _localisation(DescriptorMap.of(Blend.fit(chosen, features).map(features)))
    if features.attention is not None:
        score = score * (0.5 + 0.5 * features.saliency)
    cells = _spread(score, count)
    if not cells.size:
        raise InputError(f"{features.name} has no point that stands out from its surroundings: give points yourself")
    return features.geometry.points_xy(cells)


def _localisation(seen: DescriptorMap) -> Float:
    """The smaller eigenvalue of the structure tensor of the unit descriptors, ``(grid_h, grid_w)``; 0 at the border."""
    if min(seen.grid) <= 2 * BORDER:
        return np.zeros(seen.grid, np.float32)
    norms = np.linalg.norm(seen.values, axis=2, keepdims=True)
    down, right = np.gradient(seen.values / np.maximum(norms, NORM_FLOOR), axis=(0, 1))
    yy, yx, xx = (
        cv2.GaussianBlur(np.einsum("yxc,yxc->yx", a, b), (0, 0), CORNER_SIGMA)
        for a, b in ((down, down), (down, right), (right, right))
    )
    smaller = (yy + xx) / 2 - np.sqrt(np.square((yy - xx) / 2) + np.square(yx))
    score = np.zeros(seen.grid, np.float32)
    inner = (slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    score[inner] = np.maximum(smaller[inner], 0)
    return score


def _spread(score: Float, count: int) -> Cells:
    """At most ``count`` cells of high score, no two nearer than ``SPACING``."""
    apart = max(SPACING**2 * score.size / count, 1)  # squared
    score = np.where(score >= FLOOR * score.max(), score, 0)
    rows, columns = np.indices(score.shape)
    left = score.copy()
    cells: list[int] = []
    while len(cells) < count and left.any():
        best = int(left.argmax())
        cells.append(best)
        row, column = divmod(best, score.shape[1])
        left[np.square(rows - row) + np.square(columns - column) < apart] = 0
    return np.array(cells, np.int64)


def _centre(grid: tuple[int, int]) -> NDArray[np.float64]:
    return (np.array(grid[::-1]) - 1) / 2


def _identity(count: int) -> Shapes:
    return np.tile(np.eye(2), (count, 1, 1))


def _check_points(points_xy: ArrayLike, features: ImageRecord) -> NDArray[np.float64]:
    """Points as a new ``(N, 2)`` array, or :class:`InputError`."""
    points = np.array(points_xy, np.float64)
    if points.size == 0:
        raise InputError("no points were given: expected at least one (x, y) to follow, for example from grid_points")
    if points.ndim != 2 or points.shape[1] != 2:
        raise InputError(f"points have shape {points.shape}: expected (N, 2), an (x, y) in original pixels for each")
    if not np.isfinite(points).all():
        raise InputError("points hold NaN or infinite values: expected finite pixel coordinates")
    try:
        features.geometry.cells_at(points)
    except InputError as error:
        raise InputError(f"{features.name}: {error}") from error
    return points


def _check_alike(state: _State, features: ImageRecord) -> None:
    """Raise :class:`InputError` unless ``features`` can be compared with the first frame's."""
    encoder, stride = state.made_by
    if features.provenance.encoder_sha256 != encoder:
        raise InputError(
            f"{features.name} was encoded by another bundle ({features.provenance.model}) than the first frame: use "
            "one bundle for a video, or start anew"
        )
    if features.stride != stride:
        raise InputError(f"{features.name} has stride {features.stride} and the first frame {stride}: use one stride")
