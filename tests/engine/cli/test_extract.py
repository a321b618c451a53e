"""``extract`` and ``--features`` as a user types them: stopping, continuing, skipping."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import photo
from PIL import Image

from facetrt.engine import FeatureStore
from facetrt.engine.cli.app import interruption
from facetrt.engine.cli.extract import interruptible

PROGRAM = [sys.executable, "-c", "from facetrt.engine.cli.main import main; main()"]
ENVIRONMENT = os.environ | {"COLUMNS": "160", "NO_COLOR": "1"}
STORE = "features.zarr"
MANY = 100


def facetrt(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )


def stopped(stop: signal.Signals, ready: Callable[[], bool], *arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a command that gets a signal once ``ready``."""
    process = subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in the background
    )
    deadline = time.monotonic() + 60
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(photo(90, 120, i)).save(folder / f"photo{i}.png")
    return folder


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(MANY):
        Image.fromarray(photo(64, 64, i % 3)).save(folder / f"{i:03}.png")
    return folder


def stored(store: Path) -> int:
    return len(list(store.glob("images/0*")))


def test_extract(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # as a failure leaves it
    command = ("extract", images, "--bundle", tiny_bundle, "--out", out, "--facets", "key@1", "--load-size", "48")
    result = facetrt(*command)
    assert result.returncode == 0, result.stderr
    features = FeatureStore.open(out / STORE)
    assert features.complete and features.facets == ["key@1"] and features[0]["key@1"].shape == (11 * 15, 48)
    assert Image.open(out / "saliency" / "photo1.png").size == (64, 48)
    record = json.loads((out / "results.json").read_text())
    assert [item["group"] for item in record["images"]] == [f"features.zarr/images/000000{i}" for i in range(4)]
    assert record["images"][0]["backend"] == "onnxruntime" and record["images"][0]["original_size"] == [90, 120]
    assert record["skipped"] == [] and sorted(p.name for p in out.iterdir()) == [STORE, "results.json", "saliency"]
    times = {file: file.stat().st_mtime_ns for file in (out / STORE).rglob("*")}
    again = facetrt(*command)
    assert again.returncode == 0 and "4 images (complete already)" in again.stdout
    assert times == {file: file.stat().st_mtime_ns for file in (out / STORE).rglob("*")}
    other = facetrt(*command[:-1], "56")
    assert other.returncode == 2 and "load_size is 48 there and 56 now" in other.stderr
    assert (out / "results.json").is_file() and FeatureStore.open(out / STORE).complete
    assert facetrt(*command[:-1], "56", "--force").returncode == 0
    assert FeatureStore.open(out / STORE)[0].image_size == (56, 74)


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_extraction_continues(
    tiny_bundle: Path, many: Path, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    command = ("extract", many, "-b", tiny_bundle, "-o", out, "--load-size", "64", "--facets", "key@1")
    returned, stderr = stopped(stop, lambda: stored(out / STORE) > 2, *command)
    done = stored(out / STORE)
    assert returned == code and 2 < done < MANY
    assert stderr.strip() == (f"interrupted: {done} of {MANY} images are done; run the same command again to continue")
    assert "Traceback" not in stderr
    assert [p.name for p in out.iterdir()] == [STORE] and sorted(p.name for p in tmp_path.iterdir()) == ["many", "out"]
    first = out / STORE / "images" / "0000000" / "key@1" / "zarr.json"
    written = first.stat().st_mtime_ns
    again = facetrt(*command)
    assert again.returncode == 0 and f"{MANY} images ({done} were there already)" in again.stdout, again.stderr
    assert first.stat().st_mtime_ns == written and FeatureStore.open(out / STORE).complete
    assert len(json.loads((out / "results.json").read_text())["images"]) == MANY


def test_a_killed_extraction_continues(tiny_bundle: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("extract", many, "-b", tiny_bundle, "-o", out, "--load-size", "64", "--facets", "key@1")
    returned, _ = stopped(signal.SIGKILL, lambda: stored(out / STORE) > 2, *command)
    assert returned == -signal.SIGKILL and 2 < stored(out / STORE) < MANY
    assert facetrt(*command).returncode == 0
    features = FeatureStore.open(out / STORE)
    assert len(features) == MANY and all(np.isfinite(item["key@1"]).all() for item in features)
    assert not [p for p in out.iterdir() if p.name.endswith(".tmp")]


def test_of_two_runs_on_one_folder_one_says_so(tiny_bundle: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*PROGRAM, "extract", many, "-b", tiny_bundle, "-o", out, "--load-size", "64", "--facets", "key@1"]
    both = [subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for _ in "ab"]
    answers = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    refused = [stderr for stderr, code in answers if code]
    assert all(code == 2 and "another run is writing" in stderr for stderr, code in answers if code), answers
    assert len(refused) <= 1  # none if one came when the other was done
    assert len(FeatureStore.open(out / STORE)) == MANY and not [p for p in out.iterdir() if p.name.startswith(".")]


def test_what_a_kill_left_never_blocks(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    out, gone = tmp_path / "out", subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = out / f".{STORE}.facetrt-{socket.gethostname()}-{gone.pid}-abc.tmp"
    (left / "images").mkdir(parents=True)
    result = facetrt("extract", images, "-b", tiny_bundle, "-o", out, "--load-size", "48")
    assert result.returncode == 0 and not left.exists(), result.stderr


def test_broken_images(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    broken = images / "photo2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:500])
    out = tmp_path / "out"
    command = ("extract", images, "-b", tiny_bundle, "-o", out, "--load-size", "48")
    refused = facetrt(*command)
    assert refused.returncode == 2 and "photo2.png is damaged" in refused.stderr and "--skip-broken" in refused.stderr
    assert stored(out / STORE) == 2 and not (out / "results.json").exists()
    skipped = facetrt(*command, "--skip-broken")
    assert skipped.returncode == 0 and "1 of 4 images were left out" in skipped.stderr
    assert "photo2.png is damaged" in skipped.stderr
    record = json.loads((out / "results.json").read_text())
    assert record["skipped"][0]["image"] == str(broken) and "damaged" in record["skipped"][0]["reason"]
    assert [Path(item["image"]).name for item in record["images"]] == ["photo0.png", "photo1.png", "photo3.png"]
    again = facetrt(*command)
    assert again.returncode == 2 and json.loads((out / "results.json").read_text()) == record
    broken.write_bytes(whole)
    mended = facetrt(*command)
    assert mended.returncode == 0 and "4 images (3 were there already)" in mended.stdout
    assert json.loads((out / "results.json").read_text())["skipped"] == []
    assert sorted(p.name for p in (out / "saliency").iterdir()) == [f"photo{i}.png" for i in range(4)]


@pytest.mark.parametrize("task", ["cosegment", "parts"])
def test_tasks_skip_broken_images_and_keep_features(tiny_bundle: Path, images: Path, tmp_path: Path, task: str) -> None:
    (images / "photo1.png").write_bytes(b"x")
    store = tmp_path / "store"
    common = (task, images, "-b", tiny_bundle, "--load-size", "48", "--sample-interval", "4", "--skip-broken")
    common = (*common, "--saliency-threshold", "0", *(("--num-parts", "2") if task == "parts" else ()))
    for out, options in (("plain", ()), ("stored", ("--features", store)), ("again", ("--features", store))):
        result = facetrt(*common, "-o", tmp_path / out, *options)
        assert result.returncode == 0 and "1 of 4 images were left out" in result.stderr, result.stderr
    records = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("plain", "stored", "again")]
    assert records[0] == records[1] == records[2]
    assert records[0]["skipped"][0]["image"] == str(images / "photo1.png") and len(records[0]["images"]) == 3
    assert len(FeatureStore.open(store)) == 3
    for out, features in (("new", "new"), ("new", "new/x"), ("new/x", "new")):
        apart = facetrt(*common, "-o", tmp_path / out, "--features", tmp_path / features)
        assert apart.returncode == 2 and "one lies in the other" in apart.stderr and not (tmp_path / "new").exists()
    inside = facetrt(*common, "-o", tmp_path / "plain", "--features", tmp_path / "plain" / "x", "--force")
    assert inside.returncode == 2 and "which --force would delete" in inside.stderr


def test_skipped_images_are_listed_when_too_few_are_left(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    for name in ("photo0.png", "photo1.png", "photo2.png"):
        (images / name).write_bytes(b"x")
    result = facetrt("cosegment", images, "-b", tiny_bundle, "-o", tmp_path / "out", "--skip-broken")
    assert result.returncode == 2 and "1 image was given" in result.stderr, result.stderr
    assert "3 of 4 images were left out:" in result.stderr and "photo2.png" in result.stderr


def test_a_stopped_cosegmentation_continues(tiny_bundle: Path, many: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    common = ("cosegment", many, "-b", tiny_bundle, "-o", out, "--load-size", "64", "--refine", "none")
    code, stderr = stopped(signal.SIGINT, lambda: stored(store) > 2, *common, "--features", store)
    done = stored(store)
    assert code == 130 and f"interrupted: {done} of {MANY} images are done" in stderr and 2 < done < MANY
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["many", "store"]
    first = store / "images" / "0000000" / "zarr.json"
    written = first.stat().st_mtime_ns
    assert facetrt(*common, "--features", store).returncode == 0
    assert first.stat().st_mtime_ns == written and len(list((out / "masks").iterdir())) == MANY


def said(store: Path | None, **options: bool) -> str:
    with suppress(KeyboardInterrupt), interruptible(store, 3, **options):
        line = interruption.line()
        raise KeyboardInterrupt
    assert not interruption.line()  # nothing is left of it for the next command
    return line


def test_without_a_store_an_interruption_names_it() -> None:
    assert said(None).startswith("nothing was written; with --features DIR")


def test_an_interruption_with_force_says_to_go_on_without(tmp_path: Path) -> None:
    assert said(tmp_path, force=True) == "0 of 3 images are done; run it again without --force to continue"
