"""The original research code, timed where a user has a checkout of it. Its files are imported, so its code runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from facetrt.benchmarks.baselines.research_style import SAMPLED_ROWS
from facetrt.benchmarks.baselines.vit import PlainViT
from facetrt.benchmarks.cpu.task_times import facetrt_name
from facetrt.benchmarks.cpu.workbench import Workbench
from facetrt.benchmarks.results import Row
from facetrt.benchmarks.timing import Clock, Contestant, compare, rows_of
from facetrt.kernels.errors import InputError, MissingDependencyError, MissingFileError, reason

ENCODER, MATCH = "original code: encoder", "original code: match"
ORIGINAL = "original code"
SECONDS = 120  # for each of the two, after one round
FILES = ("extractor.py", "correspondences.py")
MODEL = "dino_vits8"  # the only one whose saliency the original computes


def check_checkout(path: Path) -> None:
    """Raise :class:`MissingFileError` unless the original's files are there."""
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise MissingFileError(
            f"--against {path}: {', '.join(missing)} not found there: expected a checkout of the original code, with "
            f"{' and '.join(FILES)} at its top"
        )


def measure(bench: Workbench, path: Path) -> list[Row]:
    """One encode with saliency, and ``match`` up to the nearest neighbours, beside facetrt in the same rounds."""
    if bench.spec.name != MODEL:
        raise InputError(f"--against runs {MODEL} only, and this bundle holds {bench.spec.name}: leave one out")
    extractor_module, correspondences = _import(path)
    model = PlainViT(bench.spec, bench.spec.patch)
    model.load_state_dict(dict(bench.state))
    extractor = extractor_module.ViTExtractor(MODEL, bench.stride, model=model, device="cpu")
    return [*_encoder(bench, extractor), *_match(bench, extractor, correspondences)]


def _import(path: Path) -> tuple[ModuleType, ModuleType]:
    """The original's modules; they import one another by bare names, so their folder goes on the path."""
    sys.path.insert(0, str(path.resolve()))
    try:
        return importlib.import_module("extractor"), importlib.import_module("correspondences")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the original code in {path} needs {error.name}, which is not installed: pip install {error.name}"
        ) from error
    except Exception as error:  # code that is not ours fails in any way
        raise InputError(f"the original code in {path} cannot be imported: {reason(error)}") from error
    finally:
        sys.path.remove(str(path.resolve()))


def _encoder(bench: Workbench, extractor: Any) -> list[Row]:
    image, facet = bench.paths[0], bench.match_facet

    def original(clock: Clock) -> object:
        with bench.torch.no_grad():
            batch, _ = extractor.preprocess(image, bench.size)
            extractor.extract_saliency_maps(batch)
            return extractor.extract_descriptors(batch, facet.layer, str(facet.kind))

    return _compare(bench, ENCODER, original, lambda clock: bench.engine("fp32").encode([image], load_size=bench.size))


def _match(bench: Workbench, extractor: Any, correspondences: Any) -> list[Row]:
    paths, facet = bench.paths[:2], bench.match_facet

    def original(clock: Clock) -> object:
        with bench.torch.no_grad():
            batches = [extractor.preprocess(path, bench.size)[0] for path in paths]
            a, b = (extractor.extract_descriptors(batch, facet.layer, str(facet.kind), True) for batch in batches)
            for batch in batches:
                extractor.extract_saliency_maps(batch)
            rows = clock.loop("rows of the similarity", range(a.shape[2]), SAMPLED_ROWS)
            return {row: int(correspondences.chunk_cosine_sim(a[:, :, row : row + 1], b).argmax()) for row in rows}

    return _compare(bench, MATCH, original, lambda clock: bench.engine("fp32").match(*paths, load_size=bench.size))


def _compare(
    bench: Workbench, section: str, original: Callable[[Clock], object], facetrt: Callable[[Clock], object]
) -> list[Row]:
    contestants = [
        Contestant(facetrt_name("fp32"), facetrt),
        Contestant(ORIGINAL, original, rounds=2, sampling=True, prepare=lambda: None),
    ]
    timings = compare(contestants, rounds=3, budget=SECONDS, report=lambda text: bench.report(f"{section}: {text}"))
    return rows_of(section, timings, [ORIGINAL])
