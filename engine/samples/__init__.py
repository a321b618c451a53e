"""A few photographs that ship with facetrt (licences in NOTICE), for the demo and for checking exports."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def sample_paths() -> dict[str, Path]:
    """Name → file of each photograph, in alphabetical order."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jpg"))}


def sample_images() -> dict[str, Image.Image]:
    """Name → decoded RGB photograph."""
    return {name: Image.open(path).convert("RGB") for name, path in sample_paths().items()}
