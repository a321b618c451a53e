"""Compiled encoders kept on disk, for backends that compile.

A file holds a line of JSON (the key and the SHA-256 of what follows) and the compiled encoder. Its name is a hash of
the key, so an encoder compiled from another graph, by another version, for another processor or precision is another
file. Writing is atomic: of several processes that compile at once each publishes a whole file, and the last one stays.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from facetrt.engine.files import atomic_file
from facetrt.kernels.errors import OutputError

MAX_HEADER_BYTES = 1 << 16


class CompiledCache:
    """One entry of the cache in ``folder``, for everything in ``key``."""

    def __init__(self, folder: Path, key: dict[str, str]) -> None:
        self.key = key
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest[:32]}.compiled"

    def read(self) -> bytes | None:
        """The compiled encoder, or None if it is not there; a damaged one is not used, with a warning."""
        try:
            with self.path.open("rb") as file:
                header, blob = file.readline(MAX_HEADER_BYTES), file.read()
        except (FileNotFoundError, NotADirectoryError):  # writing finds the folder's fault
            return None
        except OSError as error:
            warnings.warn(f"{self.path} cannot be read ({error.strerror}): compiling anew", stacklevel=2)
            return None
        if header != self._header(blob):
            warnings.warn(f"{self.path} is damaged: compiling anew", stacklevel=2)
            return None
        return blob

    def write(self, blob: bytes) -> None:
        """Publish the compiled encoder.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as temporary, temporary.open("wb") as file:
                file.write(self._header(blob))
                file.write(blob)
        except OSError as error:
            raise OutputError(
                f"the compiled encoder cannot be kept in {self.path.parent}: {error.strerror or error}; choose another "
                "cache folder, or none"
            ) from error

    def _header(self, blob: bytes) -> bytes:
        return json.dumps({**self.key, "sha256": hashlib.sha256(blob).hexdigest()}, sort_keys=True).encode() + b"\n"
