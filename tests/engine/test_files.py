from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from facetrt.engine import OutputError
from facetrt.engine.files import (
    Content,
    atomic_file,
    atomic_folder,
    check_replaceable,
    is_temporary,
    try_lock,
    write_json,
    write_results,
)


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


def result(folder: Path, text: str) -> None:
    with atomic_folder(folder, force=True) as made:
        write_results(made, {"text": text})


def test_existing_output_is_refused_and_only_our_own_is_replaced(tmp_path: Path) -> None:
    ours, theirs, website = (tmp_path / name for name in ("ours", "theirs", "website"))
    result(ours, "old")
    contents = {theirs: ("thesis.tex", "old"), website: ("manifest.json", "{}"), tmp_path / "r": ("results.json", "{}")}
    for folder, (name, text) in contents.items():
        folder.mkdir()
        (folder / name).write_text(text)
    for folder in (ours, *contents):
        with pytest.raises(OutputError, match="exists already"), atomic_folder(folder):
            pass
    result(ours, "new")
    assert json.loads((ours / "results.json").read_text()) == {"tool": "facetrt", "text": "new"}
    for folder, (name, text) in contents.items():
        with pytest.raises(OutputError, match="was not written by facetrt"):
            result(folder, "new")
        assert (folder / name).read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "r", "theirs", "website"]


def test_kinds_of_output_do_not_replace_each_other(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with pytest.raises(OutputError, match="was not written by facetrt as results"):
        result(bundle, "new")
    check_replaceable(bundle, force=True, content=Content.BUNDLE)
    result(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="as bundle"):
        check_replaceable(tmp_path / "out", force=True, content=Content.BUNDLE)


def test_a_folder_with_the_input_is_never_replaced(tmp_path: Path) -> None:
    result(tmp_path / "out", "old")
    (tmp_path / "out" / "photo.png").write_bytes(b"x")
    with pytest.raises(OutputError, match="which --force would delete"):
        check_replaceable(tmp_path / "out", force=True, inputs=[tmp_path / "out" / "photo.png"])
    with pytest.raises(OutputError, match="which --force would delete"):
        check_replaceable(tmp_path / "out", force=True, inputs=[tmp_path / "out"])
    check_replaceable(tmp_path / "out", force=True, inputs=[tmp_path / "other.png"])


def test_a_failing_replacement_keeps_the_old_result(tmp_path: Path) -> None:
    result(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", force=True):
        raise KeyboardInterrupt
    assert "old" in (tmp_path / "out" / "results.json").read_text()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write to"), atomic_folder(tmp_path / "file" / "out"):
        pass


def test_names_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write to"), atomic_folder(tmp_path / ("x" * 300)):
        pass


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    dead = tmp_path / f".out.facetrt-{host}-{gone.pid}-abc_1.tmp"
    others = [
        f".out.facetrt-{host}-{os.getpid()}-abc.tmp",
        f".out.facetrt-elsewhere-{gone.pid}-abc.tmp",
        ".out.2024.tmp",
        f".out.facetrt-{host}-99999999999999999999-abc.tmp",
    ]
    for path in (dead, *(tmp_path / name for name in others)):
        path.mkdir()
    for name in ("out", "*"):
        with atomic_folder(tmp_path / name):
            pass
    assert not dead.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "out", "*"])


def temporary(target: str, process: int) -> str:
    return f".{target}.facetrt-{socket.gethostname()}-{process}-abc.tmp"


def test_a_number_that_another_process_has_now_does_not_keep_a_leftover(tmp_path: Path) -> None:
    left, locked = tmp_path / temporary("out", os.getpid()), tmp_path / temporary("other", os.getpid())
    for path in (left, locked):
        path.mkdir()
        os.utime(path, (0, 0))
    descriptor = os.open(locked, os.O_RDONLY)
    assert try_lock(descriptor)
    result(tmp_path / "out", "new")
    os.close(descriptor)
    assert not left.exists() and locked.exists()


def test_a_result_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    result(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / f"{temporary('out', gone.pid)}.old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "out").exists()  # of another name
    with pytest.raises(OutputError, match="exists already"), atomic_folder(tmp_path / "out"):
        pass
    assert "old" in (tmp_path / "out" / "results.json").read_text()


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    name = "x" * 200 + ".png"
    for text in ("old", "new"):
        with atomic_file(tmp_path / name) as path:
            assert path.suffix == ".png" and is_temporary(path)
            path.write_text(text)
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / name) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "new")]
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
