"""What the paper's settings have in place of the published code's defaults (specification §15).

Use them as keyword arguments: ``engine.cosegment(images, **PAPER_COSEGMENT)``. Every other setting that the paper
quotes is that code's default.
"""

from typing import TypedDict


class MatchPreset(TypedDict):
    """Keyword arguments of ``Engine.match``."""

    load_size: tuple[int, int]


class CosegmentPreset(TypedDict):
    """Keyword arguments of ``Engine.cosegment``."""

    load_size: int


PAPER_MATCH: MatchPreset = {"load_size": (224, 224)}
PAPER_COSEGMENT: CosegmentPreset = {"load_size": 320}
