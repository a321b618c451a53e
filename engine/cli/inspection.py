"""``facetrt pca | similarity | facets``: looking at descriptors. Parse, call, write, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from facetrt.engine.bundle.manifest import Manifest
from facetrt.engine.cli.app import (
    BundleOption,
    ForceOption,
    HierarchyOption,
    ImagesArgument,
    LoadSizeOption,
    OutOption,
    console,
    parse_facets,
    parse_size,
    progress_bar,
)
from facetrt.engine.cli.opening import Opening, engine_options
from facetrt.engine.cli.records import describe
from facetrt.engine.drawing import inspection as draw_inspection
from facetrt.engine.drawing.inspection import FacetRow
from facetrt.engine.engine import Engine
from facetrt.engine.features.collection import MEMORY_LIMIT
from facetrt.engine.features.features import Features, Float
from facetrt.engine.files import atomic_folder, check_replaceable, write_png, write_results
from facetrt.engine.images.finding import find_images, unique_stems
from facetrt.engine.images.loading import LoadSize, Pixels
from facetrt.engine.tasks.pca import Pca, fit_pca
from facetrt.engine.tasks.similarity import SimilarityMap, similarity_map
from facetrt.kernels.errors import InputError
from facetrt.kernels.log_bin import bin_offsets

OVERVIEW_IMAGES = 24  # at most so many rows in the overview of a PCA
AUTOMATIC_POINTS = 3
FIGURE_COMPONENTS = 4

FacetOption = Annotated[
    str | None, typer.Option("--facet", help="KIND@LAYER; the deepest exported keys by default, as the reference.")
]


@engine_options
def pca(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    components: Annotated[
        int, typer.Option("--components", min=1, help="How many; the last three also make a colour picture.")
    ] = 4,
    facet: FacetOption = None,
    hierarchy: HierarchyOption = 0,
    per_image: Annotated[bool, typer.Option("--per-image", help="Components of each image by itself.")] = False,
    load_size: LoadSizeOption = "224",
    force: ForceOption = False,
    *,
    opening: Opening,
) -> None:
    """Principal components of descriptors as pictures, over all images together or per image.

    The joint fit is exact, on all descriptors of all images, and each image is encoded once: past 1 GB descriptors wait
    in a temporary folder, so memory stays bounded for any number of images.
    """
    size, paths = parse_size(load_size), find_images(images)
    check_replaceable(out, force=force, inputs=[*paths, bundle])
    with opening.engine(bundle) as engine:
        chosen = _choose_facet(engine.manifest, facet)
        channels = engine.manifest.architecture.dim * len(bin_offsets(hierarchy))
        if components > channels:
            raise InputError(f"--components {components}: {chosen} has {channels} channels, so at most that many exist")
        fitted = (_fit_each if per_image else _fit_jointly)(engine, paths, size, chosen, components, hierarchy)
        options = {"components": components, "per_image": per_image, "hierarchy": hierarchy}
        with atomic_folder(out, force=force) as folder:
            ratio = write_pca(folder, unique_stems(paths), fitted, {"facet": chosen, "options": options})
    explained = "" if per_image else f" explain {ratio.sum():.0%} of the variance"
    console.print(f"{components} components of {chosen}{explained}, {len(paths)} images: {out}")


def _fit_each(
    engine: Engine, paths: Sequence[Path], size: LoadSize, facet: str, components: int, hierarchy: int
) -> Iterator[tuple[Features, Pca]]:
    with progress_bar("projecting", len(paths)) as update:
        for item in engine.encode_iter(paths, load_size=size, progress=update):
            yield item, fit_pca([item], facet, components, hierarchy=hierarchy)


def _fit_jointly(
    engine: Engine, paths: Sequence[Path], size: LoadSize, facet: str, components: int, hierarchy: int
) -> Iterator[tuple[Features, Pca]]:
    """Encode once, fit on everything, then read again."""
    with progress_bar("encoding", len(paths)) as update:
        collected = engine.collect(paths, facets=[facet], load_size=size, memory_limit=MEMORY_LIMIT, progress=update)
    with collected:
        with progress_bar("fitting", len(paths)) as update:
            fitted = fit_pca(_counted(collected, update), facet, components, hierarchy=hierarchy)
        with progress_bar("projecting", len(paths)) as update:
            for item in _counted(collected, update):
                yield item, fitted


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
        arrays = {"projected": projected, "grid": item.grid, "image_size": item.image_size}
        np.savez(folder / "maps" / f"{stem}.npz", **arrays, **({} if joint else _fit_arrays(fit)))  # type: ignore[arg-type]
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


@engine_options
def similarity(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    at: Annotated[
        str | None, typer.Option("--at", help="X,Y in pixels of the first image's original size.", show_default=False)
    ] = None,
    cls: Annotated[bool, typer.Option("--cls", help="Compare the first image's [CLS] instead of a point.")] = False,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Mark so many of the most similar cells.")] = 5,
    hierarchy: HierarchyOption = 0,
    facet: FacetOption = None,
    load_size: LoadSizeOption = "224",
    force: ForceOption = False,
    *,
    opening: Opening,
) -> None:
    """How similar a point of the first image is to every cell of the second."""
    paths, point = _two_images(images, "similarity"), None if at is None else parse_point(at)
    if (point is None) != cls:
        raise InputError("choose what to compare: either --at X,Y or --cls")
    size = parse_size(load_size)
    check_replaceable(out, force=force, inputs=[*paths, bundle])
    with opening.engine(bundle) as engine:
        chosen = _choose_facet(engine.manifest, facet)
        a, b = _encode_two(engine, paths, size)
    found = similarity_map(a, b, facet=chosen, point_xy=point, cls=cls, hierarchy=hierarchy, top_k=top_k)
    options = {"at": point, "cls": cls, "top_k": top_k, "hierarchy": hierarchy}
    with atomic_folder(out, force=force) as folder:
        write_similarity(folder, a, b, found, options)
    x, y = found.points_xy[0]
    console.print(
        f"most similar ({chosen}, cosine {found.similarity[0]:.3f}): ({x:.1f}, {y:.1f}) of {paths[1].name}: {out}"
    )


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


@engine_options
def facets_command(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    facets: Annotated[
        str | None,
        typer.Option("--facets", help="KIND@LAYER, comma-separated; all of the bundle's by default."),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="X,Y in pixels of the first image's original size; may be repeated."),
    ] = None,
    points: Annotated[
        int | None,
        typer.Option("--points", min=1, max=12, help="Without --at: so many points found as 'match' finds them (3)."),
    ] = None,
    hierarchy: HierarchyOption = 0,
    load_size: LoadSizeOption = "224",
    force: ForceOption = False,
    *,
    opening: Opening,
) -> None:
    """Compare facets and layers on two images in one figure: joint PCA, and similarity to points of the first."""
    paths, given = _two_images(images, "facets"), [parse_point(text) for text in at or []]
    if given and points is not None:
        raise InputError("--at names the points and --points finds some: give one of them")
    size = parse_size(load_size)
    check_replaceable(out, force=force, inputs=[*paths, bundle])
    with opening.engine(bundle) as engine:
        chosen = by_layer(parse_facets(facets, engine.manifest))
        a, b = _encode_two(engine, paths, size)
        points_xy = given or _find_points(engine, a, b, points or AUTOMATIC_POINTS)
    rows = [compare_facet(a, b, facet, points_xy, hierarchy) for facet in chosen]
    with atomic_folder(out, force=force) as folder:
        write_facets(folder, a, b, rows, {"at": given, "points": len(points_xy), "hierarchy": hierarchy})
    console.print(f"{len(rows)} facets, {len(points_xy)} points: {out / 'facets.png'}")


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


def parse_point(text: str) -> tuple[float, float]:
    """``X,Y`` in pixels."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--at {text!r}: expected X,Y in pixels, like 120,85") from error
    return x, y


def _two_images(images: Sequence[Path], command: str) -> list[Path]:
    paths = find_images(images)
    if len(paths) != 2:
        raise InputError(f"{len(paths)} images were given: {command} needs exactly 2")
    return paths


def _encode_two(engine: Engine, paths: Sequence[Path], size: LoadSize) -> tuple[Features, Features]:
    with progress_bar("encoding", len(paths)) as update:
        a, b = engine.encode(paths, load_size=size, progress=update)
    return a, b


def _choose_facet(manifest: Manifest, facet: str | None) -> str:
    """``facet`` if it was exported; by default the deepest keys (layer 11 for DINO), as in the reference."""
    keys = [name for name in by_layer(manifest.facets) if name.startswith("key@")]
    return parse_facets((keys or manifest.facets)[-1] if facet is None else facet, manifest)[0]
