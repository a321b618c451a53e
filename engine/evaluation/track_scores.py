"""TAP-Vid's measures of followed points. Source: Doersch et al., TAP-Vid (arXiv 2211.03726), section 3.3.

Positions are in pixels of a frame that is squashed to 256×256, however it was encoded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.evaluation.scores import mean_of

Points = NDArray[np.float64]
Bools = NDArray[np.bool_]

SIDE = 256  # pixels of both sides of the frame that distances are measured in
THRESHOLDS = (1, 2, 4, 8, 16)  # of its pixels; a point must be nearer
METRICS = ["AJ", "delta_avg", "OA"]
DETAILS = [f"{kind}_{threshold}" for kind in ("delta", "J") for threshold in THRESHOLDS]


def track_scores(
    found_xy: Points, found: Bools, annotated_xy: Points, visible: Bools, scored: Bools
) -> dict[str, float | None]:
    """Shares of a video's points, all its queries and frames together; None of nothing.

    ``OA``: visible or not, as annotated. ``delta_d``: nearer than ``d`` pixels, of the visible points, whether or not
    they were ``found``. ``J_d``: found and nearer, of the visible points and those found where nothing is or too far
    away. ``delta_avg`` and ``AJ`` are means over the thresholds.

    Args:
        found_xy, annotated_xy: ``(Q, T, 2)``.
        found, visible: ``(Q, T)``, what was predicted and what is annotated.
        scored: ``(Q, T)``, which frames of a query count.
    """

    def count(which: Bools) -> int:
        return int((which & scored).sum())

    squared = np.square(found_xy - annotated_xy).sum(axis=2)
    delta, jaccard = [], []
    for threshold in THRESHOLDS:
        near = visible & (squared < threshold**2)
        wrong = found & ~near  # where nothing is, or too far away: then the point is missed as well
        delta.append(_share(count(near), count(visible)))
        jaccard.append(_share(count(near & found), count(visible) + count(wrong)))
    right = count(found == visible)
    figures = {"AJ": _mean(jaccard), "delta_avg": _mean(delta), "OA": _share(right, int(scored.sum()))}
    return figures | dict(zip(DETAILS, delta + jaccard, strict=True))


def _share(right: int, total: int) -> float | None:
    return right / total if total else None


def _mean(values: list[float | None]) -> float | None:
    return mean_of([value for value in values if value is not None])
