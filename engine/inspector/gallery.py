"""The photographs that a page shows, encoded once, and what the tasks find in them, as plain data."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.drawing.overlays import PcaColours, cells_on_pixels
from facetrt.engine.drawing.results import capped, palette
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.images.loading import ImageLike, LoadSize, Pixels, load_image
from facetrt.engine.tasks.discovery.catalogue import METHODS
from facetrt.engine.tasks.pca import fit_pca
from facetrt.engine.tasks.similarity import similarity_map
from facetrt.kernels.errors import FacetrtError, InputError

COMPONENTS = 3
SHOWN_SIDE = 1024  # pixels of the longer side of a photograph that is shown
MAX_PHOTOS = 200
OPAQUE = 150  # of 255: masks and parts on a photograph
ALONE = np.array([[40, 110, 255]], np.uint8)  # of a mask: few things in photographs are as blue

Found = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Photo:
    """One photograph.

    Attributes:
        name: as people know it.
        place: its path, as it was given; None for one that was dropped on the page.
        picture: PNG or JPEG file of it, at most :data:`SHOWN_SIDE` pixels long.
    """

    name: str
    place: str | None
    features: Features = field(repr=False)
    picture: bytes = field(repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` of the original."""
        return self.features.geometry.original_size


class Gallery:
    """Photographs, and what is found in them. Its methods may be called from several threads; results are JSON's.

    Args:
        load_size: that all of them are encoded with.
        bundle: as it was named, for the calls that the page shows.
    """

    def __init__(self, engine: Engine, bundle: str, load_size: LoadSize) -> None:
        self._engine, self._bundle, self._load_size = engine, bundle, load_size
        self._photos: list[Photo] = []
        self._lock, self._busy = Lock(), Lock()

    def add(self, images: Iterable[tuple[str, str | None, ImageLike]]) -> list[str]:
        """Add photographs by name, place and image.

        Returns:
            What is wrong with those that cannot be shown.

        Raises:
            InputError: there are too many.
        """
        broken = []
        for name, place, image in images:
            try:
                pixels = load_image(image, name=name).pixels
                (features,) = self._engine.encode([pixels], load_size=self._load_size)
            except FacetrtError as error:
                broken.append(str(error).replace("image 0", name))
                continue
            with self._lock:
                if len(self._photos) >= MAX_PHOTOS:
                    raise InputError(f"{MAX_PHOTOS} photographs are shown already: expected no more")
                self._photos.append(Photo(name, place, features, _file(capped(pixels, SHOWN_SIDE), "JPEG")))
        return broken

    def about(self) -> Found:
        """Photographs, facets and what can be chosen."""
        manifest = self._engine.manifest
        return {
            "bundle": self._bundle,
            "load_size": self._load_size if isinstance(self._load_size, int) else None,
            "facets": manifest.facets,
            "facet": self.facet("match"),
            "cosegment_facet": self.facet("cosegment"),
            "saliency": manifest.saliency_heads is not None,
            "methods": sorted(METHODS),
            "photos": [
                {
                    "id": number,
                    "name": photo.name,
                    "place": photo.place,
                    "height": photo.size[0],
                    "width": photo.size[1],
                }
                for number, photo in enumerate(self._photos)
            ],
        }

    def facet(self, task: str) -> str:
        """The bundle's own for a task."""
        return self._engine.manifest.default_facet(task)

    def photo(self, number: int) -> Photo:
        """A photograph by its number; raises :class:`InputError` if there is none."""
        if not 0 <= number < len(self._photos):
            raise InputError(f"photograph {number}: expected one of {len(self._photos)}")
        return self._photos[number]

    def similarity(self, photo: int, x: float, y: float, facet: str, hierarchy: int = 0) -> Found:
        """Cosines of a point, in original pixels, to the cells of every photograph, and its best buddy in each."""
        a, maps = self.photo(photo).features, []
        for other in self._photos:
            found = similarity_map(a, other.features, facet=facet, point_xy=(x, y), hierarchy=hierarchy)
            best = found.points_xy[0]
            back = similarity_map(
                other.features, a, facet=facet, point_xy=(float(best[0]), float(best[1])), hierarchy=hierarchy
            )
            low, high = float(found.values.min()), float(found.values.max())
            scaled = np.rint((found.values - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
            maps.append(
                {
                    "grid": found.values.shape,
                    "values": base64.b64encode(scaled.tobytes()).decode(),
                    "low": low,
                    "high": high,
                    "best": [round(float(value), 1) for value in best],
                    "mutual": bool(back.cells[0] == found.cell_a),
                    "covers": _covered(other.features),
                }
            )
        return {"maps": maps}

    def match(self, a: int, b: int, facet: str, hierarchy: int, threshold: float, pairs: int) -> Found:
        """Point pairs of two photographs, in original pixels."""
        with self._busy:
            found = self._engine.match(
                self.photo(a).features,
                self.photo(b).features,
                facet=facet,
                hierarchy=hierarchy,
                saliency_threshold=threshold,
                num_pairs=pairs,
            )
        return {
            "a": found.points_a_xy.round(1).tolist(),
            "b": found.points_b_xy.round(1).tolist(),
            "similarity": found.similarity[found.selected].round(3).tolist(),
            "confidence": round(found.confidence, 3),
            "why": found.why_empty,
        }

    def cosegment(self, facet: str, elbow: float, votes: float, threshold: float) -> Found:
        """What all photographs share: a picture to lay over each, transparent where nothing is."""
        with self._busy:
            masks = self._engine.cosegment(
                self._features,
                facet=facet,
                elbow=elbow,
                votes_percentage=votes,
                saliency_threshold=threshold,
                sample_interval=self._interval,
                refine="none",
            )
        overlays = [_overlay(mask.cells.astype(np.int16), mask.geometry, 1) for mask in masks]
        return {"overlays": overlays, "clusters": len(masks.clustering.centroids), "why": masks[0].why_empty}

    def parts(self, facet: str, parts: int, threshold: float) -> Found:
        """Parts that the photographs share, in colours that mean the same in all."""
        with self._busy:
            found = self._engine.segment_parts(
                self._features,
                facet=facet,
                num_parts=parts,
                saliency_threshold=threshold,
                sample_interval=self._interval,
                refine="none",
            )
        overlays = [_overlay(each.cells.astype(np.int16) + 1, each.geometry, parts) for each in found]
        return {"overlays": overlays, "why": found[0].why_empty}

    def pca(self, facet: str, *, joint: bool) -> Found:
        """The first three principal components as colours, of all photographs together or of each by itself."""
        with self._busy:
            overlays, shares = [], []
            fitted = None
            for item in self._features:
                if fitted is None or not joint:
                    among = self._features if joint else [item]
                    fitted = PcaColours.fitted(fit_pca(among, facet, COMPONENTS), among)
                    shares = fitted.pca.explained_variance_ratio.round(3).tolist()
                picture = fitted.picture(fitted.pca.project(item), item.geometry)
                overlays.append(_data_uri(_file(capped(picture, SHOWN_SIDE), "PNG")))
        return {"overlays": overlays, "shares": shares}

    def discover(self, method: str) -> Found:
        """The objects of each photograph by itself: boxes in original pixels, and masks to lay over."""
        with self._busy:
            objects = self._engine.discover(self._features, method)
        overlays, boxes = [], []
        for found in objects:
            labels = np.zeros(found.geometry.grid, np.int16)
            for number, cells in enumerate(found.cells[::-1]):
                labels[cells] = len(found) - number
            overlays.append(_overlay(labels, found.geometry, max(len(found), 1)))
            boxes.append(found.boxes.round(1).tolist())
        return {"overlays": overlays, "boxes": boxes, "why": [found.why_empty for found in objects]}

    @property
    def _features(self) -> list[Features]:
        if not self._photos:
            raise InputError("no photographs are shown: drop some on the page")
        return [photo.features for photo in self._photos]

    @cached_property
    def _interval(self) -> int:
        """Every n-th cell is clustered: few photographs have few."""
        cells = sum(item.grid[0] * item.grid[1] for item in self._features)
        return max(1, min(100, cells // 300))


def _covered(features: Features) -> list[float]:
    """Left, top, width and height of the part of a photograph that cells cover, as shares of it."""
    geometry = features.geometry
    grid_h, grid_w = geometry.grid
    centres = geometry.points_xy(np.array([0, grid_h * grid_w - 1]))
    height, width = geometry.original_size
    step_x = (centres[1, 0] - centres[0, 0]) / max(grid_w - 1, 1)
    step_y = (centres[1, 1] - centres[0, 1]) / max(grid_h - 1, 1)
    left, top = centres[0, 0] - step_x / 2, centres[0, 1] - step_y / 2
    return [float(v) for v in (left / width, top / height, grid_w * step_x / width, grid_h * step_y / height)]


def _overlay(cells: NDArray[np.int16], geometry: Any, count: int) -> str:
    """Labels ``(grid_h, grid_w)``, 0 for nothing, as a transparent picture of the photograph's shape."""
    labels = cells_on_pixels(cells - 1, geometry)
    some = ALONE if count < 2 else palette(count)
    colours = np.concatenate([np.zeros((1, 3), np.uint8), some])
    picture = np.empty((*labels.shape, 4), np.uint8)
    picture[..., :3] = colours[np.clip(labels + 1, 0, len(colours) - 1)]
    picture[..., 3] = np.where(labels >= 0, OPAQUE, 0)
    height, width = picture.shape[:2]
    scale = min(1.0, SHOWN_SIDE / max(height, width))
    small = Image.fromarray(picture).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.NEAREST
    )
    return _data_uri(_file(np.asarray(small), "PNG"))


def _file(pixels: Pixels, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def named(paths: Sequence[Path]) -> Iterable[tuple[str, str | None, ImageLike]]:
    """Files as :meth:`Gallery.add` takes them."""
    return ((path.name, str(path), path) for path in paths)
