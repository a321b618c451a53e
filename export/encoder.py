"""The network that is exported: a timm ViT cut down to what the outputs need.

* No block after the last one that an output depends on; of that block only the projections asked for.
* Saliency takes one row of the last attention: the [CLS] query against all keys, never the t × t matrix.
* Scaling to [0, 1] and mean/std normalisation are folded into the patch convolution, so that bytes go in.
* In fp16 and bf16, weights and matrix products are half; residual stream, LayerNorm and softmax stay in fp32, because
  ViTs do not survive naive fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from facetrt.export.attention import attention
from facetrt.export.options import Facet, FacetKind

RESULTS = {FacetKind.TOKEN, FacetKind.NORMED}  # facets that need the whole block
QKV = (FacetKind.QUERY, FacetKind.KEY, FacetKind.VALUE)  # order of the thirds of the fused projection


class FacetEncoder(nn.Module):
    """``forward(images, positional, rows, cols)`` → one tensor per facet, then [CLS] attention if asked.

    Shapes as in :class:`facetrt.engine.backends.base.Backend`. A static encoder has its positional table baked in and
    takes ``images`` alone.

    Args:
        vit: a timm ``VisionTransformer`` with its weights.
        mean, std: per-channel normalisation of RGB in [0, 1].
        saliency_heads: heads whose [CLS] attention is averaged, or None for no saliency output.
        table: ``(1, grid_h, grid_w, C)`` positional table of a static encoder.
    """

    def __init__(
        self,
        vit: Any,
        *,
        stride: int,
        facets: Sequence[Facet],
        saliency_heads: Sequence[int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype = torch.float32,
        table: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.facets = tuple(facets)
        self.patches = _bytes_convolution(vit.patch_embed.proj, stride, mean, std)
        self.cls = nn.Parameter(vit.cls_token + vit.pos_embed[:, :1])
        self.table = None if table is None else nn.Parameter(table)
        last = len(vit.blocks) - 1
        wanted: dict[int, set[FacetKind]] = {}
        for facet in self.facets:
            wanted.setdefault(facet.layer, set()).add(facet.kind)
        if saliency_heads is not None:
            wanted.setdefault(last, set())
        depth = 1 + max(wanted)
        self.norm = vit.norm if any(facet.kind is FacetKind.NORMED for facet in self.facets) else None
        self.blocks = nn.ModuleList(
            Block(
                vit.blocks[layer],
                kinds=wanted.get(layer, set()),
                complete=layer + 1 < depth or bool(wanted[layer] & RESULTS),
                saliency_heads=saliency_heads if layer == last else None,
                dtype=dtype,
            )
            for layer in range(depth)
        )

    def forward(
        self, images: Tensor, positional: Tensor | None = None, rows: Tensor | None = None, cols: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        pixels = images.float()  # first of all: TensorRT knows bytes at its edge only
        x = self.patches(pixels.permute(0, 3, 1, 2))  # (B, C, conv_h, conv_w)
        if rows is not None and cols is not None:
            x = x.index_select(2, rows).index_select(3, cols)
        table = positional if self.table is None else self.table
        x = (x.permute(0, 2, 3, 1) + table).flatten(1, 2)  # (B, n, C)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        outputs: dict[str, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            x, named = block(x)
            outputs |= {f"{name}@{layer}": value for name, value in named.items()}
            if Facet(FacetKind.NORMED, layer) in self.facets and self.norm is not None:
                outputs[f"normed@{layer}"] = self.norm(x)
        saliency = [value for name, value in outputs.items() if name.startswith("cls_attention")]
        return (*(outputs[str(facet)] for facet in self.facets), *saliency)


class Block(nn.Module):
    """One transformer block that also hands out its facets.

    ``complete`` says whether anything needs the block's own result; without it, attention and MLP are left out.
    """

    def __init__(
        self,
        block: Any,
        *,
        kinds: set[FacetKind],
        complete: bool,
        saliency_heads: Sequence[int] | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.kinds, self.complete, self.dtype = kinds, complete, dtype
        self.heads, self.scale = block.attn.num_heads, float(block.attn.scale)
        self.saliency_heads = None if saliency_heads is None else list(saliency_heads)
        self.norm1 = block.norm1
        needed = [k for k in QKV if complete or k in kinds or (k is FacetKind.KEY and saliency_heads is not None)]
        self.needed = needed
        self.qkv = _rows_of(block.attn.qkv, [QKV.index(kind) for kind in needed], dtype)
        self.cls_query = None
        if saliency_heads is not None and FacetKind.QUERY not in needed:
            self.cls_query = _rows_of(block.attn.qkv, [0], dtype)
        if complete:
            self.proj = _cast(block.attn.proj, dtype)
            self.norm2 = block.norm2
            self.fc1, self.fc2 = _cast(block.mlp.fc1, dtype), _cast(block.mlp.fc2, dtype)
            self.activation = block.mlp.act

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        normed = self.norm1(x).to(self.dtype)  # (B, t, C)
        thirds = self.qkv(normed).chunk(len(self.needed), dim=-1) if self.needed else ()
        projected = dict(zip(self.needed, thirds, strict=True))
        outputs = {str(kind): projected[kind].float() for kind in self.kinds - RESULTS}
        if self.saliency_heads is not None:
            query = projected[FacetKind.QUERY][:, :1] if self.cls_query is None else self.cls_query(normed[:, :1])
            outputs["cls_attention"] = self._cls_attention(query, projected[FacetKind.KEY])
        if self.complete:
            x = x + self.proj(self._attend(*(projected[kind] for kind in QKV))).float()
            x = x + self.fc2(self.activation(self.fc1(self.norm2(x).to(self.dtype)))).float()
        if FacetKind.TOKEN in self.kinds:
            outputs["token"] = x
        return x, outputs

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.dtype is torch.float32:
            return attention(query, key, value, self.heads, self.scale)
        weights = self._attention(query, key).to(self.dtype)
        mixed = weights @ self._split(value)  # (B, heads, t, d)
        return mixed.transpose(1, 2).flatten(2)

    def _cls_attention(self, query: Tensor, key: Tensor) -> Tensor:
        """Mean attention of the chosen heads from [CLS] to the cells, ``(B, n)`` float32."""
        weights = self._attention(query, key)[:, self.saliency_heads, 0, 1:]
        return weights.mean(dim=1)

    def _attention(self, query: Tensor, key: Tensor) -> Tensor:
        logits = (self._split(query) * self.scale) @ self._split(key).transpose(2, 3)
        return torch.softmax(logits.float(), dim=-1)

    def _split(self, x: Tensor) -> Tensor:
        """``(B, t, C)`` → ``(B, heads, t, d)``."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


