"""``facetrt info | extract | match | cosegment | parts | demo``: parse, call, write, print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from facetrt.engine import draw
from facetrt.engine.bundle import Bundle
from facetrt.engine.cli.app import (
    BackendOption,
    BundleOption,
    DeviceOption,
    ForceOption,
    ImagesArgument,
    IntermediateOption,
    LoadSizeOption,
    OutOption,
    ThreadsOption,
    app,
    console,
    errors,
    parse_facets,
    parse_size,
    progress_bar,
)
from facetrt.engine.cli.records import describe
from facetrt.engine.cosegmentation import Clustering, Masks
from facetrt.engine.engine import Engine
from facetrt.engine.features import Features, SaliencyMode
from facetrt.engine.files import (
    atomic_folder,
    check_replaceable,
    find_images,
    unique_stems,
    write_png,
    write_results,
)
from facetrt.engine.images import Pixels, load_image
from facetrt.engine.matching import Matches
from facetrt.engine.parts import Parts
from facetrt.engine.presets import PAPER_COSEGMENT, PAPER_MATCH
from facetrt.engine.refinement import Refinement
from facetrt.engine.samples import sample_paths, second_view
from facetrt.kernels.errors import InputError
from facetrt.kernels.vote import Votes


class Preset(StrEnum):
    """Which defaults a task starts from."""

    REFERENCE = "reference"
    PAPER = "paper"


PresetOption = Annotated[
    Preset, typer.Option("--preset", help="Defaults: of the published code, or those quoted in the paper.")
]
FacetOption = Annotated[str | None, typer.Option("--facet", help="Like key@9; the bundle's own choice by default.")]


@app.command()
def info(bundle: Annotated[str, typer.Argument(help="Bundle folder, or 'builtin'.")]) -> None:
    """Check a bundle's files and show what it holds."""
    manifest = Bundle.open(bundle).manifest
    console.print(_table("bundle", ["field", "value"], _facts(manifest)))
    files = [[name, f"{entry.bytes:,}", entry.sha256[:16] + "…"] for name, entry in manifest.files.items()]
    console.print(_table("files (checked)", ["file", "bytes", "sha256"], files))
    names = ["max_abs", "min_cosine", "mean_cosine", "p1_cosine", "relative_frobenius"]
    rows = [
        [output, *(f"{metrics.get(name, math.nan):.{7 if 'cosine' in name else 3}g}" for name in names)]
        for output, metrics in manifest.parity.outputs.items()
    ]
    console.print(
        _table(f"parity with the torch model, worst of {len(manifest.parity.cases)} images", ["output", *names], rows)
    )


