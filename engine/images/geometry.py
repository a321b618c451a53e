"""The one place where cells, loaded pixels and original pixels are converted into each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from facetrt.kernels.errors import InputError

Value = TypeVar("Value", bound=np.generic)


def grid_size(image_size: tuple[int, int], patch: int, stride: int) -> tuple[int, int]:
    """``(grid_h, grid_w)`` of a ``(height, width)`` image: whole patches at every ``stride`` pixels."""
    height, width = image_size
    if height < patch or width < patch:
        raise InputError(
            f"an image of {height}×{width} (height × width) pixels is smaller than one patch of {patch}×{patch}: "
            "use a larger image or a larger load size"
        )
    return 1 + (height - patch) // stride, 1 + (width - patch) // stride


@dataclass(frozen=True)
class Geometry:
    """How a grid of cells lies on an image.

    Points are (x, y) in continuous pixels: (0, 0) is the image's top-left corner, so the first pixel's centre is
    (0.5, 0.5) and ``floor`` gives pixel indices. In the loaded image a cell's centre is ``stride·column + patch/2``,
    the number that the reference implementation prints.

    Attributes:
        original_size: ``(height, width)`` before loading.
        image_size: of the loaded image, as the encoder sees it.
        resized: what the picture was resized to, where a border was then added at the right and at the bottom;
            :attr:`image_size` if None.
    """

    original_size: tuple[int, int]
    image_size: tuple[int, int]
    patch: int
    stride: int
    resized: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        grid_size(self.image_size, self.patch, self.stride)

    @property
    def grid(self) -> tuple[int, int]:
        """``(grid_h, grid_w)``."""
        return grid_size(self.image_size, self.patch, self.stride)

    @property
    def unused_pixels(self) -> tuple[int, int]:
        """Rows at the bottom and columns at the right of the loaded image that no cell covers."""
        height, width = self.image_size
        return (height - self.patch) % self.stride, (width - self.patch) % self.stride

    @property
    def covered_size(self) -> tuple[int, int]:
        """``(height, width)`` of the upper-left part of the loaded image that patches cover."""
        height, width = (self.stride * (cells - 1) + self.patch for cells in self.grid)
        return height, width

    @property
    def picture_size(self) -> tuple[int, int]:
        """``(height, width)`` of the picture in loaded pixels, without a border that was added."""
        return self.resized or self.image_size

    @property
    def scale_xy(self) -> NDArray[np.float64]:
        """Original pixels per loaded pixel, ``(2,)`` as (x, y)."""
        height, width = self.picture_size
        return np.array([self.original_size[1] / width, self.original_size[0] / height])

    def on_picture(self, values: NDArray[Value]) -> NDArray[Value]:
        """What belongs to the loaded image, ``(…, height, width)``, without a border that was added."""
        height, width = self.picture_size
        return values[..., :height, :width]

    def loaded_points_xy(self, cells: NDArray[np.integer]) -> NDArray[np.float64]:
        """Centres of row-major ``cells (n,)`` in the loaded image, ``(n, 2)``."""
        rows, columns = np.divmod(cells, self.grid[1])
        return np.stack([columns, rows], axis=-1) * float(self.stride) + self.patch / 2

    def points_xy(self, cells: NDArray[np.integer]) -> NDArray[np.float64]:
        """Centres of row-major ``cells (n,)`` in the original image, ``(n, 2)``."""
        return self.loaded_points_xy(cells) * self.scale_xy

    def patch_xy(self, cell: int) -> NDArray[np.float64]:
        """Top-left and bottom-right corner of a cell's patch in the original image, ``(2, 2)``."""
        centre = self.loaded_points_xy(np.array([cell]))[0]
        return np.stack([centre - self.patch / 2, centre + self.patch / 2]) * self.scale_xy

    def positions_at(self, points_xy: NDArray[np.floating]) -> NDArray[np.float64]:
        """Points ``(…, 2)`` of the original image as fractional (column, row): a cell's centre is a whole number."""
        return np.asarray((points_xy / self.scale_xy - self.patch / 2) / self.stride, np.float64)

    def points_at(self, positions: NDArray[np.floating]) -> NDArray[np.float64]:
        """The inverse of :meth:`positions_at`: fractional (column, row) ``(…, 2)`` as points of the original image."""
        return np.asarray((positions * self.stride + self.patch / 2) * self.scale_xy, np.float64)

    def cells_at(self, points_xy: NDArray[np.floating]) -> NDArray[np.int64]:
        """The cell whose centre is nearest to each point ``(n, 2)`` of the original image, ``(n,)``.

        Raises:
            InputError: a point outside the image.
        """
        limits = np.array(self.original_size[::-1])
        outside = ((points_xy < 0) | (points_xy > limits)).any(axis=-1)
        if outside.any():
            x, y = points_xy[outside][0]
            raise InputError(f"point ({x:g}, {y:g}) lies outside the image of {limits[0]}×{limits[1]} (width × height)")
        grid = np.array(self.grid[::-1])
        columns_rows = np.rint(self.positions_at(points_xy))
        clipped = np.clip(columns_rows, 0, grid - 1).astype(np.int64)
        return np.asarray(clipped[..., 1] * grid[0] + clipped[..., 0], np.int64)
