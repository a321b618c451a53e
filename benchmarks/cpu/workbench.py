"""What the sections share: a bundle and the weights behind it, image files, and everything that runs a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from facetrt.benchmarks.timing import Contestant, Timing, compare
from facetrt.benchmarks.weights import deterministic_weights
from facetrt.engine.bundle.bundle import BUILTIN, Bundle
from facetrt.engine.engine import Engine
from facetrt.engine.samples import sample_images
from facetrt.export.export_options import ExportOptions, Facet, FacetKind
from facetrt.export.models import ModelSpec, find_model, import_export_libraries
from facetrt.kernels.errors import InputError
from facetrt.kernels.machine import processors

if TYPE_CHECKING:
    from facetrt.benchmarks.baselines.research_style import Extractor
    from facetrt.benchmarks.baselines.strong_glue import Model

Opened = TypeVar("Opened")

MODEL = "dino_vits8"
UNTRAINED = (
    "The weights are deterministic and untrained. That does not matter for time; quality columns say how well results "
    "agree, not how good they are."
)
QKV = {FacetKind.KEY, FacetKind.QUERY, FacetKind.VALUE}


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the bars hold for the defaults.

    Attributes:
        side: of the square images, in pixels.
        images: of a co-segmentation.
        many: images of the long one, which runs with the built-in model.
        parts: images of a part co-segmentation.
        sides: image sizes of the scaling curve.
        large_grid: side of the grid whose best buddies' memory is measured; 111 is 448 pixels at stride 4.
        discovery: cells of an image in which objects are looked for.
        long: side of an image of 8,193 to 16,384 tokens, at stride 4.
        eigenvector: cells of the graph whose second eigenvector is looked for.
        maskcut: cells of the graph that is cut three times.
        collection: images of the discovery whose memory is measured.
        backbones: sizes of the images that other backbones encode, and ``models`` which they are.
        product: side of the square matrices whose product shows the machine's limit.
        seconds: for the whole suite, roughly: rounds are dropped to keep to it.
    """

    side: int = 224
    images: int = 20
    many: int = 200
    parts: int = 4
    sides: tuple[int, ...] = (112, 160, 224, 320)
    large_grid: int = 111
    long: int = 448
    discovery: tuple[int, int] = (30, 40)
    eigenvector: tuple[int, int] = (60, 80)
    maskcut: tuple[int, int] = (60, 60)
    collection: int = 1000
    backbones: tuple[int, ...] = (224, 518)
    models: tuple[str, ...] = ("dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16", "dinov3_vits16plus")
    product: int = 2048
    seconds: float = 560


QUICK = Sizes(
    side=96,
    images=4,
    many=8,
    parts=2,
    sides=(64, 96),
    large_grid=13,
    long=64,
    discovery=(6, 8),
    eigenvector=(9, 12),
    maskcut=(9, 9),
    collection=8,
    backbones=(64,),
    models=("dinov3_vits16",),
    product=128,
    seconds=0,  # one round
)


