"""Finding images in folders, in natural order, and distinct names for results."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from facetrt.engine import InputError, MissingFileError
from facetrt.engine.images.finding import find_images, natural_order, unique_stems


def test_finding_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image"):
        find_images([tmp_path])
    with pytest.raises(MissingFileError, match="does not exist"):
        find_images([tmp_path / "none"])
    for name in ("b.png", "a.JPG", "notes.txt"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, "PNG")
    assert [p.name for p in find_images([tmp_path])] == ["a.JPG", "b.png"]
    assert [p.name for p in find_images([tmp_path / "b.png", tmp_path])] == ["b.png", "a.JPG", "b.png"]


def test_folders_are_read_in_natural_order_without_hidden_files(tmp_path: Path) -> None:
    names = ["frame_10.jpg", "frame_2.JPE", "frame_1.jfif", "._frame_1.jpg", ".frame_3.jpg", "Thumbs.db", "a.txt"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    assert [p.name for p in find_images([tmp_path])] == ["frame_1.jfif", "frame_2.JPE", "frame_10.jpg"]


def test_pictures_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.HEIC", "c.psd", "d.heic", ".e.heic"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"3 ending in \.heic, \.psd, b\.HEIC the first") as caught:
        assert [p.name for p in find_images([tmp_path])] == ["a.jpg"]
    assert len(caught) == 1
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"holds no image \(3 ending in \.heic"):
        find_images([tmp_path])


def test_natural_order_takes_any_name() -> None:
    ordered = [
        "1.jpg", "2.jpg", "10.jpg", "a.jpg", "a02.jpg", "a2.jpg", "A10.jpg", "a10b2.jpg", "a10b10.jpg",
        "b" + "9" * 5000 + ".jpg", "b1" + "0" * 5000 + ".jpg", "c.jpg", "c.png", "c\u00b2.jpg", "c\u0661.jpg",
    ]  # fmt: skip
    numbers = ordered[:3]
    assert sorted(map(Path, reversed(numbers)), key=natural_order) == [Path(name) for name in numbers]
    assert [str(p) for p in sorted(map(Path, reversed(ordered[3:])), key=natural_order)] == ordered[3:]


def test_equal_names_stay_apart() -> None:
    assert unique_stems([Path("x/a.png"), Path("y/a.png"), Path("a-2.png")]) == ["a", "a-2", "a-2-2"]
