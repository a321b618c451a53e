"""Attention in chunks of keys: what it computes, when it runs, and what runs where it cannot be exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import export_tiny, facets, photo, require_openvino

from facetrt.engine import Engine
from facetrt.engine.backends import openvino as module
from facetrt.engine.backends import openvino_chunks as chunks
from facetrt.engine.backends.openvino import OpenVinoBackend, import_openvino, shared_core
from facetrt.engine.backends.parity import compare_output

require_openvino()

HEADS, KEYS, WIDTH = 2, 203, 16
LONG_SIZE, SHORT_SIZE = (64, 68), (32, 32)  # 241 and 50 tokens


@pytest.fixture(autouse=True)
def short_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "LONG", range(200, 300))
    monkeypatch.setattr(chunks, "CHUNK", 64)


@pytest.fixture
def bf16() -> None:
    if not module.runs_bf16():
        pytest.skip("this processor has no bf16 arithmetic")


def backend_of(engine: Engine) -> OpenVinoBackend:
    backend = engine._encoder.backend
    assert isinstance(backend, OpenVinoBackend)
    return backend


def encode(engine: Engine, size: tuple[int, int] = LONG_SIZE) -> Any:
    return engine.encode([photo(*size)], load_size=None)[0]


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> Iterator[Any]:
    with Engine.open(tiny_bundle, backend="openvino", precision="fp32") as engine:
        yield encode(engine)


def attention_model(keys: int = KEYS, **mask: Any) -> Any:
    openvino = import_openvino()
    ops = openvino.opset14
    inputs = [ops.parameter([-1, HEADS, keys, WIDTH], np.float32, name=name) for name in "qkv"]
    given = [ops.constant(mask["mask"])] if mask else []
    return openvino.Model([ops.scaled_dot_product_attention(*inputs, *given)], inputs, "attention")


def run_fp32(model: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled(inputs).values())


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The same in float64."""
    logits = query.astype(float) @ key.astype(float).swapaxes(2, 3) * WIDTH**-0.5
    shares = np.exp(logits - logits.max(axis=3, keepdims=True))
    return np.asarray(shares @ value / shares.sum(axis=3, keepdims=True))


def random_inputs(batch: int, spread: float, common: float) -> list[np.ndarray]:
    """Logits of this standard deviation, and keys that have this much in common."""
    random = np.random.default_rng(0)
    query, key, value = random.standard_normal((3, batch, HEADS, KEYS, WIDTH)).astype(np.float32)
    return [query * np.float32(spread), key + np.float32(common), value]


@pytest.mark.parametrize(("spread", "common"), [(0.01, 0), (1, 0), (1, 30), (8, 0), (11, 0)])
def test_chunks_are_attention(spread: float, common: float) -> None:
    """From uniform attention to logits that are 60 apart."""
    inputs, model = random_inputs(2, spread, common), attention_model()
    names, products = chunks.chunk_attention(import_openvino(), model)
    assert len(products) == 4 and products < names  # 203 keys
    found, weights = run_fp32(model, inputs)
    assert chunks.is_exact(weights) and weights.min() > np.log(KEYS) - 0.01
    wanted = attention(*inputs)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("spread", [25, 60, 1000])
def test_shares_that_underflow_are_told(spread: float) -> None:
    model = attention_model()
    chunks.chunk_attention(import_openvino(), model)
    assert not chunks.is_exact(run_fp32(model, random_inputs(1, spread, 0))[1])


def test_inputs_that_are_no_numbers_are_told() -> None:
    model, inputs = attention_model(), random_inputs(1, 1, 0)
    inputs[1][0, 0, 100] = np.nan
    chunks.chunk_attention(import_openvino(), model)
    assert not chunks.is_exact(run_fp32(model, inputs)[1])
    assert not chunks.is_exact(np.float32([3, np.nan]))


@pytest.mark.parametrize(
    "model",
    [
        attention_model(keys=199),
        attention_model(keys=300),
        attention_model(keys=-1),
        attention_model(mask=np.zeros((1, 1, 1, KEYS), np.float32)),
    ],
    ids=["few keys", "very many keys", "any number of keys", "mask"],
)
def test_other_attention_is_left(model: Any) -> None:
    before = len(model.get_ops())
    assert chunks.chunk_attention(import_openvino(), model) == (set(), set())
    assert len(model.get_ops()) == before and len(model.outputs) == 1


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("specialisation", ["auto", "lazy", "eager", "none"])
def test_long_sizes_run_in_chunks_unless_none_is_asked(tiny_bundle: Path, expected: Any, specialisation: str) -> None:
    with Engine.open(tiny_bundle, precision="bf16", specialisation=specialisation) as engine:
        encode(engine, SHORT_SIZE)
        found = encode(engine)
        programs = backend_of(engine)._programs.values()
        assert any(program.chunked for program in programs) == (specialisation != "none")
        assert len(programs) == {"auto": 1, "lazy": 1, "eager": 2, "none": 0}[specialisation]
    for facet in ("key@1", "key@2"):
        assert compare_output(found[facet], expected[facet])["relative_frobenius"] < 0.01
    np.testing.assert_allclose(found.saliency, expected.saliency, atol=0.05)


