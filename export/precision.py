"""How exact an encoder is in half precision, and what must stay in fp32 for its contract to hold.

Trained weights may lose far more in half precision than others: peaky [CLS] attention multiplies errors of its logits,
and a block that makes massive activations rounds them to steps as large as everything else. So it is measured, on the
images and against the float64 reference that fp32 is checked with, and what does the harm is kept in fp32, as little
as will do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facetrt.engine.backends import parity
from facetrt.engine.backends.base import Backend, Tensors
from facetrt.engine.backends.choice import BACKENDS
from facetrt.engine.backends.openvino import import_openvino, runs_bf16
from facetrt.engine.backends.run_options import BackendName, DeviceName, Precision, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import CLS_ATTENTION, Fp32Parts, Manifest, PrecisionRecord, Ranges
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder
from facetrt.export.encoder import FacetEncoder
from facetrt.export.reference import ReferenceModel
from facetrt.kernels.errors import BackendError, MissingDependencyError, ParityError

Pixels = NDArray[np.uint8]
Outputs = dict[str, NDArray[Any]]  # of one image, by name
Trial = Callable[[Fp32Parts], PrecisionRecord]

ROOM = (0.8, 0.4, 0.2)  # shares of what a contract allows that a search aims at, one after the other
EMULATED = "rounding emulated in fp32"
EMULATED_ROOM = 0.8  # of the contract: the graph's own rounding differs from the emulated one by some per cent
TIMED_RUNS = 3


@dataclass(frozen=True)
class Sample:
    """Images, and what the torch model gives for them in float64, with ``prefix`` rows before those of cells."""

    images: Sequence[Pixels]
    exact: Sequence[Outputs]
    prefix: int = 1

    def figures(self, got: Sequence[Outputs]) -> dict[str, parity.Metrics]:
        """The worst over the images of each output's figures."""
        return parity.worst([parity.compare(*pair, self.prefix) for pair in zip(got, self.exact, strict=True)])

    @property
    def first(self) -> Sample:
        """One photograph of it."""
        return replace(self, images=self.images[:1], exact=self.exact[:1])


# --------------------------------------------------------------------------------------------------------------- search
def hold_contract(
    precision: Precision,
    manifest: Manifest,
    trial: Trial,
    emulate: Trial,
    *,
    room: float = 1.0,
    islands: bool = True,
) -> PrecisionRecord:
    """The cheapest of a few choices of what stays in fp32 that keeps the contract; without one the first, the fastest.

    Nothing, then [CLS] attention, which costs next to nothing, then the blocks that do most harm as well.

    Args:
        trial: measures a choice as it will run.
        emulate: measures a choice by emulated rounding, on one image: which block does how much harm.
        room: the share of the contract that a choice may use up while others are left to try.
        islands: whether blocks may stay in fp32.
    """

    def comfortable(record: PrecisionRecord) -> bool:
        return record.holds and share_used(precision, manifest, record) <= room

    saliency = manifest.saliency_heads is not None
    tried: list[PrecisionRecord] = []
    for cls_attention in (False, True) if saliency else (False,):
        tried.append(trial(Fp32Parts(cls_attention)))
        if comfortable(tried[-1]):
            return tried[-1]
    if not islands:
        return _last_that_holds(tried)
    harm = _harm_of_blocks(precision, manifest, emulate)
    measured = np.array(_excess(precision, manifest, tried[-1]))
    if measured.size == harm.shape[1]:  # one image is not as bad as the worst of all
        harm *= np.maximum(1, measured / np.maximum(harm.sum(axis=0), 1e-30))
    for blocks in choices(harm):
        if blocks not in [record.fp32.blocks for record in tried]:
            tried.append(trial(Fp32Parts(saliency, blocks)))
            if comfortable(tried[-1]):
                return tried[-1]
    return _last_that_holds(tried)


def _last_that_holds(tried: Sequence[PrecisionRecord]) -> PrecisionRecord:
    """Or the first, the fastest, if none does."""
    return next((record for record in reversed(tried) if record.holds), tried[0])


