from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import export_tiny, facets, photo, require_openvino

from facetrt.engine import Engine, Features, InputError, MissingDependencyError, OutputError
from facetrt.engine.backends import openvino as module
from facetrt.engine.backends import openvino_islands
from facetrt.engine.backends.compiled_cache import CompiledCache
from facetrt.engine.backends.parity import compare
from facetrt.engine.bundle.bundle import read_manifest
from facetrt.engine.bundle.manifest import Fp32Parts
from facetrt.export.export_options import GraphPrecision

require_openvino()


@pytest.fixture
def bf16() -> None:
    if not module.runs_bf16():
        pytest.skip("this processor has no bf16 arithmetic")


def encode(bundle: Path, **options: object) -> object:
    with Engine.open(bundle, backend="openvino", **options) as engine:  # type: ignore[arg-type]
        return engine.encode([photo(48, 60)], load_size=None)[0]["key@2"].tobytes()


@pytest.mark.usefixtures("bf16")
def test_bf16_keeps_its_islands(tiny_bundle: Path) -> None:
    with Engine.open(tiny_bundle, precision="bf16") as engine:
        engine.encode([photo(48, 60)], load_size=None)
        nodes = engine._encoder.backend._general.compiled.get_runtime_model().get_ops()  # type: ignore[attr-defined]
    kinds = {(n.get_rt_info()["layerType"].value, n.get_rt_info()["runtimePrecision"].value) for n in nodes}
    assert ("Convolution", "f32") in kinds and ("FullyConnected", "bf16") in kinds


def with_record(bundle: Path, folder: Path, missed: str, fp32: Fp32Parts) -> Path:
    """The bundle, as if that had been measured of bf16."""
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    record = replace(manifest.precisions["bf16"], missed=missed, fp32=fp32)
    changed = replace(manifest, precisions={**manifest.precisions, "bf16": record})
    (folder / "manifest.json").write_text(changed.to_json())
    return folder


@pytest.mark.usefixtures("bf16")
def test_bf16_outside_its_contract_runs_only_if_one_insists(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_record(tiny_bundle, tmp_path / "inexact", "key@2 has relative_frobenius 0.03 > 0.01", Fp32Parts())
    with pytest.raises(InputError, match=r"key@2 has relative_frobenius 0.03 > 0.01, .* precision fp32.*--allow-in"):
        Engine.open(bundle, precision="bf16")
    with Engine.open(bundle, precision="fastest") as engine:
        assert engine.precision == "fp32"
    with Engine.open(bundle, precision="bf16", allow_inexact=True) as engine:
        assert engine.precision == "bf16"


@pytest.mark.usefixtures("bf16")
def test_blocks_and_cls_attention_stay_in_fp32(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = with_record(tiny_bundle, tmp_path / "kept", "", Fp32Parts(cls_attention=True, blocks=[0, 1]))
    errors = {}
    with Engine.open(tiny_bundle) as exact:
        expected = exact.encode([photo(96, 96)], load_size=None)[0]
    for name, path, parts in (("plain", tiny_bundle, Fp32Parts()), ("kept", bundle, None)):
        plain = with_record(path, tmp_path / name / "b", "", parts) if parts else path
        with Engine.open(plain, precision="bf16") as engine:
            got = engine.encode([photo(96, 96)], load_size=None)[0]
            metrics = compare(outputs(got), outputs(expected))
            errors[name] = {output: figures["relative_frobenius"] for output, figures in metrics.items()}
    for output in ("key@1", "key@2", "cls_attention"):  # key@2 is of block 2, which reads exact tokens
        assert errors["kept"][output] < 0.5 * errors["plain"][output]
    assert errors["kept"]["key@1"] < 1e-3 < errors["plain"]["key@1"]


def outputs(features: Features) -> dict[str, np.ndarray]:
    assert features.attention is not None
    return {**features.tokens, "cls_attention": features.attention.ravel()}


@pytest.mark.usefixtures("bf16")
def test_an_openvino_that_does_not_keep_them_is_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(openvino_islands.KEEP_FP32, "name", "UnknownMark")
    with pytest.raises(Exception, match=r"does not keep (the patch convolution|a product) in fp32"):
        encode(tiny_bundle, precision="bf16")


def test_bf16_on_a_processor_without_it(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "processor_flags", lambda: {"avx2", "avx512f"})
    with pytest.raises(InputError, match="has no bf16 arithmetic: use precision fp32, or fastest"):
        Engine.open(tiny_bundle, precision="bf16")
    with Engine.open(tiny_bundle, precision="fastest") as engine:
        assert (engine.backend, engine.precision) == ("onnxruntime", "fp32")


def test_half_precision_bundles_are_refused(work: Path, tiny_weights: Path) -> None:
    bundle = export_tiny(tiny_weights, work / "half-openvino", facets=facets("key@1"), precision=GraphPrecision.FP16)
    with pytest.raises(InputError, match="openvino runs fp32 bundles in fp32 or bf16; this one is fp16"):
        Engine.open(bundle, backend="openvino")


def test_openvino_missing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for options in ({"backend": "openvino"}, {"precision": "bf16"}, {"hint": "throughput"}):
        with pytest.raises(MissingDependencyError, match=r"pip install 'facetrt\[openvino\]'"):
            Engine.open(tiny_bundle, **options)  # type: ignore[arg-type]
    with Engine.open(tiny_bundle, precision="fastest") as engine:
        assert engine.precision == "fp32"


def test_the_cache_is_filled_once_and_used_afterwards(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "compiled"
    first = encode(tiny_bundle, cache=cache)
    (entry,) = cache.iterdir()
    monkeypatch.setattr(module.OpenVinoBackend, "_compile_anew", None)  # calling it would fail
    assert encode(tiny_bundle, cache=cache) == first
    assert [path.name for path in cache.iterdir()] == [entry.name]


@pytest.mark.usefixtures("bf16")
def test_another_precision_hint_or_graph_is_another_entry(
    tiny_bundle: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "compiled"
    other = export_tiny(tiny_weights, tmp_path / "other", facets=facets("key@2"))
    encode(tiny_bundle, cache=cache)
    encode(tiny_bundle, cache=cache, precision="bf16")
    encode(tiny_bundle, cache=cache, hint="throughput")
    encode(tiny_bundle, cache=cache, threads=1)
    encode(other, cache=cache)
    assert len(list(cache.iterdir())) == 5


def test_a_damaged_entry_is_replaced_with_a_warning(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "compiled"
    first = encode(tiny_bundle, cache=cache)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="is damaged: compiling anew"):
        assert encode(tiny_bundle, cache=cache) == first
    monkeypatch.setattr(module.OpenVinoBackend, "_compile_anew", None)  # calling it would fail
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(tiny_bundle, cache=cache) == first  # the entry is whole again


def test_two_processes_fill_the_same_cache_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "compiled"
    program = (
        "import sys\nfrom facetrt.engine import Engine\n"
        "with Engine.open(sys.argv[1], backend='openvino', cache=sys.argv[2]) as engine:\n"
        "    engine._encoder.backend.activate()\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tiny_bundle), str(cache)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert len(list(cache.iterdir())) == 1  # one whole entry, nothing temporary
    assert encode(tiny_bundle, cache=cache) == encode(tiny_bundle)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="choose another cache folder, or none"):
        CompiledCache(tmp_path / "file", {"encoder": "0"}).write(b"compiled")
    assert CompiledCache(tmp_path / "nowhere", {"encoder": "0"}).read() is None


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"^the compiled encoder cannot be kept in"):
        encode(tiny_bundle, cache=tmp_path / "file")
