"""Keypoint transfer scored by PCK, on PF-WILLOW and SPair-71k. Source: specification §14.1.

Every keypoint of the source goes to the target cell whose binned descriptor is most similar by cosine: one direction,
no saliency, no best-buddy test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.engine import Engine
from facetrt.engine.evaluation.datasets.keypoints import KeypointPair, read_pf_willow, read_spair
from facetrt.engine.evaluation.datasets.reading import digest
from facetrt.engine.evaluation.protocol import (
    Choice,
    Evaluation,
    Options,
    Record,
    Row,
    Summary,
    Tick,
    by_category,
    mean_row,
    only,
)
from facetrt.engine.evaluation.scores import distances, within
from facetrt.engine.features.features import Features
from facetrt.engine.images.geometry import Geometry
from facetrt.engine.images.loading import LoadSizeChoice, loaded_size
from facetrt.engine.settings import Hierarchy, Setting
from facetrt.engine.tasks.matching import MatchOptions
from facetrt.engine.tasks.presets import PAPER_MATCH
from facetrt.kernels.log_bin import average_pool, bin_offsets, check_map, log_bin
from facetrt.kernels.products import inner_products

Float = NDArray[np.float32]
Points = NDArray[np.float64]

PCK = "PCK"


class CellRule(StrEnum):
    """Which cell a point belongs to.

    ``nearest``: the one whose centre is nearest. ``scaled``: ``floor(x · g / size)`` with the paper's grid size
    ``g = p/s · (floor(size/p) - 1) + 1``, as in the third-party notebook.
    """

    NEAREST = "nearest"
    SCALED = "scaled"

    def cells(self, points_xy: Points, geometry: Geometry) -> NDArray[np.int64]:
        """Row-major cells of loaded pixel coordinates ``(n, 2)``, ``(n,)``; points beyond the grid go to its border."""
        grid_wh, size_wh = np.array(geometry.grid[::-1]), np.array(geometry.image_size[::-1])
        patch, stride = geometry.patch, geometry.stride
        if self is CellRule.NEAREST:
            found = np.floor((points_xy - centre_offset(geometry)) / stride + 0.5)
        else:
            paper_grid = patch // stride * (size_wh // patch - 1) + 1
            found = np.floor(points_xy * paper_grid / size_wh)
        columns_rows = np.clip(found, 0, grid_wh - 1).astype(np.int64)
        return np.asarray(columns_rows[:, 1] * grid_wh[0] + columns_rows[:, 0], np.int64)


class CoordinateFrame(StrEnum):
    """Which pixels distances are measured in: those of the loaded target, or of the file."""

    LOADED = "loaded"
    ORIGINAL = "original"


class Average(StrEnum):
    """What a category's PCK is the mean of: all its keypoints, or its pairs' PCKs."""

    KEYPOINTS = "keypoints"
    PAIRS = "pairs"


@dataclass(frozen=True)
class CorrespondenceOptions(Options):
    """Options of keypoint transfer; defaults are the paper's where it states them.

    ``limit`` counts pairs per category.
    """

    load_size: LoadSizeChoice = PAPER_MATCH["load_size"]
    hierarchy: Hierarchy = MatchOptions.hierarchy
    alpha: Annotated[
        float,
        Setting(
            "Share of the image that a point may be off.",
            above=0,
            expected="a positive share of the image, for example 0.1",
        ),
    ] = 0.1
    strict: Annotated[bool, Setting("A point that is off by just that share counts as wrong.")] = False
    cell_rule: Annotated[CellRule, Setting("The cell that a keypoint belongs to.")] = CellRule.NEAREST
    frame: Annotated[CoordinateFrame, Setting("In which pixels distances are measured.")] = CoordinateFrame.LOADED
    average: Annotated[Average, Setting("What a category's PCK is the mean of.")] = Average.KEYPOINTS


@dataclass(frozen=True)
class SPairOptions(CorrespondenceOptions):
    """SPair-71k: some pairs of each category, drawn at random."""

    split: Annotated[str, Setting("Of the data set.")] = "test"
    pairs_per_category: Annotated[int | None, Setting("How many pairs are drawn; none takes all.", minimum=1)] = 20
    seed: Annotated[int, Setting("Of the drawing.", minimum=0)] = 0


def centre_offset(geometry: Geometry) -> float:
    """Pixel index of the first cell's centre: patch 8 covers 0..7, so 3.5."""
    return geometry.patch / 2 - 0.5


def centres_xy(cells: NDArray[np.int64], geometry: Geometry) -> Points:
    """Cell centres as loaded pixel indices ``(n, 2)``: ``s·column + p/2 - 0.5``."""
    rows, columns = np.divmod(cells, geometry.grid[1])
    return np.stack([columns, rows], axis=1) * float(geometry.stride) + centre_offset(geometry)


