"""Methods of discovery by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from facetrt.engine.settings import read_options
from facetrt.engine.tasks.discovery.dino_seg import DinoSeg
from facetrt.engine.tasks.discovery.found import FoundMethod
from facetrt.engine.tasks.discovery.lost import Lost
from facetrt.engine.tasks.discovery.maskcut import MaskCut
from facetrt.engine.tasks.discovery.method import Method
from facetrt.engine.tasks.discovery.selfmask import SelfMask
from facetrt.engine.tasks.discovery.spectral import Spectral
from facetrt.engine.tasks.discovery.tokencut import TokenCut
from facetrt.kernels.errors import InputError


def make_method(method: str | Method, options: Mapping[str, Any]) -> Method:
    """A method by its name, with some of its options; an instance is taken as it is.

    Raises:
        InputError: there is no such method, or no such option; the message lists what there is.
    """
    if isinstance(method, Method):
        if options:
            raise InputError(
                f"options {', '.join(options)} were given with a method that has its own: give one of both"
            )
        return method
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: expected one of {', '.join(METHODS)}")
    return read_options(METHODS[method], options)


METHODS: dict[str, type[Method]] = {  # in the order in which people meet them
    method.name: method for method in (TokenCut, Lost, Spectral, MaskCut, FoundMethod, SelfMask, DinoSeg)
}
