"""Reader of DAVIS: ``JPEGImages/480p/SEQUENCE/*.jpg``, ``Annotations/480p/SEQUENCE/*.png``, ``ImageSets/2017/val.txt``.

The list is optional; without it all sequences are taken. Annotations are label images: palette indices or grey values.
255 is void, which the official scorer counts as background, except where an annotation has no other label: then it is
DAVIS-2016's single object.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facetrt.engine.evaluation.datasets.reading import image_size, list_folders, list_images, member, read_rows, require
from facetrt.engine.images.label_images import VOID, Labels, read_labels
from facetrt.kernels.errors import InputError, MissingFileError

DAVIS = "DAVIS"
RESOLUTION = "480p"


@dataclass(frozen=True)
class Video:
    """Frames and the label image of each; ``binary`` where 255 is the object and not void."""

    name: str
    frames: list[Path]
    annotations: list[Path]
    binary: bool

    def labels(self, index: int) -> Labels:
        """Labels of a frame, ``(H, W)``: 0 background, 1, 2, … objects.

        Raises:
            InputError: the annotation's size is not the frame's.
        """
        labels = read_labels(self.annotations[index])
        size = image_size(self.frames[index])
        if labels.shape != size:
            raise InputError(
                f"{self.annotations[index]} has {labels.shape[1]}×{labels.shape[0]} pixels and its frame "
                f"{size[1]}×{size[0]} (width × height): image and annotation must have one size"
            )
        return np.where(labels == VOID, int(self.binary), labels)


def read_davis(root: Path, split: str, limit: int | None = None) -> tuple[list[Video], bool]:
    """The sequences of a split, and whether ``ImageSets/2017/SPLIT.txt`` named them (else all are taken).

    Raises:
        MissingFileError: not DAVIS, a sequence of the list that is not there, a frame without annotation.
    """
    frames = require(root / "JPEGImages" / RESOLUTION, DAVIS, "one folder of frames per sequence")
    annotations = require(root / "Annotations" / RESOLUTION, DAVIS, "one folder of label images per sequence")
    listed = root / "ImageSets" / "2017" / f"{split}.txt"
    names = [row[0] for row in read_rows(listed, 1)] if listed.is_file() else [f.name for f in list_folders(frames)]
    if not names:
        raise MissingFileError(f"{frames} holds no sequence: expected folders of frames like car-shadow/00000.jpg")
    return [
        _read_video(member(frames, name, listed), member(annotations, name, listed)) for name in names[:limit]
    ], listed.is_file()


def _read_video(frames: Path, annotations: Path) -> Video:
    images = list_images(require(frames, DAVIS, "a sequence's frames"))
    require(annotations, DAVIS, "a sequence's label images")
    labels = [annotations / f"{path.stem}.png" for path in images]
    missing = [path for path in labels if not path.is_file()]
    if missing:
        raise MissingFileError(f"{missing[0]} is missing: scoring needs the label image of every frame")
    if len(images) < 3:
        raise InputError(f"{frames} holds {len(images)} frames: expected at least 3, as the ends are not scored")
    return Video(frames.name, images, labels, _is_binary(labels[0]))


def _is_binary(annotation: Path) -> bool:
    return set(np.unique(read_labels(annotation))) <= {0, VOID}
