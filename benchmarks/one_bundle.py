"""What suites share that measure one bundle with one engine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.engine import Engine


@dataclass(frozen=True)
class Named:
    """The model, as reports name it."""

    name: str


class OneBundle:
    """A bundle and its engine; use as a context manager.

    Attributes:
        bundle: a folder or ``builtin``.
    """

    bundle: Path | str

    @cached_property
    def _stack(self) -> ExitStack:
        """What is closed at the end."""
        return ExitStack()

    @cached_property
    def spec(self) -> Named:
        """The model."""
        return Named(Bundle.open(self.bundle).manifest.model)

    @cached_property
    def stride(self) -> int:
        """The bundle's own."""
        return Bundle.open(self.bundle).manifest.stride

    @cached_property
    def engine(self) -> Engine:
        """Opened once."""
        return self._stack.enter_context(Engine.open(self.bundle))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
