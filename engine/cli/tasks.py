"""``facetrt match | cosegment | parts | demo``: parse, call, write, print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
import typer

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.bundle.bundle import BUILTIN
from facetrt.engine.cli.app import (
    BUNDLE_HELP,
    BUNDLE_VARIABLE,
    ForceOption,
    IntermediateOption,
    OutOption,
    console,
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
from facetrt.engine.cli.opening import Job, encode_pair, open_engine
from facetrt.engine.cli.parameters import Presets, expanded
from facetrt.engine.cli.records import describe, saliency_picture
from facetrt.engine.drawing import results as draw
from facetrt.engine.engine import Engine
from facetrt.engine.features.collection import FeatureCollection
from facetrt.engine.features.features import Features
from facetrt.engine.features.store import FeatureStore
from facetrt.engine.files import atomic_folder, check_replaceable, write_png, write_results
from facetrt.engine.images.finding import unique_stems
from facetrt.engine.images.loading import Pixels, load_image
from facetrt.engine.samples import sample_paths, second_view
from facetrt.engine.settings import values_of
from facetrt.engine.tasks.clustering import Clustering
from facetrt.engine.tasks.cosegmentation import LOADING, VOTING, CosegmentOptions, Mask, Masks
from facetrt.engine.tasks.matching import Matches, MatchOptions
from facetrt.engine.tasks.model_files import check_model_path
from facetrt.engine.tasks.models import Model, parts_model, segmentation_model
from facetrt.engine.tasks.parts import PartMap, Parts, PartsOptions
from facetrt.engine.tasks.presets import PAPER_COSEGMENT, PAPER_MATCH
from facetrt.kernels.errors import InputError, OutputError
from facetrt.kernels.vote import Votes

DOUBTFUL = 0.33  # confidence of a match: pictures of noise stay below, two views of a thing above
DOUBTFUL_MASK = 0.5  # of a mask: in pictures of noise up to 0.45, of photographs 0.7 to 1

Options = TypeVar("Options", CosegmentOptions, PartsOptions)


@expanded
def match(
    job: Job,
    options: Annotated[MatchOptions, Presets(PAPER_MATCH)],
    running: RunOptions,
    save_intermediate: IntermediateOption = False,
) -> None:
    """Find corresponding points of two images and draw them side by side."""
    paths = job.pair("match")
    job.check_place()
    with open_engine(job.bundle, running) as engine:
        a, b = encode_pair(engine, paths, options.load_size)
        asked = values_of(options, without=["facet", "load_size"])
        matches = engine.match(a, b, facet=options.facet or None, **asked)
    pictures = [draw.capped(load_image(path).pixels) for path in paths]
    record = values_of(replace(options, facet=matches.facet))
    with job.folder() as folder:
        write_matches(folder, (a, b), pictures, matches, record, intermediate=save_intermediate)
    console.print(
        f"{len(matches)} point pairs from {len(matches.cells_a)} salient best buddies, confidence "
        f"{matches.confidence:.2f}: {job.out}"
    )
    say_advice(matches, options, dynamic=engine.manifest.dynamic)


def say_advice(matches: Matches, options: MatchOptions, *, dynamic: bool) -> None:
    """Print why there are no matches and what could be tried, or that they are doubtful."""
    if matches.why_empty is not None:
        console.print(f"nothing to match: {matches.why_empty}", soft_wrap=True)
    elif not len(matches):
        lower = ["a lower --saliency-threshold"] if options.saliency_threshold > 0 else []
        larger = ["a larger --load-size"] if dynamic else []
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
        everything = replace(matches, selected=np.arange(len(matches.cells_a)))
        write_png(folder / "best_buddies.png", draw.draw_matches(pictures, everything))


@dataclass(frozen=True)
class Learning:
    """Where features are kept, what may be left out, and where the model goes."""

    features: FeaturesOption = None
    skip_broken: SkipOption = False
    save_model: Annotated[
        Path | None, typer.Option("--save-model", help="File for what was learned, to be applied to further images.")
    ] = None


@dataclass(frozen=True)
class Encoded(Generic[Options]):
    """Features of a collection, and the options with everything in them that was left to facetrt."""

    engine: Engine
    features: FeatureCollection | FeatureStore
    options: Options
    skipped: Skipped

    @property
    def asked(self) -> dict[str, Any]:
        """The options as the engine takes them with features."""
        return values_of(self.options, without=LOADING)

    @property
    def record(self) -> dict[str, Any]:
        """What the results record."""
        return {"options": values_of(self.options), "skipped": self.skipped.items}


@contextmanager
def encoded(job: Job, options: Options, learning: Learning, running: RunOptions) -> Iterator[Encoded[Options]]:
    """What is clustered; before that, everything is found out that could stop the command later."""
    skipped = Skipped(learning.skip_broken)
    job.check_place(learning.features)
    check_apart(job.out, learning.features)
    check_model_place(learning.save_model, job.out, job.bundle, force=job.force)
    with skipped.reported(len(job.paths)), open_engine(job.bundle, running) as engine:
        facet, saliency = options.facet or engine.manifest.default_facet("cosegment"), options.saliency or VOTING
        keep: dict[str, Any] = {"load_size": options.load_size, "saliency": saliency, "store": learning.features}
        with collected(engine, job.paths, facet, skipped=skipped, **keep) as features:
            yield Encoded(engine, features, replace(options, facet=facet, saliency=saliency), skipped)


@expanded
def cosegment(
    job: Job,
    options: Annotated[CosegmentOptions, Presets(PAPER_COSEGMENT)],
    learning: Learning,
    running: RunOptions,
    save_intermediate: IntermediateOption = False,
) -> None:
    """Segment the objects that the images share; masks at the original size, overlays, data."""
    if len(job.paths) < 2:
        raise InputError(f"{len(job.paths)} image was given: co-segmentation needs at least 2 that share an object")
    with encoded(job, options, learning, running) as given:
        with progress_bar("clustering and refining", len(given.features)) as update:
            masks = given.engine.cosegment(given.features, progress=update, **given.asked)
        learned = bool(masks.votes.salient_labels.size)
        with job.folder() as folder:
            shown = without_descriptors(given.features)
            write_masks(folder, shown, masks, given.record, intermediate=save_intermediate)
            if learning.save_model is not None and learned:
                model = segmentation_model(masks, given.features, given.options)
                keep_model(model, learning.save_model, job.out, folder, force=job.force)
    say_masks(masks, job.out)
    report_model(learning.save_model, "cosegment", learned=learned)


def say_masks(masks: Masks, out: Path) -> None:
    """Print what was found, and what to try where nothing was."""
    found = sum(bool(mask.cells.any()) for mask in masks)
    console.print(
        f"masks of {len(masks)} images ({found} with foreground), {len(masks.clustering.centroids)} clusters: {out}"
    )
    say_doubts(masks)
    if not masks.clustering.tried_k:
        console.print("fewer than two images show anything, so they share nothing")
    elif not found:
        console.print("no cluster was salient in enough images: try a lower --saliency-threshold or --votes-percentage")


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


@expanded
def parts(job: Job, options: PartsOptions, learning: Learning, running: RunOptions) -> None:
    """Segment the parts that the images' common objects share; part colours mean the same in all images."""
    with encoded(job, options, learning, running) as given:
        with progress_bar("clustering and refining", len(given.features)) as update:
            found = given.engine.segment_parts(given.features, progress=update, **given.asked)
        with job.folder() as folder:
            write_parts(folder, without_descriptors(given.features), found, given.record)
            if learning.save_model is not None and found.num_parts:
                model = parts_model(found, given.features, given.options)
                keep_model(model, learning.save_model, job.out, folder, force=job.force)
    console.print(f"{found.num_parts} parts in {len(found)} images, refined by {options.refine}: {job.out}")
    say_doubts(found)
    if not found.num_parts and found.foreground.tried_k:
        cause = "no part is in all images" if found.common_parts is not None else "no cluster was salient enough"
        console.print(f"{cause}, so everything is background: try a lower --saliency-threshold or --votes-percentage")
    report_model(learning.save_model, "parts", learned=bool(found.num_parts))


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


