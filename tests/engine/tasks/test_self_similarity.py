from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import photo

from facetrt.engine import Engine, Features, InputError
from facetrt.engine.tasks.self_similarity import self_similarity, self_similarity_blocks

FACET = "key@2"


@pytest.fixture(scope="module")
def features(tiny_engine: Engine) -> Features:
    return tiny_engine.encode([photo(47, 70)], load_size=None)[0]


def test_equals_the_definition_with_the_cls_row(features: Features) -> None:
    tokens = np.concatenate([features.cls(FACET)[None], features[FACET]]).astype(np.float64)
    norms = np.linalg.norm(tokens, axis=1)
    matrix = self_similarity(features, FACET, block=50)
    assert matrix.shape == (1 + 10 * 16,) * 2 and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, tokens @ tokens.T / np.maximum(np.outer(norms, norms), 1e-8), atol=1e-6)


def test_symmetric_with_unit_diagonal(features: Features) -> None:
    matrix = self_similarity(features, FACET)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 161, 1000])
def test_blocks_cover_the_rows_in_order_and_stay_small(features: Features, block: int) -> None:
    whole = self_similarity(features, FACET)
    blocks = list(self_similarity_blocks(features, FACET, block=block))
    assert [start for start, _ in blocks] == list(range(0, len(whole), block))
    assert max(len(rows) for _, rows in blocks) == min(block, len(whole))
    np.testing.assert_allclose(np.concatenate([rows for _, rows in blocks]), whole, atol=1e-6)


def test_zero_rows_are_guarded(features: Features) -> None:
    tokens = features.tokens[FACET].copy()
    tokens[3] = 0
    matrix = self_similarity(replace(features, tokens={FACET: tokens}), FACET)
    assert np.isfinite(matrix).all() and not matrix[3].any() and not matrix[:, 3].any()


def test_the_appearance_vector_is_the_cls_token(features: Features) -> None:
    np.testing.assert_array_equal(features.cls("token@2"), features.tokens["token@2"][0])
    assert features.cls("token@2").shape == (48,)


def test_bad_input(features: Features) -> None:
    with pytest.raises(InputError, match="block=0: expected at least 1 row"):
        self_similarity(features, FACET, block=0)
    with pytest.raises(InputError, match=r"key@11 was not exported.*--facets"):
        self_similarity(features, "key@11")
