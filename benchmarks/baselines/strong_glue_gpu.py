"""The strong glue on a GPU: a static fp16 network under torch.compile with CUDA graphs, batches, one wide product.

What follows the matrix products (selection, clustering) is on the host, with the usual libraries.
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
    Pairs,
    Pixels,
    Source,
    elbow_sweep,
    enlarge,
    fill,
    keep_salient,
    load_pixels,
    min_max,
    pick_diverse,
    salient_clusters,
)
from facetrt.benchmarks.baselines.strong_glue import best_buddies, log_bin
from facetrt.engine.bundle.positional import Cells, positional_table
from facetrt.engine.images.geometry import grid_size
from facetrt.export.export_options import Facet
from facetrt.export.models import ModelSpec
from facetrt.export.weights import load_strictly

Encode = Callable[[Tensor], tuple[Tensor, ...]]


class StaticNetwork(nn.Module):
    """``forward(images (B, H, W, 3) uint8)`` → each facet ``(B, 1 + cells, C)``, then [CLS] attention ``(B, cells)``.

    One image size, so that nothing is decided while it runs; torch's fused attention; no block that nothing needs.
    """

    table: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, spec: ModelSpec, state: Mapping[str, Any], stride: int, size: tuple[int, int], facets: Sequence[Facet]
    ) -> None:
        super().__init__()
        self.spec, self.stride, self.facets = spec, stride, tuple(facets)
        self.grid = grid_size(size, spec.patch, stride)
        self.vit = spec.build()
        load_strictly(self.vit, dict(state), "the benchmark's weights")
        side = spec.trained_grid
        trained = self.vit.pos_embed[0, 1:].detach().numpy().reshape(side, side, -1)
        self.register_buffer(
            "table", torch.from_numpy(positional_table(trained, Cells(size, spec.patch, stride))).flatten(0, 1)
        )
        for name, values in zip(("mean", "std"), spec.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1) * 255)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x, found, last = self._tokens(images), dict[Facet, Tensor](), self.spec.depth - 1
        for layer in range(last + 1):
            block = self.vit.blocks[layer]
            thirds = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
            found |= {facet: thirds[THIRDS[facet.kind]] for facet in self.facets if facet.layer == layer}
            if layer < last:
                query, key, value = map(self._split, thirds)
                mixed = nn.functional.scaled_dot_product_attention(query, key, value)
                x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
                x = x + block.mlp(block.norm2(x))
        query, key = self._split(thirds[0][:, :1]).float(), self._split(thirds[1]).float()
        attention = (query * block.attn.scale @ key.transpose(2, 3)).softmax(dim=-1)
        heads = list(self.spec.saliency_heads or range(self.spec.heads))
        return *(found[facet] for facet in self.facets), attention[:, heads, 0, 1:].mean(dim=1)

    def _tokens(self, images: Tensor) -> Tensor:
        proj = self.vit.patch_embed.proj
        planes = (images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        cells = nn.functional.conv2d(planes, proj.weight, proj.bias, stride=self.stride).flatten(2).transpose(1, 2)
        cls = (self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([cls, cells + self.table], dim=1)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.spec.heads, -1).transpose(1, 2)


class Glue:
    """The networks of one model, one for each image size, stride and choice of facets.

    Args:
        device: torch's name.
        compiled: by torch.compile with ``max-autotune``, which also records CUDA graphs; takes minutes.
        half: compute in fp16.
    """

    def __init__(
        self, spec: ModelSpec, state: Mapping[str, Any], device: str, *, compiled: bool = True, half: bool = True
    ) -> None:
        self.device = device
        self._spec, self._state, self._compiled, self._half = spec, state, compiled, half
        self._networks: dict[object, Encode] = {}

    def encode(self, images: Tensor, facets: Sequence[Facet], stride: int) -> tuple[Tensor, ...]:
        """Encode as :class:`StaticNetwork`. A later call may overwrite what this one returns."""
        network = self._network((images.shape[1], images.shape[2]), tuple(facets), stride)
        with torch.inference_mode():
            return network(images)

    def grid(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """``(grid_h, grid_w)`` of images of a size."""
        return grid_size(size, self._spec.patch, stride)

    def upload(self, pixels: Sequence[Pixels]) -> Tensor:
        """One batch."""
        return torch.from_numpy(np.stack(pixels)).to(self.device)

    def _network(self, size: tuple[int, int], facets: tuple[Facet, ...], stride: int) -> Encode:
        key = size, facets, stride
        if key not in self._networks:
            network = StaticNetwork(self._spec, self._state, stride, size, facets).eval().to(self.device)
            network = network.half() if self._half else network
            self._networks[key] = torch.compile(network, mode="max-autotune") if self._compiled else network
        return self._networks[key]


def match(glue: Glue, sources: Sequence[Source], size: tuple[int, int], facet: Facet, stride: int) -> Pairs:
    """Point pairs of two images."""
    tokens, attention = glue.encode(glue.upload([load_pixels(s, size) for s in sources]), [facet], stride)
    binned = [log_bin(rows[1:].reshape(*glue.grid(size, stride), -1)) for rows in tokens]
    nn_ab, nn_ba = (nearest.cpu().numpy() for nearest in best_buddies(binned[0], binned[1]))
    saliency = [min_max(values) for values in attention.float().cpu().numpy()]
    cells_a = keep_salient(nn_ab, nn_ba, saliency[0], saliency[1])
    cells_b = nn_ab[cells_a]
    joined = torch.cat([binned[0][cells_a], binned[1][cells_b]], dim=1).float().cpu().numpy()
    selected = pick_diverse(joined, saliency[0][cells_a] + saliency[1][cells_b], 10)
    return Pairs(cells_a, cells_b, selected)


def cosegment(
    glue: Glue, sources: Sequence[Source], size: tuple[int, int], facet: Facet, stride: int, batch: int
) -> Cosegmented:
    """Masks of images at the loaded size, without refinement."""
    pixels = [load_pixels(source, size) for source in sources]
    half = (size[0] // 2, size[1] // 2)
    halves = [load_pixels(source, half) for source in sources]
    rows, small = [], []
    for start in range(0, len(pixels), batch):
        chosen = [min(i, len(pixels) - 1) for i in range(start, start + batch)]  # the network takes whole batches
        count = min(batch, len(pixels) - start)
        tokens, _ = glue.encode(glue.upload([pixels[i] for i in chosen]), [facet], stride)
        rows += [*tokens[:count, 1:].float().cpu().numpy()]
        (attention,) = glue.encode(glue.upload([halves[i] for i in chosen]), [], 8)
        small += [min_max(values).reshape(glue.grid(half, 8)) for values in attention[:count].float().cpu().numpy()]
    saliency = [enlarge(values, glue.grid(size, stride)).ravel() for values in small]
    sweep = elbow_sweep(rows, all_rounds=False)
    chosen_clusters = salient_clusters(sweep, saliency)
    grid = glue.grid(size, stride)
    masks = [
        fill(image, np.isin(labels, chosen_clusters).reshape(grid))
        for image, labels in zip(pixels, sweep.labels, strict=True)
    ]
    return Cosegmented(masks, sweep.labels)
