"""The style of research code: easy to write and to read, and paid for at run time.

* Eager torch; what is wanted is caught by hooks, in one full forward pass for each facet and one for saliency.
* Attention is materialised, in every block, and no block is left out.
* Log-binning fills a tensor cell by cell and bin by bin.
* Similarity is computed one row at a time: one descriptor of A against all of B.
* Clustering runs all its 300 rounds for each k; GrabCut runs image by image.

The slow loops take minutes, so that a :class:`Clock` may run them on a sample and charge them in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from facetrt.benchmarks.baselines.common import (
    THIRDS,
    Cosegmented,
    Float,
    Mask,
    Pairs,
    Pixels,
    Source,
    cut,
    elbow_sweep,
    enlarge,
    keep_salient,
    load_pixels,
    min_max,
    pick_diverse,
    salient_clusters,
)
from facetrt.benchmarks.baselines.vit import PlainViT
from facetrt.benchmarks.timing import Clock
from facetrt.engine.images.geometry import grid_size
from facetrt.export.export_options import Facet
from facetrt.export.models import ModelSpec
from facetrt.kernels.log_bin import bin_offsets

SAMPLED_CELLS, SAMPLED_ROWS, SAMPLED_IMAGES = 150, 24, 2

Binned = Callable[[Float], Float]  # (grid_h, grid_w, C) → (cells, bins·C)


class Extractor:
    """One model at one stride, on ``device`` by torch's name."""

    def __init__(self, spec: ModelSpec, state: Mapping[str, Any], stride: int, device: str = "cpu") -> None:
        self.spec, self.stride, self.device = spec, stride, device
        self.model = PlainViT(spec, stride).eval().to(device)
        self.model.load_state_dict(dict(state))

    def descriptors(self, pixels: Pixels, facet: Facet) -> Tensor:
        """``(cells, C)`` by one forward pass; the hook repeats the block's projection."""
        found: list[Tensor] = []

        def keep(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(module.qkv(inputs[0]).chunk(3, dim=-1)[THIRDS[facet.kind]])

        self._forward(pixels, self._attention(facet.layer), keep)
        return found[0][0, 1:]

    def saliency(self, pixels: Pixels) -> Float:
        """``(grid_h, grid_w)`` in [0, 1], by one forward pass."""
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(output)  # the whole (1, heads, t, t)

        self._forward(pixels, self._attention(-1).attn_drop, keep)
        heads = list(self.spec.saliency_heads or range(self.spec.heads))
        return min_max(found[0][0, heads, 0, 1:].mean(dim=0).cpu().numpy()).reshape(self.grid(pixels))

    def grid(self, pixels: Pixels) -> tuple[int, int]:
        """``(grid_h, grid_w)`` of an image."""
        return grid_size((pixels.shape[0], pixels.shape[1]), self.spec.patch, self.stride)

    def _attention(self, layer: int) -> Any:
        block: Any = self.model.blocks[layer]
        return block.attn

    def _forward(self, pixels: Pixels, hooked: Any, hook: Callable[..., None]) -> None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.spec.normalisation)
        handle = hooked.register_forward_hook(hook)
        with torch.inference_mode():
            images = ((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std)[None]
            self.model(images.to(self.device))
        handle.remove()


def log_bin(key_map: Tensor, clock: Clock, whole: Binned, hierarchy: int = 2) -> Tensor:
    """``(grid_h, grid_w, C)`` → ``(cells, bins·C)``, cell by cell; ``whole`` fills in what a sample leaves out."""
    grid_h, grid_w, channels = key_map.shape
    planes = key_map.permute(2, 0, 1)[None]
    pooled = [
        nn.functional.avg_pool2d(planes, 3**level, stride=1, padding=3**level // 2, count_include_pad=False)
        for level in range(hierarchy)
    ]
    bins = list(enumerate(bin_offsets(hierarchy)))
    binned = torch.zeros(len(bins) * channels, grid_h, grid_w, device=key_map.device)
    for cell in clock.loop("cells binned", range(grid_h * grid_w), SAMPLED_CELLS):
        y, x = divmod(cell, grid_w)
        for number, (level, dy, dx) in bins:
            inside = min(max(y + dy, 0), grid_h - 1), min(max(x + dx, 0), grid_w - 1)
            binned[number * channels : (number + 1) * channels, y, x] = pooled[level][0, :, inside[0], inside[1]]
    if not clock.sampling:
        return binned.flatten(1).T
    with clock.free():  # in the memory layout of the loop's result: it decides what the similarity costs
        return torch.from_numpy(whole(key_map.cpu().numpy())).to(key_map.device).T.contiguous().T


def similarity(a: Tensor, b: Tensor, clock: Clock) -> Tensor:
    """Cosines ``(cells of A, cells of B)``, row by row."""
    cosines = torch.zeros(len(a), len(b), device=a.device)
    for row in clock.loop("rows of the similarity", range(len(a)), SAMPLED_ROWS):
        cosines[row] = nn.functional.cosine_similarity(a[row : row + 1], b, dim=1)
    if not clock.sampling:
        return cosines
    with clock.free():
        return nn.functional.normalize(a) @ nn.functional.normalize(b).T


def match(
    extractor: Extractor, paths: Sequence[Source], size: tuple[int, int], facet: Facet, clock: Clock, whole: Binned
) -> Pairs:
    """Point pairs of two images."""
    binned, saliency = [], []
    for path in paths:
        pixels = load_pixels(path, size)
        rows = extractor.descriptors(pixels, facet)
        binned.append(log_bin(rows.reshape(*extractor.grid(pixels), -1), clock, whole))
        saliency.append(extractor.saliency(pixels).ravel())
    cosines = similarity(binned[0], binned[1], clock)
    nn_ab, nn_ba = cosines.argmax(dim=1).cpu().numpy(), cosines.argmax(dim=0).cpu().numpy()
    cells_a = keep_salient(nn_ab, nn_ba, saliency[0], saliency[1])
    cells_b = nn_ab[cells_a]
    joined = torch.cat([binned[0][cells_a], binned[1][cells_b]], dim=1).cpu().numpy()
    selected = pick_diverse(joined, saliency[0][cells_a] + saliency[1][cells_b], 10)
    return Pairs(cells_a, cells_b, selected)


def cosegment(
    extractor: Extractor,
    coarse: Extractor,
    paths: Sequence[Source],
    size: tuple[int, int],
    facet: Facet,
    clock: Clock,
    known: Sequence[tuple[Float, Float]] = (),
    finish: Callable[[Pixels, Mask], Mask] = cut,
) -> Cosegmented:
    """Masks of images at the loaded size.

    Args:
        coarse: the same model at stride 8, for saliency at half the size.
        known: descriptors ``(cells, C)`` and saliency ``(grid_h, grid_w)`` of each image, for those that a sampling
            clock leaves out.
        finish: makes the mask of an image from that of its cells.
    """
    encoded = {
        number: _encode(extractor, coarse, paths[number], size, facet)
        for number in clock.loop("images encoded", range(len(paths)), SAMPLED_IMAGES)
    }
    with clock.free():
        missing = [i for i in range(len(paths)) if i not in encoded]
        encoded |= {i: (load_pixels(paths[i], size), *known[i]) for i in missing}
    pixels, rows, saliency = zip(*(encoded[i] for i in range(len(paths))), strict=True)
    sweep = elbow_sweep(rows, all_rounds=True)
    chosen = salient_clusters(sweep, [values.ravel() for values in saliency])
    masks = [np.isin(labels, chosen).reshape(extractor.grid(p)) for labels, p in zip(sweep.labels, pixels, strict=True)]
    return Cosegmented([finish(p, mask) for p, mask in zip(pixels, masks, strict=True)], sweep.labels)


def _encode(
    extractor: Extractor, coarse: Extractor, path: Source, size: tuple[int, int], facet: Facet
) -> tuple[Pixels, Float, Float]:
    """Pixels, descriptors, and saliency from half the size enlarged to the grid."""
    pixels = load_pixels(path, size)
    rows = extractor.descriptors(pixels, facet).cpu().numpy()
    half = load_pixels(path, (size[0] // 2, size[1] // 2))
    return pixels, rows, enlarge(coarse.saliency(half), extractor.grid(pixels))
