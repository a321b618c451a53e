"""What half precision loses, and what stays in fp32 so that it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import facets, registered
from trained_like import SPEC, trained_like

from facetrt.engine import ParityError
from facetrt.engine.backends.run_options import Precision
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import Fp32Parts, Manifest, PrecisionRecord
from facetrt.export import exporting
from facetrt.export import precision as module
from facetrt.export.export_options import ExportOptions, GraphPrecision
from facetrt.export.exporting import emulation, export_bundle, find_parts, load_model, make_sample, measure_bf16
from facetrt.export.precision import hold_contract, measure_ranges

OPTIONS = ExportOptions(stride=8, precision=GraphPrecision.BF16)
Setting = tuple[Any, ExportOptions, Manifest, module.Sample]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with registered(SPEC):
        yield tmp_path_factory.mktemp("precision")


def setting(folder: Path, kind: str, **changes: Any) -> Setting:
    np.savez(folder / f"{kind}.npz", **trained_like(kind))
    vit, checkpoint = load_model(SPEC, folder / f"{kind}.npz")
    options = exporting.resolve_options(SPEC, replace(OPTIONS, **changes))
    manifest = exporting._manifest(SPEC, options, checkpoint)
    return vit, options, manifest, make_sample(vit, SPEC, manifest)


def test_what_is_kept_in_fp32_is_the_cheapest_that_holds(folder: Path) -> None:
    vit, options, manifest, sample = setting(folder, "massive")
    record = find_parts(vit, SPEC, options, manifest, sample)
    assert record.holds and record.fp32.cls_attention and 0 < len(record.fp32.blocks) < SPEC.depth
    plain = emulation(vit, SPEC, options, manifest, sample)(Fp32Parts())
    assert not plain.holds and "relative_frobenius" in plain.missed


def test_a_half_precision_graph_has_those_parts_in_fp32(folder: Path) -> None:
    np.savez(folder / "m.npz", **trained_like("massive"))
    manifest = export_bundle(SPEC.name, folder / "massive", OPTIONS, weights=folder / "m.npz")
    kept = manifest.fp32_parts("bf16")
    graph = onnx.load(folder / "massive" / "encoder.onnx").graph
    kinds = {t.name: t.data_type for t in graph.initializer if t.name.endswith(".bias") and "norm" not in t.name}
    for block in range(SPEC.depth - 1):
        expected = onnx.TensorProto.FLOAT if block in kept.blocks else onnx.TensorProto.BFLOAT16
        assert kinds[f"blocks.{block}.mlp.fc1.bias"] == kinds[f"blocks.{block}.qkv.bias"] == expected
    assert kinds[f"blocks.{SPEC.depth - 1}.cls_key.bias"] == onnx.TensorProto.FLOAT
    assert Bundle.open(folder / "massive").manifest.precisions["bf16"].holds


def test_fp16_that_overflows_is_refused_with_the_reason(folder: Path) -> None:
    params, last = trained_like("sharp1"), SPEC.depth - 1
    for i in range(last):  # no block alone is to blame
        params[f"blocks.{i}.mlp.fc1.weight"] *= np.float32(1e5)
    params[f"blocks.{last}.attn.qkv.bias"] += np.float32(1e6)
    np.savez(folder / "large.npz", **params)
    options = replace(OPTIONS, precision=GraphPrecision.FP16, facets=facets(f"key@{last}"), saliency=False)
    with pytest.raises(ParityError, match=r"fp16 misses its contract with these weights: .*infinite.*--precision fp32"):
        export_bundle(SPEC.name, folder / "large", options, weights=folder / "large.npz")
    assert not (folder / "large").exists()


def test_blocks_that_do_most_harm_are_kept_first(folder: Path) -> None:
    _, _, manifest, _ = setting(folder, "sharp1")
    depth = manifest.architecture.depth

    def measure(parts: Fp32Parts) -> PrecisionRecord:
        errors = [{1: 0.02, 3: 0.009}.get(b, 0.001) for b in range(depth) if b not in parts.blocks]
        error = float(np.linalg.norm(errors))
        missed = "too much" if error > 0.01 or not parts.cls_attention else ""
        return PrecisionRecord(missed, "", parts, {n: {"relative_frobenius": error} for n in manifest.outputs}, None)

    assert hold_contract(Precision.BF16, manifest, measure, measure).fp32 == Fp32Parts(True, [1, 3])
    worse = hold_contract(Precision.BF16, manifest, lambda parts: replace(measure(parts), missed="always"), measure)
    assert worse.fp32 == Fp32Parts() and worse.missed == "always"


def test_without_openvino_an_fp32_bundle_is_measured_by_emulated_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, options, manifest, sample = setting(folder, "sharp1", precision=GraphPrecision.FP32)
    monkeypatch.setattr(exporting, "openvino_runs_bf16", lambda: False)
    monkeypatch.setattr(exporting, "_opened", lambda folder, manifest: None)
    record = measure_bf16(folder, manifest, vit, SPEC, options, sample)
    assert record.holds and record.measured == module.EMULATED and record.relative_time is None
    assert 1e-3 < max(figures["relative_frobenius"] for figures in record.outputs.values()) <= 1e-2


def test_ranges_tell_peaky_attention_and_massive_activations(folder: Path) -> None:
    found = {}
    for kind in ("sharp1", "sharp3", "massive"):
        vit, _, manifest, sample = setting(folder, kind)
        found[kind] = measure_ranges(exporting._reference(vit, SPEC, manifest), sample.images[:1])
    last = SPEC.depth - 1
    assert found["sharp3"].logits[last] == pytest.approx(9 * found["sharp1"].logits[last], rel=0.01)
    assert found["sharp3"].logits[:last] == found["sharp1"].logits[:last]
    assert max(found["massive"].activations) > 5 * max(found["sharp1"].activations)


def test_emulated_rounding_loses_about_what_a_half_precision_network_does(folder: Path) -> None:
    vit, options, manifest, _ = setting(folder, "sharp1")
    table = exporting.position_tables(vit, manifest).positional
    assert table is not None
    inputs = (
        torch.randint(0, 256, (12, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.from_numpy(table)[None],
        *(torch.arange(6),) * 2,
    )
    parts = Fp32Parts(cls_attention=True, blocks=[2])
    with torch.no_grad():
        single = replace(options, precision=GraphPrecision.FP32)
        real, emulated, exact = (
            exporting.make_encoder(vit, SPEC, chosen, manifest, fp32=parts, emulated=flag)(*inputs)
            for chosen, flag in ((options, False), (options, True), (single, False))
        )
    for a, b, c in zip(real, emulated, exact, strict=True):
        assert 0.7 < (b - c).norm() / (a - c).norm() < 2  # eager torch adds biases before it rounds, the graph after
