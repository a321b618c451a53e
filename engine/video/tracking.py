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

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.settings import BUNDLES_CHOICE, FacetChoice, Setting, check
from facetrt.engine.tasks.discovery.fusing import read_weight
from facetrt.engine.video.alignment import Alignment, Patches, Slopes, align
from facetrt.engine.video.descriptor_maps import DescriptorMap, Positions, Shapes
from facetrt.engine.video.heads import first_then
from facetrt.engine.video.searching import Cells, Window, find
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
class _View:
    """A frame, and where the points are in it, in cells ``(N, 2)``."""

    map: DescriptorMap = field(repr=False)
    geometry: Geometry
    positions: Positions

    @cached_property
    def patches(self) -> Patches:
        """The surroundings of all points; a keyframe's are compared with many frames."""
        return Patches.around(self.map, self.positions)

    @cached_property
    def binned(self) -> Float:
        """The points' unit descriptors with level bins, ``(N, bins, C)``."""
        return self.map.binned(self.positions)


EXPECTED = "expected a form like key@3+2*query@3"  # of facets that are blended


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


@dataclass(frozen=True)
class Blend:
    """Facets that are compared together, each less its mean in the first frame and divided by its spread there.

    Attributes:
        terms: per facet its name, mean ``(C,)`` and factor.
    """

    terms: list[tuple[str, Float, float]] = field(repr=False)

    @classmethod
    def fit(cls, text: str, features: Features) -> Blend:
        """Read facets joined by ``+``, each with a weight if it starts like ``2*``: ``key@3+2*query@3``.

        Raises:
            InputError: a weight that is no positive number, or a facet that the features lack.
        """
        terms = []
        for weight, facet in _terms(text):
            rows = features[facet]
            mean = np.asarray(rows.mean(axis=0), np.float32)
            spread = float(np.sqrt(np.square(rows - mean).sum(axis=1).mean()))
            terms.append((facet, mean, 1.0 if weight is None else read_weight(weight, text, EXPECTED), spread))
        return cls([(facet, mean, weight / max(spread, NORM_FLOOR)) for facet, mean, weight, spread in terms])

    @staticmethod
    def facets(text: str) -> list[str]:
        """The facets of a text for :meth:`fit`, whatever weights they have."""
        return [facet for _, facet in _terms(text)]

    def map(self, features: Features) -> Float:
        """``(grid_h, grid_w, C)``, the facets' channels one after the other.

        Raises:
            InputError: NaN or infinite values, which no later frame would get rid of.
        """
        maps = [features.map(facet) for facet, _, _ in self.terms]
        joined = np.empty((*features.grid, sum(values.shape[2] for values in maps)), np.float32)
        first = 0
        for values, (_, mean, factor) in zip(maps, self.terms, strict=True):
            own = joined[..., first : first + values.shape[2]]
            np.subtract(values, mean, out=own)
            own *= np.float32(factor)
            first += values.shape[2]
        if not np.isfinite(joined.sum()):  # a sum is, as good as always, what all it sums is
            raise InputError(f"{features.name} has NaN or infinite descriptors: expected finite ones; leave it out")
        return joined


def _terms(text: str) -> list[tuple[str | None, str]]:
    """Weight, if there is one, and facet of each term."""
    parts = [term.rpartition("*") for term in text.split("+")]
    return [(weight if star else None, facet.strip()) for weight, star, facet in parts]