def test_fp32_runs_whole(tiny_bundle: Path) -> None:
    with Engine.open(tiny_bundle, backend="openvino", specialisation="eager") as engine:
        encode(engine)
        (program,) = backend_of(engine)._programs.values()
        assert not program.chunked


@pytest.mark.usefixtures("bf16")
def test_a_batch_is_its_images(tiny_bundle: Path) -> None:
    with Engine.open(tiny_bundle, precision="bf16") as engine:
        images = [photo(*LONG_SIZE, seed) for seed in range(3)]
        together = engine.encode(images, load_size=None)
        alone = [engine.encode([image], load_size=None)[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one["key@2"], other["key@2"])


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("missed", ["exact", "fused"])
def test_the_whole_runs_where_chunks_cannot(tiny_bundle: Path, missed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares that underflow: the general program. An OpenVINO that does not fuse chunks: one for the size."""
    wanted = "none" if missed == "exact" else "eager"
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "LONG", range(0))
        with Engine.open(tiny_bundle, precision="bf16", specialisation=wanted) as engine:
            expected = encode(engine)["key@2"]
    monkeypatch.setattr(module, f"is_{missed}", lambda *given: False)
    with Engine.open(tiny_bundle, precision="bf16") as engine:
        np.testing.assert_array_equal(encode(engine)["key@2"], expected)


@pytest.mark.usefixtures("bf16")
def test_weights_of_extreme_attention_run_whole(tiny_weights: Path, work: Path) -> None:
    """Queries and keys so large that shares of the mean key underflow."""
    with np.load(tiny_weights) as arrays:
        state = dict(arrays)
    dim = state["blocks.0.attn.qkv.weight"].shape[1]
    for part in ("weight", "bias"):
        state[f"blocks.0.attn.qkv.{part}"][: 2 * dim] *= 12
    np.savez(work / "extreme.npz", **state)
    bundle = export_tiny(work / "extreme.npz", work / "extreme", facets=facets("key@1,key@2"), measure=False)
    found = {}
    for specialisation in ("none", "auto"):
        with Engine.open(bundle, precision="bf16", allow_inexact=True, specialisation=specialisation) as engine:
            found[specialisation] = encode(engine)["key@2"]
            chunked = [program.chunked for program in backend_of(engine)._programs.values()]
            assert chunked == [True] * (specialisation == "auto")
    np.testing.assert_array_equal(found["auto"], found["none"])


@pytest.mark.usefixtures("bf16")
def test_bundles_of_one_size_and_with_riders(tiny_weights: Path, work: Path, expected: Any) -> None:
    one = export_tiny(tiny_weights, work / "one-long-size", facets=facets("key@2"), size=LONG_SIZE, measure=False)
    with Engine.open(one, precision="bf16", allow_inexact=True) as engine:
        assert compare_output(encode(engine)["key@2"], expected["key@2"])["relative_frobenius"] < 0.01
        assert [program.chunked for program in backend_of(engine)._programs.values()] == [True]
    for block, programs in ((1, [True]), (0, [])):
        riders = export_tiny(
            tiny_weights, work / f"riders-{block}", facets=facets("key@2"), riders=block, measure=False
        )
        with Engine.open(riders, precision="fp32") as engine:
            wanted = encode(engine)["key@2"]
        with Engine.open(riders, precision="bf16", allow_inexact=True) as engine:
            assert compare_output(encode(engine)["key@2"], wanted)["relative_frobenius"] < 0.01
            assert [program.chunked for program in backend_of(engine)._programs.values()] == programs


@pytest.mark.usefixtures("bf16")
def test_the_cache_tells_chunks_from_whole(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bounds in (chunks.LONG, range(0), chunks.LONG):
        monkeypatch.setattr(chunks, "LONG", bounds)
        with Engine.open(tiny_bundle, precision="bf16", specialisation="eager", cache=tmp_path) as engine:
            encode(engine)
            (program,) = backend_of(engine)._programs.values()
            assert program.chunked == bool(bounds)
    assert len(list(tmp_path.iterdir())) == 3  # any size, chunks, whole
