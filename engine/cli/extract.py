"""``facetrt extract``, and how commands get the features of a collection: skipping, storing, being interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.cli.app import (
    console,
    errors,
    interruption,
    note,
    parse_facets,
    progress_bar,
)
from facetrt.engine.cli.opening import Job, open_engine
from facetrt.engine.cli.parameters import expanded
from facetrt.engine.cli.records import describe, saliency_picture
from facetrt.engine.encoding.encoder import EncodeOptions
from facetrt.engine.encoding.extraction import is_empty_folder, sole_writer
from facetrt.engine.engine import Engine
from facetrt.engine.features.collection import FeatureCollection
from facetrt.engine.features.features import Features, SaliencyMode
from facetrt.engine.features.store import IMAGES, FeatureStore, image_key, open_store, stored_numbers
from facetrt.engine.files import (
    FEATURES,
    RESULTS,
    atomic_file,
    atomic_folder,
    is_store,
    write_png,
    write_results,
)
from facetrt.engine.images.finding import unique_stems
from facetrt.engine.images.loading import ImageLike, LoadSize
from facetrt.engine.settings import values_of
from facetrt.kernels.errors import FacetrtError, InputError, OutputError

LISTED = 10  # skipped images that are printed; the results list all

SkipOption = Annotated[
    bool,
    typer.Option("--skip-broken", help="Leave out images that cannot be encoded, and list them, instead of stopping."),
]
FeaturesOption = Annotated[
    Path | None,
    typer.Option(
        "--features", help="Folder to keep features in: an interrupted run continues from there, others use it again."
    ),
]


class Skipped:
    """Images that cannot be encoded: left out and listed if ``allowed``, else the first one stops the command."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.items: list[dict[str, str]] = []

    def __call__(self, image: ImageLike, error: FacetrtError) -> None:
        if not self.allowed:
            raise InputError(f"{error}. Mend it, or leave it out with --skip-broken; a store keeps what came before it")
        self.items.append({"image": str(image), "reason": str(error)})

    @contextmanager
    def reported(self, total: int) -> Iterator[None]:
        """Print after the block, also a failed one, what was left out, on standard error."""
        where = ""
        try:
            yield
            where = f"; {RESULTS} lists all, with reasons"
        finally:
            if self.items and not interruption.requested:
                note(f"{len(self.items)} of {total} images were left out{where}:")
                for item in self.items[:LISTED]:
                    errors.print(f"  {item['reason']}", soft_wrap=True)


def check_apart(out: Path, store: Path | None) -> None:
    """The folder of results and that of features must not hold one another."""
    if store is None:
        return
    a, b = out.resolve(), store.resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise OutputError(f"--out {out} and --features {store}: one lies in the other; choose two separate folders")


@contextmanager
def interruptible(store: Path | None, total: int, *, force: bool = False) -> Iterator[None]:
    """Say on Ctrl-C and SIGTERM how many of the images are in the store, and how to go on."""

    def say() -> str:
        if store is None:
            return "nothing was written; with --features DIR an interrupted run can be continued"
        done = len(stored_numbers(store)) if is_store(store) else 0
        again = "it again without --force" if force else "the same command again"
        return f"{done} of {total} images are done; run {again} to continue"

    with interruption.explained(say):
        yield


@contextmanager
def collected(
    engine: Engine,
    paths: Sequence[Path],
    facet: str,
    *,
    load_size: LoadSize,
    saliency: SaliencyMode,
    store: Path | None,
    skipped: Skipped,
) -> Iterator[FeatureCollection | FeatureStore]:
    """Features of a collection: in a store, where there is one, else in memory or spilled until the block ends."""
    options: dict[str, Any] = {"load_size": load_size, "saliency": saliency, "on_broken": skipped}
    with interruptible(store, len(paths)):
        with progress_bar("encoding", len(paths)) as update:
            if store is not None:
                features: FeatureCollection | FeatureStore = engine.extract(
                    paths, store, facets=_stored_facets(store, facet), progress=update, **options
                )
            else:
                features = engine.collect(paths, facets=[facet], progress=update, **options)
        with features if isinstance(features, FeatureCollection) else nullcontext():
            yield features


