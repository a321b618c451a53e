"""Every error facetrt raises on purpose. Each also inherits the builtin that callers would expect to catch."""

from __future__ import annotations


class FacetrtError(Exception):
    """Base of all facetrt errors. The message says what was given, what was expected and what to do."""

    exit_code = 1


class InputError(FacetrtError, ValueError):
    """An argument, image or option that cannot be used."""

    exit_code = 2


class MissingFileError(FacetrtError, FileNotFoundError):
    """A file or folder that was named and is not there."""

    exit_code = 2


class OutputError(FacetrtError, OSError):
    """An output path that exists already or cannot be written."""

    exit_code = 2


class BundleError(FacetrtError, ValueError):
    """A bundle that is damaged, foreign or of an unknown schema."""

    exit_code = 2


class MissingDependencyError(FacetrtError, ImportError):
    """An optional library that is needed and not installed; the message names the extra."""

    exit_code = 2


class SourceError(FacetrtError, OSError):
    """A camera or network stream that gives no frames any more; restarting the stream may bring it back."""


class BackendError(FacetrtError, RuntimeError):
    """The encoder could not be loaded or run."""


class ParityError(FacetrtError, RuntimeError):
    """An exported graph that does not reproduce its model within the contract."""


def reason(error: BaseException) -> str:
    """What a system's or library's error says, without numbers and paths."""
    return str(getattr(error, "strerror", None) or error)
