"""Splice's descriptors of a whole image (Tumanyan et al., "Splicing ViT Features for Semantic Appearance Transfer").

**Structure** is the cosine self-similarity of the last layer's keys, the [CLS] row included: :func:`self_similarity`,
or :func:`self_similarity_blocks` where the matrix is too large to hold. **Appearance** is the [CLS] token after the
last block and before the final norm: ``features.cls("token@11")``, ``(C,)``. Splice uses ViT-B/8 at stride 8::

    facetrt export dino_vitb8 --stride 8 --facets key@11,token@11 --out dino_vitb8-s8

The **identity** descriptor, the raw keys with [CLS], is ``features.tokens["key@11"]``.
Source: specification, splice §1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from facetrt.engine.features.features import Features, Float
from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.errors import InputError
from facetrt.kernels.products import inner_products

ROWS = 256  # of a product: the same ones whatever the block, so that no block size changes a bit


def self_similarity(features: Features, facet: str, *, block: int = 1024) -> Float:
    """Cosine of every token with every token, ``(t, t)`` float32 with t = 1 + cells; row and column 0 are [CLS].

    Registers are left out, and a model without [CLS] has cells alone.
    Symmetric with unit diagonal up to rounding; rows of zeros give zeros. Beside the result only ``block`` and 256 rows
    are held. At 224 × 224 pixels and stride 4 the result takes 37 MB, and four times that per doubling of the cells.

    Raises:
        InputError: the facet was not exported, or ``block`` is not positive.
    """
    tokens = _tokens(features, facet)
    matrix = np.empty((len(tokens), len(tokens)), np.float32)
    for start, rows in self_similarity_blocks(features, facet, block=block):
        matrix[start : start + len(rows)] = rows
    return matrix


def self_similarity_blocks(features: Features, facet: str, *, block: int = 1024) -> Iterator[tuple[int, Float]]:
    """The rows of :func:`self_similarity` as ``(first row, (n, t) float32)`` with n ≤ ``block``; never all at once.

    Raises:
        InputError: on the first step, as for :func:`self_similarity`.
    """
    if block < 1:
        raise InputError(f"block={block}: expected at least 1 row")
    tokens = _tokens(features, facet)
    norms = np.sqrt(np.einsum("tc,tc->t", tokens, tokens, dtype=np.float64)).astype(np.float32)
    products, held = np.empty((0, len(tokens)), np.float32), -1
    for start in range(0, len(tokens), block):
        rows = np.empty((min(block, len(tokens) - start), len(tokens)), np.float32)
        for top in range(start // ROWS * ROWS, start + len(rows), ROWS):
            if top != held:
                products, held = inner_products(tokens[top : top + ROWS], tokens), top
            low, high = max(top, start), min(top + ROWS, start + len(rows))
            rows[low - start : high - start] = products[low - top : high - top]
        rows /= np.maximum(norms[start : start + len(rows), None] * norms, NORM_FLOOR)
        yield start, rows


def _tokens(features: Features, facet: str) -> Float:
    """Rows of a facet, [CLS] first, without registers, ``(t, C)``."""
    cells = features[facet]  # raises the error for a facet that is not at hand
    return np.concatenate([features.cls(facet)[None], cells]) if features.prefix > 1 else features.tokens[facet]