def without_descriptors(features: FeatureCollection | FeatureStore) -> Sequence[Features]:
    """The images without their descriptors: a store need not read those for pictures and records."""
    return features.only([]) if isinstance(features, FeatureStore) else features


def _stored_facets(store: Path, facet: str) -> list[str]:
    """A store that holds further facets goes on with them."""
    facets = open_store(store).facets if is_store(store) else []
    return facets if facet in facets else [facet]


@dataclass(frozen=True)
class Extraction(Job):
    """What is read, and the folder that a store is made in or continued."""

    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or to continue after an interruption.")]
    force: Annotated[bool, typer.Option("--force", help="Start anew instead of continuing.")] = False


@expanded
def extract(
    job: Extraction,
    encoding: EncodeOptions,
    running: RunOptions,
    facets: Annotated[
        str | None, typer.Option("--facets", help="Comma-separated; all of the bundle's by default.")
    ] = None,
    skip_broken: SkipOption = False,
) -> None:
    """Write descriptors and saliency of images into a Zarr store, with pictures; continues an interrupted run."""
    store, skipped = job.out / FEATURES, Skipped(skip_broken)
    if job.force or not (is_store(store) or is_empty_folder(job.out)):
        job.check_place()
    with skipped.reported(len(job.paths)), open_engine(job.bundle, running) as engine:
        chosen = parse_facets(facets, engine.manifest)
        _make(job.out, force=job.force)
        there = len(stored_numbers(store)) if is_store(store) else 0
        with interruptible(store, len(job.paths), force=job.force):
            features = _fill(store, engine, job.paths, chosen, encoding, skipped)
            write_report(job.out, job.paths, features, encoding, skipped)
    state = " (complete already)" if there == len(features) else f" ({there} were there already)" if there else ""
    console.print(f"descriptors of {len(features)} images{state}: {store}")


def _fill(
    store: Path, engine: Engine, paths: Sequence[Path], facets: list[str], encoding: EncodeOptions, skipped: Skipped
) -> FeatureStore:
    """Encode what is missing. Once an image was added, the report beside the store waits until all is whole again."""
    there = len(stored_numbers(store)) if is_store(store) else 0
    with progress_bar("extracting", len(paths)) as update:

        def advance(done: int, total: int | None) -> None:
            if done > there + len(skipped.items):
                (store.parent / RESULTS).unlink(missing_ok=True)
            update(done, total)

        asked = values_of(encoding)
        return engine.extract(paths, store, facets=facets, progress=advance, on_broken=skipped, **asked)


def _make(out: Path, *, force: bool) -> None:
    """The output folder; an empty one in place of an earlier result with ``force``."""
    with sole_writer(out / FEATURES) if force and is_store(out / FEATURES) else nullcontext():
        if force:
            with atomic_folder(out, force=True):
                pass
            return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror or error}") from error


def write_report(
    out: Path, paths: Sequence[Path], features: FeatureStore, encoding: EncodeOptions, skipped: Skipped
) -> None:
    """``saliency/*.png`` that are missing, and ``results.json``: with it the extraction is finished."""
    stems, records = unique_stems(paths), []
    try:
        (out / "saliency").mkdir(exist_ok=True)
        with progress_bar("drawing", len(features)) as update:
            for done, (number, item) in enumerate(zip(features.numbers, features.only([]), strict=True), start=1):
                picture = f"saliency/{stems[number]}.png" if item.attention is not None else None
                if picture is not None and not (out / picture).exists():
                    with atomic_file(out / picture) as path:
                        write_png(path, saliency_picture(item))
                group = f"{FEATURES}/{IMAGES}/{image_key(number)}"
                records.append(describe(item) | {"group": group, "saliency": picture})
                update(done, len(features))
        record: dict[str, Any] = {"command": "extract", "store": FEATURES, "facets": features.facets}
        record |= {"options": values_of(encoding), "images": records, "skipped": skipped.items}
        write_results(out, record)
    except OSError as error:
        if isinstance(error, FacetrtError):
            raise
        raise OutputError(
            f"writing to {out} failed ({error.strerror or error}); the store is complete: make room, then run the same "
            "command again (without --force) for pictures and the report"
        ) from error
