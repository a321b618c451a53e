"""Which descriptors a method works on: one facet's, or those of several that are fused.

Written as facets joined by ``+``: ``key@9+query@11``. A facet may have a weight, ``2*query@11``, and ``-mean`` behind
it takes the image's mean descriptor from all, for models whose descriptors all point the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from facetrt.engine.features.features import Features, Float
from facetrt.engine.tasks.descriptors import normalise
from facetrt.kernels.errors import InputError

MEAN = "-mean"
EXPECTED = "expected facets joined by +, like key@9+query@11, each with a weight (2*key@9) or a shift (key@9-mean)"


@dataclass(frozen=True)
class Term:
    """One facet, how much it weighs beside others, and whether the image's mean is taken from its rows."""

    facet: str
    weight: float = 1.0
    centred: bool = False

    def rows(self, features: Features) -> Float:
        """``(cells, C)`` float32."""
        rows = features[self.facet]
        return np.asarray(rows - rows.mean(axis=0, dtype=np.float64), np.float32) if self.centred else rows

    def __str__(self) -> str:
        weight = "" if self.weight == 1 else f"{self.weight:g}*"
        return f"{weight}{self.facet}{MEAN if self.centred else ''}"


def fuse(terms: Sequence[Term], parts: Sequence[Float]) -> Float:
    """``(cells, C)`` float32 of the rows of each term; one term's stay as they are.

    Several are rows of length 1 (zeros stay) beside each other, scaled so that a product of two rows is the weighted
    mean of the facets' cosines.
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(term.weight for term in terms)
    scales = [np.float32((term.weight / total) ** 0.5) for term in terms]
    return np.concatenate([normalise(part) * scale for part, scale in zip(parts, scales, strict=True)], axis=1)


def parse_terms(text: str | Sequence[str]) -> tuple[Term, ...]:
    """Terms of a text, or of a list of texts; commas may stand for ``+``.

    Raises:
        InputError: none, a facet named twice, or a weight that is no positive number.
    """
    whole = text if isinstance(text, str) else "+".join(text)
    terms = []
    for part in whole.replace(",", "+").split("+"):
        weight, star, facet = part.strip().rpartition("*")
        name = facet.strip()
        terms.append(Term(name.removesuffix(MEAN), read_weight(weight, whole) if star else 1.0, name.endswith(MEAN)))
    facets = [term.facet for term in terms]
    if not all(facets) or len(set(facets)) < len(facets):
        raise InputError(f"facet {whole!r}: {EXPECTED}")
    return tuple(terms)


def read_weight(text: str, whole: str, expected: str = EXPECTED) -> float:
    """The weight of a facet, of which ``whole`` is written.

    Raises:
        InputError: no positive number; ``expected`` says what it should be.
    """
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < np.inf:
        raise InputError(f"facet {whole!r}: {text!r} is no weight: {expected}")
    return weight
