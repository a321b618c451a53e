"""Keypoint transfer: readers, cell rules, the fast nearest-cell search, PCK."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from facetrt.engine import Geometry, InputError, MissingFileError
from facetrt.engine.evaluation import evaluate, open_evaluation
from facetrt.engine.evaluation.correspondence import CellRule, Target, centres_xy
from facetrt.engine.evaluation.datasets.keypoints import read_pf_willow, read_spair
from facetrt.kernels import cosine_similarity, log_bin

SQUARE = Geometry((224, 224), (224, 224), 8, 4)


@pytest.fixture
def willow(tmp_path, save):
    """Two sub-classes of three images; the second image of each is the first moved by (16, 8) pixels."""
    scipy_io = pytest.importorskip("scipy.io", reason="PF-WILLOW's .mat files need the extra 'eval'")
    random = np.random.default_rng(0)
    for subclass in ("car(G)", "duck(S)"):
        picture = random.integers(0, 256, (12, 12, 3)).repeat(8, axis=0).repeat(8, axis=1)
        points = random.integers(20, 70, (2, 10)).astype(float)
        for i, (dx, dy) in enumerate(((0, 0), (16, 8), (8, 16))):
            save(tmp_path / subclass / f"im{i}.png", np.roll(picture, (dy, dx), (0, 1)))
            scipy_io.savemat(tmp_path / subclass / f"im{i}.mat", {"pts_coord": points + np.array([[dx + 1], [dy + 1]])})
    return tmp_path


@pytest.fixture
def spair(tmp_path, save):
    """One category of SPair-71k with four images and six pairs, in the official layout."""
    root = tmp_path / "SPair-71k"
    for i in range(4):
        save(root / "JPEGImages" / "cat" / f"c{i}.png", np.full((40, 60, 3), 60 * i))
    names = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    (root / "PairAnnotation" / "test").mkdir(parents=True)
    for number, (a, b) in enumerate(names):
        pair = {
            "category": "cat",
            "src_imname": f"c{a}.png",
            "trg_imname": f"c{b}.png",
            "src_imsize": [60, 40, 3],
            "trg_imsize": [60, 40, 3],
            "src_kps": [[10, 20], [30, 5]],
            "trg_kps": [[12, 20], [59, 39]],
        }
        path = root / "PairAnnotation" / "test" / f"{number:06}-c{a}-c{b}:cat.json"
        path.write_text(json.dumps(pair))
    return root


def test_pf_willow_gives_all_ordered_pairs_counted_from_zero(willow):
    pairs = read_pf_willow(willow)
    assert [pair.key for pair in pairs][:3] == ["car(G)/im0:im1", "car(G)/im0:im2", "car(G)/im1:im0"]
    assert len(pairs) == 2 * 6
    assert pairs[0].source_size == (96, 96)
    np.testing.assert_array_equal(pairs[0].target_xy - pairs[0].source_xy, [[16, 8]] * 10)
    assert pairs[0].source_xy.min() >= 20
    assert len(read_pf_willow(willow, limit=2)) == 4


def test_a_folder_that_is_not_pf_willow_says_what_is_expected(tmp_path):
    with pytest.raises(MissingFileError, match=r"SUBCLASS/NAME\.mat"):
        read_pf_willow(tmp_path)
    with pytest.raises(MissingFileError, match="nowhere is missing"):
        read_pf_willow(tmp_path / "nowhere")


def test_pf_willow_without_an_annotation_or_with_an_odd_one(willow):
    import scipy.io

    scipy.io.savemat(willow / "car(G)" / "im0.mat", {"points": np.zeros((2, 3))})
    with pytest.raises(InputError, match="has no variable pts_coord: it has points"):
        read_pf_willow(willow)
    scipy.io.savemat(willow / "car(G)" / "im0.mat", {"pts_coord": np.full((2, 10), 500.0)})
    with pytest.raises(InputError, match=r"im0\.png has 96×96 pixels .* keypoint lies at \(499, 499\)"):
        read_pf_willow(willow)
    scipy.io.savemat(willow / "car(G)" / "im0.mat", {"pts_coord": np.ones((2, 3))})
    with pytest.raises(InputError, match=r"im0.png has 3 keypoints and im1.png 10"):
        read_pf_willow(willow)
    (willow / "car(G)" / "im0.mat").unlink()
    with pytest.raises(MissingFileError, match=r"im0\.mat is missing"):
        read_pf_willow(willow)


def test_spair_reads_pairs_and_draws_the_same_ones_every_time(spair):
    everything = read_spair(spair, split="test", pairs_per_category=None, seed=0)
    assert len(everything) == 6
    np.testing.assert_array_equal(everything[0].target_xy, [[12, 20], [59, 39]])
    drawn = [read_spair(spair, split="test", pairs_per_category=3, seed=0) for _ in range(2)]
    assert [p.key for p in drawn[0]] == [p.key for p in drawn[1]]
    assert len({p.key for p in drawn[0]}) == 3
    others = {tuple(p.key for p in read_spair(spair, split="test", pairs_per_category=3, seed=s)) for s in range(9)}
    assert len(others) > 1
    assert len(read_spair(spair.parent, split="test", pairs_per_category=None, seed=0)) == 6


def test_spair_names_what_is_missing_or_does_not_fit(spair, save, tmp_path):
    with pytest.raises(MissingFileError, match=r"PairAnnotation/val is missing: SPair-71k has one JSON file"):
        read_spair(spair, split="val", pairs_per_category=None, seed=0)
    with pytest.raises(MissingFileError, match="JPEGImages is missing"):
        read_spair(tmp_path / "SPair-71k" / "PairAnnotation", split="test", pairs_per_category=None, seed=0)
    save(spair / "JPEGImages" / "cat" / "c0.png", np.zeros((30, 60, 3)))
    with pytest.raises(InputError, match=r"c0\.png has 60×30 pixels .* 60×40"):
        read_spair(spair, split="test", pairs_per_category=None, seed=0)


def test_nearest_cell_rule_by_hand():
    points = np.array([[0, 0], [3.5, 3.5], [5.4, 3.5], [5.6, 3.5], [223, 223]])
    assert CellRule.NEAREST.cells(points, SQUARE).tolist() == [0, 0, 0, 1, 54 * 55 + 54]


def test_scaled_cell_rule_by_hand():
    points = np.array([[0, 0], [4.0, 0], [4.1, 0], [223, 223]])  # 55 cells on 224 pixels: 4.07 pixels each
    assert CellRule.SCALED.cells(points, SQUARE).tolist() == [0, 0, 1, 54 * 55 + 54]


def test_cell_centres_are_patch_centres():
    np.testing.assert_array_equal(centres_xy(np.array([0, 1, 55]), SQUARE), [[3.5, 3.5], [7.5, 3.5], [3.5, 7.5]])


@pytest.mark.parametrize("hierarchy", [0, 1, 2, 3])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 9), (13, 11)])
def test_target_equals_the_full_cosine_matrix(hierarchy, grid):
    random = np.random.default_rng(1)
    source, target = random.standard_normal((2, *grid, 6)).astype(np.float32)
    cells = random.integers(0, grid[0] * grid[1], 4)
    descriptors = log_bin(source, hierarchy, cells=cells)
    lengths = np.linalg.norm(descriptors, axis=1, keepdims=True)
    cosines = Target.of(target, hierarchy).cosines(descriptors) / lengths
    np.testing.assert_allclose(cosines, cosine_similarity(source, target, hierarchy)[cells], atol=1e-5)


def test_nearest_takes_the_first_of_equals():
    flat = np.ones((3, 3, 2), np.float32)
    assert Target.of(flat, 0).nearest(np.ones((1, 2), np.float32)).tolist() == [0]


def test_moved_pictures_are_matched_and_beat_the_trivial_baseline(willow, make_engine, tmp_path):
    evaluation = open_evaluation("pf-willow", willow, {"load_size": "96x96", "hierarchy": "1"})
    outcome = evaluate(evaluation, make_engine(), tmp_path / "out")
    assert outcome.summary.overall.figures["PCK"] > 0.9
    assert outcome.summary.baselines[0].figures["PCK"] == 0  # 16 and 8 pixels away, 9.6 allowed
    assert [row.name for row in outcome.summary.categories] == ["car(G)", "duck(S)"]


def test_spair_evaluation_counts_by_hand(spair, make_engine, tmp_path):
    evaluation = open_evaluation("spair71k", spair, {"pairs_per_category": "none", "frame": "original"})
    outcome = evaluate(evaluation, None, tmp_path / "out")
    assert outcome.summary.overall is None
    assert outcome.summary.baselines[0].figures["PCK"] == 0.5  # 2 pixels away, and 45; 6 allowed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["counts"] == {"pairs": 6, "keypoints": 12}
    assert len(results["data"]["drawn_pairs"]) == 6


def test_strictness_and_average(willow, tmp_path):
    records = {
        "a": {"category": "c", "size": 100, "baseline": [10.0, 50.0, 50.0]},
        "b": {"category": "c", "size": 100, "baseline": [1.0]},
    }
    for options, expected in (({}, 0.5), ({"strict": "yes"}, 0.25), ({"average": "pairs"}, 2 / 3), ({"alpha": 0.6}, 1)):
        summary = open_evaluation("pf-willow", willow, options).summarise(records)
        assert summary.baselines[0].figures["PCK"] == pytest.approx(expected)


def test_options_out_of_range_or_unknown(willow):
    for options, message in (
        ({"alpha": "0"}, "positive share"),
        ({"hierarchy": "9"}, "0 \\(no binning\\) to 6"),
        ({"cell_rule": "closest"}, "nearest or scaled"),
        ({"strict": "maybe"}, "yes or no"),
        ({"limit": "0"}, "at least 1"),
        ({"radius": "3"}, "no option 'radius' here: expected one of facet="),
        ({"load_size": "big"}, "HEIGHTxWIDTH"),
    ):
        with pytest.raises(InputError, match=message):
            open_evaluation("pf-willow", willow, options)
    with pytest.raises(InputError, match="no evaluation 'pfw': expected one of pf-willow, spair71k"):
        open_evaluation("pfw", willow)


def test_trivial_baseline_on_the_shared_images(shared_eval, tmp_path):
    pytest.importorskip("scipy.io", reason="PF-WILLOW's .mat files need the extra 'eval'")
    outcome = evaluate(open_evaluation("pf-willow", shared_eval / "pf_willow"), None, tmp_path / "out")
    assert round(outcome.summary.baselines[0].figures["PCK"], 3) == 0.281
    assert outcome.items == 5 * 90


def test_missing_scipy_names_the_extra(willow, monkeypatch):
    from facetrt.engine import MissingDependencyError

    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(MissingDependencyError, match=r"facetrt\[eval\]"):
        read_pf_willow(Path(willow))
