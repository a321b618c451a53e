"""``facetrt discover | found-head``: objects without labels, and a head that is trained without them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.cli.app import IntermediateOption, console, progress_bar
from facetrt.engine.cli.extract import SkipOption, Skipped
from facetrt.engine.cli.opening import Job, open_engine
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.drawing import results as draw
from facetrt.engine.drawing.discovery import map_picture, objects_overlay
from facetrt.engine.engine import Engine
from facetrt.engine.files import write_json, write_png, write_results
from facetrt.engine.images.finding import unique_stems
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.loading import DEFAULT_SIZE, LOAD_SIZE_SETTING, DefaultSize, LoadSize, Pixels, load_image
from facetrt.engine.settings import BUNDLES_CHOICE, FacetChoice, Setting, check, parse, split_settings, values_of
from facetrt.engine.tasks.discovery.catalogue import METHODS
from facetrt.engine.tasks.discovery.found_head import Photograph, Training, TrainingOptions, train_head
from facetrt.engine.tasks.discovery.fusing import parse_terms
from facetrt.engine.tasks.discovery.heads import write_head
from facetrt.engine.tasks.discovery.objects import Objects
from facetrt.engine.tasks.discovery.rle import encode_rle
from facetrt.engine.tasks.refinement import Refinement
from facetrt.kernels.errors import InputError

COCO, HEAD = "objects.json", "found-head.json"
OVERVIEW_ROWS = 12
TRAINING_SIZE = 224  # shorter side of photographs, as of the published crops


def read_fit(text: str) -> Fit:
    """A fit by its name; ``none`` is one, and not the absence of a choice."""
    return parse(Fit, text, "fit")


MethodChoice = Annotated[str, Setting(f"One of {', '.join(METHODS)}.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE, any option of the method; may be repeated.")
]


@dataclass(frozen=True)
class DiscoverOptions:
    """What is looked for and how; ``Engine.discover`` documents the fields."""

    method: MethodChoice = "tokencut"
    facet: FacetChoice = BUNDLES_CHOICE
    fuse: Annotated[str | None, Setting("Facets instead of one, with commas between them.")] = None
    load_size: Annotated[
        LoadSize, replace(LOAD_SIZE_SETTING, help="Shorter side, HEIGHTxWIDTH, none; as published if not.", shown="")
    ] = DEFAULT_SIZE
    fit: Annotated[
        Fit | None,
        Setting(f"To whole patches: {', '.join(Fit)}; as published if not.", shown="", read=read_fit),
    ] = None
    stride: Annotated[int | None, Setting("Pixels between cells; the patch size by default.", minimum=1)] = None
    refine: Annotated[Refinement, Setting("How masks are refined on the picture.")] = Refinement.NONE

    def __post_init__(self) -> None:
        check(self)

    @property
    def asked(self) -> dict[str, Any]:
        """The options as the engine takes them."""
        return values_of(self) | {"facet": self.facet or None}

    @property
    def record(self) -> dict[str, Any]:
        """The options as results record them."""
        return values_of(self) | {"load_size": None if isinstance(self.load_size, DefaultSize) else self.load_size}


@expanded
def discover(
    job: Job,
    options: DiscoverOptions,
    running: RunOptions,
    settings: Settings = None,
    save_intermediate: IntermediateOption = False,
    skip_broken: SkipOption = False,
) -> None:
    """Find the objects in each image by itself, without labels: boxes, masks, overlays, COCO annotations.

    tokencut: one object, cut from the graph of alike cells.
    lost: one object, grown from a cell that few others are like.
    spectral: one object, or regions (--set form=regions), by eigenvectors.
    maskcut: up to three objects (--set cuts=3), cut one after the other.
    found: what is unlike the background; better with a head (found-head).
    selfmask: one object, by vote of clusters or a trained segmenter.
    dino-seg: one object, where a head of [CLS] looks (--set head=4).
    """
    chosen: dict[str, Any] = dict(split_settings(settings or []))
    job.check_place()
    skipped = Skipped(skip_broken)
    with (
        skipped.reported(len(job.paths)),
        open_engine(job.bundle, running) as engine,
        job.folder() as folder,
        progress_bar("discovering", len(job.paths)) as update,
    ):
        report = Report(folder, job.paths, intermediate=save_intermediate)
        report.write(engine.discover_iter(job.paths, **options.asked, progress=update, on_broken=skipped, **chosen))
        report.finish({"options": options.record | {"settings": chosen}, "skipped": skipped.items})
    console.print(f"{report.objects} objects in {report.images} images by {options.method}: {job.out}")
    for name, why in report.empty[:OVERVIEW_ROWS]:
        console.print(f"nothing found: {name} {why}", soft_wrap=True)
    if len(report.empty) > OVERVIEW_ROWS:
        console.print(f"and nothing in {len(report.empty) - OVERVIEW_ROWS} more; results.json tells why")


@dataclass
class Report:
    """Files of a run, written as results come: memory does not grow with the number of images."""

    folder: Path
    paths: list[Path]
    intermediate: bool
    objects: int = 0
    images: int = 0
    empty: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("masks", "overlays", *(("maps", "data") if self.intermediate else ())):
            (self.folder / name).mkdir()
        self._stems = dict(zip(map(str, self.paths), unique_stems(self.paths), strict=True))
        self._sheet: list[list[Pixels]] = []
        self._labels: list[str] = []
        self._records: list[dict[str, Any]] = []
        self._coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}

    def write(self, found: Iterable[Objects]) -> None:
        """Masks, overlay and data of each image."""
        for objects in found:
            self.images += 1
            self.objects += len(objects)
            if objects.why_empty is not None:
                self.empty.append((objects.name, objects.why_empty))
            self._write(objects, self._stems[objects.name])

    def _write(self, objects: Objects, stem: str) -> None:
        picture = draw.capped(load_image(objects.name).pixels)
        overlay = objects_overlay(picture, objects)
        write_png(self.folder / "overlays" / f"{stem}.png", overlay)
        masks = [f"masks/{stem}-{number}.png" for number in range(1, 1 + len(objects))]
        for place, mask in zip(masks, objects.masks, strict=True):
            write_png(self.folder / place, mask)
        if len(self._sheet) < OVERVIEW_ROWS:
            shown = next((objects.maps[name] for name in SHOWN if name in objects.maps), None)
            small = draw.scaled(picture, draw.CELL)
            heat = small if shown is None else map_picture(_layer(shown), objects.geometry, draw.CELL)
            self._sheet.append([small, heat, draw.scaled(overlay, draw.CELL)])
            self._labels.append(stem)
        if self.intermediate:
            self._write_maps(objects, stem)
        self._records.append(_record(objects) | {"masks": masks})
        self._add_annotations(objects, Path(objects.name).name)

    def _write_maps(self, objects: Objects, stem: str) -> None:
        arrays: dict[str, Any] = {name: np.asarray(values) for name, values in objects.maps.items()}
        more: dict[str, Any] = {} if objects.soft is None else {"soft": objects.soft}
        np.savez_compressed(
            self.folder / "data" / f"{stem}.npz", cells=objects.cells, boxes=objects.boxes, **more, **arrays
        )
        for name, values in arrays.items():
            layers = values if values.ndim == 3 else values[None]
            for number, layer in enumerate(layers):
                suffix = f"-{number}" if len(layers) > 1 else ""
                write_png(self.folder / "maps" / f"{stem}-{name}{suffix}.png", map_picture(layer, objects.geometry))

    def _add_annotations(self, objects: Objects, name: str) -> None:
        height, width = objects.geometry.original_size
        self._coco["images"].append({"id": self.images, "file_name": name, "height": height, "width": width})
        for number, (box, mask) in enumerate(zip(objects.boxes, objects.masks, strict=True)):
            left, top, right, bottom = (float(side) for side in box)
            score = {} if objects.scores is None else {"score": float(objects.scores[number])}
            self._coco["annotations"].append(
                {
                    "id": 1 + len(self._coco["annotations"]),
                    "image_id": self.images,
                    "category_id": 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "segmentation": encode_rle(mask),
                    "iscrowd": 0,
                    **score,
                }
            )

    def finish(self, record: dict[str, Any]) -> None:
        """``results.json``, COCO's ``objects.json``, and the overview."""
        if self._sheet:
            titles = ["photograph", "map", "objects"]
            write_png(self.folder / "overview.png", draw.table(self._sheet, titles, self._labels))
        write_json(self.folder / COCO, {**self._coco, "categories": [{"id": 1, "name": "object"}]})
        write_results(self.folder, {"command": "discover", **record, "coco": COCO, "images": self._records})