class Tracker:
    """Follows points through a video: :meth:`start` with a frame's features and points, :meth:`step` with the next.

    Args:
        facet: which descriptors are compared, one facet or several as in :meth:`Blend.fit`; ``Engine.tracker`` fills in
            the bundle's own for tracking.
        search_radius: cells that a visible point may move from frame to frame before it is searched for everywhere.
        min_confidence: below it a point counts as not visible.
    """

    def __init__(
        self,
        facet: str,
        *,
        search_radius: float = TrackOptions.search_radius,
        min_confidence: float = TrackOptions.min_confidence,
    ) -> None:
        options = TrackOptions(facet, search_radius, min_confidence)
        self.facet = facet
        self._radius, self._min_confidence = options.search_radius, options.min_confidence
        self._state: _State | None = None

    def start(self, features: Features, points_xy: ArrayLike) -> Tracks:
        """Begin, or begin anew, with points ``(N, 2)`` as (x, y) in original pixels of this frame.

        Raises:
            InputError: no points, points of another shape, outside the image or not finite; the facet was not exported.
        """
        points = _check_points(points_xy, features)
        blend = Blend.fit(self.facet, features)
        seen = DescriptorMap.of(blend.map(features))
        view = _View(seen, features.geometry, features.geometry.positions_at(points))
        everything = np.ones(len(points), np.bool_)
        tracks = Tracks(points, everything, np.ones(len(points), np.float32))
        made_by = (features.provenance.encoder_sha256, features.stride)
        self._state = _State(made_by, blend, view, view, view, everything, _identity(len(points)), tracks)
        return deepcopy(tracks)

    def step(self, features: Features) -> Tracks:
        """Where the points are in the next frame, whose size may differ. A repeated frame gives the same result again.

        Raises:
            InputError: :meth:`start` was not called; features of another bundle or stride, or without the facet.
        """
        if self._state is None:
            raise InputError("a step before the start: call start(features, points_xy) with the first result's")
        _check_alike(self._state, features)
        seen = DescriptorMap.of(self._state.blend.map(features))
        previous = self._state.previous
        if features.geometry != previous.geometry:
            self._state = self._advance(self._state.resized(features.geometry), seen, features.geometry)
        elif not seen.equals(previous.map):
            self._state = self._advance(self._state, seen, features.geometry)
        return deepcopy(self._state.tracks)  # whoever gets it may write into it

    def following(self, points: ArrayLike | int) -> Callable[[Features], Tracks]:
        """A head for :meth:`Stream.attach`: :meth:`start` with the first features, :meth:`step` with all others.

        Args:
            points: ``(N, 2)`` as for :meth:`start`, or how many to choose by :func:`grid_points`.
        """

        def start(features: Features) -> Tracks:
            chosen = grid_points(features, points, self.facet) if isinstance(points, int) else points
            return self.start(features, chosen)

        return first_then(start, self.step)

    def _advance(self, state: _State, seen: DescriptorMap, geometry: Geometry) -> _State:
        """The state after a frame of the size that ``state`` is in."""
        slopes = Slopes.of(seen)
        found = _Found.nowhere(len(state.shapes))
        visible = state.tracks.visible
        for view, in_view in ((state.key, state.in_key), (state.first, ~state.in_key)):
            if (near := np.flatnonzero(visible & in_view)).size:
                found.put(near, self._follow(state, view, seen, slopes, near))
            if (lost := np.flatnonzero(in_view & ~found.visible)).size:
                found.put(lost, self._find(state, view, seen, slopes, lost))
        positions = np.where(found.visible[:, None], found.positions, state.previous.positions)
        points = np.where(found.visible[:, None], geometry.points_at(positions), state.tracks.points_xy)
        shapes = np.where(found.visible[:, None, None], found.shapes, state.shapes)
        tracks = Tracks(points, found.visible, found.confidence.astype(np.float32))
        now = _View(seen, geometry, positions)
        return replace(state, previous=now, shapes=shapes, tracks=tracks).refreshed(found.similarity)

    def _follow(self, state: _State, view: _View, seen: DescriptorMap, slopes: Slopes, index: Cells) -> _Found:
        """Points ``index``, which were visible in the previous frame and have ``view`` as their keyframe."""
        previous, shapes = state.previous, state.shapes[index]
        before = previous.positions[index]
        wanted = view.map.binned(view.positions[index], _inverse(shapes))
        wanted += previous.binned[index]
        start = find(seen, wanted / np.float32(2), Window.near(before, self._radius, seen.grid), before)
        found = align(view.patches.only(index), slopes, start, shapes)
        whole = Window.whole(len(index), previous.map.grid)
        back = find(previous.map, seen.binned(found.positions), whole, before)
        return self._judged(found, seen.grid, back - before, self._min_confidence)

    def _find(self, state: _State, view: _View, seen: DescriptorMap, slopes: Slopes, index: Cells) -> _Found:
        """Points ``index``, which may be anywhere, by ``view`` as their keyframe."""
        at, shapes = view.positions[index], state.shapes[index]
        start = find(seen, view.map.binned(at, _inverse(shapes)), Window.whole(len(index), seen.grid))
        found = align(view.patches.only(index), slopes, start, shapes)
        whole = Window.whole(len(index), view.map.grid)
        back = find(view.map, seen.binned(found.positions, found.shapes), whole, at)
        return self._judged(found, seen.grid, back - at, max(self._min_confidence, FIND_CONFIDENCE))

    def _judged(self, found: Alignment, grid: tuple[int, int], off: Positions, needed: float) -> _Found:
        """``off (n, 2)``: from where the way back should end to where it does."""
        distance = np.linalg.norm(off, axis=1)
        confidence = np.clip(found.similarity, 0, 1) * np.maximum(0, 1 - distance / (2 * MUTUAL_DISTANCE))
        inside = (np.abs(found.positions - _centre(grid)) <= _centre(grid) + 0.5).all(axis=1)
        visible = (distance <= MUTUAL_DISTANCE) & (confidence >= needed) & inside
        return _Found(found.positions, found.shapes, found.similarity, confidence, visible)


@dataclass(frozen=True)
class _State:
    """What is carried from frame to frame.

    Attributes:
        made_by: what all frames must share: the encoder's hash and the stride.
        blend: what is compared, fitted to the first frame.
        first, key, previous: frames; ``previous.positions`` are where the points are.
        in_key: ``(N,)`` which points have the keyframe as reference; the others have the first frame.
        shapes: ``(N, 2, 2)`` from a point's reference to the previous frame.
    """

    made_by: tuple[str, int]
    blend: Blend
    first: _View
    key: _View
    previous: _View
    in_key: NDArray[np.bool_]
    shapes: Shapes
    tracks: Tracks

    def resized(self, geometry: Geometry) -> _State:
        """The state for a next frame of another size: all points are searched for anew, at its scale."""
        old = self.previous.geometry
        points = self.tracks.points_xy * (np.array(geometry.original_size) / old.original_size)[::-1]
        zoom = (np.array(geometry.image_size) / old.image_size)[::-1]
        return replace(
            self,
            previous=replace(self.previous, geometry=geometry, positions=geometry.positions_at(points)),
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


def _inverse(shapes: Shapes) -> Shapes:
    return np.asarray(np.linalg.inv(shapes), np.float64)


def _identity(count: int) -> Shapes:
    return np.tile(np.eye(2), (count, 1, 1))


def _check_points(points_xy: ArrayLike, features: Features) -> NDArray[np.float64]:
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


def _check_alike(state: _State, features: Features) -> None:
    """Raise :class:`InputError` unless ``features`` can be compared with the first frame's."""
    encoder, stride = state.made_by
    if features.provenance.encoder_sha256 != encoder:
        raise InputError(
            f"{features.name} was encoded by another bundle ({features.provenance.model}) than the first frame: use "
            "one bundle for a video, or start anew"
        )
    if features.stride != stride:
        raise InputError(f"{features.name} has stride {features.stride} and the first frame {stride}: use one stride")
