"""Riders: attention that takes keys and values of the patch grid's tokens alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import TINY, export_tiny, facets, photo, registered, require_openvino
from helpers_backbones import tiny, weights
from helpers_gpu import FakeGpu, install
from typer.testing import CliRunner

from facetrt.engine import BundleError, Engine, InputError
from facetrt.engine.backends.flavours import RTX
from facetrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from facetrt.engine.backends.openvino import OpenVinoBackend
from facetrt.engine.backends.run_options import BackendName, DeviceName, Precision, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import Checkpoint, Fp32Parts, Manifest, PrecisionRecord
from facetrt.engine.bundle.positional import Cells, positional_table
from facetrt.engine.cli.main import program
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder
from facetrt.export import exporting
from facetrt.export.export_options import ExportOptions, GraphPrecision
from facetrt.export.exporting import export_bundle, load_model, resolve_options
from facetrt.export.models import ModelSpec
from facetrt.export.plan_builder import PlanBuilder, Settings
from facetrt.export.plan_graph import prepare_graph, profile_shapes
from facetrt.export.plans import PlanOptions, build_plan
from facetrt.kernels.errors import BackendError

FROM_BLOCK = 1
NAMES = "key@1,query@1,key@2,token@2"
SIZES = [(61, 83), (104, 40)]
DINOV3 = tiny("dinov3_vits16")  # registers, and queries and keys that rotate


@pytest.fixture(scope="module")
def bundle(work: Path, tiny_weights: Path) -> Path:
    return export_tiny(tiny_weights, work / "riders", riders=FROM_BLOCK, facets=facets(NAMES), measure=False)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    with Engine.open(bundle, threads=1) as opened:
        yield opened


def direct(path: Path, pixels: np.ndarray, from_block: int) -> dict[str, np.ndarray]:
    """The tiny model with riders, written out in float64."""
    vit = load_model(TINY, path)[0].double()
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in TINY.normalisation)
    image = (torch.from_numpy(pixels).permute(2, 0, 1).double() / 255 - mean) / std
    cells = torch.nn.functional.conv2d(image[None], vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=4)
    grid_h, grid_w = cells.shape[2:]
    trained = vit.pos_embed[0, 1:].detach().float().numpy().reshape(6, 6, -1)
    table = torch.from_numpy(positional_table(trained, Cells(pixels.shape[:2], 8, 4))).double()
    x = torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], (cells[0].permute(1, 2, 0) + table).flatten(0, 1)])
    own = [0] + [1 + y * grid_w + x for y in range(0, grid_h, 2) for x in range(0, grid_w, 2)]
    found = {}
    for layer, block in enumerate(vit.blocks):
        query, key, value = block.attn.qkv(block.norm1(x)).chunk(3, dim=1)
        found |= {f"query@{layer}": query, f"key@{layer}": key}
        q, k, v = (part.reshape(len(x), 3, 16).transpose(0, 1) for part in (query, key, value))
        seen = own if layer >= from_block else list(range(len(x)))
        mixed = (q @ k[:, seen].transpose(1, 2) / 4).softmax(dim=2) @ v[:, seen]
        x = x + block.attn.proj(mixed.transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
        found[f"token@{layer}"] = x
    found["cls_attention"] = (q[:, :1] @ k.transpose(1, 2) / 4).softmax(dim=2)[:, 0, 1:].mean(dim=0)
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("size", SIZES)
def test_the_graph_is_the_formula(tiny_weights: Path, engine: Engine, size: tuple[int, int]) -> None:
    expected = direct(tiny_weights, photo(*size), FROM_BLOCK)
    got = engine.encode([photo(*size)], load_size=None)[0]
    for name in NAMES.split(","):
        np.testing.assert_allclose(got.tokens[name], expected[name], atol=1e-4)
    assert got.attention is not None and got.attention.size == len(expected["key@1"]) - 1  # all cells, not carriers
    np.testing.assert_allclose(got.attention.ravel(), expected["cls_attention"], atol=1e-6)


def test_whole_patches_lose_nothing_and_riders_do(engine: Engine, tiny_engine: Engine) -> None:
    """At the patch's stride every cell is a carrier; before the first block that differs nothing does."""
    image = photo(61, 83)
    for stride in (8, 4):
        got, exact = (each.encode([image], load_size=None, stride=stride)[0] for each in (engine, tiny_engine))
        np.testing.assert_allclose(got["key@1"], exact["key@1"], atol=1e-5)
        off = np.abs(got["token@2"] - exact["token@2"]).max()
        assert off < 1e-4 if stride == 8 else off > 0.01


