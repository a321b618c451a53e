"""Principal components of descriptors, over one image or jointly over a set. Source: Amir et al.; specification §11.

The fit is exact and streams: only the C × C scatter matrix is held, so a set may have any number of images. It equals
scikit-learn's full solver up to signs, which a rule fixes here; the reference's randomised solver has no seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSizeChoice
from facetrt.engine.machine.memory import fits
from facetrt.engine.settings import BUNDLES_CHOICE, Hierarchy, Setting, check, read_facet
from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import bin_offsets, log_bin
from facetrt.kernels.parallel import one_blas_thread
from facetrt.kernels.products import gram_matrix, inner_products

Double = NDArray[np.float64]

BLOCK = 4096  # descriptors turned into float64 at a time, of one bin
SCATTERS = 4  # matrices of the scatter's size that a fit holds


@dataclass(frozen=True)
class Pca:
    """Principal components of one facet's raw (not normalised) descriptors.

    Attributes:
        mean: ``(C,)`` float64.
        components: ``(c, C)`` float64, orthonormal rows, largest variance first. The largest-magnitude entry of each
            row is positive (the first one on ties), so that a fit can be repeated.
        explained_variance_ratio: ``(c,)`` float64, share of the total variance; zeros if there is none.
        count: number of descriptors fitted.
        hierarchy: levels of log-binning of the descriptors; 0 for none.
    """

    facet: str
    mean: Double = field(repr=False)
    components: Double = field(repr=False)
    explained_variance_ratio: Double
    count: int
    hierarchy: int = 0

    def __post_init__(self) -> None:
        shape = self.components.shape
        if len(shape) != 2 or self.mean.shape != shape[1:] or self.explained_variance_ratio.shape != shape[:1]:
            raise InputError(
                f"components of shape {shape} do not fit a mean of shape {self.mean.shape} and ratios of shape "
                f"{self.explained_variance_ratio.shape}: expected (c, C), (C,) and (c,)"
            )

    def project(self, features: Features) -> Float:
        """Coordinates of every cell on the components, ``(grid_h, grid_w, c)`` float32.

        Raises:
            InputError: the facet is not at hand or has another width than the fit.
        """
        rows = _Raw(features, self.facet, self.hierarchy)
        if rows.width != self.mean.size:
            raise InputError(_width_differs(features, self.facet, rows.width, self.mean.size))
        projected = np.empty((len(rows), len(self.components)), np.float32)
        for start, block in rows.blocks():
            projected[start : start + len(block)] = inner_products(block - self.mean, self.components)
        return projected.reshape(*features.grid, -1)


@dataclass(frozen=True)
class PcaOptions:
    """Options of :func:`fit_pca`, which documents them."""

    facet: Annotated[
        str, Setting("KIND@LAYER; the deepest exported keys by default, as the reference.", shown="", read=read_facet)
    ] = BUNDLES_CHOICE
    components: Annotated[int, Setting("How many; the last three also make a colour picture.", minimum=1)] = 4
    hierarchy: Hierarchy = 0
    load_size: LoadSizeChoice = DEFAULT_SIZE

    def __post_init__(self) -> None:
        check(self)


def fit_pca(
    features: Iterable[Features],
    facet: str,
    components: int = PcaOptions.components,
    *,
    hierarchy: int = PcaOptions.hierarchy,
) -> Pca:
    """Principal components of all cells of all images together ([CLS] left out).

    Args:
        features: of any number of images, for example from ``Engine.encode_iter`` or ``Engine.collect``;
            read once, none is kept.
        facet: which descriptors.
        components: how many, at most the width of the descriptors and their number.
        hierarchy: levels of log-binning; 0 for none. The scatter matrix of binned descriptors is as wide as they are:
            0.3 GB for two levels of 384 channels, and minutes to decompose.

    Raises:
        InputError: no image, too few descriptors or channels, a facet that was not exported, NaN or infinite values,
            a scatter matrix that does not fit into memory.
    """
    PcaOptions(facet, components, hierarchy)
    moments = None
    for item in features:
        rows = _checked_rows(item, facet, components, hierarchy)
        moments = moments or Moments(rows.width)
        if rows.width != moments.mean.size:
            raise InputError(_width_differs(item, facet, rows.width, moments.mean.size))
        for _, block in rows.blocks():
            moments.add(block)
    if moments is None:
        raise InputError("no image was given: PCA needs at least 1")
    return replace(_decompose(moments, facet, components), hierarchy=hierarchy)


class _Raw:
    """Descriptors of an image as they are, not normalised, in float64 blocks; binned ones are made by the block."""

    def __init__(self, features: Features, facet: str, hierarchy: int) -> None:
        self._map, self._hierarchy, self._bins = features.map(facet), hierarchy, len(bin_offsets(hierarchy))
        self.width = self._bins * self._map.shape[2]

    def __len__(self) -> int:
        return int(np.prod(self._map.shape[:2]))

    def blocks(self) -> Iterator[tuple[int, Double]]:
        """Consecutive pieces as ``(first row, (n, width) float64)``."""
        for start in range(0, len(self), step := BLOCK // self._bins):
            cells = np.arange(start, min(start + step, len(self)))
            yield start, log_bin(self._map, self._hierarchy, cells=cells).astype(np.float64)


class Moments:
    """Count, mean ``(C,)`` and scatter about the mean ``(C, C)``, in float64, of rows that arrive in pieces.

    Pieces are merged by the parallel update of Chan, Golub and LeVeque, which does not cancel as raw sums of squares
    do: keys have means that are large beside their spread.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = np.zeros(channels)
        self.scatter = np.zeros((channels, channels))

    def add(self, rows: Float | Double) -> None:
        """Take in some ``rows (n, C)``."""
        mean = rows.mean(axis=0, dtype=np.float64)
        centred = rows - mean
        shift, total = mean - self.mean, self.count + len(rows)
        self.scatter += gram_matrix(centred.T)
        self.scatter += np.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total


def _decompose(moments: Moments, facet: str, components: int) -> Pca:
    if moments.count < components:
        raise InputError(
            f"the images give {moments.count} descriptors, too few for {components} components: use fewer components, "
            "more images or a larger load size"
        )
    with one_blas_thread:
        variances, vectors = np.linalg.eigh(moments.scatter)
    chosen = vectors[:, ::-1][:, :components].T  # (c, C)
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(axis=1, keepdims=True), axis=1)
    total = variances.clip(0).sum()
    ratio = variances[::-1][:components].clip(0) / (total if total > 0 else 1)
    return Pca(facet, moments.mean, chosen * np.where(largest < 0, -1.0, 1.0), ratio, moments.count)


def _checked_rows(item: Features, facet: str, components: int, hierarchy: int) -> _Raw:
    rows = _Raw(item, facet, hierarchy)
    if components > rows.width:
        raise InputError(f"components={components}: {facet} has {rows.width} channels, so at most that many exist")
    if not fits(needed := SCATTERS * rows.width**2 * 8):
        raise InputError(
            f"the scatter of descriptors of {rows.width:,} numbers needs {needed / 1e9:.0f} GB, more than this machine "
            "has: use a smaller hierarchy"
        )
    if not np.isfinite(item[facet]).all():
        raise InputError(f"{facet} of {item.name} holds NaN or infinite values: expected finite descriptors")
    return rows


def _width_differs(item: Features, facet: str, found: int, expected: int) -> str:
    return f"{facet} of {item.name} has {found} channels and not {expected}: use one bundle for all"
