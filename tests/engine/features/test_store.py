from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers import photo
from PIL import Image

from facetrt.engine import Engine, FeatureStore, InputError, MissingDependencyError, MissingFileError, OutputError
from facetrt.engine.encoding import extraction as extraction_module
from facetrt.engine.features import store as store_module
from facetrt.engine.features.features import Features
from facetrt.engine.files import is_store
from facetrt.engine.images.loading import ImageLike

IMAGES = [photo(40, 48, seed) for seed in range(4)]
OPTIONS: dict[str, Any] = {"load_size": None, "facets": ["key@1", "key@2"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features.zarr"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(paths):
        Image.fromarray(IMAGES[i]).save(file)
    return paths


def same(a: Features, b: Features) -> None:
    for facet in a.facets:
        np.testing.assert_array_equal(a[facet], b[facet])
        np.testing.assert_array_equal(a.cls(facet), b.cls(facet))
    np.testing.assert_array_equal(a.saliency, b.saliency)
    np.testing.assert_array_equal(a.pixels, b.pixels)
    assert (a.geometry, a.name, a.provenance, a.load_size, a.saliency_mode) == (
        (b.geometry, b.name, b.provenance, b.load_size, b.saliency_mode)
    )


def encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the batch size with every pass of the encoder."""
    passes: list[int] = []
    run = engine._encoder.backend.run
    monkeypatch.setattr(
        engine._encoder.backend, "run", lambda inputs: passes.append(len(inputs["images"])) or run(inputs)
    )
    return passes


def test_what_was_stored_is_what_was_encoded(tiny_engine: Engine, path: Path) -> None:
    images = [*IMAGES, np.zeros((24, 24, 3), np.uint8)]  # zeros are written, too
    stored = tiny_engine.extract(images, path, load_size=(40, 48), saliency="low_resolution")
    expected = tiny_engine.encode(images, load_size=(40, 48), saliency="low_resolution")
    assert stored.complete and len(stored) == 5 and not stored.cheap and stored.numbers == [0, 1, 2, 3, 4]
    for a, b in zip(FeatureStore.open(path), expected, strict=True):
        assert a.facets == b.facets
        same(a, b)
    assert [item.name for item in stored[1:3]] == ["image 1", "image 2"]


def test_others_can_open_it(tiny_engine: Engine, path: Path, files: list[Path]) -> None:
    tiny_engine.extract(files, path, **OPTIONS)
    expected = tiny_engine.encode(files, load_size=None)[2]
    root = zarr.open_group(str(path), mode="r")
    assert sorted(root["images"].group_keys()) == ["0000000", "0000001", "0000002", "0000003"]
    group = root["images/0000002"]
    assert group.attrs["name"] == str(files[2]) and group.attrs["grid"] == [9, 11] and group.attrs["stride"] == 4
    np.testing.assert_array_equal(group["key@2"][...], expected.map("key@2"))
    np.testing.assert_array_equal(group["key@2.cls"][...], expected.cls("key@2"))
    np.testing.assert_array_equal(group["pixels"][...], IMAGES[2])
    assert sorted(group.array_keys()) == ["attention", "key@1", "key@1.cls", "key@2", "key@2.cls", "pixels"]
    made = root.attrs["facetrt"]
    assert made["format"] == 1 and made["model"] == "tiny" and made["backend"] == expected.provenance.backend
    assert made["encoder_sha256"] == expected.provenance.encoder_sha256 and made["facets"] == ["key@1", "key@2"]
    assert root.attrs["complete"] is True


def test_large_maps_have_several_chunks(tiny_engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 4 * 11 * 48 * 4)
    stored = tiny_engine.extract(IMAGES[:1], path, **OPTIONS)
    assert zarr.open_group(str(path))["images/0000000/key@1"].chunks == (4, 11, 48)
    np.testing.assert_array_equal(stored[0]["key@1"], tiny_engine.encode(IMAGES[:1], load_size=None)[0]["key@1"])


@pytest.mark.parametrize("task", ["cosegment", "segment_parts"])
def test_tasks_take_a_store(tiny_engine: Engine, path: Path, task: str) -> None:
    options: dict[str, Any] = {"sample_interval": 3, "saliency_threshold": 0.0}
    options |= {"num_parts": 2} if task == "segment_parts" else {}
    stored = tiny_engine.extract(IMAGES, path, load_size=None, saliency="low_resolution")
    run = getattr(tiny_engine, task)
    field = "loaded_labels" if task == "segment_parts" else "loaded_mask"
    expected = run(IMAGES, load_size=None, **options)
    for given in (stored, stored[:]):
        for a, b in zip(run(given, **options), expected, strict=True):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    with pytest.raises(InputError, match="low_resolution saliency and full was asked"):
        run(stored, saliency="full")


class Stop(BaseException):
    """Stands for Ctrl-C."""


def test_an_interrupted_run_continues(tiny_engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def frames() -> Any:
        yield from IMAGES[:2]
        raise Stop

    monkeypatch.setattr("facetrt.engine.encoding.encoder.WINDOW", 1)
    with pytest.raises(Stop):
        tiny_engine.extract(frames(), path, **OPTIONS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("facetrt")]
    with pytest.warns(UserWarning, match="is unfinished: it holds 2 images"):
        partial = FeatureStore.open(path)
    assert not partial.complete
    same(partial[1], tiny_engine.encode(IMAGES[:2], load_size=None)[1])
    passes, calls = encoded(tiny_engine, monkeypatch), list[tuple[int, int | None]]()
    stored = tiny_engine.extract(IMAGES, path, progress=lambda done, total: calls.append((done, total)), **OPTIONS)
    assert sum(passes) == 2 and len(stored) == 4 and stored.complete and calls[-1] == (4, 4)
    tiny_engine.extract(IMAGES, path, **OPTIONS)
    assert sum(passes) == 2
    for a, b in zip(stored, tiny_engine.encode(IMAGES, load_size=None), strict=True):
        same(a, b)


def test_a_full_disk_keeps_what_was_written(
    tiny_engine: Engine, path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = extraction_module.write_image

    def full(folder: Path, features: Features, *rest: Any) -> None:
        if features.name == str(files[2]):
            folder.mkdir()
            (folder / "half").write_bytes(b"x")
            raise OSError(28, "No space left on device")
        write(folder, features, *rest)

    monkeypatch.setattr(extraction_module, "write_image", full)
    message = (
        r"2\.png cannot be written to .*No space left on device\); the 2 images there are safe: make room, then run"
    )
    with pytest.raises(OutputError, match=message):
        tiny_engine.extract(files, path, **OPTIONS)
    assert sorted(p.name for p in path.parent.iterdir()) == [*(file.name for file in files), path.name]
    monkeypatch.undo()
    passes = encoded(tiny_engine, monkeypatch)
    assert len(tiny_engine.extract(files, path, **OPTIONS)) == 4 and sum(passes) == 1


def test_other_settings_and_images_are_refused(tiny_engine: Engine, path: Path, files: list[Path]) -> None:
    tiny_engine.extract(files, path, **OPTIONS)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    cases: list[tuple[list[ImageLike], dict[str, Any], str]] = [
        ([*files], {"load_size": 24}, "load_size is None there and 24 now"),
        ([*files], {"facets": ["key@1"]}, "facets is"),
        ([*files], {"saliency": "low_resolution"}, "saliency is full there and low_resolution now"),
        ([*files], {"stride": 8}, "stride is 4 there and 8 now"),
        ([files[1], *files], {}, "the name of image 0 is"),
        ([*files[:3]], {}, "more than the 3 images given"),
        ([*IMAGES], {}, "the content of image 0 is"),
    ]
    for images, changed, message in cases:
        with pytest.raises(OutputError, match=message):
            tiny_engine.extract(images, path, **{**OPTIONS, **changed})
    Image.fromarray(IMAGES[0]).save(files[3])
    with pytest.raises(OutputError, match="the content of image 3 is"):
        tiny_engine.extract(files, path, **OPTIONS)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    stored = tiny_engine.extract(files, path, load_size=24, force=True)
    assert stored.settings.load_size == 24 and stored[3].image_size == (24, 28)


def test_a_wrong_list_adds_nothing_to_an_unfinished_store(
    tiny_engine: Engine, path: Path, files: list[Path], tmp_path: Path
) -> None:
    whole = files[1].read_bytes()
    files[1].write_bytes(b"x")
    tiny_engine.extract(files, path, on_broken=lambda image, error: None, **OPTIONS)  # lacks image 1
    files[1].write_bytes(whole)
    for images, message in (
        ([*files[:2], files[3], files[2]], "the name of image 2 is"),
        (files[:2], "more than the 2 images given"),
    ):
        with pytest.raises(OutputError, match=message):
            tiny_engine.extract(images, path, **OPTIONS)
        assert FeatureStore.open(path).numbers == [0, 2, 3]


def test_many_skipped_images(tiny_engine: Engine, path: Path) -> None:
    tiny_engine.extract(IMAGES[:1], path, **OPTIONS)
    skipped = [{"image": "x" * 600, "reason": "y" * 600}] * 1000
    edit(path / "zarr.json", lambda data: data["attributes"].update(skipped=skipped))
    assert (path / "zarr.json").stat().st_size > 1 << 20 and len(FeatureStore.open(path).skipped) == 1000


def test_a_store_behind_a_link_continues(tiny_engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "store")
    tiny_engine.extract(IMAGES[:2], link, **OPTIONS)
    assert tiny_engine.extract(IMAGES, link, **OPTIONS).numbers == [0, 1, 2, 3]
    assert link.is_symlink() and len(FeatureStore.open(tmp_path / "disk" / "store")) == 4


def test_an_empty_folder_is_free_and_the_folder_above_a_store_is_named(tiny_engine: Engine, tmp_path: Path) -> None:
    store = tmp_path / "out" / "features.zarr"
    store.mkdir(parents=True)
    assert tiny_engine.extract(IMAGES[:1], store, **OPTIONS).complete
    with pytest.raises(InputError, match=r"is not a feature store .*out/features\.zarr is one"):
        FeatureStore.open(tmp_path / "out")


def test_force_replaces_only_a_store(tiny_engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="was not written by facetrt as a feature store"):
        tiny_engine.extract(IMAGES, tmp_path / "mine", force=True)
    with pytest.raises(InputError, match=r"is not a feature store of facetrt: it has no zarr\.json"):
        tiny_engine.extract(IMAGES, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_broken_images(tiny_engine: Engine, path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:200])
    with pytest.raises(InputError, match=r"1\.png is damaged"):
        tiny_engine.extract(files, path, **OPTIONS)
    with pytest.warns(UserWarning, match="holds 1 image"):
        FeatureStore.open(path)
    stored = tiny_engine.extract(files, path, on_broken=lambda image, error: None, **OPTIONS)
    assert stored.complete and stored.numbers == [0, 2, 3] and stored.skipped[0]["image"] == str(files[1])
    assert [item.name for item in stored] == [str(files[i]) for i in (0, 2, 3)]
    files[1].write_bytes(whole)
    passes = encoded(tiny_engine, monkeypatch)
    stored = tiny_engine.extract(files, path, **OPTIONS)
    assert sum(passes) == 1 and stored.numbers == [0, 1, 2, 3] and not stored.skipped
    with pytest.raises(InputError, match="none of the 1 images could be encoded"):
        tiny_engine.extract([b"x"], path.parent / "none.zarr", on_broken=lambda image, error: None)  # type: ignore[list-item]


def edit(file: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_damaged_and_hostile_stores(tiny_engine: Engine, tmp_path: Path) -> None:
    whole = tmp_path / "whole.zarr"
    tiny_engine.extract(IMAGES[:1], whole, **OPTIONS)
    image, key = Path("images/0000000"), Path("images/0000000/key@1")
    chunk = key / "c/0/0/0"

    def shape(data: Any) -> None:
        data["shape"] = [1 << 20, 1 << 20, 1 << 12]
        data["chunk_grid"]["configuration"]["chunk_shape"] = data["shape"]

    def codec(data: Any) -> None:
        data["codecs"].append({"name": "zstd", "configuration": {"level": 0, "checksum": False}})

    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda p: (p / chunk).write_bytes(b"x" * 99), "key@1 is damaged: .*; delete .* and run the extraction again"),
        (lambda p: (p / chunk).unlink(), "key@1 is damaged: 1 of its chunks are missing; delete"),
        (lambda p: edit(p / key / "zarr.json", shape), "is damaged: it is float32"),
        (lambda p: edit(p / key / "zarr.json", codec), "not compressed"),
        (lambda p: edit(p / key / "zarr.json", lambda d: d.update(data_type="int64")), "is damaged: it is int64"),
        (lambda p: (p / key / "zarr.json").write_text("{"), "not a Zarr array that can be read"),
        (lambda p: (p / image / "zarr.json").write_text("[" * 100_000), "not a Zarr group that can be read"),
        (lambda p: os.truncate(p / image / "zarr.json", 2 << 20), "expected at most 1,048,576"),
        (lambda p: shutil.rmtree(p / image / "pixels"), r"has no zarr\.json"),
        (
            lambda p: edit(p / image / "zarr.json", lambda d: d["attributes"].update(image_size=[1 << 40, 9])),
            "no image",
        ),
        (lambda p: edit(p / image / "zarr.json", lambda d: d["attributes"].update(image_size=[4, 4])), "is damaged"),
        (lambda p: edit(p / image / "zarr.json", lambda d: d["attributes"].update(patch=-8)), "patch -8"),
        (lambda p: edit(p / image / "zarr.json", lambda d: d["attributes"].update(name=3)), "has no name"),
        (lambda p: edit(p / image / "zarr.json", lambda d: d["attributes"].update(model="x")), "is foreign: its model"),
        (lambda p: edit(p / "zarr.json", lambda d: d["attributes"]["facetrt"].update(format=9)), "has format 9"),
        (
            lambda p: edit(p / "zarr.json", lambda d: d["attributes"]["facetrt"].update(facets=["../x"])),
            "its facets is",
        ),
        (lambda p: edit(p / "zarr.json", lambda d: d["attributes"]["facetrt"].update(load_size=-1)), "load_size is -1"),
        (lambda p: edit(p / "zarr.json", lambda d: d["attributes"]["facetrt"].pop("model")), "its model is None"),
        (lambda p: edit(p / "zarr.json", lambda d: d["attributes"].clear()), "not a feature store of facetrt"),
        (lambda p: edit(p / "zarr.json", lambda d: d["attributes"].update(skipped=[1])), "whether it is complete"),
        (lambda p: shutil.rmtree(p / "images"), "images cannot be read"),
    ]
    for number, (damage, message) in enumerate(cases):
        copy = Path(shutil.copytree(whole, tmp_path / f"{number}.zarr"))
        damage(copy)
        with pytest.raises(InputError, match=message):
            FeatureStore.open(copy)[0]
    with pytest.raises(MissingFileError, match="does not exist"):
        FeatureStore.open(tmp_path / "none")


def test_a_pipe_is_no_store_and_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    os.mkfifo(tmp_path / "store" / "zarr.json")
    assert not is_store(tmp_path / "store")
    with pytest.raises(InputError, match="is not a feature store of facetrt"):
        FeatureStore.open(tmp_path / "store")


def test_foreign_folders_are_no_images(tiny_engine: Engine, path: Path) -> None:
    tiny_engine.extract(IMAGES[:2], path, **OPTIONS)
    for name in ("1", "00000001", "0000007.tmp", "x"):
        (path / "images" / name).mkdir()
    (path / "images" / "0000005").symlink_to(path / "images" / "0000000")
    assert FeatureStore.open(path).numbers == [0, 1]


def test_a_missing_zarr_names_the_extra(tiny_engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'facetrt\[cpu\]'"):
        tiny_engine.extract(IMAGES, path)
    assert not path.exists()


def test_zarr_is_imported_only_when_it_is_needed() -> None:
    code = "import sys, facetrt.engine, facetrt.engine.cli.tasks; sys.exit('zarr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
