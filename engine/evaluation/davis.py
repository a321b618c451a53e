"""Label propagation through DAVIS-2017, scored by J and F. Source: specification §14.4 (the DINO repository)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import cv2
import numpy as np
from PIL import Image

from facetrt.engine.drawing import results as draw
from facetrt.engine.drawing.results import palette
from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.comparison import resize_labels, write_comparison
from facetrt.engine.evaluation.datasets.reading import digest
from facetrt.engine.evaluation.datasets.videos import Video, read_davis
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
from facetrt.engine.evaluation.scores import boundary_similarity, mean_of, region_similarity
from facetrt.engine.features.features import Features
from facetrt.engine.images.label_images import Labels
from facetrt.engine.images.loading import Pixels, load_image
from facetrt.engine.settings import Setting, values_of
from facetrt.engine.video.propagation import MaskPropagator, PropagateOptions
from facetrt.kernels.errors import InputError, OutputError

METRICS = ["J&F", "J", "F"]
MULTIPLE = 64  # of pixels, that the longer side is truncated to


@dataclass(frozen=True)
class DavisOptions(PropagateOptions, Options):
    """Options of label propagation; defaults are the DINO repository's. ``limit`` counts sequences."""

    load_size: Annotated[
        int,
        Setting(
            "Length of the shorter side.",
            minimum=MULTIPLE,
            expected=f"a shorter side of at least {MULTIPLE} pixels",
        ),
    ] = 480
    stride: Annotated[int | None, Setting("Pixels between cells; the patch size by default.", minimum=1)] = None
    split: Annotated[str, Setting("Of the data set.")] = "val"


class Davis(Evaluation):
    """J&F of one-shot label propagation; an item is a sequence."""

    name = "davis2017"
    task: ClassVar[str] = "propagate"
    category_word: ClassVar[str] = "objects"

    def __init__(self, root: Path, options: DavisOptions) -> None:
        self.options: DavisOptions = options
        self.root = root
        videos, self.listed = read_davis(root, options.split, options.limit)
        self.videos = {video.name: video for video in videos}

    @property
    def keys(self) -> list[str]:
        return list(self.videos)

    def steps(self, key: str) -> int:
        return len(self.videos[key].frames)

    def facts(self) -> dict[str, Any]:
        videos = self.videos.values()
        list_file = f"ImageSets/2017/{self.options.split}.txt"
        return {
            "data_set": "DAVIS-2017",
            "sequences": {video.name: len(video.frames) for video in videos},
            "sequences_from": list_file if self.listed else f"all folders ({list_file} is absent)",
            "binary_annotations": [video.name for video in videos if video.binary],
            "digest": digest(self.root, [path for video in videos for path in (*video.frames, *video.annotations)]),
        }

    def choices(self) -> list[Choice]:
        side = self.options.load_size
        return [
            Choice("frame size", f"shorter side {side}, longer truncated to a multiple of {MULTIPLE}; OpenCV bilinear"),
            Choice("resized frames", "rounded to 8 bits by OpenCV, as the encoder takes bytes (the protocol: float)"),
            Choice(
                "normalisation", "the bundle's; the protocol's red standard deviation .228 instead of .229 is not used"
            ),
            Choice("grid", f"at stride {self.options.stride or '= patch, the protocol'}; Amir et al.: 4"),
            Choice("first annotation → grid", "nearest neighbour (Pillow's rule) from the full-size annotation"),
            Choice("neighbourhood", f"±{self.options.radius} cells (12 keeps the cells; 24 the pixels at stride 4)"),
            Choice(
                "soft labels → frame", "bilinear with half-pixel centres to the resized frame (the protocol: by patch)"
            ),
            Choice("a label that fills the frame", "wins everywhere; the protocol's scaling divides by zero there"),
            Choice(
                "an annotation whose only label is 255", "object 1, as in DAVIS-2016; beside other labels it is void"
            ),
            Choice("void (255) pixels", "background, as in the official semi-supervised scorer"),
            Choice("objects", "those of the first frame; frames 1 … T-2 are scored"),
        ]

    def run(self, engine: Engine | None, todo: Sequence[str], out: Path, tick: Tick) -> Iterator[tuple[str, Record]]:
        for key in todo:
            video = self.videos[key]
            first = video.labels(0)
            if not first.any():
                raise InputError(f"{video.annotations[0]} shows no object: expected labels 1, 2, … in the first frame")
            scores: dict[str, list[dict[str, list[float]]]] = {"static": []}
            for index, predicted in self._predict(engine, video, first):
                tick(1)
                if engine is not None:
                    _save(out / key / f"{video.frames[index].stem}.png", predicted)
                    _compare(out / key, video, index, predicted)
                if 0 < index < len(video.frames) - 1:
                    annotated = video.labels(index)
                    scores["static"].append(_score(first, annotated, first))
                    if engine is not None:
                        scores.setdefault("propagated", []).append(_score(predicted, annotated, first))
            yield key, {"category": key} | {name: _per_object(frames) for name, frames in scores.items()}

    def _predict(self, engine: Engine | None, video: Video, first: Labels) -> Iterator[tuple[int, Labels]]:
        """Index and labels ``(H, W)`` of every frame; the first frame's throughout without an engine."""
        if engine is None:
            yield from ((index, first) for index in range(len(video.frames)))
            return
        yield from enumerate(propagate_video(engine, video, first, self.facet, self.options))

    def summarise(self, records: Mapping[str, Record]) -> Summary:
        groups = by_category(records)
        rows = {
            method: [
                Row(f"{name}/{number}", _figures(per_object))
                for name, group in groups.items()
                for number, per_object in enumerate(group[0].get(method, []), start=1)
            ]
            for method in ("propagated", "static")
        }
        return Summary(
            metrics=METRICS,
            overall=mean_row("this run", rows["propagated"], METRICS) if rows["propagated"] else None,
            baselines=[mean_row("first mask throughout (trivial)", rows["static"], METRICS)],
            categories=rows["propagated"] or rows["static"],
            counts={"sequences": len(records), "objects": len(rows["static"])},
        )


