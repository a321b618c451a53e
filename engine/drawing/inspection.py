"""Pictures of principal components, similarity maps and facet comparisons; ``(H, W, 3)`` uint8 RGB as in ``draw``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.drawing.results import (
    CELL,
    GAP,
    RIM,
    STRIP,
    captioned,
    display_size,
    draw_point,
    palette,
    scaled,
    side_by_side,
    table,
    text_width,
    write_line,
)
from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import Pixels
from facetrt.engine.images.resampling import pillow_nearest
from facetrt.engine.tasks.similarity import SimilarityMap
from facetrt.kernels.errors import InputError

SINGLE = 400  # height of the pictures of a similarity figure
LAYER_GAP = 14  # additional white between layers
MARK = (46, 204, 255)  # colour of marked points: stands out on every colour of the heat map


@dataclass(frozen=True)
class FacetRow:
    """What a facet figure shows of one facet.

    ``projected_a``, ``projected_b``: ``(grid_h, grid_w, c)`` on joint principal components; ``maps``: a similarity
    map over B per point of A.
    """

    facet: str
    projected_a: Float
    projected_b: Float
    explained_variance_ratio: NDArray[np.float64]
    maps: list[SimilarityMap]

    @property
    def layer(self) -> str:
        """``9`` of ``key@9``."""
        return self.facet.partition("@")[2]


def component_pictures(projected: Float, size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Each component of ``(grid_h, grid_w, c)`` as ``(height, width)`` grey, min–max scaled by itself (§11)."""
    return [pillow_nearest(values, size) for values in np.moveaxis(_to_bytes(projected), 2, 0)]


def rgb_picture(projected: Float, size: tuple[int, int]) -> Pixels:
    """The last three components as red, green and blue at ``(height, width)``, channels scaled separately (§11)."""
    if projected.shape[2] < 3:
        raise InputError(f"{projected.shape[2]} components cannot make a colour picture: expected at least 3")
    return pillow_nearest(_to_bytes(projected[..., -3:]), size)


def grey_to_rgb(values: NDArray[np.uint8]) -> Pixels:
    """``(H, W)`` as ``(H, W, 3)``."""
    return np.repeat(values[..., None], 3, axis=2)


def pca_row(features: Features, projected: Float) -> list[Pixels]:
    """An image, its last three components in colour if there are three, and each component in grey; a table's row."""
    size = display_size(features.image_size, CELL)
    greys = [grey_to_rgb(grey) for grey in component_pictures(projected, size)]
    return [_scaled(features, CELL), *([rgb_picture(projected, size)] if len(greys) >= 3 else []), *greys]


def pca_overview(rows: Sequence[Sequence[Pixels]], labels: Sequence[str], ratio: Sequence[float] | None) -> Pixels:
    """A table of :func:`pca_row` s with component numbers, and their shares of the variance if given."""
    coloured = len(rows[0]) > 3  # an image, a colour picture and at least three components
    count = len(rows[0]) - 1 - coloured
    shares = [f"{i + 1}" if ratio is None else f"{i + 1}: {ratio[i]:.0%}" for i in range(count)]
    return table(rows, ["image", *([f"{count - 2} to {count} in colour"] if coloured else []), *shares], labels)


def similarity_figure(a: Features, b: Features, found: SimilarityMap) -> Pixels:
    """A with the point that was given and the cell used, beside B under its heat map with the best cells marked."""
    left, what = _scaled(a, SINGLE), "[CLS] of this image"
    if found.cell_a is not None and found.clicked_xy is not None:
        left = mark_clicked(left, found.geometry_a, found.cell_a, found.clicked_xy)
        what = "point ({:.0f}, {:.0f}), in the box the cell used".format(*found.clicked_xy)
    points = found.geometry_b.loaded_points_xy(found.cells)
    right = mark_points(b, heat(b, found, SINGLE), points, [MARK] * len(points))
    low, high = float(found.values.min()), float(found.values.max())
    right = np.vstack([right, _white(6, right), _colour_bar(right.shape[1], f"{low:.2f}", f"cosine {high:.2f}")])
    binned = f", {found.hierarchy} levels of bins" if found.hierarchy else ""
    return side_by_side([captioned(left, what), captioned(right, f"{found.facet}{binned}: most similar cells")])


def mark_clicked(picture: Pixels, geometry: Geometry, cell: int, clicked_xy: tuple[float, float]) -> Pixels:
    """A box around the patch of ``cell``, and a disc at the (x, y) of the original image that was asked for."""
    drawn = picture.copy()
    scale = np.array(picture.shape[1::-1]) / geometry.original_size[::-1]
    low, high = (tuple(int(v) for v in np.rint(corner * scale)) for corner in geometry.patch_xy(cell))
    for width, shade in ((6, RIM), (3, MARK)):
        cv2.rectangle(drawn, (low[0] - 2, low[1] - 2), (high[0] + 2, high[1] + 2), shade, width)
    draw_point(drawn, tuple(int(v) for v in np.array(clicked_xy) * scale), 1, RIM)
    return drawn


