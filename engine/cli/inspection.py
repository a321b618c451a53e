"""``facetrt pca | similarity | facets``: looking at descriptors. Parse, call, write, print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.cli.app import console, parse_facets, progress_bar
from facetrt.engine.cli.opening import Job, encode_pair, open_engine
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.cli.records import describe
from facetrt.engine.drawing import inspection as draw_inspection
from facetrt.engine.drawing.inspection import FacetRow
from facetrt.engine.engine import Engine
from facetrt.engine.features.collection import MEMORY_LIMIT
from facetrt.engine.features.features import Features, Float
from facetrt.engine.files import write_png, write_results
from facetrt.engine.images.finding import unique_stems
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSizeChoice, Pixels
from facetrt.engine.settings import Hierarchy, Setting, values_of
from facetrt.engine.tasks.pca import Pca, PcaOptions, fit_pca
from facetrt.engine.tasks.similarity import SimilarityMap, SimilarityOptions, parse_point, similarity_map
from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import bin_offsets

OVERVIEW_IMAGES = 24  # at most so many rows in the overview of a PCA
AUTOMATIC_POINTS = 3
FIGURE_COMPONENTS = 4


@expanded
def pca(
    job: Job,
    options: PcaOptions,
    running: RunOptions,
    per_image: Annotated[bool, typer.Option("--per-image", help="Components of each image by itself.")] = False,
) -> None:
    """Principal components of descriptors as pictures, over all images together or per image.

    The joint fit is exact, on all descriptors of all images, and each image is encoded once: past 1 GB descriptors wait
    in a temporary folder, so memory stays bounded for any number of images.
    """
    job.check_place()
    with open_engine(job.bundle, running) as engine:
        chosen = replace(options, facet=_choose_facet(engine.manifest, options.facet))
        _check_width(engine.manifest, chosen)
        fitted = (_fit_each if per_image else _fit_jointly)(engine, job.paths, chosen)
        record = {"facet": chosen.facet, "options": values_of(chosen) | {"per_image": per_image}}
        with job.folder() as folder:
            ratio = write_pca(folder, unique_stems(job.paths), fitted, record)
    explained = "" if per_image else f" explain {ratio.sum():.0%} of the variance"
    console.print(f"{chosen.components} components of {chosen.facet}{explained}, {len(job.paths)} images: {job.out}")


def _check_width(manifest: Manifest, options: PcaOptions) -> None:
    channels = manifest.architecture.dim * len(bin_offsets(options.hierarchy))
    if options.components > channels:
        raise InputError(
            f"--components {options.components}: {options.facet} has {channels} channels, so at most that many exist"
        )


def _fit_each(engine: Engine, paths: Sequence[Path], options: PcaOptions) -> Iterator[tuple[Features, Pca]]:
    with progress_bar("projecting", len(paths)) as update:
        for item in engine.encode_iter(paths, load_size=options.load_size, progress=update):
            yield item, _fit([item], options)


def _fit_jointly(engine: Engine, paths: Sequence[Path], options: PcaOptions) -> Iterator[tuple[Features, Pca]]:
    """Encode once, fit on everything, then read again."""
    keep: dict[str, Any] = {"facets": [options.facet], "load_size": options.load_size, "memory_limit": MEMORY_LIMIT}
    with progress_bar("encoding", len(paths)) as update:
        collected = engine.collect(paths, progress=update, **keep)
    with collected:
        with progress_bar("fitting", len(paths)) as update:
            fitted = _fit(_counted(collected, update), options)
        with progress_bar("projecting", len(paths)) as update:
            for item in _counted(collected, update):
                yield item, fitted


def _fit(features: Iterable[Features], options: PcaOptions) -> Pca:
    return fit_pca(features, **values_of(options, without=["load_size"]))


def _counted(items: Sequence[Features], update: Callable[[int, int | None], None]) -> Iterator[Features]:
    for done, item in enumerate(items, start=1):
        yield item
        update(done, len(items))


def write_pca(
    folder: Path, stems: Sequence[str], fitted: Iterator[tuple[Features, Pca]], record: dict[str, Any]
) -> NDArray[np.float64]:
    """``maps/*.npz``, ``components/*.png``, ``rgb/*.png``, ``overview.png`` and ``results.json``; ``pca.npz`` if joint.

    Returns the last fit's explained variance ratio.
    """
    for name in ("maps", "components", *(("rgb",) if record["options"]["components"] >= 3 else ())):
        (folder / name).mkdir()
    joint = not record["options"]["per_image"]
    sheet: list[list[Pixels]] = []
    records: list[dict[str, Any]] = []
    for stem, (item, fit) in zip(stems, fitted, strict=True):
        projected = fit.project(item)
        arrays: dict[str, Any] = {"projected": projected, "grid": item.grid, "image_size": item.image_size}
        np.savez(folder / "maps" / f"{stem}.npz", **arrays, **({} if joint else _fit_arrays(fit)))
        _write_components(folder, stem, item, projected)
        if len(sheet) < OVERVIEW_IMAGES:
            sheet.append(draw_inspection.pca_row(item, projected))
        records.append(describe(item) | {"maps": f"maps/{stem}.npz"} | ({} if joint else _fit_record(fit)))
    ratio = list(fit.explained_variance_ratio) if joint else None
    write_png(folder / "overview.png", draw_inspection.pca_overview(sheet, stems[: len(sheet)], ratio))
    if joint:
        np.savez(folder / "pca.npz", **_fit_arrays(fit))
    write_results(folder, {"command": "pca", **record, **(_fit_record(fit) if joint else {}), "images": records})
    return fit.explained_variance_ratio


def _write_components(folder: Path, stem: str, item: Features, projected: Float) -> None:
    for number, grey in enumerate(draw_inspection.component_pictures(projected, item.image_size), start=1):
        write_png(folder / "components" / f"{stem}_{number}.png", grey)
    if projected.shape[2] >= 3:
        write_png(folder / "rgb" / f"{stem}.png", draw_inspection.rgb_picture(projected, item.image_size))


def _fit_arrays(fit: Pca) -> dict[str, Any]:
    return {
        "mean": fit.mean,
        "components": fit.components,
        "explained_variance_ratio": fit.explained_variance_ratio,
    }


def _fit_record(fit: Pca) -> dict[str, Any]:
    return {"explained_variance_ratio": fit.explained_variance_ratio.round(6), "descriptors_fitted": fit.count}


@dataclass(frozen=True)
class Marking(SimilarityOptions):
    """The picture marks a few cells, not one."""

    top_k: int = 5


@expanded
def similarity(job: Job, options: Marking, running: RunOptions) -> None:
    """How similar a point of the first image is to every cell of the second."""
    paths = job.pair("similarity")
    if (options.point_xy is None) != options.cls:
        raise InputError("choose what to compare: either --at X,Y or --cls")
    job.check_place()
    with open_engine(job.bundle, running) as engine:
        chosen = replace(options, facet=_choose_facet(engine.manifest, options.facet))
        a, b = encode_pair(engine, paths, options.load_size)
    found = similarity_map(a, b, **values_of(chosen, without=["load_size"]))
    with job.folder() as folder:
        write_similarity(folder, a, b, found, values_of(chosen))
    x, y = found.points_xy[0]
    best = f"cosine {found.similarity[0]:.3f}): ({x:.1f}, {y:.1f}) of {paths[1].name}"
    console.print(f"most similar ({found.facet}, {best}: {job.out}")


def write_similarity(folder: Path, a: Features, b: Features, found: SimilarityMap, options: dict[str, Any]) -> None:
    """``similarity.png``, ``similarity.npz`` and ``results.json``."""
    write_png(folder / "similarity.png", draw_inspection.similarity_figure(a, b, found))
    best: dict[str, Any] = {"cells": found.cells, "points_b_xy": found.points_xy, "similarity": found.similarity}
    np.savez(folder / "similarity.npz", values=found.values, **best)
    record = {
        "command": "similarity",
        "facet": found.facet,
        "options": options,
        "cell_a": found.cell_a,
        "clicked_xy": found.clicked_xy,
        "cell_a_box_xy": None if found.cell_a is None else found.geometry_a.patch_xy(found.cell_a).round(3),
        "point_a_xy": None if found.point_a_xy is None else found.point_a_xy.round(3),
        "range": [found.values.min(), found.values.max()],
        **best,
        "points_b_xy": found.points_xy.round(3),
        "images": [describe(a), describe(b)],
    }
    write_results(folder, record)


@dataclass(frozen=True)
class Comparison:
    """Which facets are compared, and at which points of the first image."""

    facets: Annotated[
        str | None, typer.Option("--facets", help="KIND@LAYER, comma-separated; all of the bundle's by default.")
    ] = None
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="X,Y in pixels of the first image's original size; may be repeated."),
    ] = None
    points: Annotated[
        int | None,
        Setting("Without --at: so many points found as 'match' finds them (3).", minimum=1, maximum=12),
    ] = None
    hierarchy: Hierarchy = 0
    load_size: LoadSizeChoice = DEFAULT_SIZE

    @cached_property
    def points_xy(self) -> list[tuple[float, float]]:
        """The points that were given."""
        given = [parse_point(text) for text in self.at or []]
        if given and self.points is not None:
            raise InputError("--at names the points and --points finds some: give one of them")
        return given


@expanded
def facets_command(job: Job, options: Comparison, running: RunOptions) -> None:
    """Compare facets and layers on two images in one figure: joint PCA, and similarity to points of the first."""
    paths, given = job.pair("facets"), options.points_xy
    job.check_place()
    with open_engine(job.bundle, running) as engine:
        chosen = by_layer(parse_facets(options.facets, engine.manifest))
        a, b = encode_pair(engine, paths, options.load_size)
        points_xy = given or _find_points(engine, a, b, options.points or AUTOMATIC_POINTS)
    rows = [compare_facet(a, b, facet, points_xy, options.hierarchy) for facet in chosen]
    record = values_of(options) | {"at": given, "points": len(points_xy)}
    with job.folder() as folder:
        write_facets(folder, a, b, rows, record)
    console.print(f"{len(rows)} facets, {len(points_xy)} points: {job.out / 'facets.png'}")


def by_layer(names: Sequence[str]) -> list[str]:
    """Facet names without repetition, deepest layer last, kinds of one layer in a fixed order."""
    kinds = ("key", "query", "value", "token", "normed")

    def rank(name: str) -> tuple[int, int, str]:
        kind, _, layer = name.partition("@")
        return (int(layer) if layer.isdecimal() else -1, kinds.index(kind) if kind in kinds else len(kinds), name)

    return sorted(set(names), key=rank)


def compare_facet(
    a: Features, b: Features, facet: str, points_xy: Sequence[tuple[float, float]], hierarchy: int
) -> FacetRow:
    """PCA of both images together, and the similarity in B of each point of A, for one facet."""
    fit = fit_pca([a, b], facet, min(FIGURE_COMPONENTS, len(a[facet]) + len(b[facet])))
    maps = [similarity_map(a, b, facet=facet, point_xy=point, hierarchy=hierarchy) for point in points_xy]
    return FacetRow(facet, fit.project(a), fit.project(b), fit.explained_variance_ratio, maps)


def write_facets(folder: Path, a: Features, b: Features, rows: Sequence[FacetRow], options: dict[str, Any]) -> None:
    """``facets.png``, ``facets.npz`` and ``results.json``."""
    write_png(folder / "facets.png", draw_inspection.facet_figure(a, b, rows))
    arrays: dict[str, Any] = {}
    for row in rows:
        arrays |= {f"{row.facet}.pca_a": row.projected_a, f"{row.facet}.pca_b": row.projected_b}
        arrays[f"{row.facet}.similarity"] = np.stack([found.values for found in row.maps])
    np.savez_compressed(folder / "facets.npz", **arrays)
    record = {
        "command": "facets",
        "options": options,
        "points_a_xy": _points_a(rows[0]),
        "facets": {row.facet: _facet_record(row) for row in rows},
        "images": [describe(a), describe(b)],
    }
    write_results(folder, record)


def _points_a(row: FacetRow) -> NDArray[np.float64]:
    """Centres of the compared cells in original pixels of A, ``(points, 2)``."""
    geometry = row.maps[0].geometry_a
    return geometry.points_xy(np.array([found.cell_a for found in row.maps])).round(3)


def _facet_record(row: FacetRow) -> dict[str, Any]:
    return {
        "explained_variance_ratio": row.explained_variance_ratio.round(6),
        "best_b_xy": [found.points_xy[0].round(3) for found in row.maps],
        "similarity": [found.similarity[0] for found in row.maps],
    }


def _find_points(engine: Engine, a: Features, b: Features, count: int) -> list[tuple[float, float]]:
    """Points of A that have a counterpart in B, as ``facetrt match`` picks them."""
    matches = engine.match(a, b, num_pairs=count)
    found = matches.points_a_xy
    if not len(found):
        why = "" if matches.why_empty is None else f"{matches.why_empty}: "
        raise InputError(
            f"{why}no point of the first image corresponds to one of the second: name points with --at X,Y"
        )
    return [(float(x), float(y)) for x, y in found]


def _choose_facet(manifest: Manifest, facet: str) -> str:
    """``facet`` if it was exported; if none was chosen, the deepest keys (layer 11 for DINO), as in the reference."""
    keys = [name for name in by_layer(manifest.facets) if name.startswith("key@")]
    return parse_facets(facet or (keys or manifest.facets)[-1], manifest)[0]