def share_used(precision: Precision, manifest: Manifest, record: PrecisionRecord) -> float:
    """The share of the error that the contract allows; 1 is its bound."""
    return float(np.sqrt(max(_excess(precision, manifest, record), default=0.0)))


def choices(harm: NDArray[np.float64]) -> Iterator[list[int]]:
    """Blocks that may stay in fp32, cheapest first; never all of them, which would leave nothing in half precision."""
    for room in ROOM:
        blocks = _worst_blocks(harm, room)
        if len(blocks) == len(harm):
            blocks.remove(int(harm.max(axis=1).argmin()))
        yield sorted(blocks)


def _excess(precision: Precision, manifest: Manifest, record: PrecisionRecord) -> list[float]:
    """What a choice uses up of what the contract allows, by output and figure; empty if nothing finite came out.

    Independent errors' squares add up, and 1 - cosine is a square already.
    """
    contract = parity.CONTRACTS[precision]
    return [
        value if figure in parity.LOW else value**2
        for output in manifest.outputs
        for figure, value in contract.excess(record.outputs.get(output, {})).items()
    ]


def _harm_of_blocks(precision: Precision, manifest: Manifest, emulate: Trial) -> NDArray[np.float64]:
    """``(blocks, figures)``: what each block alone, in half precision, uses up of what the contract allows."""
    depth, saliency = encoder_depth(manifest), manifest.saliency_heads is not None
    alone = [Fp32Parts(saliency, [b for b in range(depth) if b != block]) for block in range(depth)]
    rows = [_excess(precision, manifest, emulate(parts)) for parts in alone]
    width = max(map(len, rows)) or 1
    return np.array([row or [np.inf] * width for row in rows])  # a block that overflows does all the harm


def _worst_blocks(harm: NDArray[np.float64], room: float) -> set[int]:
    """The fewest blocks, by taking the worst one each time, without which all others stay within ``room``."""
    kept: set[int] = set()
    while len(kept) < len(harm):
        left = np.array([row if i not in kept else np.zeros_like(row) for i, row in enumerate(harm)])
        total = left.sum(axis=0)
        if (total <= room**2).all():
            break
        kept.add(int(left[:, int(total.argmax())].argmax()))
    return kept


def encoder_depth(manifest: Manifest) -> int:
    """How many of the model's blocks the encoder has."""
    layers = [int(facet.rpartition("@")[2]) + 1 for facet in manifest.facets]
    return manifest.architecture.depth if manifest.saliency_heads is not None else max(layers)


# ---------------------------------------------------------------------------------------------------------- measurement
def measure(
    precision: Precision, parts: Fp32Parts, sample: Sample, backend: Backend, bundle: Bundle, measured: str
) -> PrecisionRecord:
    """What a backend gives on a sample; it is closed."""
    try:
        encoder = Encoder(bundle, backend, max_cells=None)
        figures = sample.figures([run(encoder, pixels) for pixels in sample.images])
        missed = parity.violation(figures, precision)
    except (ParityError, BackendError) as error:  # fp16 overflows; a library that keeps nothing in fp32
        figures, missed = {}, str(error)
    finally:
        backend.close()
    return PrecisionRecord(missed, measured, parts, figures, None)


def run(encoder: Encoder, pixels: Pixels) -> Outputs:
    """All outputs of one image."""
    features = next(encoder.encode([pixels], EncodeOptions(None)))
    outputs: Outputs = dict(features.tokens)
    if features.attention is not None:
        outputs[CLS_ATTENTION] = features.attention.ravel()
    return outputs


class TorchBackend(Backend):
    """Runs a network in torch, under the contract of all backends."""

    name = BackendName.ONNXRUNTIME

    def __init__(self, bundle: Bundle, network: FacetEncoder) -> None:
        super().__init__(bundle, RunOptions(BackendName.ONNXRUNTIME, DeviceName.CPU))
        self._network = network

    @classmethod
    def check_installed(cls) -> None:
        """Export has it."""

    @classmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        """Every bundle."""

    def _activate(self) -> None:
        """The network is there."""

    @torch.no_grad()
    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        outputs = self._network(**{name: torch.from_numpy(np.array(values)) for name, values in inputs.items()})
        return [output.numpy() for output in outputs]

    def _close(self) -> None:
        """Nothing is held."""


