"""TAP-Vid's arrays: what is read, and what is refused in one line."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facetrt.engine import InputError, MissingFileError
from facetrt.engine.evaluation.datasets import points
from facetrt.engine.evaluation.datasets.points import read_point_videos

COUNT, SIZE = 4, (30, 40)


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    occluded = np.zeros((3, COUNT), bool)
    occluded[1, :2] = True
    found = {
        "video": rng.integers(0, 256, (COUNT, *SIZE, 3), np.uint8),
        "points": rng.random((3, COUNT, 2), np.float32),
        "occluded": occluded,
    } | changes
    return {name: values for name, values in found.items() if values is not None}


def save_frames(folder: Path, video: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for index, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"{index:05}.png")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_points_and_frames_are_read(tmp_path: Path, save: Callable[..., None]) -> None:
    given = arrays()
    save(tmp_path / "b10.npz", **given)
    save(tmp_path / "b9.npz", **arrays())
    (tmp_path / "._b9.npz").write_bytes(b"")
    assert [video.name for video in read_point_videos(tmp_path)] == ["b9", "b10"]
    (video,) = read_point_videos(tmp_path, limit=1)
    assert (len(video), video.size, video.frames) == (COUNT, SIZE, None)
    np.testing.assert_allclose(video.points_xy, given["points"].astype(float) * [40, 30])
    np.testing.assert_array_equal(video.visible, ~given["occluded"])
    np.testing.assert_array_equal(list(video.pictures()), given["video"])  # type: ignore[arg-type]


def test_frames_may_be_daviss_own(tmp_path: Path) -> None:
    np.savez(tmp_path / "bear.npz", **arrays(video=None))
    with pytest.raises(MissingFileError, match=r"480p/bear is missing: TAP-Vid-DAVIS has the frames of bear\.npz"):
        read_point_videos(tmp_path)
    folder = tmp_path / "JPEGImages" / "480p" / "bear"
    save_frames(folder, arrays()["video"])
    (video,) = read_point_videos(tmp_path)
    assert video.size == SIZE
    assert list(video.pictures()) == [folder / f"{i:05}.png" for i in range(COUNT)]
    (folder / "00003.png").unlink()
    with pytest.raises(InputError, match=r"bear holds 3 frames and bear\.npz points of 4"):
        read_point_videos(tmp_path)


def test_a_pickle_is_answered_with_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "tapvid_davis.pkl"
    path.write_bytes(pickle.dumps({"bear": arrays()}))
    for given in (tmp_path, path):
        with pytest.raises(MissingFileError, match=r"tapvid_davis\.pkl is a pickle.*np\.savez.*evaluate\.md") as caught:
            read_point_videos(given)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(MissingFileError, match=r"holds no NAME\.npz: expected one for each video"):
        read_point_videos(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": None}, r"holds video\.npy, occluded\.npy: expected points, occluded"),
        ({"points": np.zeros((3, COUNT, 3))}, r"points are float64 of shape \(3, 4, 3\): expected floats \(3, 4, 2\)"),
        ({"points": np.full((3, COUNT, 2), 12.0)}, "a visible point has no place in the frame: expected x"),
        ({"points": np.full((3, COUNT, 2), np.nan)}, "a visible point has no place in the frame"),
        ({"occluded": np.zeros((3, COUNT))}, r"occluded is float64 of shape \(3, 4\): expected bool \(points, fr"),
        ({"occluded": np.zeros((0, COUNT), bool)}, r"occluded is bool of shape \(0, 4\)"),
        ({"occluded": np.ones((3, COUNT), bool)}, "has no point that is visible in any frame"),
        ({"video": np.zeros((3, *SIZE, 3), np.uint8)}, r"video is uint8 of shape \(3, 30, 40, 3\): expected .*\(4, H"),
        ({"video": np.array([b"jpeg"] * COUNT, object)}, "its member video is object .* expected plain numbers"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "bear.npz", **arrays(**changes))
    with pytest.raises(InputError, match=message) as caught:
        read_point_videos(tmp_path)
    assert "bear.npz" in str(caught.value)


def test_what_is_occluded_may_be_anything(tmp_path: Path) -> None:
    given = arrays()
    given["points"][given["occluded"]] = np.nan
    np.savez(tmp_path / "bear.npz", **given)
    assert read_point_videos(tmp_path)[0].visible.sum() == 3 * COUNT - 2


def test_files_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bear.npz"
    path.write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(InputError, match=r"bear\.npz is not an NPZ file of annotated points"):
        read_point_videos(tmp_path)
    np.savez(path, **arrays())
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2500000000, 2)}".ljust(117) + b"\n"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["points.npy"] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match=r"bear\.npz is not .* shape \(3, 2500000000, 2\) in 64 bytes"):
        read_point_videos(tmp_path)
    np.savez_compressed(path, **arrays())
    monkeypatch.setattr(points, "MAX_VIDEO_BYTES", 1000)
    with pytest.raises(InputError, match=r"video has 14,528 bytes: expected at most 1,000"):
        read_point_videos(tmp_path)
