"""``facetrt match | cosegment | parts | demo``: parse, call, write, print."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from facetrt.engine.bundle.bundle import BUILTIN
from facetrt.engine.cli.app import (
    BUNDLE_HELP,
    BUNDLE_VARIABLE,
    FACET_HELP,
    BundleOption,
    ForceOption,
    HierarchyOption,
    ImagesArgument,
    IntermediateOption,
    LoadSizeOption,
    OutOption,
    console,
    parse_size,
    progress_bar,
)
from facetrt.engine.cli.extract import (
    FeaturesOption,
    SkipOption,
    Skipped,
    check_apart,
    collected,
    without_descriptors,
)
from facetrt.engine.cli.opening import Opening, engine_options
from facetrt.engine.cli.records import describe, saliency_picture
from facetrt.engine.drawing import results as draw
from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features, SaliencyMode
from facetrt.engine.files import atomic_folder, check_replaceable, write_png, write_results
from facetrt.engine.images.finding import find_images, unique_stems
from facetrt.engine.images.loading import Pixels, load_image
from facetrt.engine.samples import sample_paths, second_view
from facetrt.engine.tasks.clustering import Clustering
from facetrt.engine.tasks.cosegmentation import CosegmentOptions, Mask, Masks
from facetrt.engine.tasks.matching import Matches
from facetrt.engine.tasks.model_files import check_model_path
from facetrt.engine.tasks.models import Model, parts_model, segmentation_model
from facetrt.engine.tasks.parts import PartMap, Parts, PartsOptions
from facetrt.engine.tasks.presets import PAPER_COSEGMENT, PAPER_MATCH
from facetrt.engine.tasks.refinement import Refinement
from facetrt.kernels.errors import InputError, OutputError
from facetrt.kernels.vote import Votes


class Preset(StrEnum):
    """Which defaults a task starts from."""

    REFERENCE = "reference"
    PAPER = "paper"


PresetOption = Annotated[
    Preset, typer.Option("--preset", help="Defaults: of the published code, or those quoted in the paper.")
]
PresetSizeOption = Annotated[
    str | None, typer.Option("--load-size", help="Shorter side (224, or the preset's), HEIGHTxWIDTH, or none.")
]
FacetOption = Annotated[str | None, typer.Option("--facet", help=FACET_HELP)]
VoteThresholdOption = Annotated[
    float,
    typer.Option("--saliency-threshold", help="An image votes for clusters of a mean saliency above this, of 0 to 1."),
]
VotesOption = Annotated[
    float,
    typer.Option("--votes-percentage", min=0, max=100, help="Share of the images that must vote for a cluster."),
]
SampleOption = Annotated[
    int, typer.Option("--sample-interval", min=1, help="Cluster every n-th descriptor of each image.")
]
SaliencyOption = Annotated[
    SaliencyMode,
    typer.Option("--saliency", help="From the descriptors' own pass, or from one at half the size and stride 8."),
]
DOUBTFUL = 0.33  # confidence of a match: pictures of noise stay below, two views of a thing above
DOUBTFUL_MASK = 0.5  # of a mask: in pictures of noise up to 0.45, of photographs 0.7 to 1

SaveModelOption = Annotated[
    Path | None, typer.Option("--save-model", help="File for what was learned, to be applied to further images.")
]


@engine_options
def match(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    num_pairs: Annotated[int, typer.Option("--num-pairs", min=1, help="At most this many point pairs.")] = 10,
    load_size: PresetSizeOption = None,
    saliency_threshold: Annotated[
        float, typer.Option("--saliency-threshold", help="Points are cells more salient than this, of 0 to 1.")
    ] = 0.05,
    hierarchy: HierarchyOption = 2,
    facet: FacetOption = None,
    preset: PresetOption = Preset.REFERENCE,
    save_intermediate: IntermediateOption = False,
    force: ForceOption = False,
    *,
    opening: Opening,
) -> None:
    """Find corresponding points of two images and draw them side by side."""
    paths = find_images(images)
    if len(paths) != 2:
        raise InputError(f"{len(paths)} images were given: match needs exactly 2")
    size = parse_size(load_size) if load_size else PAPER_MATCH["load_size"] if preset is Preset.PAPER else 224
    check_replaceable(out, force=force, inputs=[*paths, bundle])
    with opening.engine(bundle) as engine:
        with progress_bar("encoding", 2) as update:
            a, b = engine.encode(paths, load_size=size, progress=update)
        options = {"num_pairs": num_pairs, "hierarchy": hierarchy, "saliency_threshold": saliency_threshold}
        matches = engine.match(
            a, b, num_pairs=num_pairs, facet=facet, hierarchy=hierarchy, saliency_threshold=saliency_threshold
        )
    pictures = [draw.capped(load_image(path).pixels) for path in paths]
    with atomic_folder(out, force=force) as folder:
        write_matches(folder, (a, b), pictures, matches, options, intermediate=save_intermediate)
    console.print(
        f"{len(matches)} point pairs from {len(matches.cells_a)} salient best buddies, confidence "
        f"{matches.confidence:.2f}: {out}"
    )
    if matches.why_empty is not None:
        console.print(f"nothing to match: {matches.why_empty}", soft_wrap=True)
    elif not len(matches):
        lower = ["a lower --saliency-threshold"] if saliency_threshold > 0 else []
        larger = ["a larger --load-size"] if engine.manifest.dynamic else []
        advice = f": try {' or '.join(lower + larger)}" if lower + larger else ""
        console.print(f"nothing corresponds{advice}")
    elif matches.confidence < DOUBTFUL:
        console.print(
            f"a confidence below {DOUBTFUL:g} is what images without anything in common have as well: look at "
            "matches.png before relying on them"
        )


def write_matches(
    folder: Path,
    features: tuple[Features, Features],
    pictures: Sequence[Pixels],
    matches: Matches,
    options: dict[str, Any],
    *,
    intermediate: bool,
) -> None:
    """``matches.png``, ``matches.npz`` and ``results.json``; saliency pictures if ``intermediate``.

    Args:
        pictures: what to draw on: both images at the original size, or smaller.
    """
    a, b = features
    points: dict[str, Any] = {"points_a_xy": matches.points_a_xy, "points_b_xy": matches.points_b_xy}
    loaded: dict[str, Any] = {
        "loaded_points_a_xy": matches.loaded_points_a_xy,
        "loaded_points_b_xy": matches.loaded_points_b_xy,
    }
    kept: dict[str, Any] = {name: getattr(matches, name) for name in ("cells_a", "cells_b", "similarity", "agreement")}
    write_png(folder / "matches.png", draw.draw_matches(pictures, matches))
    np.savez(folder / "matches.npz", **points, **loaded, **kept, clusters=matches.clusters, selected=matches.selected)
    record: dict[str, Any] = {
        "command": "match",
        "facet": matches.facet,
        "options": options,
        "images": [describe(a), describe(b)],
    }
    record |= {"confidence": round(matches.confidence, 4), "why_empty": matches.why_empty}
    of_pairs = {name: getattr(matches, name)[matches.selected] for name in ("similarity", "agreement")}
    write_results(folder, record | {k: v.round(3) for k, v in points.items()} | of_pairs)
    if intermediate:
        for side, item in (("a", a), ("b", b)):
            write_png(folder / f"saliency_{side}.png", saliency_picture(item))
        everything = dataclasses.replace(matches, selected=np.arange(len(matches.cells_a)))
        write_png(folder / "best_buddies.png", draw.draw_matches(pictures, everything))


@engine_options
def cosegment(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    load_size: PresetSizeOption = None,
    elbow: Annotated[float, typer.Option("--elbow", help="Stop adding clusters at this error ratio.")] = 0.975,
    saliency_threshold: VoteThresholdOption = 0.065,
    votes_percentage: VotesOption = 75,
    sample_interval: SampleOption = 100,
    saliency: SaliencyOption = SaliencyMode.LOW_RESOLUTION,
    hierarchy: HierarchyOption = 0,
    remove_outliers: Annotated[
        bool, typer.Option("--remove-outliers", help="Leave out images that are unlike the others.")
    ] = False,
    outlier_threshold: Annotated[
        float, typer.Option("--outlier-threshold", help="Cosine to the images' mean [CLS] that --remove-outliers asks.")
    ] = 0.7,
    refine: Annotated[Refinement, typer.Option("--refine", help="How cells become pixels.")] = Refinement.GRABCUT,
    facet: FacetOption = None,
    preset: PresetOption = Preset.REFERENCE,
    features: FeaturesOption = None,
    skip_broken: SkipOption = False,
    save_model: SaveModelOption = None,
    save_intermediate: IntermediateOption = False,
    force: ForceOption = False,
    *,
    opening: Opening,
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
        "hierarchy": hierarchy,
    }
    skipped, keep = Skipped(skip_broken), {"load_size": size, "saliency": saliency, "store": features}
    check_replaceable(out, force=force, inputs=[*paths, bundle, *([features] if features else [])])
    check_apart(out, features)
    check_model_place(save_model, out, bundle, force=force)
    with skipped.reported(len(paths)), opening.engine(bundle) as engine:
        if len(paths) < 2:
            raise InputError(f"{len(paths)} image was given: co-segmentation needs at least 2 that share an object")
        chosen = engine.manifest.default_facet("cosegment") if facet is None else facet
        with collected(engine, paths, chosen, skipped=skipped, **keep) as encoded:  # type: ignore[arg-type]
            with progress_bar("clustering and refining", len(encoded)) as update:
                masks = engine.cosegment(encoded, facet=chosen, progress=update, **options)  # type: ignore[arg-type]
            record = {"options": options | {"saliency": saliency}, "skipped": skipped.items}
            with atomic_folder(out, force=force) as folder:
                write_masks(folder, without_descriptors(encoded), masks, record, intermediate=save_intermediate)
                if save_model is not None and masks.votes.salient_labels.size:
                    model = segmentation_model(masks, encoded, CosegmentOptions(chosen, **options))  # type: ignore[arg-type]
                    keep_model(model, save_model, out, folder, force=force)
    found = sum(bool(mask.cells.any()) for mask in masks)
    console.print(
        f"masks of {len(masks)} images ({found} with foreground), {len(masks.clustering.centroids)} clusters: {out}"
    )
    say_doubts(masks)
    if not masks.clustering.tried_k:
        console.print("fewer than two images show anything, so they share nothing")
    elif not found:
        console.print("no cluster was salient in enough images: try a lower --saliency-threshold or --votes-percentage")
    report_model(save_model, "cosegment", learned=bool(masks.votes.salient_labels.size))


def write_masks(
    folder: Path, features: Sequence[Features], masks: Masks, record: dict[str, Any], *, intermediate: bool
) -> None:
    """``masks/``, ``overlays/``, ``data/``, ``overview.png`` and ``results.json``; maps if ``intermediate``."""
    stems = unique_stems([Path(mask.name) for mask in masks])
    for name in ("masks", "overlays", "data", *(("saliency", "clusters") if intermediate else ())):
        (folder / name).mkdir()
    sheet: list[list[Pixels]] = []
    records = []
    for stem, item, mask in zip(stems, features, masks, strict=True):
        saliency, overlay = saliency_picture(item), draw.on_chessboard(item.pixels, mask.loaded_mask)
        clusters = draw.blend(item.pixels, draw.label_map(mask.labels, item.image_size))
        if len(sheet) < OVERVIEW_ROWS:
            sheet.append([draw.scaled(picture, draw.CELL) for picture in (item.pixels, saliency, clusters, overlay)])
        write_png(folder / "masks" / f"{stem}.png", mask.mask)
        write_png(folder / "overlays" / f"{stem}.png", overlay)
        if intermediate:
            write_png(folder / "saliency" / f"{stem}.png", saliency)
            write_png(folder / "clusters" / f"{stem}.png", clusters)
        arrays: dict[str, Any] = {"labels": mask.labels, "loaded_mask": mask.loaded_mask, "saliency": item.saliency}
        np.savez_compressed(folder / "data" / f"{stem}.npz", **arrays)
        state = {"foreground": round(float(mask.loaded_mask.mean()), 4), "inlier": mask.inlier, **doubts(mask)}
        records.append(describe(item) | state | {"refinement": mask.refinement, "mask": f"masks/{stem}.png"})
    write_png(
        folder / "overview.png", draw.table(sheet, ["photograph", "saliency", "clusters", "mask"], stems[: len(sheet)])
    )
    np.save(folder / "centroids.npy", masks.clustering.centroids)
    summary = {"command": "cosegment", **record, **_clustering(masks.clustering, masks.votes)}
    write_results(folder, summary | {"images": records})


def doubts(result: Mask | PartMap) -> dict[str, Any]:
    """What a record says of how sure a mask or a map of parts is."""
    confidence = None if result.confidence is None else round(result.confidence, 4)
    return {"confidence": confidence, "why_empty": result.why_empty}


def say_doubts(results: Iterable[Mask | PartMap]) -> None:
    """Print in which images there is nothing to find, and why, or little reason to believe what was found."""
    for result in results:
        if result.why_empty is not None:
            console.print(f"nothing to find: {result.name} {result.why_empty}", soft_wrap=True)
        elif result.confidence is not None and 0 < result.confidence < DOUBTFUL_MASK:
            console.print(
                f"doubtful: what was found in {result.name} is hardly more salient than the rest (confidence "
                f"{result.confidence:.2f})",
                soft_wrap=True,
            )


OVERVIEW_ROWS = 12  # images shown in the contact sheet


def _clustering(clustering: Clustering, votes: Votes) -> dict[str, Any]:
    return {
        "tried_k": clustering.tried_k,
        "objectives": clustering.objectives,
        "votes": votes.counts,
        "votes_needed": votes.needed,
        "salient_labels": votes.salient_labels,
    }


@engine_options
def parts(
    images: ImagesArgument,
    bundle: BundleOption,
    out: OutOption,
    num_parts: Annotated[int, typer.Option("--num-parts", min=1, max=64, help="Number of part labels.")] = 4,
    load_size: LoadSizeOption = "224",
    sample_interval: SampleOption = 100,
    saliency_threshold: VoteThresholdOption = 0.065,
    votes_percentage: VotesOption = 75,
    elbow: Annotated[float, typer.Option("--elbow", help="Of the foreground stage.")] = 0.975,
    elbow_second_stage: Annotated[float, typer.Option("--elbow-second-stage", help="With --three-stages.")] = 0.94,
    num_crop_augmentations: Annotated[
        int, typer.Option("--num-crop-augmentations", min=0, help="Random crops of each image and its mirror.")
    ] = 0,
    flip_augmentation: Annotated[bool, typer.Option("--flip-augmentation", help="Mirrors join as well.")] = False,
    three_stages: Annotated[bool, typer.Option("--three-stages", help="Drop parts that some image lacks.")] = False,
    saliency: SaliencyOption = SaliencyMode.LOW_RESOLUTION,
    hierarchy: HierarchyOption = 0,
    refine: Annotated[Refinement, typer.Option("--refine", help="crf, pydensecrf or none.")] = Refinement.CRF,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random crops.")] = 0,
    facet: FacetOption = None,
    features: FeaturesOption = None,
    skip_broken: SkipOption = False,
    save_model: SaveModelOption = None,
    force: ForceOption = False,
    *,
    opening: Opening,
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
        "hierarchy": hierarchy,
        "seed": seed,
    }
    keep = {"load_size": parse_size(load_size), "saliency": saliency, "store": features}
    skipped = Skipped(skip_broken)
    check_replaceable(out, force=force, inputs=[*paths, bundle, *([features] if features else [])])
    check_apart(out, features)
    check_model_place(save_model, out, bundle, force=force)
    with skipped.reported(len(paths)), opening.engine(bundle) as engine:
        chosen = engine.manifest.default_facet("cosegment") if facet is None else facet
        with collected(engine, paths, chosen, skipped=skipped, **keep) as encoded:  # type: ignore[arg-type]
            with progress_bar("clustering and refining", len(encoded)) as update:
                found = engine.segment_parts(encoded, facet=chosen, progress=update, **options)  # type: ignore[arg-type]
            record = {"options": options | {"saliency": saliency}, "skipped": skipped.items}
            with atomic_folder(out, force=force) as folder:
                write_parts(folder, without_descriptors(encoded), found, record)
                if save_model is not None and found.num_parts:
                    known = {f.name: options[f.name] for f in dataclasses.fields(PartsOptions) if f.name in options}
                    model = parts_model(found, encoded, PartsOptions(chosen, **known))  # type: ignore[arg-type]
                    keep_model(model, save_model, out, folder, force=force)
    console.print(f"{found.num_parts} parts in {len(found)} images, refined by {refine}: {out}")
    say_doubts(found)
    if not found.num_parts and found.foreground.tried_k:
        cause = "no part is in all images" if found.common_parts is not None else "no cluster was salient enough"
        console.print(f"{cause}, so everything is background: try a lower --saliency-threshold or --votes-percentage")
    report_model(save_model, "parts", learned=bool(found.num_parts))


def write_parts(folder: Path, features: Sequence[Features], found: Parts, record: dict[str, Any]) -> None:
    """``labels/`` (0 is background, parts from 1), ``overlays/``, ``overview.png``, ``parts.npz``, ``results.json``."""
    stems = unique_stems([Path(part.name) for part in found])
    (folder / "labels").mkdir()
    (folder / "overlays").mkdir()
    sheet: list[list[Pixels]] = []
    records = []
    for stem, item, part in zip(stems, features, found, strict=True):
        overlay = draw.part_overlay(item.pixels, part.loaded_labels)
        if len(sheet) < OVERVIEW_ROWS:
            sheet.append([draw.scaled(picture, draw.CELL) for picture in (item.pixels, overlay)])
        write_png(folder / "labels" / f"{stem}.png", (part.labels + 1).astype(np.uint8))
        write_png(folder / "overlays" / f"{stem}.png", overlay)
        shares = np.bincount(part.loaded_labels.ravel() + 1, minlength=found.num_parts + 1) / part.loaded_labels.size
        state = {
            **doubts(part),
            "shares": shares.round(4),
            "refinement": part.refinement,
            "labels": f"labels/{stem}.png",
        }
        records.append(describe(item) | state)
    write_png(folder / "overview.png", draw.table(sheet, ["photograph", "parts"], stems[: len(sheet)]))
    np.savez(folder / "parts.npz", centroids=found.centroids, background_centroids=found.background_centroids)
    summary = {"command": "parts", **record, **_clustering(found.foreground, found.votes)}
    summary |= {"num_parts": found.num_parts, "common_parts": found.common_parts}
    write_results(folder, summary | {"images": records})


def check_model_place(path: Path | None, out: Path, bundle: str, *, force: bool) -> None:
    """Raise :class:`OutputError` now if a model cannot be saved there later. In ``out``, everything is made anew."""
    if path is None:
        return
    place, results, opened = path.resolve(), out.resolve(), Path(bundle).resolve()
    if results.is_relative_to(place):
        raise OutputError(f"--save-model {path} is a folder: name a file, for example {out / 'model.npz'}")
    if opened.is_dir() and place.is_relative_to(opened):
        raise OutputError(
            f"--save-model {path} lies in the bundle, which holds its own files only: choose another place"
        )
    if not place.is_relative_to(results):
        check_model_path(path, force=force)


def keep_model(model: Model, path: Path, out: Path, folder: Path, *, force: bool) -> None:
    """Save a model; a path in ``out`` means the same place in ``folder``, which becomes ``out``."""
    place, results = path.resolve(), out.resolve()
    if place.is_relative_to(results):
        model.save(folder / place.relative_to(results))
    else:
        model.save(path, force=force)


def report_model(path: Path | None, task: str, *, learned: bool) -> None:
    """Say where the model is and what it is for.

    Raises:
        InputError: one was asked for, and there was nothing to learn.
    """
    if path is None:
        return
    if not learned:
        raise InputError(f"{path} was not written: everything is background, so there is no model to keep")
    console.print(f"model: {path}; apply it to further images and videos:", soft_wrap=True)
    console.print(f"  facetrt video IN --task {task} --model {path} --out OUT.mp4", soft_wrap=True)
    console.print(f"  engine.apply(load_model({str(path)!r}), image)", soft_wrap=True)


@engine_options
def demo(
    out: OutOption = Path("facetrt-demo"),
    bundle: Annotated[str, typer.Option("--bundle", "-b", help=BUNDLE_HELP, envvar=BUNDLE_VARIABLE)] = BUILTIN,
    force: ForceOption = False,
    *,
    opening: Opening,
) -> None:
    """Co-segment and match the photographs that ship with facetrt; no download, no torch."""
    check_replaceable(out, force=force, inputs=[bundle])
    samples = sample_paths()
    with opening.engine(bundle) as engine:
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
    write_matches(folder, (a, b), [pixels, turned], matches, {}, intermediate=True)
    error = np.linalg.norm(matches.points_a_xy @ matrix[:, :2].T + matrix[:, 2] - matches.points_b_xy, axis=1)
    console.print(
        f"{folder.name}: {len(matches)} points, median error {np.median(error):.1f} pixels of {pixels.shape[1]}"
    )
