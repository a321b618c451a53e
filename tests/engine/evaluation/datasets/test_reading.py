"""Annotations that say what annotations never should."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facetrt.engine import InputError, MissingFileError, OutputError
from facetrt.engine.evaluation.datasets.reading import image_size, member, numbers, read_mat, read_rows
from facetrt.engine.evaluation.resume import ITEMS, ItemStore
from facetrt.engine.files import read_bytes, read_object


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "b/../../a.jpg", "", "a\0.jpg", "a\x1b.jpg", "é" * 200])
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"list\.txt names the image .*: expected one inside"):
        member(tmp_path, name, tmp_path / "list.txt")
    assert member(tmp_path, "birds/a.jpg", tmp_path / "list.txt") == tmp_path / "birds" / "a.jpg"


@pytest.mark.parametrize("field", ["nan", "1e999", "²", "x", "9" * 5000 + "e"])
def test_numbers_are_finite(field: str) -> None:
    with pytest.raises(InputError, match="are not all numbers"):
        numbers(["1.5", field], Path("a.txt"))


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a \xff\n")
    with pytest.raises(InputError, match="is not a list in UTF-8"):
        read_rows(tmp_path / "a.txt", 2)


def test_pipes_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_object, image_size, lambda path: read_rows(path, 1)):
        with pytest.raises((InputError, MissingFileError)):
            read(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(InputError, match="11 bytes, expected a file of at most 10"):
        read_bytes(tmp_path / "large", "a list", 10)


def test_keypoints_that_are_none(tmp_path: Path) -> None:
    scipy = pytest.importorskip("scipy.io", reason="scipy is not installed")
    path = tmp_path / "a.mat"
    for content, said in [
        ({"pts_coord": "text"}, "expected numbers"),
        ({"pts_coord": np.zeros((2000, 2000))}, "expected at most"),
        ({"other": 1}, "has no variable pts_coord: it has other"),
    ]:
        scipy.savemat(path, content, do_compression=True)
        with pytest.raises(InputError, match=said):
            read_mat(path, "pts_coord")


def test_sizes_of_images_obey_the_pixel_limit(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="at most 100,000,000"):
        image_size(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"somebody's only copy", b"one line\n", b'{"a": 1}\n{"b": 2}\n'])
@pytest.mark.parametrize("force", [False, True])
def test_items_of_somebody_else_are_kept(content: bytes, force: bool, tmp_path: Path) -> None:
    (tmp_path / ITEMS).write_bytes(content)
    with pytest.raises(OutputError, match="not written by facetrt"):
        ItemStore(tmp_path, {}, force=force)
    assert (tmp_path / ITEMS).read_bytes() == content
