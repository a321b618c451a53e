"""The tasks that are served: tensors of a request in, tensors of its response out, whatever the server.

A server reads each request with :meth:`ServedTask.read`, which checks it and decodes nothing, collects items of several
requests, and gives them to :meth:`ServedTask.run` together. What comes back for an item is its result, or the error
that is its own; :meth:`ServedTask.respond` makes a response of a request's items.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.run_options import Kernels
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.images.loading import DEFAULT_SIZE, LOAD_SIZE_SETTING, LoadSize
from facetrt.engine.serving.tensors import (
    ImageFile,
    Limits,
    MaskFormat,
    Outputs,
    Request,
    Tensor,
    as_bytes,
    label_bytes,
    mask_bytes,
    read_images,
    stacked,
)
from facetrt.engine.settings import Setting, check, parse_several
from facetrt.engine.tasks.cosegmentation import Mask
from facetrt.engine.tasks.discovery.objects import Objects
from facetrt.engine.tasks.models import PartsModel, SegmentationModel, load_model
from facetrt.engine.tasks.parts import PartMap
from facetrt.engine.tasks.refinement import Refinement
from facetrt.engine.video.tracking import Tracker, Tracks
from facetrt.kernels.errors import FacetrtError, InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
Outcome = Outputs | FacetrtError

PANEL = "Serving"  # of options in the command line's help
SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")  # parameters, as Triton's clients send them


class TaskName(StrEnum):
    """What can be served."""

    MATCH = "match"
    COSEGMENT = "cosegment"
    APPLY = "apply"
    DISCOVER = "discover"
    TRACK = "track"


def read_tasks(text: str) -> tuple[TaskName, ...]:
    """See :func:`parse_several`."""
    return parse_several(TaskName, text, "task")


@dataclass(frozen=True)
class TaskOptions:
    """What is served, and how: chosen by who serves, never by a request."""

    tasks: Annotated[
        tuple[TaskName, ...], Setting(f"Out of {', '.join(TaskName)}, comma-separated.", read=read_tasks, panel=PANEL)
    ] = (TaskName.MATCH,)
    learned: Annotated[
        Path | None, Setting("apply: from --save-model of cosegment or parts.", flag="model", panel=PANEL)
    ] = None
    load_size: Annotated[LoadSize, replace(LOAD_SIZE_SETTING, panel=PANEL)] = DEFAULT_SIZE
    num_pairs: Annotated[
        int, Setting("match: at most so many point pairs.", minimum=1, maximum=10_000, panel=PANEL)
    ] = 10
    method: Annotated[str, Setting("discover: a method of 'facetrt discover'.", panel=PANEL)] = "tokencut"
    refine: Annotated[Refinement, Setting("How masks are refined; slower.", panel=PANEL)] = Refinement.NONE
    masks: Annotated[
        MaskFormat, Setting("How masks travel: PNG files, or COCO's run lengths as JSON.", panel=PANEL)
    ] = MaskFormat.PNG
    max_images: Annotated[int, Setting("Of one request.", minimum=1, panel=PANEL)] = Limits.images
    max_image_mib: Annotated[int, Setting("Of one image file.", minimum=1, maximum=1024, panel=PANEL)] = 32
    max_sequences: Annotated[int, Setting("track: videos that are followed at a time.", minimum=1, panel=PANEL)] = 64
    idle_seconds: Annotated[float, Setting("track: after which a video is given up.", above=0, panel=PANEL)] = 60.0

    def __post_init__(self) -> None:
        check(self)
        if (self.learned is None) == (TaskName.APPLY in self.tasks):
            given = "no model" if self.learned is None else f"{self.learned}, and apply is not served"
            raise InputError(f"--model: {given}: expected a model exactly where apply is among the tasks")

    @property
    def limits(self) -> Limits:
        """What one request may hold."""
        return Limits(self.max_images, self.max_image_mib << 20)


class ServedTask(ABC, Generic[Item]):
    """One task of an open engine. Its methods may be called from several threads.

    Attributes:
        inputs: of one item, and ``outputs`` likewise.
        batches: whether items of several requests are worth being run together.
    """

    name: ClassVar[TaskName]
    inputs: ClassVar[tuple[Tensor, ...]]
    outputs: ClassVar[tuple[Tensor, ...]]
    batches: ClassVar[bool] = True

    def __init__(self, engine: Engine, options: TaskOptions) -> None:
        self._engine, self._options = engine, options

    @abstractmethod
    def read(self, request: Request) -> list[Item]:
        """The items of a request.

        Raises:
            InputError: what is wrong with it.
        """

    @abstractmethod
    def run(self, items: Sequence[Item]) -> list[Outcome]:
        """What is found of each item, or why nothing is."""

    def respond(self, outcomes: Sequence[Outcome]) -> dict[str, NDArray[Any]]:
        """The outputs of a request from what was found of its items.

        Raises:
            FacetrtError: of the first item that failed.
        """
        found = []
        for outcome in outcomes:
            if isinstance(outcome, FacetrtError):
                raise outcome
            found.append(outcome)
        return stacked(found, self.outputs)

    def close(self) -> None:
        """Let go of what is kept between requests."""

    def _images(self, request: Request, name: str = "image") -> list[ImageFile]:
        return read_images(request, name, self._options.limits)

    def _encode(self, images: Sequence[ImageFile], **options: Any) -> list[Features | FacetrtError]:
        """Features of each image in one pass, or why it has none."""
        return each_or_error(images, partial(self._engine.encode, images, **options))


IMAGE = Tensor("image", "BYTES", (1,))
CONFIDENCE = Tensor("confidence", "FP32", (1,))
COUNT = Tensor("count", "INT32", (1,))


class MatchTask(ServedTask[tuple[ImageFile, ImageFile]]):
    """Point pairs of two images, as ``Engine.match`` finds them."""

    name = TaskName.MATCH
    inputs = (Tensor("image_a", "BYTES", (1,)), Tensor("image_b", "BYTES", (1,)))
    outputs = (
        COUNT,
        Tensor("points_a_xy", "FP32", (-1, 2)),
        Tensor("points_b_xy", "FP32", (-1, 2)),
        Tensor("similarity", "FP32", (-1,)),
        CONFIDENCE,
    )

    def read(self, request: Request) -> list[tuple[ImageFile, ImageFile]]:
        a, b = self._images(request, "image_a"), self._images(request, "image_b")
        if len(a) != len(b):
            raise InputError(f"image_a has {len(a)} images and image_b {len(b)}: expected as many")
        return list(zip(a, b, strict=True))

    def run(self, items: Sequence[tuple[ImageFile, ImageFile]]) -> list[Outcome]:
        if self._engine.kernels == Kernels.DEVICE:  # where a pair goes from the files to its points on the device
            size = self._options.load_size
            return [attempt(self._match, a, b, load_size=size) for a, b in items]
        features = self._encode([image for pair in items for image in pair], load_size=self._options.load_size)
        return [attempt(self._match, a, b) for a, b in zip(features[::2], features[1::2], strict=True)]

    def _match(self, *pair: Any, **loading: Any) -> Outputs:
        for item in pair:
            if isinstance(item, FacetrtError):
                raise item
        found = self._engine.match(*pair, num_pairs=self._options.num_pairs, **loading)
        return {
            "count": np.array([len(found)], np.int32),
            "points_a_xy": found.points_a_xy.astype(np.float32),
            "points_b_xy": found.points_b_xy.astype(np.float32),
            "similarity": found.similarity[found.selected],
            "confidence": np.array([found.confidence], np.float32),
        }


class CosegmentTask(ServedTask[list[ImageFile]]):
    """What the images of one request share, as ``Engine.cosegment`` finds it: the request is one item."""

    name = TaskName.COSEGMENT
    inputs = (Tensor("image", "BYTES", (-1, 1)),)
    outputs = (Tensor("mask", "BYTES", (-1, 1)), Tensor("confidence", "FP32", (-1, 1)))
    batches = False

    def read(self, request: Request) -> list[list[ImageFile]]:
        return [self._images(request)]

    def run(self, items: Sequence[list[ImageFile]]) -> list[Outcome]:
        return [attempt(self._cosegment, images) for images in items]

    def respond(self, outcomes: Sequence[Outcome]) -> dict[str, NDArray[Any]]:
        """The outputs of the one item, which have an image in each row by now."""
        return {name: values[0] for name, values in super().respond(outcomes).items()}

    def _cosegment(self, images: list[ImageFile]) -> Outputs:
        options = self._options
        masks = self._engine.cosegment(images, load_size=options.load_size, refine=options.refine)
        found = [mask_outputs(mask, options.masks) for mask in masks]
        return {name: np.stack([each[name] for each in found]) for name in found[0]}


class ApplyTask(ServedTask[ImageFile]):
    """What a learned model finds in each image, as ``Engine.apply`` does: a mask, or labels of parts."""

    name = TaskName.APPLY
    inputs = (IMAGE,)
    outputs = (Tensor("mask", "BYTES", (1,)), CONFIDENCE)

    def __init__(self, engine: Engine, options: TaskOptions) -> None:
        super().__init__(engine, options)
        if options.learned is None:
            raise InputError("apply needs a model: from --save-model of cosegment or parts")
        self._model: SegmentationModel | PartsModel = load_model(options.learned)
        engine.check_model(self._model)

    def read(self, request: Request) -> list[ImageFile]:
        return self._images(request)

    def run(self, items: Sequence[ImageFile]) -> list[Outcome]:
        found = self._encode(items, load_size=self._model.load_size, stride=self._model.stride)
        return [attempt(self._apply, features) for features in found]

    def _apply(self, features: Features | FacetrtError) -> Outputs:
        if isinstance(features, FacetrtError):
            raise features
        found: Mask | PartMap = self._engine.apply(self._model, features, refine=self._options.refine)
        return mask_outputs(found, self._options.masks)


class DiscoverTask(ServedTask[ImageFile]):
    """The objects of each image, as ``Engine.discover`` finds them."""

    name = TaskName.DISCOVER
    inputs = (IMAGE,)
    outputs = (
        COUNT,
        Tensor("boxes", "FP32", (-1, 4)),
        Tensor("scores", "FP32", (-1,)),
        Tensor("masks", "BYTES", (-1,)),
    )

    def __init__(self, engine: Engine, options: TaskOptions) -> None:
        super().__init__(engine, options)
        self._method = engine.discovery(options.method, refine=options.refine).method  # which checks both now

    def read(self, request: Request) -> list[ImageFile]:
        return self._images(request)

    def run(self, items: Sequence[ImageFile]) -> list[Outcome]:
        options: dict[str, Any] = {"load_size": self._options.load_size, "refine": self._options.refine}
        found = each_or_error(items, partial(self._engine.discover, items, self._method, **options))
        return [each if isinstance(each, FacetrtError) else self._outputs(each) for each in found]

    def _outputs(self, found: Objects) -> Outputs:
        scores = np.full(len(found), np.nan) if found.scores is None else found.scores
        return {
            "count": np.array([len(found)], np.int32),
            "boxes": found.boxes.astype(np.float32),
            "scores": scores.astype(np.float32),
            "masks": as_bytes([mask_bytes(mask, self._options.masks) for mask in found.masks]),
        }


@dataclass
class _Video:
    """One video that is followed."""

    tracker: Tracker
    lock: Lock = field(default_factory=Lock)
    used: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class TrackedFrame:
    """A frame of a video, and the points to follow from it on if it is the first."""

    image: ImageFile
    video: str
    starts: bool
    ends: bool
    points: NDArray[np.float64] | int


class TrackTask(ServedTask[TrackedFrame]):
    """Points through the frames of a video, which come one by one as a sequence, as ``Engine.tracker`` follows them.

    The first request has ``sequence_start``, all have one ``sequence_id``, and the last has ``sequence_end``.
    """

    name = TaskName.TRACK
    inputs = (IMAGE, Tensor("points_xy", "FP32", (-1, 2), optional=True))
    outputs = (
        Tensor("tracked_xy", "FP32", (-1, 2)),
        Tensor("visible", "BOOL", (-1,)),
        Tensor("confidence", "FP32", (-1,)),
    )
    batches = False

    CHOSEN = 20  # points, where none are given

    def __init__(self, engine: Engine, options: TaskOptions) -> None:
        super().__init__(engine, options)
        self._videos: dict[str, _Video] = {}
        self._lock = Lock()

    def read(self, request: Request) -> list[TrackedFrame]:
        images, parameters = self._images(request), request.parameters
        if len(images) != 1:
            raise InputError(f"image has {len(images)} frames: expected one in each request of a sequence")
        if not parameters.get("sequence_id"):
            raise InputError("the request has no sequence_id: expected one for all frames of a video")
        points: NDArray[np.float64] | int = self.CHOSEN
        if "points_xy" in request.tensors:
            points = np.asarray(request.tensors["points_xy"], np.float64).reshape(-1, 2)
        video, starts, ends = (parameters.get(name, False) for name in SEQUENCE)
        return [TrackedFrame(images[0], str(video), bool(starts), bool(ends), points)]

    def run(self, items: Sequence[TrackedFrame]) -> list[Outcome]:
        return [attempt(self._follow, frame) for frame in items]

    def _follow(self, frame: TrackedFrame) -> Outputs:
        video = self._video(frame)
        with video.lock:
            (features,) = self._encode([frame.image], load_size=self._options.load_size)
            if isinstance(features, FacetrtError):
                raise features
            follow = video.tracker.following(frame.points) if frame.starts else video.tracker.step
            tracks: Tracks = follow(features)
            video.used = time.monotonic()
        if frame.ends:
            self.forget(frame.video)
        return {
            "tracked_xy": tracks.points_xy.astype(np.float32),
            "visible": tracks.visible,
            "confidence": tracks.confidence,
        }

    def _video(self, frame: TrackedFrame) -> _Video:
        with self._lock:
            self._give_up(time.monotonic() - self._options.idle_seconds)
            if frame.starts:
                if frame.video not in self._videos and len(self._videos) >= self._options.max_sequences:
                    raise InputError(
                        f"{len(self._videos)} videos are followed already: end one with sequence_end, or try later"
                    )
                self._videos[frame.video] = _Video(self._engine.tracker())
            if frame.video not in self._videos:
                raise InputError(
                    f"sequence {frame.video} was not started, has ended, or was idle for "
                    f"{self._options.idle_seconds:g} s: start it with sequence_start"
                )
            return self._videos[frame.video]

    def _give_up(self, before: float) -> None:
        for name in [name for name, video in self._videos.items() if video.used < before]:
            del self._videos[name]

    def forget(self, video: str) -> None:
        """Let go of what is kept for a video."""
        with self._lock:
            self._videos.pop(video, None)


TASKS: dict[TaskName, type[ServedTask[Any]]] = {
    task.name: task for task in (MatchTask, CosegmentTask, ApplyTask, DiscoverTask, TrackTask)
}


def make_tasks(engine: Engine, options: TaskOptions) -> dict[str, ServedTask[Any]]:
    """The tasks that were asked for, by name.

    Raises:
        InputError: one that this bundle cannot do, a method that does not exist, a model of another encoder.
    """
    return {name: TASKS[name](engine, options) for name in options.tasks}


def mask_outputs(found: Mask | PartMap, how: MaskFormat) -> Outputs:
    """``mask`` and ``confidence`` of one image; an unknown confidence is NaN."""
    data = mask_bytes(found.mask, how) if isinstance(found, Mask) else label_bytes(found.labels, how)
    confidence = np.nan if found.confidence is None else found.confidence
    return {"mask": as_bytes([data]), "confidence": np.array([confidence], np.float32)}


def each_or_error(images: Sequence[Any], work: Callable[..., Iterable[Result]]) -> list[Result | FacetrtError]:
    """What ``work`` finds of each image, or why nothing is found of it.

    Args:
        images: objects that are all different, as errors are told apart by them.
        work: takes ``on_broken``, as ``Engine.encode`` does, and leaves broken images out.
    """
    broken: dict[int, FacetrtError] = {}
    found = iter(work(on_broken=lambda image, error: broken.update({id(image): error})))
    return [broken[id(image)] if id(image) in broken else next(found) for image in images]


def attempt(work: Callable[..., Outputs], *item: Any, **options: Any) -> Outcome:
    """What comes of an item, or the error that is its own."""
    try:
        return work(*item, **options)
    except FacetrtError as error:
        return error
