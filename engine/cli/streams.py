"""Standard streams that never end the work: of any encoding, closed early, or on a full disk."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from contextlib import suppress

ERRORS = "facetrt.plain"
PLAIN = str.maketrans("✓✗–—−×·→←≤≥“”‘’━─│•", "+x---x*><<>\"\"''--|*")  # one for one: tables keep their columns
BRAILLE = range(0x2800, 0x2900)  # what spinners are made of


class KeptStream(io.TextIOWrapper):
    """A text stream that keeps its first failure instead of raising it, and from then on leads nowhere."""

    failure: OSError | None = None

    def write(self, text: str, /) -> int:
        with self._kept():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            super().flush()

    def _kept(self) -> _Kept:
        return _Kept(self)


class _Kept:
    """Keeps what goes wrong in a block."""

    def __init__(self, stream: KeptStream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, OSError):
            return False
        if self._stream.failure is None:
            self._stream.failure = error
            with suppress(OSError):  # what is in the buffers goes there, also when the interpreter ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        return True


def open_streams() -> None:
    """Make standard output and standard error such streams."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed one would be given to the next file opened
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    codecs.register_error(ERRORS, _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            encoding, buffered = stream.encoding, stream.line_buffering
            made = KeptStream(stream.detach(), encoding=encoding, errors=ERRORS, line_buffering=buffered)
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)


def lost_output() -> str | None:
    """Why standard output could not be written; None if it could, or if its reader has seen enough (``| head``)."""
    stream = sys.stdout
    if not isinstance(stream, KeptStream):
        return None
    stream.flush()
    failure = stream.failure
    return None if failure is None or failure.errno == errno.EPIPE else str(failure.strerror or failure)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters that an encoding lacks by something like them, or by their number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    text = "".join("*" if ord(letter) in BRAILLE else letter for letter in text)
    return text.encode(error.encoding, "backslashreplace"), error.end
