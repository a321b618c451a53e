"""Parity with the reference method's outputs on deterministic ViT-S weights, end to end through bundles.

The repository holds an extract of those outputs; where the full set lies beside the checkout, it is used as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GOLDEN_FACETS, HERE, deterministic_weights, facets, require_openvino
from PIL import Image

from facetrt.engine import Engine, Features
from facetrt.engine.backends.openvino import runs_bf16
from facetrt.engine.backends.parity import check, compare, worst
from facetrt.engine.backends.run_options import Precision
from facetrt.engine.samples import sample_paths
from facetrt.engine.tasks.matching import keep_salient, pick_diverse
from facetrt.export.export_options import ExportOptions
from facetrt.export.exporting import export_bundle
from facetrt.export.models import find_model
from facetrt.kernels import best_buddies, cosine_similarity, log_bin

HEADS = 6
CHELSEA, CAT = (np.asarray(Image.open(HERE / "golden" / f"{name}98.png")) for name in ("chelsea", "cat"))


@pytest.fixture(scope="module")
def open_golden(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("golden")

    def opener(model: str, stride: int, names: str) -> Engine:
        weights, out = folder / f"{model}.npz", folder / f"{model}-{stride}"
        if not weights.exists():
            np.savez(weights, **deterministic_weights(find_model(model)))
        saliency = model == "dino_vits8"
        export_bundle(
            model,
            out,
            ExportOptions(stride=stride, facets=facets(names), saliency=saliency, measure=False),
            weights=weights,
        )
        return Engine.open(out)

    return opener


@pytest.fixture(scope="session")
def pair(golden_vits8: Engine) -> list[Features]:
    return golden_vits8.encode([CHELSEA, CAT], load_size=None)


def reference_order(rows: np.ndarray) -> np.ndarray:
    """Head-major channels as the reference stores them: dim·heads + head."""
    return rows.reshape(len(rows), HEADS, -1).transpose(0, 2, 1).reshape(len(rows), -1)


def check_facet(features: Features, facet: str, golden: dict[str, Any], key: str) -> None:
    expected, rows = golden[key], golden[f"{key}.rows"]
    got = features.tokens[facet][rows]
    if not facet.startswith("token"):
        got = reference_order(got)
    np.testing.assert_allclose(got, expected, atol=2e-3 if facet == "token@11" else 1e-4, rtol=0)
    cosine = (got * expected).sum(1, dtype=np.float64) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() >= 0.999999


@pytest.mark.parametrize("facet", GOLDEN_FACETS.split(","))
def test_stride_4(pair: list[Features], golden: dict[str, Any], facet: str) -> None:
    assert pair[0].grid == tuple(golden["chelsea98.stride4.grid"])
    check_facet(pair[0], facet, golden, f"chelsea98.stride4.{facet}")


def test_saliency(pair: list[Features], golden: dict[str, Any]) -> None:
    np.testing.assert_allclose(pair[0].saliency.ravel(), golden["chelsea98.stride4.saliency"], atol=1e-4)
    np.testing.assert_allclose(pair[0].saliency.ravel(), golden["match.saliency1"], atol=1e-4)
    np.testing.assert_allclose(pair[1].saliency.ravel(), golden["match.saliency2"], atol=1e-4)


@pytest.mark.parametrize(
    ("model", "stride", "prefix", "pixels"),
    [
        ("dino_vits8", 8, "chelsea98.stride8", CHELSEA),
        ("dino_vits8", 2, "chelsea98.stride2", CHELSEA[:64, :72]),
        ("dino_vits16", 8, "chelsea98.vits16_stride8", CHELSEA),
    ],
)
def test_other_strides_and_models(
    open_golden: Any, golden: dict[str, Any], model: str, stride: int, prefix: str, pixels: np.ndarray
) -> None:
    with open_golden(model, stride, "key@9") as engine:
        features = engine.encode([np.ascontiguousarray(pixels)], load_size=None)[0]
    assert features.grid == tuple(golden[f"{prefix}.grid"])
    check_facet(features, "key@9", golden, f"{prefix}.key@9")
    if model == "dino_vits8":
        np.testing.assert_allclose(features.saliency.ravel(), golden[f"{prefix}.saliency"], atol=1e-4)


def test_log_bin(pair: list[Features], golden: dict[str, Any]) -> None:
    rows = golden["chelsea98.stride4.logbin_key@9_rows"][:6]
    binned = log_bin(reference_order(pair[0]["key@9"]).reshape(*pair[0].grid, -1), cells=rows)
    np.testing.assert_allclose(binned, golden["chelsea98.stride4.logbin_key@9"], atol=1e-4)


def test_best_buddies(pair: list[Features], golden: dict[str, Any]) -> None:
    found = best_buddies(pair[0].map("key@9"), pair[1].map("key@9"))
    for got, side, similarity in ((found.nn_ab, "12", found.sim_ab), (found.nn_ba, "21", found.sim_ba)):
        clear = golden[f"match.margin{side}"] > 1e-5
        np.testing.assert_array_equal(got[clear], golden[f"match.nn{side}"][clear])
        np.testing.assert_allclose(similarity, golden[f"match.sim{side}"], atol=1e-5)
    np.testing.assert_array_equal(found.mutual, golden["match.mutual"])


def test_points(golden_vits8: Engine, pair: list[Features], golden: dict[str, Any]) -> None:
    """The golden points come from scikit-learn's present default, one k-means restart; ours is the reference's ten."""
    expected = np.concatenate([golden["match.points1"], golden["match.points2"]], axis=1)
    a, b = pair
    buddies = best_buddies(a.map("key@9"), b.map("key@9"))
    cells_a = keep_salient(buddies, a.saliency.ravel(), b.saliency.ravel(), 0.05)
    cells_b = buddies.nn_ab[cells_a]
    joined = np.hstack([log_bin(a.map("key@9"), cells=cells_a), log_bin(b.map("key@9"), cells=cells_b)])
    rank = a.saliency.ravel()[cells_a] + b.saliency.ravel()[cells_b]
    _, selected = pick_diverse(joined, rank, 10, restarts=1)
    points = [f.geometry.loaded_points_xy(cells[selected])[:, ::-1] for f, cells in ((a, cells_a), (b, cells_b))]
    np.testing.assert_array_equal(np.hstack(points), expected)
    ten = golden_vits8.match(a, b)
    assert len(ten) == 10
    got = np.hstack([ten.loaded_points_a_xy[:, ::-1], ten.loaded_points_b_xy[:, ::-1]]).astype(int)
    assert len(set(map(tuple, got.tolist())) & set(map(tuple, expected.tolist()))) >= 8


def test_full_arrays(golden_vits8: Engine, shared: Path) -> None:
    """Every row of the golden descriptors, and log-binning of the golden's own features."""
    arrays = np.load(shared / "golden" / "features.npz")
    features = golden_vits8.encode([shared / "images" / "chelsea.png"], load_size=98)[0]
    for facet in GOLDEN_FACETS.split(","):
        full = {facet: arrays[f"chelsea98.stride4.{facet}"]}
        check_facet(features, facet, full | {f"{facet}.rows": np.arange(len(full[facet]))}, facet)
    own = arrays["chelsea98.stride4.key@9"][1:].reshape(*features.grid, -1)
    rows = arrays["chelsea98.stride4.logbin_key@9_rows"]
    np.testing.assert_allclose(log_bin(own, cells=rows), arrays["chelsea98.stride4.logbin_key@9"], atol=1e-5)