def _facts(manifest: Any) -> list[list[str]]:
    size = "any" if manifest.size is None else f"{manifest.size[0]}×{manifest.size[1]} (height × width)"
    shape = manifest.architecture
    heads = "none" if manifest.saliency_heads is None else ", ".join(map(str, manifest.saliency_heads))
    return [
        ["model", f"{manifest.model}: {manifest.description}"],
        ["checkpoint", f"{manifest.checkpoint.source} (sha256 {manifest.checkpoint.sha256[:16]}…)"],
        ["architecture", f"{shape.depth} blocks, {shape.heads} heads, width {shape.dim}, patch {shape.patch}"],
        ["stride", str(manifest.stride)],
        ["image size", size],
        ["facets", ", ".join(manifest.facets)],
        ["saliency heads", heads],
        ["precision", f"{manifest.precision}, opset {manifest.opset}"],
        ["task defaults", ", ".join(f"{task}: {facet}" for task, facet in manifest.defaults.items())],
        ["exported with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())],
    ]


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    return table


@app.command()
def extract(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    load_size: LoadSizeOption = "224",
    facets: Annotated[
        str | None, typer.Option("--facets", help="Comma-separated; all of the bundle's by default.")
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Write descriptors and saliency of each image as NPZ, with a saliency picture."""
    size, paths = parse_size(load_size), find_images(images)
    check_replaceable(out, force=force, inputs=[*paths, bundle])
    with (
        Engine.open(bundle, backend=backend, device=device, threads=threads) as engine,
        atomic_folder(out, force=force) as folder,
    ):
        chosen = parse_facets(facets, engine.manifest)
        stems = unique_stems(paths)
        records = []
        with progress_bar("extracting", len(paths)) as update:
            stream = engine.encode_iter(paths, load_size=size, progress=update)
            for stem, features in zip(stems, stream, strict=True):
                _write_features(folder, stem, features, chosen)
                records.append(describe(features) | {"file": f"{stem}.npz"})
        write_results(folder, {"command": "extract", "facets": chosen, "images": records})
    console.print(f"descriptors of {len(paths)} images: {out}")


def _write_features(folder: Path, stem: str, features: Features, facets: list[str]) -> None:
    arrays: dict[str, Any] = {facet: features[facet] for facet in facets}
    arrays |= {f"cls.{facet}": features.cls(facet) for facet in facets}
    if features.attention is not None:
        arrays["saliency"] = features.saliency
        write_png(folder / f"{stem}_saliency.png", _saliency_picture(features))
    np.savez(folder / f"{stem}.npz", grid=features.grid, image_size=features.image_size, **arrays)


@app.command()
def match(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    num_pairs: Annotated[int, typer.Option("--num-pairs", min=1, help="At most this many point pairs.")] = 10,
    load_size: Annotated[
        str | None, typer.Option("--load-size", help="Shorter side (224), HEIGHTxWIDTH, or none.")
    ] = None,
    saliency_threshold: Annotated[float, typer.Option("--saliency-threshold")] = 0.05,
    hierarchy: Annotated[int, typer.Option("--hierarchy", min=0, max=6, help="Levels of log-binning; 0 for none.")] = 2,
    facet: FacetOption = None,
    preset: PresetOption = Preset.REFERENCE,
    save_intermediate: IntermediateOption = False,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Find corresponding points of two images and draw them side by side."""
    paths = find_images(images)
    if len(paths) != 2:
        raise InputError(f"{len(paths)} images were given: match needs exactly 2")
    size = parse_size(load_size) if load_size else PAPER_MATCH["load_size"] if preset is Preset.PAPER else 224
    check_replaceable(out, force=force, inputs=[*paths, bundle])
    with Engine.open(bundle, backend=backend, device=device, threads=threads) as engine:
        with progress_bar("encoding", 2) as update:
            a, b = engine.encode(paths, load_size=size, progress=update)
        options = {"num_pairs": num_pairs, "hierarchy": hierarchy, "saliency_threshold": saliency_threshold}
        matches = engine.match(
            a, b, num_pairs=num_pairs, facet=facet, hierarchy=hierarchy, saliency_threshold=saliency_threshold
        )
    with atomic_folder(out, force=force) as folder:
        write_matches(folder, a, b, matches, options, intermediate=save_intermediate)
    console.print(f"{len(matches)} point pairs from {len(matches.cells_a)} salient best buddies: {out}")
    if not len(matches):
        console.print("nothing corresponds: try a lower --saliency-threshold or a larger --load-size")


def write_matches(
    folder: Path, a: Features, b: Features, matches: Matches, options: dict[str, Any], *, intermediate: bool
) -> None:
    """``matches.png``, ``matches.npz`` and ``results.json``; saliency pictures if ``intermediate``."""
    points: dict[str, Any] = {"points_a_xy": matches.points_a_xy, "points_b_xy": matches.points_b_xy}
    loaded: dict[str, Any] = {
        "loaded_points_a_xy": matches.loaded_points_a_xy,
        "loaded_points_b_xy": matches.loaded_points_b_xy,
    }
    kept: dict[str, Any] = {"cells_a": matches.cells_a, "cells_b": matches.cells_b, "similarity": matches.similarity}
    write_png(folder / "matches.png", draw.draw_matches(a.pixels, b.pixels, matches))
    np.savez(folder / "matches.npz", **points, **loaded, **kept, clusters=matches.clusters, selected=matches.selected)
    record = {"command": "match", "facet": matches.facet, "options": options, "images": [describe(a), describe(b)]}
    similarity = matches.similarity[matches.selected]
    write_results(folder, record | {k: v.round(3) for k, v in points.items()} | {"similarity": similarity})
    if intermediate:
        for side, features in (("a", a), ("b", b)):
            write_png(folder / f"saliency_{side}.png", _saliency_picture(features))
        _draw_all_buddies(folder / "best_buddies.png", a, b, matches)


def _draw_all_buddies(path: Path, a: Features, b: Features, matches: Matches) -> None:
    everything = Matches(**{**vars(matches), "selected": np.arange(len(matches.cells_a))})
    write_png(path, draw.draw_matches(a.pixels, b.pixels, everything))


@app.command()
def cosegment(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    load_size: Annotated[
        str | None, typer.Option("--load-size", help="Shorter side (224), HEIGHTxWIDTH, or none.")
    ] = None,
    elbow: Annotated[float, typer.Option("--elbow", help="Stop adding clusters at this error ratio.")] = 0.975,
    saliency_threshold: Annotated[float, typer.Option("--saliency-threshold")] = 0.065,
    votes_percentage: Annotated[float, typer.Option("--votes-percentage", min=0, max=100)] = 75,
    sample_interval: Annotated[
        int, typer.Option("--sample-interval", min=1, help="Cluster every n-th descriptor.")
    ] = 100,
    saliency: Annotated[
        SaliencyMode, typer.Option("--saliency", help="Which pass saliency comes from.")
    ] = SaliencyMode.LOW_RESOLUTION,
    remove_outliers: Annotated[bool, typer.Option("--remove-outliers", help="Leave out unlike images.")] = False,
    outlier_threshold: Annotated[float, typer.Option("--outlier-threshold")] = 0.7,
    refine: Annotated[Refinement, typer.Option("--refine", help="How cells become pixels.")] = Refinement.GRABCUT,
    facet: FacetOption = None,
    preset: PresetOption = Preset.REFERENCE,
    save_intermediate: IntermediateOption = False,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Segment the objects that the images share; masks at the original size, overlays, data."""
    paths = find_images(images)
    default_size = PAPER_COSEGMENT["load_size"] if preset is Preset.PAPER else 224
    size = parse_size(load_size) if load_size else default_size
    options = {
        "elbow": elbow,
        "saliency_threshold": saliency_threshold,
        "votes_percentage": votes_percentage,
        "sample_interval": sample_interval,
        "remove_outliers": remove_outliers,
        "outlier_threshold": outlier_threshold,
        "refine": refine,
    }
    check_replaceable(out, force=force, inputs=[*paths, bundle])
    with Engine.open(bundle, backend=backend, device=device, threads=threads) as engine:
        if len(paths) < 2:
            raise InputError(f"{len(paths)} image was given: co-segmentation needs at least 2 that share an object")
        chosen = engine.manifest.default_facet("cosegment") if facet is None else facet
        with progress_bar("encoding", len(paths)) as update:
            features = engine.collect(paths, facets=[chosen], load_size=size, saliency=saliency, progress=update)
        with features:
            with errors.status("clustering, voting and refining"):
                masks = engine.cosegment(features, facet=chosen, **options)  # type: ignore[arg-type]
            with atomic_folder(out, force=force) as folder:
                write_masks(folder, features, masks, options | {"saliency": saliency}, intermediate=save_intermediate)
    found = sum(bool(mask.cells.any()) for mask in masks)
    console.print(
        f"masks of {len(masks)} images ({found} with foreground), {masks.clustering.tried_k[-1]} clusters: {out}"
    )
    if not found:
        console.print("no cluster was salient in enough images: try a lower --saliency-threshold or --votes-percentage")


def write_masks(
    folder: Path, features: Sequence[Features], masks: Masks, options: dict[str, Any], *, intermediate: bool
) -> None:
    """``masks/``, ``overlays/``, ``data/``, ``overview.png`` and ``results.json``; maps if ``intermediate``."""
    stems = unique_stems([Path(mask.name) for mask in masks])
    for name in ("masks", "overlays", "data", *(("saliency", "clusters") if intermediate else ())):
        (folder / name).mkdir()
    sheet: list[list[Pixels]] = []
    records = []
    for stem, item, mask in zip(stems, features, masks, strict=True):
        saliency, overlay = _saliency_picture(item), draw.on_chessboard(item.pixels, mask.loaded_mask)
        clusters = draw.blend(item.pixels, draw.label_map(mask.labels, item.image_size))
        if len(sheet) < OVERVIEW_ROWS:
            sheet.append([item.pixels, saliency, clusters, overlay])
        write_png(folder / "masks" / f"{stem}.png", mask.mask)
        write_png(folder / "overlays" / f"{stem}.png", overlay)
        if intermediate:
            write_png(folder / "saliency" / f"{stem}.png", saliency)
            write_png(folder / "clusters" / f"{stem}.png", clusters)
        arrays: dict[str, Any] = {"labels": mask.labels, "loaded_mask": mask.loaded_mask, "saliency": item.saliency}
        np.savez_compressed(folder / "data" / f"{stem}.npz", **arrays)
        state = {"foreground": round(float(mask.loaded_mask.mean()), 4), "inlier": mask.inlier}
        records.append(describe(item) | state | {"refinement": mask.refinement, "mask": f"masks/{stem}.png"})
    write_png(folder / "overview.png", draw.contact_sheet(sheet))
    np.save(folder / "centroids.npy", masks.clustering.centroids)
    summary = {"command": "cosegment", "options": options, **_clustering(masks.clustering, masks.votes)}
    write_results(folder, summary | {"images": records})


OVERVIEW_ROWS = 12  # images shown in the contact sheet


def _clustering(clustering: Clustering, votes: Votes) -> dict[str, Any]:
    return {
        "tried_k": clustering.tried_k,
        "objectives": clustering.objectives,
        "votes": votes.counts,
        "votes_needed": votes.needed,
        "salient_labels": votes.salient_labels,
    }


@app.command()
def parts(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    num_parts: Annotated[int, typer.Option("--num-parts", min=1, max=64, help="Number of part labels.")] = 4,
    load_size: LoadSizeOption = "224",
    sample_interval: Annotated[int, typer.Option("--sample-interval", min=1)] = 100,
    saliency_threshold: Annotated[float, typer.Option("--saliency-threshold")] = 0.065,
    votes_percentage: Annotated[float, typer.Option("--votes-percentage", min=0, max=100)] = 75,
    elbow: Annotated[float, typer.Option("--elbow", help="Of the foreground stage.")] = 0.975,
    elbow_second_stage: Annotated[float, typer.Option("--elbow-second-stage", help="With --three-stages.")] = 0.94,
    num_crop_augmentations: Annotated[
        int, typer.Option("--num-crop-augmentations", min=0, help="Random crops of each image and its mirror.")
    ] = 0,
    flip_augmentation: Annotated[bool, typer.Option("--flip-augmentation", help="Mirrors join as well.")] = False,
    three_stages: Annotated[bool, typer.Option("--three-stages", help="Drop parts that some image lacks.")] = False,
    saliency: Annotated[SaliencyMode, typer.Option("--saliency")] = SaliencyMode.LOW_RESOLUTION,
    refine: Annotated[Refinement, typer.Option("--refine", help="crf, pydensecrf or none.")] = Refinement.CRF,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random crops.")] = 0,
    facet: FacetOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Segment the parts that the images' common objects share; part colours mean the same in all images."""
    paths = find_images(images)
    options = {
        "num_parts": num_parts,
        "sample_interval": sample_interval,
        "saliency_threshold": saliency_threshold,
        "votes_percentage": votes_percentage,
        "elbow": elbow,
        "elbow_second_stage": elbow_second_stage,
        "num_crop_augmentations": num_crop_augmentations,
        "flip_augmentation": flip_augmentation,
        "three_stages": three_stages,
        "refine": refine,
        "seed": seed,
    }
    size = parse_size(load_size)
    check_replaceable(out, force=force, inputs=[*paths, bundle])
    with Engine.open(bundle, backend=backend, device=device, threads=threads) as engine:
        chosen = engine.manifest.default_facet("cosegment") if facet is None else facet
        with progress_bar("encoding", len(paths)) as update:
            features = engine.collect(paths, facets=[chosen], load_size=size, saliency=saliency, progress=update)
        with features:
            with errors.status("clustering, voting and refining"):
                found = engine.segment_parts(features, facet=chosen, **options)  # type: ignore[arg-type]
            with atomic_folder(out, force=force) as folder:
                write_parts(folder, features, found, options | {"saliency": saliency})
    console.print(f"{found.num_parts} parts in {len(found)} images, refined by {refine}: {out}")
    if not found.num_parts:
        cause = "no part is in all images" if found.common_parts is not None else "no cluster was salient enough"
        console.print(f"{cause}, so everything is background: try a lower --saliency-threshold or --votes-percentage")


def write_parts(folder: Path, features: Sequence[Features], found: Parts, options: dict[str, Any]) -> None:
    """``labels/`` (0 is background, parts from 1), ``overlays/``, ``overview.png``, ``parts.npz``, ``results.json``."""
    stems = unique_stems([Path(part.name) for part in found])
    (folder / "labels").mkdir()
    (folder / "overlays").mkdir()
    sheet: list[list[Pixels]] = []
    records = []
    for stem, item, part in zip(stems, features, found, strict=True):
        overlay = draw.part_overlay(item.pixels, part.loaded_labels)
        if len(sheet) < OVERVIEW_ROWS:
            sheet.append([item.pixels, overlay])
        write_png(folder / "labels" / f"{stem}.png", (part.labels + 1).astype(np.uint8))
        write_png(folder / "overlays" / f"{stem}.png", overlay)
        shares = np.bincount(part.loaded_labels.ravel() + 1, minlength=found.num_parts + 1) / part.loaded_labels.size
        state = {"shares": shares.round(4), "refinement": part.refinement, "labels": f"labels/{stem}.png"}
        records.append(describe(item) | state)
    write_png(folder / "overview.png", draw.contact_sheet(sheet))
    np.savez(folder / "parts.npz", centroids=found.centroids, background_centroids=found.background_centroids)
    summary = {"command": "parts", "options": options, **_clustering(found.foreground, found.votes)}
    summary |= {"num_parts": found.num_parts, "common_parts": found.common_parts}
    write_results(folder, summary | {"images": records})


def _saliency_picture(features: Features) -> Any:
    if features.attention is None:
        return features.pixels
    return draw.heat_map(features.saliency, features.image_size)


@app.command()
def demo(
    out: OutOption = Path("facetrt-demo"),
    bundle: BundleOption = "builtin",
    threads: ThreadsOption = None,
    force: ForceOption = False,
) -> None:
    """Co-segment and match the photographs that ship with facetrt; no download, no torch."""
    check_replaceable(out, force=force, inputs=[bundle])
    samples = sample_paths()
    with Engine.open(bundle, threads=threads) as engine:
        console.print(f"model: {engine.manifest.model} ({engine.manifest.description}), backend: {engine.backend}")
        with atomic_folder(out, force=force) as folder:
            _demo_cosegment(engine, folder / "cosegment", [samples[name] for name in DEMO_SET])
            for name in DEMO_VIEWS:
                _demo_match(engine, folder / f"match-{name}", load_image(samples[name]).pixels)
            write_results(folder, {"command": "demo", "model": engine.manifest.model})
    for picture in sorted(out.glob("*/*.png")):
        console.print(f"  {picture}")


DEMO_SET = ("astronaut", "cat", "coffee", "ibex")
DEMO_VIEWS = ("astronaut", "coffee")


def _demo_cosegment(engine: Engine, folder: Path, paths: list[Path]) -> None:
    folder.mkdir()
    with progress_bar(f"co-segmenting {len(paths)} photographs", len(paths)) as update:
        features = engine.encode(paths, saliency=SaliencyMode.LOW_RESOLUTION, progress=update)
    write_masks(folder, features, engine.cosegment(features), {}, intermediate=True)


def _demo_match(engine: Engine, folder: Path, pixels: Pixels) -> None:
    """Match a photograph with a second view of it, and say how far the points are off."""
    folder.mkdir()
    turned, matrix = second_view(pixels)
    with progress_bar("matching two views", 2) as update:
        a, b = engine.encode([pixels, turned], progress=update)
    matches = engine.match(a, b)
    write_matches(folder, a, b, matches, {}, intermediate=True)
    error = np.linalg.norm(matches.points_a_xy @ matrix[:, :2].T + matrix[:, 2] - matches.points_b_xy, axis=1)
    console.print(
        f"{folder.name}: {len(matches)} points, median error {np.median(error):.1f} pixels of {pixels.shape[1]}"
    )
