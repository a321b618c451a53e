"""Methods of discovery by name."""

from __future__ import annotations

from facetrt.engine.tasks.discovery.dino_seg import DinoSeg
from facetrt.engine.tasks.discovery.lost import Lost
from facetrt.engine.tasks.discovery.maskcut import MaskCut
from facetrt.engine.tasks.discovery.method import Method
from facetrt.engine.tasks.discovery.tokencut import TokenCut

METHODS: dict[str, type[Method]] = {  # in the order in which people meet them
    method.name: method for method in (TokenCut, Lost, MaskCut, DinoSeg)
}