@pytest.mark.parametrize("interval", [100, 10])
def test_cosegmentation(golden_vits8: Engine, shared: Path, interval: int) -> None:
    arrays = np.load(shared / "golden" / "tasks.npz")
    prefix = f"coseg.interval{interval}."
    paths = [shared / "images" / name for name in ("chelsea.png", "cat.jpg", "ibex.jpg", "coffee.png")]
    masks = golden_vits8.cosegment(paths, load_size=98, sample_interval=interval)
    assert masks.clustering.tried_k == list(arrays[f"{prefix}k"])
    np.testing.assert_allclose(masks.clustering.objectives, arrays[f"{prefix}objective"], rtol=1e-3)
    labels, expected = np.concatenate(masks.clustering.labels), arrays[f"{prefix}labels"]
    renamed = np.array([np.bincount(expected[labels == k], minlength=1).argmax() for k in range(labels.max() + 1)])
    assert (renamed[labels] == expected).mean() >= 0.995 and len(set(renamed)) == len(renamed)
    np.testing.assert_array_equal(
        np.sort(renamed[masks.votes.salient_labels]), np.sort(arrays[f"{prefix}salient_labels"])
    )
    for i, mask in enumerate(masks):
        shape = arrays[f"{prefix}mask{i}_shape"]
        truth = np.unpackbits(arrays[f"{prefix}mask{i}"])[: shape.prod()].reshape(shape).astype(bool)
        union = (mask.loaded_mask | truth).sum()
        assert union == 0 or (mask.loaded_mask & truth).sum() / union >= 0.99


def test_bf16_keeps_its_contract_on_photographs(golden_vits8_bundle: Path) -> None:
    require_openvino()
    if not runs_bf16():
        pytest.skip("this processor has no bf16 arithmetic")
    photos = list(sample_paths().values())
    with Engine.open(golden_vits8_bundle, backend="onnxruntime") as exact:
        expected = exact.encode(photos, load_size=80)
    with Engine.open(golden_vits8_bundle, precision="bf16", allow_inexact=True) as engine:
        got = engine.encode(photos, load_size=80)
    assert {f.provenance.precision for f in got} == {"bf16"}
    check(worst([compare(a.tokens, b.tokens) for a, b in zip(got, expected, strict=True)]), Precision.BF16)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.saliency, b.saliency, atol=0.02)
    similarity = [cosine_similarity(x[0].map("key@9"), x[1].map("key@9")) for x in (got, expected)]
    best = np.sort(similarity[1], axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-3
    assert clear.sum() > 50
    assert (similarity[0].argmax(axis=1) == similarity[1].argmax(axis=1))[clear].mean() >= 0.98
