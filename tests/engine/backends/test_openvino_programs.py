"""Programs for one size: when they are compiled, and that nothing but speed and the last bits depends on them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import export_tiny, facets, photo, require_openvino

from facetrt.engine import Engine
from facetrt.engine.backends import openvino as module
from facetrt.engine.backends.openvino import OpenVinoBackend

require_openvino()

SIZES = ((48, 60), (60, 48), (48, 48))


def bits(engine: Engine, size: tuple[int, int], **options: object) -> bytes:
    return engine.encode([photo(*size)], load_size=None, **options)[0]["key@2"].tobytes()  # type: ignore[arg-type]


def backend_of(engine: Engine) -> OpenVinoBackend:
    backend = engine._encoder.backend
    assert isinstance(backend, OpenVinoBackend)
    return backend


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PROGRAMS", len(SIZES) - 1)


@pytest.fixture
def eager(tiny_bundle: Path) -> Iterator[Engine]:
    with Engine.open(tiny_bundle, backend="openvino", specialisation="eager") as engine:
        yield engine


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("specialisation", ["auto", "none", "eager"])
def test_bits_do_not_depend_on_what_came_before(tiny_bundle: Path, specialisation: str) -> None:
    with Engine.open(tiny_bundle, backend="openvino", specialisation=specialisation) as engine:
        first = bits(engine, SIZES[0])
        for size in SIZES:
            bits(engine, size)
        assert bits(engine, SIZES[0]) == first
        with engine.stream([photo(*SIZES[0])], load_size=None) as stream:
            (result,) = stream
        assert result.features["key@2"].tobytes() == first
        assert len(backend_of(engine)._programs) == (module.MAX_PROGRAMS if specialisation == "eager" else 0)


def test_the_program_changes_no_more_than_rounding(tiny_bundle: Path, eager: Engine) -> None:
    with Engine.open(tiny_bundle, backend="openvino", specialisation="none") as general:
        for images in ([photo(48, 60)], [photo(48, 60, seed) for seed in range(3)]):
            pairs = zip(general.encode(images, load_size=None), eager.encode(images, load_size=None), strict=True)
            for expected, found in pairs:
                np.testing.assert_allclose(found["key@2"], expected["key@2"], atol=2e-5)
    assert len(backend_of(eager)._programs) == 1  # a batch is no other size


def test_lazy_waits_for_ten_batches(tiny_bundle: Path) -> None:
    with Engine.open(tiny_bundle, backend="openvino", specialisation="lazy") as engine:
        for _ in range(module.LAZY_BATCHES):
            bits(engine, SIZES[0])
        bits(engine, SIZES[1])
        assert not backend_of(engine)._programs
        bits(engine, SIZES[0])
        assert len(backend_of(engine)._programs) == 1


def test_both_passes_of_low_resolution_saliency_have_a_program(eager: Engine) -> None:
    for _ in range(2):
        bits(eager, (64, 64), saliency="low_resolution")
    assert len(backend_of(eager)._programs) == 2


def test_a_padded_image_runs_in_the_program_of_its_padded_size(eager: Engine, tiny_engine: Engine) -> None:
    eager.encode([photo(64, 64)], load_size=None)
    padded = eager.encode([photo(61, 62)], load_size=None, fit="pad")[0]
    assert len(backend_of(eager)._programs) == 1
    expected = tiny_engine.encode([photo(61, 62)], load_size=None, fit="pad")[0]
    np.testing.assert_allclose(padded["key@2"], expected["key@2"], atol=2e-5)


def test_the_cache_holds_sizes(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        with Engine.open(tiny_bundle, backend="openvino", specialisation="eager", cache=tmp_path) as engine:
            found.append([bits(engine, size) for size in SIZES[:2]])
        assert len(list(tmp_path.iterdir())) == 3  # any size, and two
        monkeypatch.setattr(module.OpenVinoBackend, "_compile_anew", None)  # calling it would fail
    assert found[0] == found[1]


def test_bf16_keeps_its_islands_in_a_program(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not module.runs_bf16():
        pytest.skip("this processor has no bf16 arithmetic")
    checked, check = [], module.check_islands
    monkeypatch.setattr(module, "check_islands", lambda *given: checked.append(check(*given)))
    with Engine.open(tiny_bundle, precision="bf16", specialisation="eager") as engine:
        bits(engine, SIZES[0])
        (program,) = backend_of(engine)._programs.values()
        nodes = [node.get_rt_info() for node in program.compiled.get_runtime_model().get_ops()]
    kinds = {(node["layerType"].value, node["runtimePrecision"].value) for node in nodes}
    assert ("Convolution", "f32") in kinds and ("FullyConnected", "bf16") in kinds
    assert len(checked) == 2


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_threads_with_different_sizes(tiny_bundle: Path, hint: str) -> None:
    """More sizes than programs, so that some are dropped while others run."""
    with Engine.open(tiny_bundle, backend="openvino", specialisation="eager", hint=hint) as engine:
        expected = {size: bits(engine, size) for size in SIZES}
        with ThreadPoolExecutor(4) as pool:
            sizes = SIZES * 2
            assert list(pool.map(lambda size: bits(engine, size), sizes)) == [expected[size] for size in sizes]


def test_a_bundle_of_one_size_is_one_program(work: Path, tiny_weights: Path) -> None:
    bundle = export_tiny(tiny_weights, work / "one-size-openvino", facets=facets("key@2"), size=(48, 48))
    with Engine.open(bundle, backend="openvino", specialisation="eager") as engine:
        bits(engine, (48, 48))
        assert not backend_of(engine)._programs
