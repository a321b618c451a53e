from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from facetrt.engine import BundleError, Engine, MissingFileError
from facetrt.engine.bundle import Bundle, Manifest


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, **changes: object) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(data | changes))


def test_round_trip_and_relocation(copy: Path) -> None:
    manifest = Bundle.open(copy).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.facets == ["key@1", "query@1", "key@2", "token@2"] and manifest.dynamic


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="is not a bundle"):
        Engine.open(tmp_path)
    with pytest.raises(MissingFileError, match="is not a bundle"):
        Engine.open(tmp_path / "nowhere")


def test_missing_file(copy: Path) -> None:
    (copy / "encoder.onnx").unlink()
    with pytest.raises(BundleError, match=r"encoder\.onnx is missing"):
        Bundle.open(copy)


@pytest.mark.parametrize(("change", "field"), [(b"x", "bytes"), (None, "sha256")])
def test_edited_file(copy: Path, change: bytes | None, field: str) -> None:
    path = copy / "encoder.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) + (change or b""))
    with pytest.raises(BundleError, match=f"encoder.onnx: field '{field}' differs"):
        Bundle.open(copy)


def test_foreign_file(copy: Path) -> None:
    (copy / "extra.bin").write_bytes(b"1")
    with pytest.raises(BundleError, match=r"extra\.bin does not belong"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["../encoder.onnx", "/etc/passwd", "a/../../b", "c:\\x", ""])
def test_paths_that_escape(copy: Path, name: str) -> None:
    edit(copy, files={name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(copy)


def test_links_that_escape(copy: Path, tmp_path: Path) -> None:
    (copy / "encoder.onnx").rename(tmp_path / "elsewhere.onnx")
    (copy / "encoder.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="leads outside the bundle"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"surprise": 1}, "surprise"),
        ({"stride": "4"}, "field stride is '4'"),
        ({"stride": 3}, "stride 3 does not divide"),
        ({"facets": [1]}, r"field facets\[0\] is 1"),
        ({"facets": []}, "no facets"),
        ({"size": [224]}, r"expected \[height, width\]"),
        ({"size": [2, 2]}, "smaller than one patch"),
        ({"architecture": {"dim": 48}}, "missing or unknown fields"),
    ],
)
def test_manifests_that_do_not_fit(copy: Path, changes: dict, message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 5000])
def test_manifests_that_are_not_json_objects(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(copy)


def test_oversized_manifest(copy: Path) -> None:
    (copy / "manifest.json").write_text(" " * ((1 << 20) + 1))
    with pytest.raises(BundleError, match="expected at most"):
        Bundle.open(copy)


def test_a_graph_that_is_not_onnx(copy: Path) -> None:
    import hashlib

    data = b"not a graph"
    (copy / "encoder.onnx").write_bytes(data)
    files = json.loads((copy / "manifest.json").read_text())["files"]
    files["encoder.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(copy, files=files)
    with Engine.open(copy) as engine, pytest.raises(BundleError, match="the encoder cannot be loaded"):
        engine._encoder.backend.activate()


def test_a_graph_cannot_read_files_outside_the_bundle(copy: Path, tmp_path: Path) -> None:
    import hashlib

    import onnx

    model = onnx.load(copy / "encoder.onnx")
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", str(tmp_path / "secret.bin")
    data = model.SerializeToString()
    (copy / "encoder.onnx").write_bytes(data)
    files = json.loads((copy / "manifest.json").read_text())["files"]
    files["encoder.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(copy, files=files)
    with Engine.open(copy) as engine, pytest.raises(BundleError, match="the encoder cannot be loaded"):
        engine._encoder.backend.activate()


def test_a_manifest_that_means_another_graph(copy: Path) -> None:
    edit(copy, size=[64, 64])
    with Engine.open(copy) as engine, pytest.raises(BundleError, match=r"has inputs \['cols', .* the manifest means"):
        engine._encoder.backend.activate()
