from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from helpers import photo
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine import Engine, Features, InputError
from facetrt.engine.drawing.inspection import component_pictures, display_size, pca_overview, pca_row, rgb_picture
from facetrt.engine.tasks import pca as module
from facetrt.engine.tasks.pca import Moments, Pca, fit_pca

FACET = "key@2"


@pytest.fixture(scope="module")
def features(tiny_engine: Engine) -> list[Features]:
    sizes = [(64, 64), (47, 70), (64, 64)]
    return tiny_engine.encode([photo(*size, seed=i) for i, size in enumerate(sizes)], load_size=None)


def stacked(features: list[Features]) -> NDArray[np.float64]:
    return np.concatenate([item[FACET] for item in features]).astype(np.float64)


def test_fit_equals_an_svd_of_all_descriptors(features: list[Features]) -> None:
    rows = stacked(features)
    _, singular, axes = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    fit = fit_pca(features, FACET, 5)
    np.testing.assert_allclose(fit.mean, rows.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(fit.explained_variance_ratio, (singular**2 / (singular**2).sum())[:5], rtol=1e-9)
    signs = np.sign((fit.components * axes[:5]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(fit.components, axes[:5] * signs, atol=1e-8)
    projected = np.concatenate([fit.project(item).reshape(-1, 5) for item in features])
    np.testing.assert_allclose(projected, (rows - rows.mean(axis=0)) @ axes[:5].T * signs.T, atol=1e-5)
    assert fit.count == len(rows) and fit.project(features[1]).shape == (*features[1].grid, 5)
    assert fit.project(features[0]).dtype == np.float32


def test_fit_equals_scikit_learn(features: list[Features]) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn is not installed")
    rows = stacked(features)
    reference = decomposition.PCA(n_components=4, svd_solver="full").fit(rows)
    fit = fit_pca(features, FACET)
    np.testing.assert_allclose(np.abs((fit.components * reference.components_).sum(axis=1)), 1, atol=1e-9)
    np.testing.assert_allclose(fit.explained_variance_ratio, reference.explained_variance_ratio_, rtol=1e-9)
    projected = np.concatenate([fit.project(item).reshape(-1, 4) for item in features])
    np.testing.assert_allclose(np.abs(projected), np.abs(reference.transform(rows)), atol=1e-5)


def test_signs_follow_the_rule_and_orders_of_images_agree(features: list[Features]) -> None:
    forward, again, backward = (fit_pca(order, FACET) for order in (features, features, features[::-1]))
    largest = np.take_along_axis(forward.components, np.abs(forward.components).argmax(axis=1)[:, None], axis=1)
    assert (largest > 0).all()
    np.testing.assert_array_equal(forward.components, again.components)
    np.testing.assert_allclose(forward.components, backward.components, atol=1e-8)


def test_moments_in_pieces_are_exact_for_large_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)
    rows = (np.random.default_rng(0).standard_normal((100, 5)) + 1000).astype(np.float32)
    moments = Moments(5)
    for piece in np.split(rows, [1, 40, 41]):
        moments.add(piece)
    assert moments.count == 100
    np.testing.assert_allclose(moments.scatter / 99, np.cov(rows.astype(np.float64).T), rtol=1e-9)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-14)


def test_the_fit_streams(features: list[Features]) -> None:
    alive: list[int] = []

    def stream() -> Iterator[Features]:
        for item in features:
            alive.append(len(alive))
            yield item

    assert fit_pca(stream(), FACET).count == len(stacked(features)) and alive == [0, 1, 2]


def test_bad_input(features: list[Features], tiny_engine: Engine) -> None:
    with pytest.raises(InputError, match="no image was given: PCA needs at least 1"):
        fit_pca([], FACET)
    with pytest.raises(InputError, match="components=0: expected at least 1"):
        fit_pca(features, FACET, 0)
    with pytest.raises(InputError, match="components=49: key@2 has 48 channels"):
        fit_pca(features, FACET, 49)
    with pytest.raises(InputError, match="value@7 was not exported"):
        fit_pca(features, "value@7")
    small = tiny_engine.encode([photo(8, 16)], load_size=None)
    with pytest.raises(InputError, match="3 descriptors, too few for 4 components"):
        fit_pca(small, FACET)
    broken = replace(features[0], tokens={FACET: np.full_like(features[0].tokens[FACET], np.nan)})
    with pytest.raises(InputError, match="NaN or infinite"):
        fit_pca([broken], FACET)
    narrow = replace(features[0], tokens={FACET: features[0].tokens[FACET][:, :10]})
    with pytest.raises(InputError, match="10 channels and not 48"):
        fit_pca([features[0], narrow], FACET)
    with pytest.raises(InputError, match="10 channels and not 48"):
        fit_pca(features, FACET).project(narrow)
    with pytest.raises(InputError, match=r"expected \(c, C\)"):
        Pca(FACET, np.zeros(3), np.zeros((2, 4)), np.zeros(2), 9)


def test_constant_descriptors_have_no_variance(features: list[Features]) -> None:
    flat = replace(features[0], tokens={FACET: np.ones_like(features[0].tokens[FACET])})
    fit = fit_pca([flat], FACET, 3)
    assert not fit.explained_variance_ratio.any() and not fit.project(flat).any()
    assert not rgb_picture(fit.project(flat), (9, 9)).any()


def test_pictures_are_scaled_per_component_and_enlarged_by_nearest_neighbour() -> None:
    projected = np.zeros((2, 3, 4), np.float32)
    projected[..., 0] = [[0, 1, 2], [3, 4, 10]]
    projected[..., 1] = 5
    projected[..., 3] = [[-1, 0, 0], [0, 0, 1]]
    greys = component_pictures(projected, (5, 9))
    expected = np.array([[0, 25, 51], [76, 102, 255]], np.uint8)  # truncated: 76.5 becomes 76
    np.testing.assert_array_equal(greys[0], Image.fromarray(expected).resize((9, 5), Image.Resampling.NEAREST))
    assert not greys[1].any() and greys[3].max() == 255
    colour = rgb_picture(projected, (5, 9))
    assert colour.shape == (5, 9, 3)
    np.testing.assert_array_equal(colour, np.stack(greys[1:], axis=-1))
    with pytest.raises(InputError, match="expected at least 3"):
        rgb_picture(projected[..., :2], (5, 9))


@pytest.mark.parametrize("components", [1, 4])
def test_overview(features: list[Features], components: int) -> None:
    fit = fit_pca(features, FACET, components)
    rows = [pca_row(item, fit.project(item)) for item in features]
    assert [picture.shape[:2] for picture in rows[1]] == [display_size(features[1].image_size, 150)] * (
        2 if components == 1 else 6
    )
    sheet = pca_overview(rows, ["a", "b" * 99, "c"], list(fit.explained_variance_ratio))
    assert sheet.dtype == np.uint8 and sheet.shape[0] > 450 and sheet.std() > 0
