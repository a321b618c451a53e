"""Facets of a video's frames that are compared together."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from facetrt.engine.features.features import Features, Float
from facetrt.engine.tasks.discovery.fusing import read_weight
from facetrt.kernels.best_buddies import NORM_FLOOR
from facetrt.kernels.errors import InputError

EXPECTED = "expected a form like key@3+2*query@3"  # of facets that are blended


@dataclass(frozen=True)
class Blend:
    """Facets that are compared together, each less its mean in the first frame and divided by its spread there.

    Attributes:
        terms: per facet its name, mean ``(C,)`` and factor.
    """

    terms: list[tuple[str, Float, float]] = field(repr=False)

    @classmethod
    def fit(cls, text: str, features: Features) -> Blend:
        """Read facets joined by ``+``, each with a weight if it starts like ``2*``: ``key@3+2*query@3``.

        Raises:
            InputError: a weight that is no positive number, or a facet that the features lack.
        """
        terms = []
        for weight, facet in _terms(text):
            rows = features[facet]
            mean = np.asarray(rows.mean(axis=0), np.float32)
            spread = float(np.sqrt(np.square(rows - mean).sum(axis=1).mean()))
            terms.append((facet, mean, 1.0 if weight is None else read_weight(weight, text, EXPECTED), spread))
        return cls([(facet, mean, weight / max(spread, NORM_FLOOR)) for facet, mean, weight, spread in terms])

    @staticmethod
    def facets(text: str) -> list[str]:
        """The facets of a text for :meth:`fit`, whatever weights they have."""
        return [facet for _, facet in _terms(text)]

    def map(self, features: Features) -> Float:
        """``(grid_h, grid_w, C)``, the facets' channels one after the other.

        Raises:
            InputError: NaN or infinite values, which no later frame would get rid of.
        """
        maps = [features.map(facet) for facet, _, _ in self.terms]
        joined = np.empty((*features.grid, sum(values.shape[2] for values in maps)), np.float32)
        first = 0
        for values, (_, mean, factor) in zip(maps, self.terms, strict=True):
            own = joined[..., first : first + values.shape[2]]
            np.subtract(values, mean, out=own)
            own *= np.float32(factor)
            first += values.shape[2]
        if not np.isfinite(joined.sum()):  # a sum is, as good as always, what all it sums is
            raise InputError(nonfinite(features.name))
        return joined


def _terms(text: str) -> list[tuple[str | None, str]]:
    """Weight, if there is one, and facet of each term."""
    parts = [term.rpartition("*") for term in text.split("+")]
    return [(weight if star else None, facet.strip()) for weight, star, facet in parts]


def nonfinite(name: str) -> str:
    """What is said of a frame that cannot be compared."""
    return f"{name} has NaN or infinite descriptors: expected finite ones; leave it out"
