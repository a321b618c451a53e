"""What to export, checked before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from facetrt.engine.machine.memory import MAX_CELLS, check_max_cells
from facetrt.kernels.errors import InputError

FACET = re.compile(r"(key|query|value|token|normed)@(\d{1,3})")


class GraphPrecision(StrEnum):
    """What a graph's weights and matrix products are in; sums, normalisations and softmax stay in fp32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Target(StrEnum):
    """What is made: the portable graph alone, or also a TensorRT plan for the GPU of this machine, or an engine of
    TensorRT for RTX, for any list of GPUs.
    """

    ONNX = "onnx"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class FacetKind(StrEnum):
    """Which tensor of a block is taken. ``token`` is the block's result, ``normed`` the same after the final norm."""

    KEY = "key"
    QUERY = "query"
    VALUE = "value"
    TOKEN = "token"
    NORMED = "normed"


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
                f"facet {text!r}: expected key, query, value, token or normed, then @ and a layer, like key@1"
            )
        return Facet(FacetKind(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.kind}@{self.layer}"


@dataclass(frozen=True)
class ExportOptions:
    """How to export a model.

    Attributes:
        stride: of the patch convolution; must divide the patch size.
        size: ``(height, width)`` of a static bundle, or None for a bundle of any size.
        facets: what to output; None for the model's defaults (layers 9 and 11 keys for DINO).
        saliency: whether to output [CLS] attention of the last layer.
        saliency_heads: heads it is averaged over; None for the model's own.
        measure: of an fp32 bundle, whether to measure bf16, too; without it bf16 runs only if one insists.
        kernels: GPU architectures, like ``sm_90``, that kernels are compiled for and put into the bundle.
        max_cells: a ``size`` of more is refused: time grows with their square. None for no bound.
    """

    stride: int = 4
    size: tuple[int, int] | None = None
    facets: tuple[Facet, ...] | None = None
    saliency: bool = True
    saliency_heads: tuple[int, ...] | None = None
    precision: GraphPrecision = GraphPrecision.FP32
    measure: bool = True
    kernels: tuple[str, ...] = ()
    max_cells: int | None = MAX_CELLS

    def __post_init__(self) -> None:
        check_max_cells(self.max_cells)
        if self.stride < 1:
            raise InputError(f"stride {self.stride}: expected at least 1")
        if self.facets is not None and not self.facets:
            raise InputError("no facets were asked: expected at least one, like key@9")
        if self.facets is not None and len(set(self.facets)) != len(self.facets):
            raise InputError(f"a facet is named twice in {','.join(map(str, self.facets))}")