def test_openvino_runs_them_and_keeps_blocks_in_fp32(bundle: Path, engine: Engine) -> None:
    require_openvino()
    image = photo(61, 83)
    expected = engine.encode([image], load_size=None)[0]["token@2"]
    opened = Bundle.open(bundle)
    kept = {Precision.BF16: PrecisionRecord("", "", Fp32Parts(True, [FROM_BLOCK]), {}, None)}
    marked = replace(opened, manifest=replace(opened.manifest, precisions=kept))  # type: ignore[arg-type]
    for precision, error in ((Precision.FP32, 1e-4), (Precision.BF16, 0.1)):
        options = RunOptions(BackendName.OPENVINO, DeviceName.CPU, precision)
        try:
            OpenVinoBackend.check_supported(marked, options)
        except InputError:  # no bf16 here
            continue
        backend = OpenVinoBackend(marked, options)
        (got,) = Encoder(marked, backend).encode([image], EncodeOptions(None))
        backend.close()
        np.testing.assert_allclose(got["token@2"], expected, atol=error)


def test_a_rotating_model_of_one_size(tmp_path: Path) -> None:
    """What turns carriers is baked in; the export compares it with the torch model, and refuses what differs."""
    with registered(DINOV3):
        options = ExportOptions(riders=0, stride=8, size=(64, 80), facets=facets("key@1,token@2"), measure=False)
        manifest = export_bundle(DINOV3.name, tmp_path / "out", options, weights=weights(DINOV3, tmp_path))
    assert manifest.riders is not None and manifest.riders.deviation.outputs["token@2"]["mean_cosine"] < 0.9999
    values = {tensor.name: tensor for tensor in onnx.load(tmp_path / "out" / "encoder.onnx").graph.initializer}
    (carriers,) = (t for t in values.values() if list(t.dims) == [5 + 4 * 5])
    assert onnx.numpy_helper.to_array(carriers)[:8].tolist() == [0, 1, 2, 3, 4, 5, 7, 9]  # every second of nine


def test_carriers_are_the_cells_of_whole_patches() -> None:
    assert Cells((20, 24), 8, 4).carriers(1).tolist() == [0, 1, 3, 5, 11, 13, 15]  # of 4 × 5 cells
    assert Cells((20, 24), 8, 8).carriers(2).tolist() == list(range(2 + 2 * 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"riders": 0, "stride": 8}, "at stride 8 every cell of tiny is a patch of its own"),
        ({"riders": 2, "facets": facets("key@2")}, r"riders 2: .* need that of blocks 0 to 1 alone"),
        ({"riders": 0, "facets": facets("key@0"), "saliency": False}, "none of any block: leave riders out"),
        ({"riders": -1}, "riders"),
    ],
)
def test_riders_that_change_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_options(TINY, ExportOptions(**options))
    resolve_options(TINY, ExportOptions(riders=2, facets=facets("token@2")))


def test_the_bundle_says_what_it_is(bundle: Path, engine: Engine, tiny_engine: Engine) -> None:
    manifest = engine.manifest
    assert manifest.riders is not None and manifest.riders.from_block == FROM_BLOCK
    figures = manifest.riders.deviation.outputs
    assert set(figures) == set(manifest.outputs) and figures["key@1"]["p1_cosine"] > 0.999999
    assert 0.9 < figures["token@2"]["p1_cosine"] < figures["token@2"]["mean_cosine"] < 0.9999
    shown = " ".join(CliRunner().invoke(program(), ["info", str(bundle)]).output.split())
    assert "approximation" in shown and "riders from block 1 against the full network, worst of 5 images" in shown
    features = tiny_engine.encode([photo(48, 48)], load_size=None)[0]
    mine = engine.encode([photo(48, 48)], load_size=None)[0]
    assert (features.provenance.model, mine.provenance.model) == ("tiny", "tiny, riders from block 1")
    with pytest.raises(InputError, match=r"come from another bundle \(tiny\)"):
        engine.match(features, mine)