def measure_on_openvino(sample: Sample, bundle: Bundle) -> Trial:
    """A trial of an fp32 bundle in bf16 by OpenVINO itself."""

    def trial(parts: Fp32Parts) -> PrecisionRecord:
        chosen = _keeping(bundle, parts)
        measured = f"openvino {import_openvino().get_version().partition('-')[0]}"
        backend = _openvino(chosen, Precision.BF16)
        return measure(Precision.BF16, parts, sample, backend, chosen, measured)

    return trial


def relative_time(pixels: Pixels, bundle: Bundle, parts: Fp32Parts) -> float:
    """The encoder's time by OpenVINO in bf16, as a multiple of its time in fp32."""
    bf16 = _seconds(pixels, _keeping(bundle, parts), Precision.BF16)
    return bf16 / _seconds(pixels, bundle, Precision.FP32)


def _keeping(bundle: Bundle, parts: Fp32Parts) -> Bundle:
    """The bundle with other parts in fp32 where it runs in bf16."""
    record = PrecisionRecord("", "", parts, {}, None)
    precisions = {**bundle.manifest.precisions, str(Precision.BF16): record}
    return replace(bundle, manifest=replace(bundle.manifest, precisions=precisions))


def _openvino(bundle: Bundle, precision: Precision) -> Backend:
    kind = BACKENDS[BackendName.OPENVINO, DeviceName.CPU]
    return kind(bundle, RunOptions(BackendName.OPENVINO, DeviceName.CPU, precision))


def _seconds(pixels: Pixels, bundle: Bundle, precision: Precision) -> float:
    """The fastest of a few runs after the first."""
    backend = _openvino(bundle, precision)
    try:
        encoder = Encoder(bundle, backend, max_cells=None)
        run(encoder, pixels)
        times = []
        for _ in range(TIMED_RUNS):
            start = time.perf_counter()
            run(encoder, pixels)
            times.append(time.perf_counter() - start)
        return min(times)
    finally:
        backend.close()


def openvino_runs_bf16() -> bool:
    """Whether bf16 can be measured as it will run."""
    try:
        return runs_bf16()
    except MissingDependencyError:
        return False


# --------------------------------------------------------------------------------------------------------------- ranges
@torch.no_grad()
def measure_ranges(model: ReferenceModel, images: Sequence[Pixels], *, residual: bool = True) -> Ranges:
    """Largest attention logits and stored activations of each block of the torch model.

    Args:
        residual: count the blocks' own results, which stay in fp32; else what layers take in and give out, which half
            precision must hold.
    """
    blocks = model.vit.blocks
    logits, activations = [0.0] * len(blocks), [0.0] * len(blocks)

    def keep(layer: int, *stored: Tensor) -> None:
        activations[layer] = max(activations[layer], *(float(each.abs().max()) for each in stored))

    def attended(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        keep(layer, query, key, value)
        logits[layer] = max(logits[layer], _largest_logit(query[0], key[0]) * float(blocks[layer].attn.scale))

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: keep(layer, *([output] if residual else [*inputs, output]))

    handles = [
        module.register_forward_hook(hook(layer))
        for layer, block in enumerate(blocks)
        for module in _storing(block, residual=residual)
    ]
    try:
        for pixels in images:
            model.run(pixels, [], attended)
    finally:
        for handle in handles:
            handle.remove()
    return Ranges(logits, activations)


def _storing(block: Any, *, residual: bool) -> list[Any]:
    """What gives out tensors that are stored, but for queries, keys and values."""
    layers = [module for module in block.mlp.modules() if isinstance(module, torch.nn.Linear)]
    return [block.attn.proj, *layers, *([block] if residual else [block.norm1])]


def _largest_logit(query: Tensor, key: Tensor) -> float:
    """Over heads and pairs of tokens, of ``(heads, t, d)``, before they are scaled; a head at a time."""
    return max(float((q @ k.T).abs().max()) for q, k in zip(query, key, strict=True))
