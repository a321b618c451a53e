"""Ctrl-C and SIGTERM, as the program meets them: in imports, in long calls of libraries, in writing, twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import photo
from PIL import Image

ENTRY = "from facetrt.engine.cli import main as entry, stopping\n"
READY = "print('ready', flush=True)"
IMPORTING = f"""
install = stopping.Stopping.install
def installed(self):
    install(self)
    {READY}
stopping.Stopping.install = installed
"""
WRITING = f"""
unwind = stopping.Stopping.unwind
def unwinds(self, *arguments):
    unwind(self, *arguments)
    import numpy, time
    from facetrt.engine import files
    from facetrt.engine.cli import tasks
    def write_matches(folder, *arguments, **options):
        (folder / "half").write_bytes(b"x")
        {{before}}
        {READY}
        {{work}}
    tasks.write_matches = write_matches
stopping.Stopping.unwind = unwinds
"""
SLEEP = "time.sleep(60)"
NATIVE = "[a @ a for a in [numpy.ones((9000, 9000))]]"
LONG = 20.0  # seconds that a loaded machine may take for what is meant to take two


class Running:
    """``facetrt match`` with a part replaced, once it has printed that it is there."""

    def __init__(self, patch: str, folder: Path) -> None:
        for i in range(2):
            Image.fromarray(photo(64, 80, i)).save(folder / f"{i}.png")
        images = [str(folder / f"{i}.png") for i in range(2)]
        options = ["-b", "builtin", "-o", str(folder / "results" / "out"), "--load-size", "64"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{ENTRY}{patch}entry.main()", "match", *images, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_COLOR": "1"},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def stop(self, number: int) -> tuple[int, str]:
        """Exit code, and what stands on standard error."""
        self.process.send_signal(number)
        start = time.monotonic()
        _, stderr = self.process.communicate(timeout=60)
        assert time.monotonic() - start < LONG
        return self.process.returncode, stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(IMPORTING, id="importing"),
        pytest.param(WRITING.format(before="", work=SLEEP), id="writing"),
        pytest.param(WRITING.format(before="", work=NATIVE), id="in a library"),
    ],
)
def test_a_signal_ends_it_with_one_line_and_nothing_half_written(
    patch: str, number: int, code: int, tmp_path: Path
) -> None:
    assert Running(patch, tmp_path).stop(number) == (code, "interrupted\n")
    results = tmp_path / "results"
    assert not results.exists() or not list(results.iterdir())


def test_what_is_worth_keeping_is_finished_unless_a_second_signal_comes(tmp_path: Path) -> None:
    running = Running(WRITING.format(before="files.finishing.__enter__()", work=SLEEP), tmp_path)
    running.process.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert running.process.poll() is None
    assert running.stop(signal.SIGINT) == (130, "interrupted\n")
    assert not list((tmp_path / "results").iterdir())


def test_a_signal_that_waited_takes_effect_when_that_is_finished(tmp_path: Path) -> None:
    work = "files.finishing.__exit__() if not time.sleep(1) else None; (folder / 'never').write_bytes(b'x')"
    running = Running(WRITING.format(before="files.finishing.__enter__()", work=work), tmp_path)
    assert running.stop(signal.SIGTERM) == (143, "interrupted\n")
    assert not list((tmp_path / "results").iterdir())


def test_the_library_leaves_signals_alone() -> None:
    code = (
        "import signal, facetrt.engine, facetrt.export.cli\n"
        "facetrt.engine.Engine.open('builtin').close()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in the background
    )
    assert done.returncode == 0, done.stderr
