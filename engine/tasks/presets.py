"""Settings quoted in the paper, where they differ from the published code's defaults (specification §15).

Use them as keyword arguments: ``engine.cosegment(images, **PAPER_COSEGMENT)``.
"""

from typing import TypedDict


class MatchPreset(TypedDict):
    """Keyword arguments of ``Engine.match``."""

    load_size: tuple[int, int]
    saliency_threshold: float


class CosegmentPreset(TypedDict):
    """Keyword arguments of ``Engine.cosegment``."""

    load_size: int
    elbow: float
    saliency_threshold: float
    votes_percentage: float


PAPER_MATCH: MatchPreset = {"load_size": (224, 224), "saliency_threshold": 0.05}
PAPER_COSEGMENT: CosegmentPreset = {
    "load_size": 320,
    "elbow": 0.975,
    "saliency_threshold": 0.065,
    "votes_percentage": 75,
}
PAPER_OUTLIER_THRESHOLD = 0.7  # for collections that hold images without the object
