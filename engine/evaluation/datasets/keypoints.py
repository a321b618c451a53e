"""Readers of data sets of image pairs with corresponding keypoints: PF-WILLOW and SPair-71k.

Layouts, as the data sets are distributed:

* PF-WILLOW: ``SUBCLASS/NAME.png`` with ``SUBCLASS/NAME.mat``, whose ``pts_coord (2, n)`` holds x and y, counted from 1.
  The keypoints of a sub-class come in one order. The folder above (with ``PF-dataset/`` in it) is taken as well.
* SPair-71k: ``JPEGImages/CATEGORY/NAME.jpg``, ``PairAnnotation/test/*.json`` (``ImageAnnotation`` and ``Layout`` are
  part of the data set but hold nothing that the pair files lack).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.evaluation.datasets.reading import (
    first_of,
    image_size,
    list_folders,
    list_images,
    member,
    read_mat,
    require,
)
from facetrt.engine.files import read_object
from facetrt.engine.images.finding import visible_files
from facetrt.kernels.errors import InputError, MissingFileError, reading

Points = NDArray[np.float64]

PAIR_FILE = "a pair annotation of SPair-71k"

OUTSIDE = 0.1  # a keypoint this share of the image beyond its border says that image and annotation do not match


@dataclass(frozen=True)
class KeypointPair:
    """Two images and the keypoints that both show.

    ``source_xy``, ``target_xy (n, 2)`` float64: pixel indices counted from 0; sizes are ``(height, width)``.
    """

    key: str
    category: str
    source: Path
    target: Path
    source_xy: Points
    target_xy: Points
    source_size: tuple[int, int]
    target_size: tuple[int, int]


@dataclass(frozen=True)
class _Annotated:
    path: Path
    points_xy: Points
    size: tuple[int, int]


def read_pf_willow(root: Path, limit: int | None = None) -> list[KeypointPair]:
    """All ordered pairs inside each sub-class; at most the first ``limit`` per sub-class.

    Raises:
        MissingFileError, InputError: not PF-WILLOW, a missing or odd annotation.
    """
    require(root, "PF-WILLOW", "its sub-class folders")
    folder = root / "PF-dataset" if (root / "PF-dataset").is_dir() else root
    pairs = []
    for subclass in list_folders(folder):
        if not any(subclass.glob("*.mat")):
            continue
        pairs += list(_ordered_pairs(subclass.name, [_read_willow(path) for path in list_images(subclass)]))[:limit]
    if not pairs:
        raise MissingFileError(
            f"{folder} is not PF-WILLOW: expected SUBCLASS/NAME.png with SUBCLASS/NAME.mat, for example car(G)/…"
        )
    return pairs


def _read_willow(path: Path) -> _Annotated:
    annotation = require(path.with_suffix(".mat"), "PF-WILLOW", "the keypoints of an image")
    points = read_mat(annotation, "pts_coord")
    if points.ndim != 2 or points.shape[0] != 2:
        raise InputError(f"{annotation}: pts_coord has shape {points.shape}: expected (2, n), x above y")
    size = image_size(path)
    return _Annotated(path, _inside(points.T - 1, size, path), size)  # MATLAB counts from 1


def _ordered_pairs(category: str, images: list[_Annotated]) -> Iterator[KeypointPair]:
    for source in images:
        for target in images:
            if source is target:
                continue
            if source.points_xy.shape != target.points_xy.shape:
                raise InputError(
                    f"{source.path.name} has {len(source.points_xy)} keypoints and {target.path.name} "
                    f"{len(target.points_xy)}: expected the same ones in every image of {category}"
                )
            yield _pair(f"{category}/{source.path.stem}:{target.path.stem}", category, source, target)


def _pair(key: str, category: str, source: _Annotated, target: _Annotated) -> KeypointPair:
    return KeypointPair(
        key,
        category,
        source.path,
        target.path,
        source.points_xy,
        target.points_xy,
        source.size,
        target.size,
    )


def read_spair(root: Path, *, split: str, pairs_per_category: int | None, seed: int) -> list[KeypointPair]:
    """Pairs of a split of SPair-71k, drawn per category without replacement; all if ``pairs_per_category`` is None.

    The draw depends on the seed, the category's name and its sorted list of pairs alone.

    Raises:
        MissingFileError, InputError: not SPair-71k, or images that differ from their annotation.
    """
    root = first_of(root, ["SPair-71k", "."], "SPair-71k", "PairAnnotation/ and JPEGImages/")
    require(root / "JPEGImages", "SPair-71k", "the images")
    folder = require(root / "PairAnnotation" / split, "SPair-71k", "one JSON file per image pair")
    by_category: dict[str, list[Path]] = {}
    for path in (path for path in visible_files(folder) if path.suffix == ".json"):
        category = (
            path.stem.rpartition(":")[2] if ":" in path.stem else _text(read_object(path, PAIR_FILE), "category", path)
        )
        by_category.setdefault(category, []).append(path)
    if not by_category:
        raise MissingFileError(f"{folder} holds no pair: SPair-71k has files like 000001-NAME-NAME:CATEGORY.json there")
    chosen = [
        path
        for category in sorted(by_category)
        for path in _draw(category, by_category[category], pairs_per_category, seed)
    ]
    return [_read_spair_pair(root, path) for path in chosen]


def _draw(category: str, paths: list[Path], count: int | None, seed: int) -> list[Path]:
    if count is None or count >= len(paths):
        return paths
    return sorted(random.Random(f"{seed}/{category}").sample(paths, count))


def _read_spair_pair(root: Path, path: Path) -> KeypointPair:
    data = read_object(path, PAIR_FILE)
    category = _text(data, "category", path)
    source, target = (_read_spair_side(root, path, data, category, side) for side in ("src", "trg"))
    if source.points_xy.shape != target.points_xy.shape:
        raise InputError(f"{path}: {len(source.points_xy)} source and {len(target.points_xy)} target keypoints")
    return _pair(path.stem, category, source, target)


def _read_spair_side(root: Path, path: Path, data: dict[str, Any], category: str, side: str) -> _Annotated:
    image = member(root / "JPEGImages", f"{category}/{_text(data, f'{side}_imname', path)}", path)
    size = image_size(image)
    with reading(path, PAIR_FILE):
        width, height = (int(v) for v in _field(data, f"{side}_imsize", path)[:2])
        points = np.array(_field(data, f"{side}_kps", path), np.float64).reshape(-1, 2)
    if size != (height, width):
        raise InputError(
            f"{image} has {size[1]}×{size[0]} pixels (width × height), its annotation {path.name} {width}×{height}: "
            "they do not belong together"
        )
    return _Annotated(image, _inside(points, size, image), size)


def _text(data: dict[str, Any], name: str, path: Path) -> str:
    value = _field(data, name, path)
    if not isinstance(value, str):
        raise InputError(f"{path}: field {name!r} is {value!r:.60}: expected a text")
    return value


def _field(data: dict[str, Any], name: str, path: Path) -> Any:
    if name not in data:
        raise InputError(f"{path} has no field {name!r}: expected a pair annotation of SPair-71k")
    return data[name]


def _inside(points_xy: Points, size: tuple[int, int], path: Path) -> Points:
    limits = np.array(size[::-1])
    if not np.isfinite(points_xy).all() or (np.abs(points_xy / limits - 0.5) > 0.5 + OUTSIDE).any():
        worst = points_xy[np.abs(points_xy / limits - 0.5).max(axis=1).argmax()]
        raise InputError(
            f"{path} has {size[1]}×{size[0]} pixels (width × height), but a keypoint lies at ({worst[0]:g}, "
            f"{worst[1]:g}): image and annotation do not belong together"
        )
    return points_xy
