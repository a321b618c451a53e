"""The baselines do the same as facetrt: otherwise their times would mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import photo

from facetrt.benchmarks.baselines import research_style, strong_glue
from facetrt.benchmarks.baselines.common import Pairs, elbow_sweep, load_pixels
from facetrt.benchmarks.cpu.kernels import cluster_elbow, normalise
from facetrt.benchmarks.cpu.task_times import cosegment, mean_iou
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.benchmarks.timing import Clock
from facetrt.engine import Engine
from facetrt.engine.samples import sample_paths
from facetrt.export.export_options import Facet
from facetrt.kernels import best_buddies, log_bin

PIXELS = photo(45, 62)
FACETS = tuple(map(Facet.parse, ("key@1", "query@1", "key@2")))


@pytest.mark.parametrize("facet", FACETS)
def test_research_style_encodes_alike(workbench: Workbench, tiny_engine: Engine, facet: Facet) -> None:
    expected = tiny_engine.encode([PIXELS], load_size=None)[0]
    extractor = workbench.extractor()
    np.testing.assert_allclose(extractor.descriptors(PIXELS, facet).numpy(), expected[str(facet)], atol=2e-5)
    np.testing.assert_allclose(extractor.saliency(PIXELS), expected.saliency, atol=2e-5)


def test_strong_glue_encodes_alike(workbench: Workbench, tiny_engine: Engine) -> None:
    expected = tiny_engine.encode([PIXELS], load_size=None)[0]
    tokens, attention = workbench.glue().encode(PIXELS, FACETS, saliency=True)
    for facet in map(str, FACETS):
        np.testing.assert_allclose(tokens[facet].numpy(), expected.tokens[facet], atol=2e-5)
    assert attention is not None and expected.attention is not None
    np.testing.assert_allclose(attention.numpy(), expected.attention, atol=1e-6)


def test_strong_glue_leaves_out_what_is_not_asked(workbench: Workbench) -> None:
    model, ran = workbench.glue(), list[int]()
    hooks = [
        block.mlp.register_forward_hook(lambda *call, number=number: ran.append(number))
        for number, block in enumerate(model.vit.blocks)
    ]
    tokens, attention = model.encode(PIXELS, FACETS[:1], saliency=False)
    for hook in hooks:
        hook.remove()
    assert list(tokens) == ["key@1"] and attention is None
    assert ran == [0]  # block 1 is left after its keys, block 2 never begins


@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (9, 2)])
def test_binning_alike(workbench: Workbench, grid: tuple[int, int]) -> None:
    key_map = np.random.default_rng(0).standard_normal((*grid, 6)).astype(np.float32)
    tensor = workbench.torch.from_numpy(key_map)
    np.testing.assert_allclose(strong_glue.log_bin(tensor).numpy(), log_bin(key_map), atol=1e-6)
    np.testing.assert_allclose(research_style.log_bin(tensor, Clock(), log_bin).numpy(), log_bin(key_map), atol=1e-6)


def test_neighbours_alike(workbench: Workbench) -> None:
    maps = [np.random.default_rng(i).standard_normal((6, 8, 5)).astype(np.float32) for i in range(2)]
    a, b = (workbench.torch.from_numpy(log_bin(values)) for values in maps)
    expected = best_buddies(maps[0], maps[1])
    for got, wanted in zip(strong_glue.best_buddies(a, b), (expected.nn_ab, expected.nn_ba), strict=True):
        np.testing.assert_array_equal(got.numpy(), wanted)
    cosines = research_style.similarity(a, b, Clock())
    np.testing.assert_array_equal(cosines.argmax(dim=1).numpy(), expected.nn_ab)
    np.testing.assert_allclose(cosines.max(dim=1).values.numpy(), expected.sim_ab, atol=1e-6)


def same(got: Pairs, expected: Pairs) -> None:
    np.testing.assert_array_equal(got.cells_a, expected.cells_a)
    np.testing.assert_array_equal(got.cells_b, expected.cells_b)
    np.testing.assert_array_equal(got.selected, expected.selected)


def test_match_alike(workbench: Workbench) -> None:
    paths, size, facet = workbench.paths[:2], (64, 72), workbench.match_facet
    found = workbench.engine("fp32").match(*paths, load_size=size)
    expected = Pairs(found.cells_a, found.cells_b, found.selected)
    assert len(expected.selected) > 3
    same(strong_glue.match(workbench.glue(), paths, size, facet), expected)
    same(research_style.match(workbench.extractor(), paths, size, facet, Clock(), log_bin), expected)
    clock = Clock(sampling=True)
    same(research_style.match(workbench.extractor(), paths, size, facet, clock, log_bin), expected)
    assert len(clock.extrapolated) == 3 and clock.seconds > 0  # both images' cells, and the rows


@pytest.mark.parametrize("all_rounds", [True, False])
def test_elbow_sweep_alike(all_rounds: bool) -> None:
    random = np.random.default_rng(0)
    centres = random.standard_normal((4, 12))
    rows = [
        (centres[random.integers(0, 4, 900)] + 0.3 * random.standard_normal((900, 12))).astype(np.float32)
        for _ in range(4)
    ]
    expected, got = elbow_sweep(rows, all_rounds=all_rounds), cluster_elbow([normalise(values) for values in rows])
    assert got.tried_k == expected.tried_k and got.tried_k[-1] > 3
    np.testing.assert_allclose(got.objectives, expected.objectives, rtol=1e-5)
    for labels, wanted in zip(got.labels, expected.labels, strict=True):
        np.testing.assert_array_equal(labels, wanted)


def test_cosegment_alike(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(workbench), "paths", list(sample_paths().values())[:4])
    expected, features = cosegment(workbench, "fp32")
    assert 0 < np.mean([mask.mean() for mask in expected.masks]) < 1
    paths, size, facet = workbench.paths, workbench.size, workbench.cosegment_facet
    extractors, clock = (workbench.extractor(), workbench.extractor(8)), Clock(sampling=True)
    known = [(item[str(facet)], item.saliency) for item in features]
    for got in (
        strong_glue.cosegment(workbench.glue(), paths, size, facet),
        research_style.cosegment(*extractors, paths, size, facet, Clock()),
        research_style.cosegment(*extractors, paths, size, facet, clock, known),
    ):
        assert mean_iou(got.masks, expected.masks) == 1
        np.testing.assert_array_equal(got.labels, expected.labels)
    assert clock.extrapolated == ["images encoded: 2 of 4 timed"]


def test_mean_iou() -> None:
    a, b, nothing = np.array([True, True, False]), np.array([True, False, False]), np.zeros(3, np.bool_)
    assert mean_iou([a, nothing], [b, nothing]) == pytest.approx(0.75)
    assert mean_iou([a], [nothing]) == 0


def test_pixels_are_loaded_alike(workbench: Workbench) -> None:
    path = workbench.paths[0]
    expected = workbench.engine("fp32").encode([path], load_size=(40, 56))[0].pixels
    np.testing.assert_array_equal(load_pixels(path, (40, 56)), expected)