@dataclass
class Workbench:
    """Opens models when they are first needed and closes them at the end; use as a context manager.

    Attributes:
        bundle: dynamic, with saliency and the facets of both tasks.
        state: the same weights as torch tensors, for the baselines.
        folder: a scratch folder for images and results.
    """

    bundle: Path | str
    spec: ModelSpec
    state: Mapping[str, Any]
    folder: Path
    sizes: Sizes = field(default_factory=Sizes)
    rounds: int = 5
    report: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        manifest = Bundle.open(self.bundle).manifest
        self.stride = manifest.stride
        if not manifest.dynamic or manifest.saliency_heads is None or 8 % self.stride:
            raise InputError(
                f"{self.bundle}: the benchmarks need a bundle of any image size, with saliency and a stride that "
                "divides 8: export one without --size and --no-saliency"
            )
        self.match_facet, self.cosegment_facet = (
            Facet.parse(manifest.default_facet(task)) for task in ("match", "cosegment")
        )
        self.facets = tuple(dict.fromkeys((self.match_facet, self.cosegment_facet)))
        missing = [str(facet) for facet in self.facets if str(facet) not in manifest.facets]
        if missing or any(facet.kind not in QKV for facet in self.facets):
            raise InputError(f"{self.bundle} has no {', '.join(missing)}: export it with the model's default facets")
        self.torch, _ = import_export_libraries()
        self.torch.set_num_threads(processors())
        self._start, self._shares = time.perf_counter(), 1.0
        self._stack = ExitStack()
        self._opened: dict[object, Any] = {}

    def compare(
        self, title: str, contestants: Sequence[Contestant], *, share: float, rounds: int | None = None
    ) -> dict[str, Timing]:
        """:func:`compare` with the suite's rounds, within a share of its time.

        What earlier sections left over is spread over those to come, and so is what they took too much.
        """
        left = self.sizes.seconds - (time.perf_counter() - self._start)
        budget = left * share / max(self._shares, share)
        self._shares -= share
        return compare(
            contestants,
            rounds=rounds or self.rounds,
            budget=budget,
            report=lambda text: self.report(f"{title}: {text}"),
        )

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` of the benchmark's images once loaded."""
        return self.sizes.side, self.sizes.side

    @cached_property
    def paths(self) -> list[Path]:
        """Image files of a co-segmentation; the first two make a pair."""
        return write_images(self.folder, self.sizes.images)

    def engine(self, precision: str, backend: str = "auto", specialisation: str = "auto") -> Engine:
        """An open engine; raises where this machine lacks the backend or the precision."""

        def make() -> Engine:
            return self._stack.enter_context(
                Engine.open(
                    self.bundle,
                    backend=backend,
                    precision=precision,
                    allow_inexact=True,
                    specialisation=specialisation,
                )
            )

        return self.once(("engine", precision, backend, specialisation), make)

    def open(self, bundle: Path, precision: str) -> Engine:
        """Another bundle's engine, kept open."""

        def make() -> Engine:
            return self._stack.enter_context(Engine.open(bundle, precision=precision, allow_inexact=True))

        return self.once((bundle, precision), make)

    def glue(self, *, bf16: bool = False) -> Model:
        """The strong glue's model."""
        from facetrt.benchmarks.baselines.strong_glue import Model

        return self.once(("glue", bf16), lambda: Model(self.spec, self.state, self.stride, bf16=bf16))

    def extractor(self, stride: int | None = None) -> Extractor:
        """The research style's model at the bundle's stride or another."""
        from facetrt.benchmarks.baselines.research_style import Extractor

        chosen = stride or self.stride
        return self.once(("extractor", chosen), lambda: Extractor(self.spec, self.state, chosen))

    def once(self, key: object, make: Callable[[], Opened]) -> Opened:
        if key not in self._opened:
            self._opened[key] = make()
        opened: Opened = self._opened[key]
        return opened

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.clear()
        self._stack.close()


def prepare(
    bundle: Path | str | None, weights: Path | None, folder: Path, options: ExportOptions | None = None
) -> tuple[Path | str, ModelSpec, Any]:
    """Bundle, model and weights: as given, or exported to ``folder``.

    Without weights they are deterministic and untrained: they do not matter for time.

    Raises:
        InputError: a bundle without the weights it was made of.
    """
    from facetrt.export.exporting import export_bundle
    from facetrt.export.weights import load_weights

    if bundle is not None and weights is None and str(bundle) != BUILTIN:
        raise InputError(
            f"--bundle {bundle} was given without --weights: the torch baselines need the checkpoint it was made of"
        )
    if bundle is not None:
        manifest = Bundle.open(bundle).manifest
        spec = find_model(manifest.model)
        state, checkpoint = load_weights(spec, weights)
        if weights is not None and checkpoint.sha256 != manifest.checkpoint.sha256:
            raise InputError(f"{weights} is not the checkpoint that {bundle} was made of: its SHA-256 differs")
        return bundle, spec, state
    spec = find_model(MODEL)
    if weights is None:
        weights = folder / "untrained.npz"
        np.savez(weights, **deterministic_weights(spec))  # type: ignore[arg-type]
    export_bundle(MODEL, folder / "bundle", options or ExportOptions(), weights=weights)
    return folder / "bundle", spec, load_weights(spec, weights)[0]


def write_images(folder: Path, count: int) -> list[Path]:
    """Square random crops of one photograph, so that they share an object, as JPEG files of 256 pixels."""
    random, image = np.random.default_rng(0), sample_images()["chelsea"]
    side = min(image.size) * 7 // 10
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        left, top = (int(random.integers(0, length - side + 1)) for length in image.size)
        paths.append(folder / f"{i:05}.jpg")
        image.crop((left, top, left + side, top + side)).resize((256, 256)).save(paths[-1], quality=90)
    return paths
