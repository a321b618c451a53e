"""Reader of points that are annotated in every frame of a video: TAP-Vid's arrays, one ``NAME.npz`` for each video.

* ``points (N, T, 2)``: x and y as shares of the frame's width and height; (0, 0) is its upper left corner.
* ``occluded (N, T)`` bool: what ``points`` says there means nothing.
* ``video (T, H, W, 3)`` uint8, or instead of it DAVIS's own frames in ``JPEGImages/480p/NAME``.

TAP-Vid is distributed as a pickle, and to read one is to run what its author put in; facetrt reads none. A file is read
as :mod:`facetrt.engine.tasks.model_files` reads its own, but may be compressed and large.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.evaluation.datasets.reading import image_size, list_images, require
from facetrt.engine.evaluation.datasets.videos import RESOLUTION
from facetrt.engine.images.finding import natural_order
from facetrt.engine.images.loading import Pixels
from facetrt.engine.tasks.model_files import MAX_MEMBERS, read_header
from facetrt.kernels.errors import InputError, MissingFileError, reading

TAPVID = "TAP-Vid-DAVIS"
WHAT = "an NPZ file of annotated points"
MAX_POINT_BYTES = 64 << 20  # of one array; the largest of TAP-Vid-DAVIS has 0.1 MB
MAX_VIDEO_BYTES = 2 << 30  # of a whole video; 104 frames of 480p have 128 MB
FURTHEST = 0.5  # of the frame's side that a visible point may lie outside; pixels lie further


@dataclass(frozen=True)
class PointVideo:
    """A video and its points.

    Attributes:
        annotation: the file of the points.
        frames: the frames' files; None where ``annotation`` holds the frames.
        size: ``(height, width)`` of a frame.
        points_xy: ``(N, T, 2)`` float64, pixels of a frame, meaningless where not ``visible (N, T)``.
    """

    name: str
    annotation: Path
    frames: list[Path] | None
    size: tuple[int, int]
    points_xy: NDArray[np.float64] = field(repr=False)
    visible: NDArray[np.bool_] = field(repr=False)

    def __len__(self) -> int:
        return int(self.visible.shape[1])

    @property
    def files(self) -> list[Path]:
        """All files of the video."""
        return [self.annotation, *(self.frames or [])]

    def pictures(self) -> Sequence[Path | Pixels]:
        """What can be encoded, frame by frame. Frames of the annotation's file are read at once, and held.

        Raises:
            InputError: the file is damaged.
        """
        if self.frames is not None:
            return self.frames
        with _member(self.annotation, "video", MAX_VIDEO_BYTES) as (stream, shape, dtype):
            return list(_numbers(stream, shape, dtype))


def read_point_videos(root: Path, limit: int | None = None) -> list[PointVideo]:
    """The videos of a folder, in natural order.

    Raises:
        MissingFileError: none is there, or a video without frames; a pickle is answered with how to convert it.
        InputError: arrays that do not fit together, or a damaged file.
    """
    files = [path for path in root.glob("*.npz") if not path.name.startswith(".")] if root.is_dir() else []
    if not files:
        raise MissingFileError(_what_is_missing(root))
    return [_read_video(root, path) for path in sorted(files, key=natural_order)[:limit]]


def _what_is_missing(root: Path) -> str:
    pickles = [root] if root.is_file() else sorted(root.glob("*.pkl"))
    if any(path.suffix == ".pkl" for path in pickles):
        return (
            f"{pickles[0]} is a pickle, which can run any code when it is read: facetrt reads none. If you trust it, "
            "write each of its videos with np.savez(NAME.npz, video=…, points=…, occluded=…), by the script in "
            "docs/tasks/evaluate.md, and give the folder of those files"
        )
    return f"{root} holds no NAME.npz: expected one for each video of {TAPVID}, with points, occluded and video"


def _read_video(root: Path, path: Path) -> PointVideo:
    with _member(path, "occluded", MAX_POINT_BYTES) as (stream, shape, dtype):
        if dtype != np.bool_ or len(shape) != 2 or 0 in shape:
            raise InputError(f"{path}: occluded is {dtype} of shape {shape}: expected bool (points, frames)")
        visible = ~_numbers(stream, shape, dtype)
    with _member(path, "points", MAX_POINT_BYTES) as (stream, shape, dtype):
        if dtype.kind != "f" or shape != (*visible.shape, 2):
            raise InputError(f"{path}: points are {dtype} of shape {shape}: expected floats {(*visible.shape, 2)}")
        shares = _numbers(stream, shape, dtype).astype(np.float64)
    if not visible.any():
        raise InputError(f"{path} has no point that is visible in any frame: nothing can be followed")
    off = np.abs(shares[visible] - 0.5).max()
    if not off <= FURTHEST + 0.5:
        raise InputError(f"{path}: a visible point has no place in the frame: expected x and y from 0 to 1, its shares")
    frames, size = _read_frames(root, path, visible.shape[1])
    return PointVideo(path.stem, path, frames, size, shares * size[::-1], visible)


def _read_frames(root: Path, path: Path, count: int) -> tuple[list[Path] | None, tuple[int, int]]:
    """The files of the frames, None if ``path`` holds them, and ``(height, width)``."""
    if "video.npy" in _names(path):
        with _member(path, "video", MAX_VIDEO_BYTES) as (_, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[0] != count or shape[3] != 3 or 0 in shape:
                raise InputError(f"{path}: video is {dtype} of shape {shape}: expected uint8 ({count}, H, W, 3)")
        return None, (shape[1], shape[2])
    folder = root / "JPEGImages" / RESOLUTION / path.stem
    frames = list_images(require(folder, TAPVID, f"the frames of {path.name}, which has no video"))
    if len(frames) != count:
        raise InputError(f"{folder} holds {len(frames)} frames and {path.name} points of {count}: expected as many")
    return frames, image_size(frames[0])


def _names(path: Path) -> list[str]:
    with reading(path, WHAT), zipfile.ZipFile(path) as archive:
        return archive.namelist()


@contextmanager
def _member(path: Path, name: str, limit: int) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """An array's numbers as a stream, its shape and its type; nothing but the header has been read.

    Raises:
        InputError: no such array, one of more than ``limit`` bytes, or a damaged file.
    """
    with reading(path, WHAT), zipfile.ZipFile(path) as archive:
        found = [member for member in archive.infolist() if member.filename == f"{name}.npy"]
        if len(found) != 1 or len(archive.infolist()) > MAX_MEMBERS:
            there = ", ".join(archive.namelist()[:MAX_MEMBERS]) or "nothing"
            raise InputError(f"{path} holds {there}: expected points, occluded and perhaps video, each once")
        if found[0].file_size > limit:
            raise InputError(f"{path}: {name} has {found[0].file_size:,} bytes: expected at most {limit:,}")
        with archive.open(found[0]) as stream:
            try:
                shape, dtype = read_header(name, stream, found[0].file_size)
            except InputError as error:
                raise InputError(f"{path} is not {WHAT}: {error}") from error
            yield stream, shape, dtype


def _numbers(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """What :func:`_member` gives, as an array that cannot be written into."""
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(stream.read(size), dtype).reshape(shape)  # with a size, no more is unpacked at a time