@dataclass(frozen=True)
class Target:
    """An image that keypoints are transferred to, without its 17-fold binned descriptors (79 MB at ViT-S, 55 × 55).

    The bins of a level are shifted views of one pooled map, so a product with that map and a shift of the result give
    the same dot products.
    """

    levels: list[Float] = field(repr=False)
    norms: Float = field(repr=False)  # (grid_h, grid_w) of the binned descriptors
    hierarchy: int

    @staticmethod
    def of(key_map: Float, hierarchy: int) -> Target:
        """Prepare ``(grid_h, grid_w, C)`` descriptors."""
        checked = check_map("key_map", key_map)
        levels = [average_pool(checked, level) for level in range(max(hierarchy, 1))]
        squares = [np.einsum("yxc,yxc->yx", level, level, dtype=np.float64) for level in levels]
        total = sum(_shifted(squares[level], dy, dx) for level, dy, dx in bin_offsets(hierarchy))
        return Target(levels, np.sqrt(total).astype(np.float32), hierarchy)

    def nearest(self, descriptors: Float) -> NDArray[np.int64]:
        """The most similar cell to each binned descriptor ``(n, bins·C)``, first one on ties, ``(n,)``."""
        return np.asarray(self.cosines(descriptors).argmax(axis=1), np.int64)

    def cosines(self, descriptors: Float) -> Float:
        """Cosine to every cell up to a positive factor per descriptor, ``(n, cells)``."""
        offsets = bin_offsets(self.hierarchy)
        grid_h, grid_w, channels = self.levels[0].shape
        parts = descriptors.reshape(len(descriptors), len(offsets), channels)
        total = np.zeros((grid_h, grid_w, len(descriptors)), np.float32)
        for i, (level, dy, dx) in enumerate(offsets):
            product = inner_products(self.levels[level].reshape(-1, channels), parts[:, i])
            total += _shifted(product.reshape(grid_h, grid_w, -1), dy, dx)
        total /= np.maximum(self.norms, np.finfo(np.float32).tiny)[..., None]
        return total.reshape(grid_h * grid_w, -1).T


def _shifted(values: NDArray[Any], dy: int, dx: int) -> NDArray[Any]:
    """``values[clamp(y + dy), clamp(x + dx)]`` on the first two axes."""
    rows = np.clip(np.arange(values.shape[0]) + dy, 0, values.shape[0] - 1)
    columns = np.clip(np.arange(values.shape[1]) + dx, 0, values.shape[1] - 1)
    return np.asarray(values[rows[:, None], columns])