def _bytes_convolution(proj: Any, stride: int, mean: Sequence[float], std: Sequence[float]) -> nn.Conv2d:
    """The patch convolution for 0..255 input: ``w·(x/255 − mean)/std + b`` with the constants folded, in float64."""
    scale = 1 / torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    offset = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1) * scale
    weight = proj.weight.double()
    convolution = nn.Conv2d(3, proj.out_channels, proj.kernel_size, stride=stride)
    convolution.weight = nn.Parameter((weight * scale / 255).float())
    convolution.bias = nn.Parameter((proj.bias.double() - (weight * offset).sum(dim=(1, 2, 3))).float())
    return convolution


def _rows_of(qkv: nn.Linear, thirds: Sequence[int], dtype: torch.dtype) -> nn.Linear:
    """The fused projection with only some of its thirds; keeps the numbers bit for bit."""
    dim = qkv.in_features
    rows = torch.cat([torch.arange(third * dim, (third + 1) * dim) for third in thirds] or [torch.arange(0)])
    part = nn.Linear(dim, len(rows), dtype=dtype)
    part.weight = nn.Parameter(qkv.weight[rows].to(dtype))
    part.bias = nn.Parameter(qkv.bias[rows].to(dtype))
    return part


def _cast(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, dtype=dtype)
    copy.weight, copy.bias = nn.Parameter(linear.weight.to(dtype)), nn.Parameter(linear.bias.to(dtype))
    return copy
