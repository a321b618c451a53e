"""What to export, checked before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated

from facetrt.engine.machine.memory import MAX_CELLS, MAX_CELLS_SETTING
from facetrt.engine.settings import Setting, check
from facetrt.kernels.errors import InputError

GPU = "GPU"  # the panel of options in the command line's help
FACET = re.compile(r"(key|query|value|token|normed|rotated_key|rotated_query)@(\d{1,3})")


class GraphPrecision(StrEnum):
    """What a graph's weights and matrix products are in; sums, normalisations and softmax stay in fp32.

    ``auto`` is the shortest that measurements allow: see :mod:`facetrt.export.choosing`.
    """

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Target(StrEnum):
    """What is made: the portable graph alone, or also a TensorRT plan for the GPU of this machine, an engine of
    TensorRT for RTX, for any list of GPUs, or a model repository for Triton.
    """

    ONNX = "onnx"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    TRITON = "triton"


class FacetKind(StrEnum):
    """Which tensor of a block is taken. ``token`` is the block's result, ``normed`` the same after the final norm.

    Queries and keys are those of the projection; ``rotated`` ones, of models with RoPE, are what attention takes.
    """

    KEY = "key"
    QUERY = "query"
    VALUE = "value"
    TOKEN = "token"
    NORMED = "normed"
    ROTATED_KEY = "rotated_key"
    ROTATED_QUERY = "rotated_query"


@dataclass(frozen=True)
class Facet:
    """A facet of a layer, written ``key@9``."""

    kind: FacetKind
    layer: int

    @staticmethod
    def parse(text: str) -> Facet:
        """Read ``kind@layer``; raises :class:`InputError` for anything else."""
        found = FACET.fullmatch(text)
        if found is None:
            raise InputError(
                f"facet {text!r}: expected key, query, value, token or normed, or rotated_key or rotated_query of "
                "models with RoPE, then @ and a layer, like key@1"
            )
        return Facet(FacetKind(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.kind}@{self.layer}"


def _architectures(text: str) -> tuple[str, ...]:
    if text.lower() == "none":
        return ()
    from facetrt.export.kernels import parse_architectures

    return tuple(parse_architectures(text))


@dataclass(frozen=True)
class ExportOptions:
    """How to export a model. Without ``measure``, bf16 runs only if one insists."""

    stride: Annotated[
        int | None,
        Setting("Of the patch convolution; divides the patch size. 4 by default, 7 for patches of 14.", minimum=1),
    ] = None
    size: Annotated[tuple[int, int] | None, Setting("HEIGHTxWIDTH for a bundle of one size.")] = None
    facets: Annotated[
        tuple[Facet, ...] | None, Setting("KIND@LAYER, comma-separated; the model's defaults if not given.")
    ] = None
    precision: Annotated[
        GraphPrecision,
        Setting("Of weights and matrix products; bf16 runs on GPUs only. Auto: the shortest that measurements allow."),
    ] = GraphPrecision.FP32
    measure: Annotated[bool, Setting("Of an fp32 bundle: measure bf16 as well.")] = True
    saliency: Annotated[bool, Setting("Output [CLS] attention.")] = True
    saliency_heads: Annotated[
        tuple[int, ...] | None, Setting("Numbers, comma-separated; the model's own by default.")
    ] = None
    riders: Annotated[
        int | None,
        Setting(
            "Approximate: from this block on (0 for all), attention takes keys and values only of the cells that whole "
            "patches make. Faster; how far off is measured and kept in the bundle.",
            minimum=0,
            shown="none",
        ),
    ] = None
    kernels: Annotated[
        tuple[str, ...],
        Setting("Compile for GPUs: none, all, or like sm_80,sm_90.", panel=GPU, shown="none", read=_architectures),
    ] = ()
    max_cells: Annotated[
        int | None, replace(MAX_CELLS_SETTING, help="A --size of more is refused: time grows with their square.")
    ] = MAX_CELLS

    def __post_init__(self) -> None:
        check(self)
        if self.facets is not None and not self.facets:
            raise InputError("no facets were asked: expected at least one, like key@9")
        if self.facets is not None and len(set(self.facets)) != len(self.facets):
            raise InputError(f"a facet is named twice in {','.join(map(str, self.facets))}")