class KeypointTransfer(Evaluation):
    """PCK of keypoints carried from one image to another."""

    task: ClassVar[str] = "match"
    data_set: ClassVar[str]

    def __init__(self, root: Path, options: CorrespondenceOptions) -> None:
        self.options: CorrespondenceOptions = options
        self.root = root
        self.pairs = {pair.key: pair for pair in self.read()}

    def read(self) -> list[KeypointPair]:
        """The pairs to score."""
        raise NotImplementedError

    @property
    def keys(self) -> list[str]:
        return list(self.pairs)

    def steps(self, key: str) -> int:
        return 1

    def facts(self) -> dict[str, Any]:
        pairs = self.pairs.values()
        images = {pair.source for pair in pairs} | {pair.target for pair in pairs}
        return {
            "data_set": self.data_set,
            "categories": len({pair.category for pair in pairs}),
            "images": len(images),
            "pairs": len(pairs),
            "keypoints": sum(len(pair.source_xy) for pair in pairs),
            "digest": digest(self.root, images),
        }

    def choices(self) -> list[Choice]:
        options = self.options
        return [
            Choice("keypoint → cell", options.cell_rule, "cell_rule=nearest or scaled"),
            Choice("cell → point", "pixel index s·i + p/2 - 0.5, the patch's centre"),
            Choice("keypoint in the loaded image", "pixel index from 0, multiplied by loaded / original size per axis"),
            Choice("distances measured in", f"{options.frame} target pixels", "frame=loaded or original"),
            Choice("limit", f"{'<' if options.strict else '≤'} {options.alpha} · max(height, width)", "strict, alpha"),
            Choice("a category's PCK", f"mean over its {options.average}", "average=keypoints or pairs"),
        ]

    def run(self, engine: Engine | None, todo: Sequence[str], out: Path, tick: Tick) -> Iterator[tuple[str, Record]]:
        for pairs in _grouped([self.pairs[key] for key in todo]):
            encoded = {} if engine is None else self._encode(engine, pairs)
            for pair in pairs:
                record = {"category": pair.category, "size": max(self._frame_size(pair))}
                record["baseline"] = self._distances(pair, pair.source_xy / pair.source_size[::-1])
                if encoded:
                    record["distances"] = self._transfer(pair, encoded)
                tick(1)
                yield pair.key, record

    def _encode(self, engine: Engine, pairs: list[KeypointPair]) -> dict[Path, tuple[Features, Target]]:
        """A category's images; held until its pairs are done."""
        paths = sorted({path for pair in pairs for path in (pair.source, pair.target)})
        stream = engine.encode_iter(paths, load_size=self.options.load_size)
        return {
            path: (only(features, self.facet), Target.of(features.map(self.facet), self.options.hierarchy))
            for path, features in zip(paths, stream, strict=True)
        }

    def _transfer(self, pair: KeypointPair, encoded: dict[Path, tuple[Features, Target]]) -> list[float]:
        source, (target, binned) = encoded[pair.source][0], encoded[pair.target]
        loaded_xy = pair.source_xy * np.array(source.image_size[::-1]) / pair.source_size[::-1]
        cells = self.options.cell_rule.cells(loaded_xy, source.geometry)
        found = binned.nearest(log_bin(source.map(self.facet), self.options.hierarchy, cells=cells))
        return self._distances(pair, centres_xy(found, target.geometry) / target.image_size[::-1])

    def _distances(self, pair: KeypointPair, relative_xy: Points) -> list[float]:
        """Distances in the chosen frame of predictions relative to the target's size."""
        frame = np.array(self._frame_size(pair)[::-1])
        annotated = pair.target_xy / pair.target_size[::-1] * frame
        return [float(value) for value in distances(relative_xy * frame, annotated)]

    def _frame_size(self, pair: KeypointPair) -> tuple[int, int]:
        if self.options.frame is CoordinateFrame.ORIGINAL:
            return pair.target_size
        return loaded_size(pair.target_size, self.options.load_size)

    def summarise(self, records: Mapping[str, Record]) -> Summary:
        groups = by_category(records)
        rows = {
            part: [Row(name, {PCK: self._pck(group, part)}) for name, group in groups.items() if part in group[0]]
            for part in ("distances", "baseline")
        }
        return Summary(
            metrics=[PCK],
            overall=mean_row("this run", rows["distances"], [PCK]) if rows["distances"] else None,
            baselines=[mean_row("same relative position (trivial)", rows["baseline"], [PCK])],
            categories=rows["distances"] or rows["baseline"],
            counts={"pairs": len(records), "keypoints": sum(len(record["baseline"]) for record in records.values())},
        )

    def _pck(self, group: list[Record], part: str) -> float | None:
        hits = [
            within(np.array(record[part]), self.options.alpha * record["size"], strict=self.options.strict)
            for record in group
            if record[part]
        ]
        if not hits:
            return None
        if self.options.average is Average.PAIRS:
            return float(np.mean([pair.mean() for pair in hits]))
        return float(np.concatenate(hits).mean())


class PfWillow(KeypointTransfer):
    """All ordered pairs inside each sub-class of PF-WILLOW."""

    name = "pf-willow"
    data_set = "PF-WILLOW"

    def read(self) -> list[KeypointPair]:
        return read_pf_willow(self.root, self.options.limit)


class SPair(KeypointTransfer):
    """Pairs drawn per category from SPair-71k."""

    name = "spair71k"
    data_set = "SPair-71k"

    def __init__(self, root: Path, options: SPairOptions) -> None:
        self.draw = options
        super().__init__(root, options)

    def read(self) -> list[KeypointPair]:
        wanted = [count for count in (self.draw.pairs_per_category, self.draw.limit) if count is not None]
        return read_spair(
            self.root,
            split=self.draw.split,
            pairs_per_category=min(wanted) if wanted else None,
            seed=self.draw.seed,
        )

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"drawn_pairs": self.keys}

    def choices(self) -> list[Choice]:
        count = "all pairs" if self.draw.pairs_per_category is None else f"{self.draw.pairs_per_category} pairs"
        drawn = f"{count} per category of '{self.draw.split}', seed {self.draw.seed}, without replacement"
        return [*super().choices(), Choice("pairs", drawn, "pairs_per_category, seed, split")]


def _grouped(pairs: list[KeypointPair]) -> Iterator[list[KeypointPair]]:
    """Consecutive pairs of one category."""
    group: list[KeypointPair] = []
    for pair in pairs:
        if group and group[0].category != pair.category:
            yield group
            group = []
        group.append(pair)
    if group:
        yield group