@expanded
def demo(
    out: OutOption = Path("facetrt-demo"),
    bundle: Annotated[str, typer.Option("--bundle", "-b", help=BUNDLE_HELP, envvar=BUNDLE_VARIABLE)] = BUILTIN,
    force: ForceOption = False,
    *,
    running: RunOptions,
) -> None:
    """Co-segment and match the photographs that ship with facetrt; no download, no torch."""
    check_replaceable(out, force=force, inputs=[bundle])
    samples = sample_paths()
    with open_engine(bundle, running) as engine:
        console.print(f"model: {engine.manifest.title} ({engine.manifest.description}), backend: {engine.backend}")
        with atomic_folder(out, force=force) as folder:
            _demo_cosegment(engine, folder / "cosegment", [samples[name] for name in DEMO_SET])
            for name in DEMO_VIEWS:
                _demo_match(engine, folder / f"match-{name}", load_image(samples[name]).pixels)
            write_results(folder, {"command": "demo", "model": engine.manifest.title})
    for picture in sorted(out.glob("*/*.png")):
        console.print(f"  {picture}")


DEMO_SET = ("astronaut", "cat", "coffee", "ibex")
DEMO_VIEWS = ("astronaut", "coffee")


def _demo_cosegment(engine: Engine, folder: Path, paths: list[Path]) -> None:
    folder.mkdir()
    with progress_bar(f"co-segmenting {len(paths)} photographs", len(paths)) as update:
        features = engine.encode(paths, saliency=VOTING, progress=update)
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
