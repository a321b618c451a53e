from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from facetrt.engine import BundleError, Engine, InputError, MissingFileError
from facetrt.engine.backends.choice import check_exact
from facetrt.engine.backends.run_options import Precision
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.bundle.positional import TableRule
from facetrt.export.mending import write_manifest

ARCHITECTURE = {"dim": 48, "depth": 3, "heads": 3, "patch": 8, "trained_grid": 6, "prefix": 1}


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, **changes: object) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(data | changes))


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Another content, which the manifest states."""
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(data)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit(bundle, files=files | {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}})


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


def test_a_link_to_a_bundle_and_links_that_stay_inside(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    (copy / "plans").mkdir()
    (copy / "encoder.onnx").rename(copy / "plans" / "moved")
    (copy / "encoder.onnx").symlink_to(Path("plans") / "moved")
    assert Bundle.open(tmp_path / "link").manifest.model == "tiny"


@pytest.mark.parametrize("name", ["encoder.onnx", "manifest.json", "kernels", "plans", "plans/unlisted"])
@pytest.mark.parametrize("target", ["outside", "/nowhere", "itself"])
def test_links_that_leave_or_loop(copy: Path, tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "outside").mkdir()
    if target == "outside" and name in ("encoder.onnx", "manifest.json"):
        (copy / name).rename(tmp_path / "outside" / name)
        target = f"outside/{name}"
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to((copy / name) if target == "itself" else tmp_path / target)
    with pytest.raises((BundleError, MissingFileError), match=r"a link that leads|is no regular file"):
        Bundle.open(copy)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("name", ["encoder.onnx", "positional.npy", "manifest.json"])
@pytest.mark.parametrize("make", [fifo, bound_socket, Path.mkdir])
def test_special_files_are_not_opened(copy: Path, name: str, make: Callable[[Path], None]) -> None:
    (copy / name).unlink()
    here = Path.cwd()
    os.chdir(copy)  # a socket's path may not be long
    try:
        make(Path(name))
    finally:
        os.chdir(here)
    with pytest.raises(BundleError, match="is no regular file"):
        Bundle.open(copy)


def test_a_file_that_grows_while_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (copy / "encoder.onnx").stat().st_size
    opened = os.open

    def grow(path: str | Path, flags: int, *more: int) -> int:
        if Path(path).name == "encoder.onnx" and Path(path).stat().st_size == size:
            with (copy / "encoder.onnx").open("ab") as file:
                file.write(b"more")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", grow)
    with pytest.raises(BundleError, match="changed while it was read"):
        Bundle.open(copy)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': True, 'shape': (6, 6, 48), }", "Fortran order"),
        ("{'descr': '>f4', 'fortran_order': False, 'shape': (6, 6, 48), }", "is >f4"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (6, 6, 48), }", "is object"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 48), }", r"\(99999999999, 48\)"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-6, -6, 48), }", r"-6"),
        ("{'descr': '<f4', 'fortran_order': False}", "is not a NumPy array"),
        ("(" * 60, "is not a NumPy array"),
    ],
)
def test_tables_whose_header_lies(copy: Path, header: str, message: str) -> None:
    data = npy(np.zeros((6, 6, 48), np.float32))
    replace_file(copy, "positional.npy", data[:10] + header.ljust(117).encode() + b"\n" + data[128:])
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_a_table_that_is_not_finite(copy: Path) -> None:
    replace_file(copy, "positional.npy", npy(np.full((6, 6, 48), np.nan, np.float32)))
    with pytest.raises(BundleError, match="not finite"):
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
        ({"architecture": ARCHITECTURE | {"dim": 65536}}, r"architecture\.dim is 65536: expected 1 to 16,384"),
        ({"architecture": ARCHITECTURE | {"depth": 65536}}, r"architecture\.depth is 65536"),
        ({"architecture": ARCHITECTURE | {"heads": 5}}, "which does not divide dim"),
        ({"size": [1 << 40, 64]}, r"expected \[height, width\], at most"),
        ({"facets": ["key@1", "key@1"]}, "lists a facet twice"),
        ({"facets": ["key@3"]}, "a layer of 0 to 2"),
        ({"saliency_heads": [3]}, "some of the heads 0 to 2"),
        ({"precision": "auto"}, "precision 'auto': expected fp32, fp16, bf16"),
        ({"normalisation": {"mean": [0.5], "std": [1, 1, 1]}}, "expected three finite numbers"),
        ({"model": "\ud800"}, "which is no text"),
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
    replace_file(copy, "encoder.onnx", b"not a graph")
    with pytest.raises(BundleError, match="the encoder's graph has"):
        Engine.open(copy)


def test_a_manifest_that_means_another_graph(copy: Path) -> None:
    edit(copy, size=[64, 64])
    with pytest.raises(BundleError, match=r"has the inputs 'cols, images, .* the manifest means images;"):
        Bundle.open(copy)


def test_a_bundle_of_the_schema_before(copy: Path) -> None:
    edit(copy, schema=2)
    with pytest.raises(BundleError, match="has schema 2; this version of facetrt reads schemas 3 to 5: export again"):
        Bundle.open(copy)


@pytest.fixture
def large(copy: Path) -> Path:
    """With kernels for two architectures and a file whose hash is wrong."""
    files = json.loads((copy / "manifest.json").read_text())["files"]
    for name in ("kernels/sm_90/kernels.json", "kernels/sm_90/a.cubin", "kernels/sm_100/kernels.json", "plans/p.plan"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"data")
        files[name] = {"bytes": 4, "sha256": hashlib.sha256(b"data").hexdigest()}
    edit(copy, files=files)
    return copy


def test_plans_and_kernels_are_read_at_use(large: Path) -> None:
    bundle = Bundle.open(large)
    assert bundle.kernel_architectures() == ["sm_90", "sm_100"]
    assert bundle.read("kernels/sm_90/a.cubin") == b"data"
    (large / "kernels/sm_90/a.cubin").write_bytes(b"DATA")
    bundle = Bundle.open(large)  # its size is right, which is all that opening looks at
    with pytest.raises(BundleError, match=r"a\.cubin: field 'sha256' differs"):
        bundle.read("kernels/sm_90/a.cubin")
    with pytest.raises(BundleError, match=r"does not list plans/other\.plan"):
        bundle.read("plans/other.plan")
    (large / "plans/p.plan").write_bytes(b"longer")
    with pytest.raises(BundleError, match=r"p\.plan: field 'bytes' differs"):
        bundle.read("plans/p.plan")
    with pytest.raises(BundleError, match=r"p\.plan: field 'bytes' differs"):
        Bundle.open(large)


@pytest.mark.parametrize(
    ("name", "command"),
    [("kernels/sm_90/a.cubin", "--kernels sm_90"), ("plans/p.plan", "--target tensorrt")],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_what_is_damaged_names_the_command_that_mends_it(large: Path, name: str, command: str, damage: str) -> None:
    (large / name).write_bytes({"missing": b"", "truncated": b"dat", "changed": b"DATA"}[damage])
    if damage == "missing":
        (large / name).unlink()
    with pytest.raises(BundleError, match=f"{Path(name).name}.*copy it again, or .*'facetrt export {large} {command}'"):
        Bundle.open(large).read(name)
    assert Bundle.open(large, complete=False).kernel_architectures() == ["sm_90", "sm_100"]


def test_an_incomplete_bundle_has_its_encoder_and_no_links(large: Path, tmp_path: Path) -> None:
    (large / "positional.npy").rename(tmp_path / "moved.npy")
    with pytest.raises(BundleError, match=r"positional\.npy is missing.*export or copy the bundle again"):
        Bundle.open(large, complete=False)
    (tmp_path / "moved.npy").rename(large / "positional.npy")
    (large / "kernels" / "sm_90").rename(tmp_path / "elsewhere")
    (large / "kernels" / "sm_90").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="leads outside the bundle"):
        Bundle.open(large, complete=False)


def test_what_a_killed_build_left_is_ignored_elsewhere_not(large: Path) -> None:
    (large / "plans/.building-1").mkdir()
    (large / "plans/.building-1/half.plan").write_bytes(b"half")
    assert Bundle.open(large).manifest.plans == {}
    (large / "planned").write_bytes(b"x")
    with pytest.raises(BundleError, match="planned does not belong"):
        Bundle.open(large)


def test_plans_that_are_no_files_or_no_plans(large: Path) -> None:
    record = {
        "encoder_sha256": "0", "builder": "tensorrt", "version": "11.4.0.106", "architectures": ["sm_90"], "flags": [],
        "precision": "fp32", "profile": {"images": [[1, 8, 8, 3]] * 3}, "parity": {"cases": [], "outputs": {}},
        "layers": 1, "attention": 2, "fused_attention": 0, "scratch_bytes": [7],
    }  # fmt: skip
    edit(large, plans={"plans/p.plan": record})
    assert Bundle.open(large).manifest.plans["plans/p.plan"].max_batch == 1
    edit(large, plans={"plans/q.plan": record})
    with pytest.raises(BundleError, match=r"describes the plans \['plans/q\.plan'\], but does not list"):
        Bundle.open(large)
    edit(large, plans={"plans/p.plan": {**record, "profile": {"images": [[1, 8]]}}})
    with pytest.raises(BundleError, match="expected three shapes of four numbers"):
        Bundle.open(large)
    edit(large, plans={"plans/p.plan": {**record, "builder": "foundry"}})
    with pytest.raises(BundleError, match="builder is 'foundry': expected tensorrt or tensorrt-rtx"):
        Bundle.open(large)
    for names in ([], ["sm_90", "../sm_90"]):
        edit(large, plans={"plans/p.plan": {**record, "architectures": names}})
        with pytest.raises(BundleError, match=r"architectures are \[.*expected names like sm_90"):
            Bundle.open(large)
    edit(large, plans={"plans/p.plan": {**record, "surprise": 1}})
    with pytest.raises(BundleError, match="surprise"):
        Bundle.open(large)


def test_the_manifest_is_replaced_whole(large: Path) -> None:
    from dataclasses import replace

    manifest = Bundle.open(large).manifest
    write_manifest(large, replace(manifest, description="another"))
    assert Bundle.open(large).manifest.description == "another"
    assert sorted(path.name for path in (large / "plans").iterdir()) == ["p.plan"]


def test_schema_4_is_of_models_with_cls_and_no_registers(copy: Path) -> None:
    data = json.loads((copy / "manifest.json").read_text())
    for name in ("family", "rotation", "positional_rule"):
        del data[name]
    del data["architecture"]["prefix"]
    (copy / "manifest.json").write_text(json.dumps(data | {"schema": 4}))
    manifest = Bundle.open(copy).manifest
    assert (manifest.schema, manifest.architecture.prefix, manifest.table_rule) == (5, 1, TableRule.SCALE)


def test_schema_3_is_read_and_what_it_did_not_measure_is_said(copy: Path) -> None:
    data = json.loads((copy / "manifest.json").read_text())
    del data["precisions"], data["ranges"]
    (copy / "manifest.json").write_text(json.dumps(data | {"schema": 3}))
    bundle = Bundle.open(copy)
    assert bundle.manifest.schema == 5 and bundle.manifest.precisions == {} and bundle.manifest.ranges.logits == []
    check_exact(bundle, Precision.FP32)
    assert bundle.manifest.plans == {}
    with pytest.raises(InputError, match=r"bf16 is was not measured .*export it again, .*--allow-inexact.*info"):
        check_exact(bundle, Precision.BF16)


def test_plans_of_schema_3_are_read(large: Path) -> None:
    record = {
        "encoder_sha256": "0", "tensorrt": "11.4.0.106", "architecture": "sm_90", "flags": [], "precision": "fp32",
        "profile": {"images": [[1, 8, 8, 3]] * 3}, "parity": {"cases": [], "outputs": {}}, "layers": 9,
        "fused_attention": 3,
    }  # fmt: skip
    data = json.loads((large / "manifest.json").read_text())
    del data["precisions"], data["ranges"]
    (large / "manifest.json").write_text(json.dumps(data | {"schema": 3, "plans": {"plans/p.plan": record}}))
    plan = Bundle.open(large).manifest.plans["plans/p.plan"]
    assert (plan.builder, plan.version, plan.architectures) == ("tensorrt", "11.4.0.106", ["sm_90"])
    assert plan.attention == plan.fused_attention == 3 and plan.scratch_bytes == []
    for broken in ([], {"plans/p.plan": 1}, {"plans/p.plan": {}}):
        (large / "manifest.json").write_text(json.dumps(data | {"schema": 3, "plans": broken}))
        with pytest.raises(BundleError, match="plans"):
            Bundle.open(large)
