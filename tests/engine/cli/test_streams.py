"""Consoles of other encodings, full disks and readers that have seen enough."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import photo
from PIL import Image

from facetrt.engine.cli import streams

PROGRAM = [sys.executable, "-c", "from facetrt.engine.cli.main import main; main()"]


def facetrt(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"} | options.pop("env", {})
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([*PROGRAM, *map(str, arguments)], check=False, env=environment, **outputs)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[streams.KeptStream]:
    path = tmp_path / "stream"
    monkeypatch.setattr(sys, "stdout", path.open("w", encoding="ascii"))
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    monkeypatch.setattr(sys, "stderr", None)
    streams.open_streams()
    assert isinstance(sys.stdout, streams.KeptStream)
    made = sys.stdout
    yield made
    made.close()


def test_what_an_encoding_lacks_is_shown_by_something_like_it(stream: streams.KeptStream, tmp_path: Path) -> None:
    stream.write("✓ 3×4 – \u2839 漢\udcff\n")
    stream.flush()
    assert (tmp_path / "stream").read_text() == "+ 3x4 - * \\u6f22\\udcff\n"
    assert streams.lost_output() is None


@pytest.mark.parametrize(("device", "said"), [("/dev/full", os.strerror(errno.ENOSPC)), ("closed pipe", None)])
def test_a_stream_that_cannot_be_written_raises_nothing(
    stream: streams.KeptStream, device: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)  # pytest put its own there after the fixture
    reading, writing = os.pipe()
    os.close(reading)
    target = os.open(device, os.O_WRONLY) if said else writing
    os.dup2(target, stream.fileno())
    for _ in range(3):
        stream.write("x" * 100_000)
        stream.flush()
    assert streams.lost_output() == said
    for descriptor in {target, writing}:
        os.close(descriptor)


def test_an_encoding_is_no_reason_to_fail(tmp_path: Path) -> None:
    picture = tmp_path / "✓漢.png"
    Image.fromarray(photo(64, 80)).save(picture)
    out = tmp_path / "out✗"
    options = ("-b", "builtin", "-o", out, "--load-size", "64")
    done = facetrt("match", picture, picture, *options, env={"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"point pairs" in done.stdout, done.stderr
    missing = facetrt("match", picture, tmp_path / "漢", *options, "--force", env={"PYTHONIOENCODING": "ascii"})
    assert missing.returncode == 2 and missing.stderr.count(b"\n") == 1 and b"\\u6f22 does not" in missing.stderr


def test_names_that_are_no_text(tmp_path: Path) -> None:
    picture = tmp_path / os.fsdecode(b"bad\xff.png")
    try:
        Image.fromarray(photo(64, 80)).save(picture)
    except OSError:
        pytest.skip("this file system takes no such names")
    (tmp_path / os.fsdecode(b"broken\xff.png")).write_bytes(b"x")
    done = facetrt("extract", tmp_path, "-b", "builtin", "-o", tmp_path / "out", "--load-size", "64", "--skip-broken")
    assert done.returncode == 0 and b"broken\\udcff.png is not an image" in done.stderr, done.stderr


def test_results_outlive_a_full_disk_behind_standard_output(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(photo(64, 80)).save(picture)
    with Path("/dev/full").open("wb") as full:
        options = ("-b", "builtin", "-o", tmp_path / "out", "--load-size", "64")
        done = facetrt("match", picture, picture, *options, stdout=full)
        assert done.returncode == 1 and b"standard output cannot be written" in done.stderr
        assert (tmp_path / "out" / "results.json").is_file()
        assert facetrt("match", picture, picture, *options, stderr=full).returncode == 2  # exists already


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = facetrt("info", "builtin", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_streams() -> None:
    done = facetrt("info", "builtin", preexec_fn=lambda: os.close(1), stdout=None)
    assert (done.returncode, done.stderr) == (0, b"")