def propagate_video(engine: Engine, video: Video, first: Labels, facet: str, options: DavisOptions) -> Iterator[Labels]:
    """Labels of every frame at its own size, the first as given; one frame is held beside the context."""
    propagator = MaskPropagator(facet, **values_of(options, PropagateOptions, without=["facet"]))
    for index, path in enumerate(video.frames):
        features = _encode_frame(engine, path, options)
        if index == 0:
            propagator.start(features, first)
            yield first
        else:
            yield propagator.step(features)


def _encode_frame(engine: Engine, path: Path, options: DavisOptions) -> Features:
    """Features of a frame resized as the protocol says, which are told its original size."""
    frame = load_image(path)
    pixels = resize_frame(frame.pixels, frame_size(frame.original_size, options.load_size))
    stride = options.stride or engine.manifest.architecture.patch
    features = engine.encode([pixels], load_size=None, stride=stride)[0]
    return replace(features, geometry=replace(features.geometry, original_size=frame.original_size), name=frame.name)


def frame_size(original: tuple[int, int], side: int) -> tuple[int, int]:
    """``(height, width)`` of a resized frame: the shorter side exact, the longer truncated to a multiple of 64."""
    height, width = original
    if height > width:
        return side * height // width // MULTIPLE * MULTIPLE, side
    return side, side * width // height // MULTIPLE * MULTIPLE


def resize_frame(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """OpenCV's bilinear resizing (no antialiasing) to ``(height, width)``, rounded to bytes."""
    return np.asarray(cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)


def _score(predicted: Labels, annotated: Labels, first: Labels) -> dict[str, list[float]]:
    """J and F of each object of the first frame."""
    objects = range(1, int(first.max(initial=0)) + 1)
    return {
        "J": [region_similarity(predicted == number, annotated == number) for number in objects],
        "F": [boundary_similarity(predicted == number, annotated == number) for number in objects],
    }


def _per_object(frames: list[dict[str, list[float]]]) -> list[dict[str, list[float]]]:
    """Turn figures per frame and object into figures per object and frame."""
    return [
        {metric: [frame[metric][number] for frame in frames] for metric in ("J", "F")}
        for number in range(len(frames[0]["J"]))
    ]


def _figures(per_object: Mapping[str, list[float]]) -> dict[str, float | None]:
    j, f = mean_of(per_object["J"]), mean_of(per_object["F"])
    return {"J&F": None if j is None or f is None else (j + f) / 2, "J": j, "F": f}


def _compare(out: Path, video: Video, index: int, predicted: Labels) -> None:
    """The frame beside its annotation and the prediction, objects in colour."""
    frame = draw.scaled(load_image(video.frames[index]).pixels, draw.COMPARED)
    shown = (resize_labels(labels, frame.shape[:2]).astype(np.int16) - 1 for labels in (video.labels(index), predicted))
    write_comparison(out, video.frames[index].stem, frame, *(draw.part_overlay(frame, labels) for labels in shown))


def _save(path: Path, labels: Labels) -> None:
    """A palette PNG whose indices are the labels, as the official scorer reads them."""
    image = Image.fromarray(labels.astype(np.uint8))
    colours = np.vstack([[[0, 0, 0]], palette(255)]).astype(np.uint8)
    image.putpalette(colours.tobytes())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
