"""The model as published, in plain torch: what an exported graph is compared with, in float64 for the truth.

Independent of the pruned encoder on purpose: the whole timm network with hooks, pixels normalised in front of it, the
positional table from torch's own bicubic interpolation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from facetrt.engine.bundle.manifest import BY_SIZE, CLS_ATTENTION
from facetrt.engine.images.geometry import grid_size
from facetrt.export.export_options import Facet, FacetKind
from facetrt.export.models import ModelSpec


class ReferenceModel:
    """Facets and [CLS] attention of one image by the unpruned network, in float32 or float64 throughout."""

    def __init__(
        self,
        vit: Any,
        spec: ModelSpec,
        *,
        stride: int,
        saliency_heads: Sequence[int] | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vit = vit if dtype is torch.float32 else copy.deepcopy(vit).to(dtype)
        self.spec, self.stride, self.saliency_heads, self.dtype = spec, stride, saliency_heads, dtype

    @torch.no_grad()
    def run(self, pixels: NDArray[np.uint8], facets: Sequence[Facet]) -> dict[str, NDArray[Any]]:
        """``pixels (H, W, 3)`` uint8 → each facet ``(1 + cells, C)``, and ``cls_attention (cells,)``."""
        captured: dict[str, Tensor] = {}
        hooks = [
            handle
            for layer, block in enumerate(self.vit.blocks)
            for handle in (
                block.attn.qkv.register_forward_hook(_keep(captured, f"qkv@{layer}")),
                block.register_forward_hook(_keep(captured, f"token@{layer}")),
            )
        ]
        try:
            x = self._tokens(pixels)
            for block in self.vit.blocks:
                x = block(x)
        finally:
            for hook in hooks:
                hook.remove()
        outputs = {str(facet): self._facet(captured, facet).numpy() for facet in facets}
        if self.saliency_heads is not None:
            outputs[CLS_ATTENTION] = self._cls_attention(captured[f"qkv@{len(self.vit.blocks) - 1}"]).numpy()
        return outputs

    def _tokens(self, pixels: NDArray[np.uint8]) -> Tensor:
        mean, std = (torch.tensor(v, dtype=self.dtype).view(3, 1, 1) for v in self.spec.normalisation)
        image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(self.dtype) / 255 - mean) / std
        proj = self.vit.patch_embed.proj
        x = nn.functional.conv2d(image[None], proj.weight, proj.bias, stride=self.stride)
        x = x.flatten(2).transpose(1, 2)  # (1, n, C)
        size = (pixels.shape[0], pixels.shape[1])
        cls = self.vit.cls_token + self.vit.pos_embed[:, :1]
        return torch.cat([cls, x + self._positional(size)], dim=1)

    def _positional(self, size: tuple[int, int]) -> Tensor:
        side, table = self.spec.trained_grid, self.vit.pos_embed[:, 1:]
        grid = grid_size(size, self.spec.patch, self.stride)
        by_size = self.spec.positional_rule == BY_SIZE
        if grid[0] * grid[1] == side * side and (by_size or size[0] == size[1]):
            return torch.as_tensor(table)
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        how: dict[str, Any] = {"size": grid}
        if not by_size:
            scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
            how = {"scale_factor": scale, "recompute_scale_factor": False}
        resized = nn.functional.interpolate(square, mode="bicubic", **how)
        return resized.flatten(2).transpose(1, 2)

    def _facet(self, captured: dict[str, Tensor], facet: Facet) -> Tensor:
        if facet.kind in (FacetKind.TOKEN, FacetKind.NORMED):
            token = captured[f"token@{facet.layer}"][0]
            return token if facet.kind is FacetKind.TOKEN else torch.as_tensor(self.vit.norm(token))
        third = {FacetKind.QUERY: 0, FacetKind.KEY: 1, FacetKind.VALUE: 2}[facet.kind]
        part: Tensor = captured[f"qkv@{facet.layer}"][0].chunk(3, dim=-1)[third]
        return part

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(1, x.shape[1], self.spec.heads, -1).transpose(1, 2)

    def _cls_attention(self, qkv: Tensor) -> Tensor:
        query, key = (self._split(part) for part in qkv.chunk(3, dim=-1)[:2])
        attention = (query[:, :, :1] @ key.transpose(2, 3) * self.vit.blocks[-1].attn.scale).softmax(dim=-1)
        rows: Tensor = attention[0, list(self.saliency_heads or ()), 0, 1:]
        return rows.mean(dim=0)


def _keep(captured: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        captured[name] = output

    return hook
