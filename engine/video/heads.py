"""What is done with the features of each frame of a video."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def first_then(first: Callable[[Item], Result], then: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """``first`` until it has succeeded once, and ``then`` ever after."""
    started = False

    def head(item: Item) -> Result:
        nonlocal started
        if started:
            return then(item)
        result = first(item)
        started = True
        return result

    return head