def facet_figure(a: Features, b: Features, rows: Sequence[FacetRow]) -> Pixels:
    """A table: photographs on top, below a row per facet with the PCA of both images and one heat map per point."""
    cells = [point.cell_a for point in rows[0].maps if point.cell_a is not None]
    points = list(a.geometry.loaded_points_xy(np.array(cells, np.int64)))
    colours = [_colour(values) for values in palette(len(points))]
    top = [mark_points(a, _scaled(a, CELL), points, colours), _scaled(b, CELL)]
    top += [mark_points(a, _scaled(a, CELL), [p], [c]) for p, c in zip(points, colours, strict=True)]
    titles = [
        "A, joint PCA below",
        "B, joint PCA below",
        *(f"point {i}: similar in B" for i in range(1, 1 + len(points))),
    ]
    body = [_facet_pictures(a, b, row, colours) for row in rows]
    gaps = [GAP + LAYER_GAP * (above.layer != below.layer) for above, below in pairwise(rows)]
    return table([top, *body], titles, ["", *(row.facet for row in rows)], [GAP + LAYER_GAP, *gaps])


def heat(features: Features, found: SimilarityMap, height: int) -> Pixels:
    """The photograph in grey under the map in colour, at ``height``; the map's own range takes all colours.

    Every cell's colour lies at its own centre (a map stretched over the image would be off by up to half a patch at
    the borders), with linear interpolation between.
    """
    photograph = _scaled(features, height)
    values = on_pixels(found.values, features.geometry, photograph.shape[:2])
    low, high = found.values.min(), found.values.max()
    coloured = _inferno((values - low) / max(high - low, np.finfo(np.float32).tiny))
    grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)[..., None]
    return np.asarray(0.3 * grey + 0.7 * coloured, np.uint8)


def on_pixels(values: Float, geometry: Geometry, size: tuple[int, ...]) -> Float:
    """``(grid_h, grid_w)`` values at the pixels of the image drawn at ``(height, width)``, linear between centres."""
    rows, columns = (
        (((np.arange(n) + 0.5) * loaded / n - geometry.patch / 2) / geometry.stride).astype(np.float32)
        for n, loaded in zip(size, geometry.image_size, strict=True)
    )
    x, y = np.meshgrid(columns, rows)
    return np.asarray(cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)


def mark_points(
    features: Features,
    picture: Pixels,
    points: Sequence[NDArray[np.float64]] | NDArray[np.float64],
    colours: Sequence[tuple[int, ...]],
) -> Pixels:
    """Discs at (x, y) of the loaded image, drawn on a picture of it at any scale; the first one is large and on top."""
    drawn = picture.copy()
    scale = np.array([drawn.shape[1] / features.image_size[1], drawn.shape[0] / features.image_size[0]])
    large = max(5, drawn.shape[0] // 50)
    for i in reversed(range(len(points))):
        radius = large if i == 0 or len(set(colours)) > 1 else large * 2 // 3
        x, y = (int(v) for v in points[i] * scale)
        cv2.circle(drawn, (x, y), radius, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(drawn, (x, y), radius - 2, colours[i], -1, cv2.LINE_AA)
    return drawn


def _facet_pictures(a: Features, b: Features, row: FacetRow, colours: Sequence[tuple[int, ...]]) -> list[Pixels]:
    pictures = [
        rgb_picture(row.projected_a, display_size(a.image_size, CELL)),
        rgb_picture(row.projected_b, display_size(b.image_size, CELL)),
    ]
    for found, colour in zip(row.maps, colours, strict=True):
        best = found.geometry_b.loaded_points_xy(found.cells[:1])
        pictures.append(mark_points(b, heat(b, found, CELL), best, [colour]))
    return pictures


def _colour_bar(width: int, low: str, high: str) -> Pixels:
    """The colours of a heat map from low to high, with what the ends mean."""
    bar = np.asarray(np.repeat(_inferno(np.linspace(0, 1, width, dtype=np.float32)[None]), STRIP, axis=0))
    drawn = Image.fromarray(bar)
    write_line(drawn, (6, STRIP // 2), low, width, (255, 255, 255))
    write_line(drawn, (width - 6 - round(text_width(high)), STRIP // 2), high, width)
    return np.asarray(drawn)


def _inferno(values: Float) -> Pixels:
    """Values in [0, 1] of any two-dimensional shape as colours, dark to bright."""
    grey = (np.clip(values, 0, 1) * 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB), np.uint8)


def _to_bytes(values: Float) -> NDArray[np.uint8]:
    """The last axis' channels each min–max scaled to 0..255 and truncated; flat ones become 0."""
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    return np.asarray((values - low) / np.where(high > low, high - low, 1) * 255, np.float32).astype(np.uint8)


def _scaled(features: Features, height: int) -> Pixels:
    return scaled(features.pixels, height)


def _white(height: int, picture: Pixels) -> Pixels:
    return np.full((height, picture.shape[1], 3), 255, np.uint8)


def _colour(values: NDArray[np.uint8]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
