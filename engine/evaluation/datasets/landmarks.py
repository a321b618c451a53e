"""Readers of data sets of single images with landmarks: CUB-200-2011 and CelebA with MAFL's lists.

Layouts, as the data sets are distributed:

* CUB-200-2011: ``images.txt``, ``train_test_split.txt``, ``bounding_boxes.txt``, ``parts/part_locs.txt``, ``images/``.
  The folder above (with ``CUB_200_2011/`` in it) is taken as well.
* CelebA: ``Anno/list_landmarks_celeba.txt`` and ``Anno/list_bbox_celeba.txt`` for the in-the-wild images in
  ``Img/img_celeba/`` or ``img_celeba/``, and MAFL's ``training.txt`` and ``testing.txt`` in ``MAFL/``; the text files
  may also lie in the folder itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.evaluation.datasets.reading import first_of, image_size, member, numbers, read_rows, require
from facetrt.kernels.errors import InputError

T = TypeVar("T")

CUB = "CUB-200-2011"
CELEBA = "CelebA"
CUB_CATEGORIES = ("001", "002", "003")  # those that the paper reports
CUB_LANDMARKS = 15
PARTS = frozenset(map(str, range(1, CUB_LANDMARKS + 1)))
CELEBA_LANDMARKS = 5
SMALLEST_FACE = 0.3  # share of the image that a face's box must cover


@dataclass(frozen=True)
class LandmarkImage:
    """An image with landmarks in its own pixels.

    ``points_xy (n, 2)`` float64, meaningless where not ``visible (n,)``; ``box_wh`` is the annotated box's size.
    """

    path: Path
    size: tuple[int, int]
    points_xy: NDArray[np.float64]
    visible: NDArray[np.bool_]
    box_wh: tuple[float, float]


@dataclass(frozen=True)
class LandmarkSet:
    """Images to fit a regression on and images to score it on."""

    name: str
    train: list[LandmarkImage]
    test: list[LandmarkImage]


def read_cub(root: Path, limit: int | None = None) -> list[LandmarkSet]:
    """Categories 001, 002 and 003, each split by the data set's own list.

    Raises:
        MissingFileError, InputError: not CUB-200-2011, or lists that do not fit together.
    """
    root = first_of(root, ["CUB_200_2011/images.txt", "images.txt"], CUB, "its list of images").parent
    files = _table(root / "images.txt", 2, "its list of images")
    training = _table(root / "train_test_split.txt", 2, "the split (1 is training)")
    boxes = _table(root / "bounding_boxes.txt", 5, "a box per image")
    points = _cub_points(root / "parts" / "part_locs.txt")
    sets = []
    for category in CUB_CATEGORIES:
        wanted = [number for number, row in files.items() if row[0].startswith(f"{category}.")]
        if not wanted:
            raise InputError(f"{root / 'images.txt'} lists no image of category {category}: expected {category}.NAME/…")
        sides: dict[bool, list[LandmarkImage]] = {True: [], False: []}
        for number in wanted:
            in_training = _of(training, number, root / "train_test_split.txt")[0] == "1"
            if limit is None or len(sides[in_training]) < limit:
                box = numbers(_of(boxes, number, root / "bounding_boxes.txt"), root / "bounding_boxes.txt")
                located = _of(points, number, root / "parts" / "part_locs.txt")
                sides[in_training].append(
                    _cub_image(member(root / "images", files[number][0], root / "images.txt"), located, box)
                )
        sets.append(LandmarkSet(category, sides[True], sides[False]))
    return _checked(sets)


def _table(path: Path, columns: int, what: str) -> dict[str, list[str]]:
    """Rows by their first column."""
    return {row[0]: row[1:] for row in read_rows(require(path, CUB, what), columns)}


def _cub_points(path: Path) -> dict[str, NDArray[np.float64]]:
    """``(15, 3)`` x, y, visible of each image number."""
    rows = read_rows(require(path, CUB, "the landmarks"), 5)
    found: dict[str, NDArray[np.float64]] = {}
    for image, part, *values in rows:
        table = found.setdefault(image, np.zeros((CUB_LANDMARKS, 3)))
        if part not in PARTS:
            raise InputError(f"{path}: image {image} has a part {part}: expected 1 to {CUB_LANDMARKS}")
        table[int(part) - 1] = numbers(values, path)
    return found


def _cub_image(path: Path, located: NDArray[np.float64], box: list[float]) -> LandmarkImage:
    size = image_size(path)
    _check_box(path, size, box)
    return LandmarkImage(path, size, located[:, :2], located[:, 2] > 0, (box[2], box[3]))


def read_celeba(root: Path, limit: int | None = None) -> list[LandmarkSet]:
    """MAFL's training and test faces whose box covers at least 30 % of the in-the-wild image; one set.

    Raises:
        MissingFileError, InputError: not CelebA with MAFL, or lists that do not fit together.
    """
    require(root, CELEBA, "images and lists")
    folder = first_of(root, ["Img/img_celeba", "img_celeba"], CELEBA, "in-the-wild images")
    landmarks = _celeba_table(root, "list_landmarks_celeba.txt", 2 * CELEBA_LANDMARKS)
    boxes = _celeba_table(root, "list_bbox_celeba.txt", 4)
    sides = []
    for name in ("training.txt", "testing.txt"):
        path = first_of(root, [f"MAFL/{name}", name], CELEBA, "MAFL's list of images")
        faces: list[LandmarkImage] = []
        for (image,) in read_rows(path, 1):
            if limit is not None and len(faces) == limit:
                break
            face = _celeba_image(member(folder, image, path), _of(landmarks, image, path), _of(boxes, image, path))
            if face.box_wh[0] * face.box_wh[1] >= SMALLEST_FACE * face.size[0] * face.size[1]:
                faces.append(face)
        sides.append(faces)
    return _checked([LandmarkSet("CelebA", *sides)])


def _celeba_table(root: Path, name: str, columns: int) -> dict[str, list[float]]:
    """Numbers of each image; two header lines (the count and the columns' names) are left out."""
    path = first_of(root, [f"Anno/{name}", name], CELEBA, "its annotations")
    return {row[0]: numbers(row[1:], path) for row in read_rows(path, 1 + columns, skip=2)}


def _celeba_image(path: Path, points: list[float], box: list[float]) -> LandmarkImage:
    size = image_size(path)
    _check_box(path, size, box)
    located = np.array(points).reshape(-1, 2)
    return LandmarkImage(path, size, located, np.ones(len(located), np.bool_), (box[2], box[3]))


def _check_box(path: Path, size: tuple[int, int], box: list[float]) -> None:
    """A box ``x, y, width, height`` that reaches far beyond the image shows that the two do not belong together."""
    height, width = size
    if box[0] + box[2] > 1.1 * width or box[1] + box[3] > 1.1 * height:
        raise InputError(
            f"{path} has {width}×{height} pixels (width × height), but its annotated box reaches to "
            f"({box[0] + box[2]:g}, {box[1] + box[3]:g}): image and annotation do not belong together"
        )


def _of(table: Mapping[str, T], key: str, path: Path) -> T:
    if key not in table:
        raise InputError(f"{path}: image {key} has no entry in the annotations: expected one for every listed image")
    return table[key]


def _checked(sets: list[LandmarkSet]) -> list[LandmarkSet]:
    for found in sets:
        if len(found.train) < 2 or not found.test:
            raise InputError(
                f"{found.name}: {len(found.train)} training and {len(found.test)} test images, expected at least "
                "2 and 1"
            )
    return sets
