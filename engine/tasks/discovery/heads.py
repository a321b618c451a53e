"""FOUND's head in a file of its own: JSON with a facet, its weights and a bias."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from facetrt.engine.bundle.manifest import LinearHead, parse_head
from facetrt.engine.files import atomic_file, read_object
from facetrt.kernels.errors import BundleError, InputError


def read_head(path: Path) -> LinearHead:
    """A head that :func:`write_head` wrote.

    Raises:
        MissingFileError, InputError: no such file, or another content.
    """
    try:
        return parse_head(read_object(path, "a head of FOUND"))
    except BundleError as error:
        raise InputError(f"{path} is no head of FOUND: {error}") from None


def write_head(head: LinearHead, path: Path) -> None:
    """A head as JSON; the file appears whole or not at all."""
    with atomic_file(path) as made:
        made.write_text(json.dumps(asdict(head)) + "\n", encoding="utf-8")
