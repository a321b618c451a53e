"""How much [CLS] looks at each cell, head by head.

Bundles state the mean over some heads as saliency. Methods that weigh heads need each of them, which follows from two
facets of the last block: the query of [CLS] and all keys.
"""

from __future__ import annotations

import numpy as np

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.features.features import Features, Float
from facetrt.kernels.errors import InputError


def attention_facets(manifest: Manifest) -> list[str]:
    """The facets that :func:`cls_attention` needs.

    Raises:
        InputError: the bundle lacks one; the message tells how to export it.
    """
    last = manifest.architecture.depth - 1
    key = "key" if manifest.rotation is None else "rotated_key"  # [CLS] does not turn, cells do
    facets = [f"query@{last}", f"{key}@{last}"]
    missing = [facet for facet in facets if facet not in manifest.facets]
    if missing:
        raise InputError(
            f"attention of each head is made of {' and '.join(facets)}: {manifest.missing_facet(*missing)}"
        )
    return facets


def cls_attention(features: Features, manifest: Manifest) -> Float:
    """The last block's attention of [CLS], ``(heads, prefix + cells)`` float32: to itself first, then to registers.

    Rows sum to 1.

    Raises:
        InputError: a number that is not finite.
    """
    query, key = attention_facets(manifest)
    heads = manifest.architecture.heads
    keys = features.tokens[key].reshape(len(features.tokens[key]), heads, -1).astype(np.float64)  # (t, heads, d)
    logits = np.einsum("hd,thd->ht", features.cls(query).reshape(heads, -1).astype(np.float64), keys)
    logits /= np.sqrt(keys.shape[2])
    if not np.isfinite(logits).all():
        raise InputError("the attention of [CLS] is not finite: the encoder, or what it was given, is damaged")
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True), np.float32)


def per_head(rows: Float, manifest: Manifest) -> Float:
    """Rows ``(n, C)`` as ``(n, heads, C / heads)``; channels are head-major.

    Raises:
        InputError: rows of another width than the encoder's: several facets that were fused.
    """
    if rows.shape[1] != manifest.architecture.dim:
        raise InputError(
            f"descriptors have {rows.shape[1]} channels: expected the {manifest.architecture.dim} of one facet, whose "
            "heads are told apart"
        )
    return rows.reshape(len(rows), manifest.architecture.heads, -1)
