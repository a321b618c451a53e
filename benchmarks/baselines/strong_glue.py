"""What a very good engineer would write with the usual libraries.

torch's fused attention on the pruned network, one forward pass for all that is wanted, vectorised binning, one wide
matrix product, FAISS and scikit-learn for clustering, GrabCut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from facetrt.benchmarks.baselines.common import (
    THIRDS,
    Cosegmented,
    Float,
    Pairs,
    Pixels,
    cut,
    elbow_sweep,
    enlarge,
    keep_salient,
    load_pixels,
    min_max,
    pick_diverse,
    salient_clusters,
)
from facetrt.engine.bundle.positional import Cells, positional_table
from facetrt.engine.images.geometry import grid_size
from facetrt.export.export_options import Facet, FacetKind
from facetrt.export.models import ModelSpec
from facetrt.export.weights import load_strictly
from facetrt.kernels.log_bin import bin_offsets


class Model:
    """timm's ViT, whose attention is torch's fused one, run only as far as the outputs need it.

    Args:
        bf16: run under autocast.
    """

    def __init__(self, spec: ModelSpec, state: Mapping[str, Any], stride: int, *, bf16: bool = False) -> None:
        self.spec, self.stride, self.bf16 = spec, stride, bf16
        self.vit = spec.build()
        load_strictly(self.vit, dict(state), "the benchmark's weights")
        side = spec.trained_grid
        trained = self.vit.pos_embed[0, 1:].detach().numpy().reshape(side, side, -1)
        self._table = lru_cache(maxsize=8)(lambda cells: torch.from_numpy(positional_table(trained, cells)))

    def encode(
        self, pixels: Pixels, facets: Sequence[Facet], *, saliency: bool, stride: int | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Each facet ``(1 + cells, C)``, [CLS] first, and [CLS] attention ``(grid_h, grid_w)`` if asked."""
        stride = stride or self.stride
        last = len(self.vit.blocks) - 1
        depth = last if saliency else max(facet.layer for facet in facets)
        found: dict[str, Tensor] = {}
        attention = None
        autocast = torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()
        with torch.inference_mode(), autocast:
            x = self._tokens(pixels, stride)
            for layer in range(depth + 1):
                block, wanted = self.vit.blocks[layer], [facet for facet in facets if facet.layer == layer]
                normed = block.norm1(x)
                if layer < depth:
                    x, thirds = self._block(block, x, normed)
                    found |= {str(facet): thirds[THIRDS[facet.kind]][0].float() for facet in wanted}
                else:
                    found |= {str(facet): _project(block, normed, facet.kind)[0].float() for facet in wanted}
            if saliency:
                grid = self.grid(pixels, stride)
                attention = self._cls_attention(self.vit.blocks[last], normed, found.get(f"key@{last}")).reshape(grid)
        return found, attention

    def grid(self, pixels: Pixels, stride: int | None = None) -> tuple[int, int]:
        """``(grid_h, grid_w)`` of an image."""
        return grid_size((pixels.shape[0], pixels.shape[1]), self.spec.patch, stride or self.stride)

    def _tokens(self, pixels: Pixels, stride: int) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.spec.normalisation)
        images = ((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std)[None]
        proj = self.vit.patch_embed.proj
        x = nn.functional.conv2d(images, proj.weight, proj.bias, stride=stride).permute(0, 2, 3, 1)
        x = x + self._table(Cells((pixels.shape[0], pixels.shape[1]), self.spec.patch, stride))
        return torch.cat([self.vit.cls_token + self.vit.pos_embed[:, :1], x.flatten(1, 2)], dim=1)

    def _block(self, block: Any, x: Tensor, normed: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        thirds = block.attn.qkv(normed).chunk(3, dim=-1)
        query, key, value = (self._split(third) for third in thirds)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        return x, thirds

    def _cls_attention(self, block: Any, normed: Tensor, key: Tensor | None) -> Tensor:
        """Mean attention of the saliency heads from [CLS] to the cells, ``(cells,)``."""
        query = self._split(_project(block, normed[:, :1], FacetKind.QUERY).float())
        keys = self._split(_project(block, normed, FacetKind.KEY).float() if key is None else key[None])
        attention = (query * block.attn.scale @ keys.transpose(2, 3)).softmax(dim=-1)
        heads = list(self.spec.saliency_heads or range(self.spec.heads))
        mean: Tensor = attention[0, heads, 0, 1:].mean(dim=0)
        return mean

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.spec.heads, -1).transpose(1, 2)


def _project(block: Any, normed: Tensor, kind: FacetKind) -> Tensor:
    """One third of the fused projection."""
    rows = slice(THIRDS[kind] * normed.shape[2], (THIRDS[kind] + 1) * normed.shape[2])
    return nn.functional.linear(normed, block.attn.qkv.weight[rows], block.attn.qkv.bias[rows])


def log_bin(key_map: Tensor, hierarchy: int = 2) -> Tensor:
    """``(grid_h, grid_w, C)`` → ``(cells, bins·C)``: pooled planes, padded once per level, copied in whole windows."""
    grid_h, grid_w, channels = key_map.shape
    offsets = bin_offsets(hierarchy)
    binned = key_map.new_empty(grid_h, grid_w, len(offsets), channels)
    padded = []
    for level in range(hierarchy):
        step = 3**level
        planes = key_map.permute(2, 0, 1)[None]
        pooled = nn.functional.avg_pool2d(planes, step, stride=1, padding=step // 2, count_include_pad=False)
        padded.append(nn.functional.pad(pooled, (step,) * 4, mode="replicate")[0].permute(1, 2, 0).contiguous())
    for number, (level, dy, dx) in enumerate(offsets):
        top, left = 3**level + dy, 3**level + dx
        binned[:, :, number] = padded[level][top : top + grid_h, left : left + grid_w]
    return binned.reshape(grid_h * grid_w, -1)


def best_buddies(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest neighbours of binned descriptors in both directions: normalise, one product, two arg-maxima."""
    cosines = nn.functional.normalize(a) @ nn.functional.normalize(b).T
    return cosines.argmax(dim=1), cosines.argmax(dim=0)


def match(model: Model, paths: Sequence[Path], size: tuple[int, int], facet: Facet) -> Pairs:
    """Point pairs of two image files."""
    binned, saliency = [], []
    for path in paths:
        pixels = load_pixels(path, size)
        tokens, attention = model.encode(pixels, [facet], saliency=True)
        binned.append(log_bin(tokens[str(facet)][1:].reshape(*model.grid(pixels), -1)))
        saliency.append(min_max(np.asarray(attention)).ravel())
    nn_ab, nn_ba = (nearest.numpy() for nearest in best_buddies(binned[0], binned[1]))
    cells_a = keep_salient(nn_ab, nn_ba, saliency[0], saliency[1])
    cells_b = nn_ab[cells_a]
    joined = torch.cat([binned[0][cells_a], binned[1][cells_b]], dim=1).numpy()
    selected = pick_diverse(joined, saliency[0][cells_a] + saliency[1][cells_b], 10)
    return Pairs(cells_a, cells_b, selected)


def cosegment(model: Model, paths: Sequence[Path], size: tuple[int, int], facet: Facet) -> Cosegmented:
    """Masks of image files at the loaded size."""
    encoded = [_encode(model, path, size, facet) for path in paths]
    sweep = elbow_sweep([rows for _, rows, _ in encoded], all_rounds=False)
    chosen = salient_clusters(sweep, [saliency.ravel() for _, _, saliency in encoded])
    masks = [
        cut(pixels, np.isin(labels, chosen).reshape(model.grid(pixels)))
        for (pixels, _, _), labels in zip(encoded, sweep.labels, strict=True)
    ]
    return Cosegmented(masks, sweep.labels)


def _encode(model: Model, path: Path, size: tuple[int, int], facet: Facet) -> tuple[Pixels, Float, Float]:
    """Pixels, descriptors, and saliency from a second pass at half the size and stride 8."""
    pixels, half = load_pixels(path, size), load_pixels(path, (size[0] // 2, size[1] // 2))
    tokens, _ = model.encode(pixels, [facet], saliency=False)
    _, attention = model.encode(half, [], saliency=True, stride=8)
    return pixels, tokens[str(facet)][1:].numpy(), enlarge(min_max(np.asarray(attention)), model.grid(pixels))