SHOWN = ("eigenvector", "eigenvectors", "expansion", "logits", "kept", "attention", "clusters")  # in the overview


def _layer(values: Any) -> Any:
    """One layer of a map: the second one of a graph's eigenvectors, whose first is constant, or the first."""
    if values.ndim == 2:
        return values
    return values[1] if np.ptp(values[0]) < np.ptp(values[-1]) * 1e-3 else values[0]


def _record(objects: Objects) -> dict[str, Any]:
    return {
        "image": objects.name,
        "original_size": objects.geometry.original_size,
        "loaded_size": objects.geometry.image_size,
        "grid": objects.geometry.grid,
        "method": objects.method,
        "facet": objects.facet,
        "refinement": objects.refinement,
        "boxes": objects.boxes.round(3),
        "scores": None if objects.scores is None else objects.scores.round(6),
        "why_empty": objects.why_empty,
        "facts": dict(objects.facts),
    }


@expanded
def found_head(
    job: Job,
    options: TrainingOptions,
    running: RunOptions,
    facet: Annotated[
        str | None, typer.Option("--facet", help="KIND@LAYER that it weighs; the bundle's choice by default.")
    ] = None,
    load_size: Annotated[int, typer.Option("--load-size", min=1, help="Shorter side of photographs.")] = TRAINING_SIZE,
    skip_broken: SkipOption = False,
) -> None:
    """Train FOUND's head on photographs without labels: a few hundred numbers that tell foreground from background."""
    job.check_place()
    skipped = Skipped(skip_broken)
    with skipped.reported(len(job.paths)), open_engine(job.bundle, running) as engine:
        term = _single_term(facet or engine.manifest.default_facet("discover"))
        photographs = []
        with progress_bar("encoding", len(job.paths)) as update:
            encoding = METHODS["found"]().encoding(engine.manifest, load_size)
            asked: dict[str, Any] = {"load_size": load_size, "fit": encoding.fit, "stride": encoding.stride}
            for item in engine.encode_iter(job.paths, progress=update, on_broken=skipped, **asked):
                photographs.append(Photograph.of(item, engine.manifest, term))
        kept = [photograph for photograph in photographs if photograph is not None]
        source = f"trained by facetrt on {len(kept)} photographs, seed {options.seed}"
        with progress_bar("training", options.steps) as update:
            training = train_head(kept, options, str(term), source, update)
        with job.folder() as folder:
            write_head(training.head, folder / HEAD)
            _write_training(folder, engine, job.paths, training, load_size)
            record: dict[str, Any] = {"command": "found-head", "options": values_of(options) | {"facet": str(term)}}
            record |= {"photographs": len(kept), "losses": training.losses.round(5), "skipped": skipped.items}
            write_results(folder, record | {"load_size": load_size, "head": HEAD})
    first, last = training.losses[0], training.losses[-1]
    console.print(
        f"a head of {len(training.head.weight) + 1} numbers for {term}, loss {first:.3f} at first and {last:.3f} at "
        f"last: {job.out / HEAD}"
    )
    console.print(f"use it: facetrt discover --method found --set head={job.out / HEAD}", soft_wrap=True)


def _single_term(text: str) -> Any:
    terms = parse_terms(text)
    if len(terms) != 1:
        raise InputError(f"facet {text!r}: a head weighs one facet: expected KIND@LAYER, or KIND@LAYER-mean")
    return terms[0]


def _write_training(folder: Path, engine: Engine, paths: list[Path], training: Training, load_size: int) -> None:
    """What the head finds in the first photographs."""
    rows, labels = [], []
    method: dict[str, Any] = {"head": folder / HEAD, "extent": "multi"}
    chosen = paths[:OVERVIEW_ROWS]
    found = engine.discover_iter(chosen, "found", load_size=load_size, on_broken=lambda *_: None, **method)
    for objects in found:
        picture = draw.capped(load_image(objects.name).pixels)
        rows.append([draw.scaled(each, draw.CELL) for each in (picture, objects_overlay(picture, objects))])
        labels.append(Path(objects.name).stem)
    if rows:
        write_png(folder / "overview.png", draw.table(rows, ["photograph", "foreground"], labels))
