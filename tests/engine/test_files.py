from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facetrt.engine import InputError, MissingFileError, OutputError
from facetrt.engine.files import atomic_folder, find_images, unique_stems, write_json


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with atomic_folder(target) as folder:
        write_json(folder / "results.json", {"n": np.int64(3), "a": np.arange(2)})
        assert not target.exists()
    assert (target / "results.json").read_text().split() == ["{", '"n":', "3,", '"a":', "[", "0,", "1", "]", "}"]


def test_existing_output_is_refused_and_only_our_own_is_replaced(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, name in ((ours, "results.json"), (theirs, "thesis.tex")):
        folder.mkdir()
        (folder / name).write_text("old")
        with pytest.raises(OutputError, match="exists already"), atomic_folder(folder):
            pass
    with atomic_folder(ours, force=True) as made:
        (made / "results.json").write_text("new")
    assert (ours / "results.json").read_text() == "new"
    with pytest.raises(OutputError, match="was not written by facetrt"), atomic_folder(theirs, force=True):
        pass
    assert (theirs / "thesis.tex").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_failing_replacement_keeps_the_old_result(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as made:
        (made / "results.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", force=True):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "results.json").read_text() == "old"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write to"), atomic_folder(tmp_path / "file" / "out"):
        pass


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive = tmp_path / f".out.abc.{gone.pid}.tmp", tmp_path / f".out.abc.{os.getpid()}.tmp"
    dead.mkdir()
    alive.mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert not dead.exists() and alive.exists()


def test_finding_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image"):
        find_images([tmp_path])
    with pytest.raises(MissingFileError, match="does not exist"):
        find_images([tmp_path / "none"])
    for name in ("b.png", "a.JPG", "notes.txt"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, "PNG")
    assert [p.name for p in find_images([tmp_path])] == ["a.JPG", "b.png"]
    assert [p.name for p in find_images([tmp_path / "b.png", tmp_path])] == ["b.png", "a.JPG", "b.png"]


def test_equal_names_stay_apart() -> None:
    assert unique_stems([Path("x/a.png"), Path("y/a.png"), Path("a-2.png")]) == ["a", "a-2", "a-2-2"]
