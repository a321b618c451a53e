"""Every error facetrt raises on purpose. Each also inherits the builtin that callers would expect to catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike


class FacetrtError(Exception):
    """Base of all facetrt errors. The message says what was given, what was expected and what to do, in one line."""

    exit_code = 1

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} …"


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


class UnsupportedSystemError(FacetrtError, ImportError):
    """An operating system that facetrt does not run on."""

    exit_code = 2


class SourceError(FacetrtError, OSError):
    """A camera or network stream that gives no frames any more; restarting the stream may bring it back."""


class BackendError(FacetrtError, RuntimeError):
    """The encoder could not be loaded or run."""


class ParityError(FacetrtError, RuntimeError):
    """An exported graph that does not reproduce its model within the contract."""


def reason(error: BaseException) -> str:
    """What a system's or library's error says, without numbers and paths."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def printable(text: str) -> str:
    """One line that any terminal shows as it is: blanks for line ends, escapes for what is no character to be seen.

    File names and other people's messages may hold control characters, and halves of characters that cannot be encoded.
    """
    if text.isprintable():
        return text
    shown = (letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(text.split()))
    return "".join(shown)


@contextmanager
def reading(path: str | PathLike[str], what: str, error: type[FacetrtError] = InputError) -> Iterator[None]:
    """Reading a file of any content: whatever the block raises becomes one of our errors, which names the file.

    Libraries fail on damaged files in any way, so this takes every exception but an error of ours.

    Args:
        what: the file should be, for the message: "a MATLAB file".
        error: the kind to raise.

    Raises:
        MissingFileError: there is no such file.
    """
    try:
        yield
    except FacetrtError:
        raise
    except FileNotFoundError as missing:
        raise MissingFileError(f"{path} does not exist: expected {what}") from missing
    except MemoryError as large:
        raise error(f"{path} is not {what} that can be read: it would not fit into memory") from large
    except RecursionError as deep:
        raise error(f"{path} is not {what} that can be read: it is nested too deeply") from deep
    except Exception as failed:
        raise error(f"{path} is not {what} that can be read: {reason(failed)[:MAX_REASON]}") from failed


MAX_REASON = 200  # characters of other people's messages
MAX_MESSAGE = 4000  # of ours, which quote what was given