def test_manifests_with_and_without(bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Older ones do not know the field; one that hides it does not fit its graph."""
    old = json.loads((tiny_bundle / "manifest.json").read_text())
    del old["riders"]
    assert Manifest.from_json(json.dumps(old)).riders is None
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**data, "riders": None}))
    with pytest.raises(BundleError, match=r"has the inputs .*carriers"):
        Bundle.open(folder)
    for change, message in (({"from_block": 3}, "expected 0 to 2"), ({"from_block": "0"}, "riders.from_block")):
        with pytest.raises(BundleError, match=message):
            Manifest.from_json(json.dumps({**data, "riders": {**data["riders"], **change}}))
    with pytest.raises(BundleError, match="no cell lies between"):
        Manifest.from_json(json.dumps({**data, "stride": 8}))


def test_carriers_outside_of_the_tokens_are_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    backend = OnnxRuntimeBackend(opened, RunOptions())
    inputs = {"images": photo(48, 48)[None], **Encoder(opened, backend).grid_inputs((48, 48), step=1)}
    for wrong in ([0, 122], [-1], []):
        with pytest.raises(BackendError, match=r"carriers do not all lie in 0\.\.121"):
            backend.run({**inputs, "carriers": np.array(wrong, np.int64)})
    backend.close()


def test_the_command_and_its_words(tiny_weights: Path, tmp_path: Path) -> None:
    command = ["export", "tiny", "--weights", str(tiny_weights), "--facets", "key@2", "--no-measure", "--riders"]
    result = CliRunner().invoke(program(), [*command, "1", "--size", "64x64", "--out", str(tmp_path / "out")])
    shown = " ".join(result.output.split())
    assert result.exit_code == 0 and "riders from block 1 change it: key@2 keeps a mean cosine of 0.9" in shown


def test_a_plan_has_room_for_carriers(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine: FakeGpu = install(monkeypatch)
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    options = PlanOptions(
        opt_batch=1, max_batch=1, allow_unfused=True, min_size=(8, 8), opt_size=(24, 32), max_size=(40, 40)
    )
    _, record = build_plan(folder, options)
    assert record.profile["carriers"] == [[2], [13], [26]] and len(machine.tensorrt.fake.profiles) == 1
    assert record.parity.outputs["token@2"]["relative_frobenius"] <= 1e-4  # at stride 8, too


@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="the extra rtx is not installed")
@pytest.mark.parametrize(("spec", "size"), [(TINY, None), (DINOV3, (112, 96))], ids=["dynamic", "rotating-static"])
def test_tensorrt_fuses_attention_to_carriers(spec: ModelSpec, size: tuple[int, int] | None, tmp_path: Path) -> None:
    asked = ExportOptions(riders=1, stride=spec.patch // 2, size=size, precision=GraphPrecision.FP16)
    options = resolve_options(spec, replace(asked, facets=facets("key@1,token@2")))
    manifest = exporting._manifest(spec, options, Checkpoint("untrained", ""))
    exporting.write_files(tmp_path, spec.build(), spec, options, manifest)
    graph = prepare_graph((tmp_path / "encoder.onnx").read_bytes())
    shapes = profile_shapes(manifest, (1, 1, 1), ((64, 64), (112, 112), (224, 224)))
    newer = Settings(architectures=[name for name in RTX.architectures or () if name != "sm_75"])
    built = PlanBuilder(graph, RTX, lambda stage: None).build([shapes], newer)
    assert len(graph.attention) == 3 and built.unfused == ()
