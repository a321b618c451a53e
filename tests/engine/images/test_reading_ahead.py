from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import photo
from PIL import Image

from facetrt.engine import Engine, FacetrtError, InputError, MissingFileError
from facetrt.engine.images import reading_ahead as module
from facetrt.engine.images.loading import ImageLike, LoadedImage, load_image


def load(number: int, image: ImageLike) -> LoadedImage:
    return load_image(image, name=f"image {number}")


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("facetrt-reader")]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.fromarray(photo(32, 40, i)).save(path)
    return paths


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.005)
    assert condition()  # type: ignore[operator]


def test_files_are_read_ahead_in_order_and_the_thread_ends(files: list[Path]) -> None:
    started: list[int] = []

    def watched(number: int, image: ImageLike) -> LoadedImage:
        started.append(number)
        return load(number, image)

    stream = module.read_ahead(enumerate(files), watched)
    first = next(stream)
    wait_until(lambda: started == list(range(6)))  # all, though only one was asked for
    assert [first.number, *(item.number for item in stream)] == list(range(6)) and not readers()


def test_closing_early_ends_the_thread(files: list[Path]) -> None:
    stream = module.read_ahead(enumerate(files * 20), load)
    next(stream)
    assert readers()
    stream.close()
    assert not readers()


def test_arrays_are_taken_one_at_a_time_before_they_are_used_again() -> None:
    buffer = np.zeros((16, 16, 3), np.uint8)
    asked: list[int] = []

    def frames() -> Iterator[tuple[int, ImageLike]]:
        for i in range(5):
            asked.append(i)
            buffer[:] = i
            yield i, buffer

    stream = module.read_ahead(frames(), load)
    first = next(stream)
    assert asked == [0] and not readers()
    loaded = [first.loaded, *(item.loaded for item in stream)]
    assert [int(item.pixels[0, 0, 0]) for item in loaded if isinstance(item, LoadedImage)] == list(range(5))


def test_decoded_bytes_are_bounded(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    size = 32 * 40 * 3
    monkeypatch.setattr(module, "READ_AHEAD_BYTES", 2 * size)
    started: list[int] = []

    def watched(number: int, image: ImageLike) -> LoadedImage:
        started.append(number)
        return load(number, image)

    stream = module.read_ahead(enumerate(files), watched)
    next(stream)
    wait_until(lambda: len(started) >= 3)
    time.sleep(0.1)
    assert started == [0, 1, 2]  # one was taken, two wait
    next(stream)
    wait_until(lambda: started == [0, 1, 2, 3])
    stream.close()
    assert not readers()


def test_arrays_take_no_room_that_files_wait_for(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_AHEAD_BYTES", 2 * 32 * 40 * 3)
    numbers: list[int] = []
    begin = threading.Event()

    def slow(number: int, image: ImageLike) -> LoadedImage:
        if isinstance(image, np.ndarray):
            begin.set()  # the array is loaded before any file
        elif number < 2:
            begin.wait(20)
        return load(number, image)

    def read() -> None:
        images: list[ImageLike] = [files[0], files[1], photo(100, 100), files[2]]
        numbers.extend(item.number for item in module.read_ahead(enumerate(images), slow))

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(20)
    assert numbers == [0, 1, 2, 3]


def test_a_script_ends_with_an_unfinished_iterator(files: list[Path]) -> None:
    script = """
import sys, time
from facetrt.engine.images import reading_ahead as loading
from facetrt.engine.images.loading import load_image
loading.READ_AHEAD_BYTES = 1
stream = loading.read_ahead(enumerate(sys.argv[1:]), lambda number, image: load_image(image))
print(next(stream).number)
time.sleep(0.2)
"""
    command = [sys.executable, "-c", script, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_errors_come_in_their_turn(files: list[Path], tmp_path: Path) -> None:
    def source() -> Iterator[tuple[int, ImageLike]]:
        yield from enumerate([files[0], tmp_path / "none.png", files[1]])
        raise RuntimeError("the source broke")

    stream = module.read_ahead(source(), load)
    kinds = [type(next(stream).loaded) for _ in range(3)]
    assert kinds == [LoadedImage, MissingFileError, LoadedImage]
    with pytest.raises(RuntimeError, match="the source broke"):
        next(stream)
    assert not readers()


def test_whatever_loading_raises_comes_in_its_turn(files: list[Path]) -> None:
    def fails(number: int, image: ImageLike) -> LoadedImage:
        if number == 1:
            raise MemoryError(number)
        return load(number, image)

    for second in (files[1], photo(9, 9)):
        stream = module.read_ahead(enumerate([files[0], second]), fails)
        assert next(stream).number == 0
        with pytest.raises(MemoryError):
            next(stream)


def test_images_before_an_error_of_their_source_are_encoded(tiny_engine: Engine) -> None:
    def source() -> Iterator[np.ndarray]:
        yield photo(32, 40)
        raise RuntimeError("the source broke")

    stream = tiny_engine.encode_iter(source(), load_size=None)
    assert next(stream).image_size == (32, 40)
    with pytest.raises(RuntimeError, match="the source broke"):
        next(stream)


def test_a_truncated_pil_image_is_a_broken_image(tiny_engine: Engine, files: list[Path]) -> None:
    files[1].write_bytes(files[1].read_bytes()[:900])
    broken: list[str] = []
    with Image.open(files[1]) as lazy:
        images = [files[0], lazy, files[2]]
        got = tiny_engine.encode(images, load_size=None, on_broken=lambda image, error: broken.append(str(error)))
    assert [item.name for item in got] == [str(files[0]), str(files[2])]
    assert len(broken) == 1 and broken[0].startswith("image 1 is damaged")


def test_features_of_files_and_arrays_are_the_same(tiny_engine: Engine, files: list[Path]) -> None:
    arrays = [photo(32, 40, i) for i in range(6)]
    for a, b in zip(tiny_engine.encode(files, load_size=24), tiny_engine.encode(arrays, load_size=24), strict=True):
        np.testing.assert_array_equal(a["key@2"], b["key@2"])
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_a_broken_image_stops_after_everything_before_it(tiny_engine: Engine, files: list[Path]) -> None:
    files[3].write_bytes(b"not an image")
    got: list[str] = []
    with pytest.raises(InputError, match=r"3\.png is not an image"):
        for item in tiny_engine.encode_iter(files, load_size=None):
            got.append(item.name)
    assert got == [str(path) for path in files[:3]]


def test_broken_images_are_left_out_if_asked(tiny_engine: Engine, files: list[Path]) -> None:
    files[1].unlink()
    Image.fromarray(photo(4, 4)).save(files[4])  # smaller than a patch
    broken: list[tuple[ImageLike, FacetrtError]] = []
    calls: list[tuple[int, int | None]] = []
    got = tiny_engine.encode(
        files,
        load_size=None,
        on_broken=lambda image, error: broken.append((image, error)),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [item.name for item in got] == [str(files[i]) for i in (0, 2, 3, 5)]
    assert [image for image, _ in broken] == [files[1], files[4]] and calls[-1] == (6, 6)
    assert isinstance(broken[0][1], MissingFileError) and "smaller than one patch" in str(broken[1][1])
    masks = tiny_engine.cosegment(files, load_size=None, sample_interval=3, on_broken=lambda image, error: None)
    assert [mask.name for mask in masks] == [item.name for item in got]


def test_wrong_options_are_not_broken_images(tiny_engine: Engine, files: list[Path]) -> None:
    broken: list[ImageLike] = []
    with pytest.raises(InputError, match="expected the shorter side"):
        tiny_engine.encode(files, load_size=24.5, on_broken=lambda image, error: broken.append(image))  # type: ignore[arg-type]
    assert not broken
