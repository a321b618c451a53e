"""The network that is exported: a timm ViT cut down to what the outputs need.

* No block after the last one that an output depends on; of that block only the projections asked for.
* Saliency takes one row of the last attention: the [CLS] query against all keys, never the t × t matrix.
* Scaling to [0, 1] and mean/std normalisation are folded into the patch convolution, so that bytes go in.
* In fp16 and bf16, weights and matrix products are half; residual stream, LayerNorm and softmax stay in fp32, because
  ViTs do not survive naive fp16. So do whole blocks, and [CLS] attention, where the contract needs it
  (:class:`facetrt.engine.bundle.manifest.Fp32Parts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from facetrt.engine.bundle.manifest import Fp32Parts
from facetrt.export.attention import attention
from facetrt.export.export_options import Facet, FacetKind

RESULTS = {FacetKind.TOKEN, FacetKind.NORMED}  # facets that need the whole block
QKV = (FacetKind.QUERY, FacetKind.KEY, FacetKind.VALUE)  # order of the thirds of the fused projection


@dataclass(frozen=True)
class Arithmetic:
    """What weights and matrix products are made of.

    Attributes:
        dtype: their type.
        rounded: compute in fp32 and round to ``dtype`` wherever a tensor of that type would be made. That is what
            hardware does which sums in fp32 and stores halves, on processors without such hardware.
        fused: write attention as one operation, which runtimes have a kernel for that runs in its inputs' type.
    """

    dtype: torch.dtype = torch.float32
    rounded: bool = False
    fused: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        half = x.to(self.dtype)
        return half.float() if self.rounded else half

    def product(self, x: Tensor) -> Tensor:
        """What is made of a product of tensors of this type: rounded, if they are of this type by name only."""
        return self(x) if self.rounded else x

    def apply(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """A layer of this arithmetic; as in the graph, product and bias are two operations."""
        if not self.rounded:
            result: Tensor = linear(x)
            return result
        return self(self(nn.functional.linear(x, linear.weight)) + linear.bias)

    def activate(self, activation: nn.Module, x: Tensor) -> Tensor:
        """An activation; as in the graph, GELU is five operations."""
        if self.rounded and isinstance(activation, nn.GELU):
            return self(x * self(0.5 * self(self(torch.erf(self(x / 2**0.5))) + 1)))
        result: Tensor = activation(x)
        return self.product(result)

    def linear(self, linear: nn.Linear, rows: Tensor | None = None) -> nn.Linear:
        """A copy of a layer in this arithmetic, or of some of its rows; in fp32 the numbers stay bit for bit."""
        weight, bias = (v if rows is None else v[rows] for v in (linear.weight, linear.bias))
        weight, bias = self(weight), self(bias)
        copy = nn.Linear(linear.in_features, len(weight), dtype=weight.dtype)
        copy.weight, copy.bias = nn.Parameter(weight), nn.Parameter(bias)
        return copy


FP32 = Arithmetic()
HALF_LOGITS = 64.0  # attention logits up to here lose less than 2 % of a weight in fp16


class FacetEncoder(nn.Module):
    """``forward(images, positional, rows, cols)`` → one tensor per facet, then [CLS] attention if asked.

    Shapes as in :class:`facetrt.engine.backends.base.Backend`. A static encoder has its positional table baked in and
    takes ``images`` alone.

    Args:
        vit: a timm ``VisionTransformer`` with its weights.
        mean, std: per-channel normalisation of RGB in [0, 1].
        saliency_heads: heads whose [CLS] attention is averaged, or None for no saliency output.
        arithmetic: of the blocks; in fp32 stays what ``fp32`` names.
        logits: the largest attention logit of each block, where it was measured. A block that stays in fp32 beside
            others in fp16 computes its attention in fp16 if these are small: fp32 attention is fused by no builder.
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
        arithmetic: Arithmetic = FP32,
        fp32: Fp32Parts | None = None,
        logits: Sequence[float] = (),
        table: Tensor | None = None,
    ) -> None:
        super().__init__()
        fp32 = fp32 or Fp32Parts()
        small = {i for i, logit in enumerate(logits) if logit <= HALF_LOGITS and arithmetic.dtype is torch.float16}
        exact = replace(FP32, fused=arithmetic.dtype is torch.float32)
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
                arithmetic=exact if layer in fp32.blocks else arithmetic,
                cls_arithmetic=exact if fp32.cls_attention else arithmetic,
                attention_arithmetic=exact if layer in set(fp32.blocks) - small else arithmetic,
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
        arithmetic: Arithmetic,
        cls_arithmetic: Arithmetic,
        attention_arithmetic: Arithmetic,
    ) -> None:
        super().__init__()
        self.kinds, self.complete, self.arithmetic, self.cls_arithmetic = kinds, complete, arithmetic, cls_arithmetic
        self.attention_arithmetic = attention_arithmetic
        self.heads, self.scale = block.attn.num_heads, float(block.attn.scale)
        self.saliency_heads = None if saliency_heads is None else list(saliency_heads)
        self.norm1 = block.norm1
        apart = (
            saliency_heads is not None and cls_arithmetic != arithmetic
        )  # [CLS] attention has projections of its own
        shared = saliency_heads is not None and not apart
        needed = [k for k in QKV if complete or k in kinds or (k is FacetKind.KEY and shared)]
        self.needed = needed
        self.qkv = _thirds(block.attn.qkv, needed, arithmetic) if needed else None
        self.cls_key = _thirds(block.attn.qkv, [FacetKind.KEY], cls_arithmetic) if apart else None
        self.cls_query = None
        if apart or (shared and FacetKind.QUERY not in needed):
            self.cls_query = _thirds(block.attn.qkv, [FacetKind.QUERY], cls_arithmetic)
        if complete:
            self.proj = arithmetic.linear(block.attn.proj)
            self.norm2 = block.norm2
            self.fc1, self.fc2 = arithmetic.linear(block.mlp.fc1), arithmetic.linear(block.mlp.fc2)
            self.activation = block.mlp.act

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.arithmetic
        normed = self.norm1(x)  # (B, t, C)
        thirds = a.apply(self.qkv, a(normed)).chunk(len(self.needed), dim=-1) if self.qkv is not None else ()
        projected = dict(zip(self.needed, thirds, strict=True))
        outputs = {str(kind): projected[kind].float() for kind in self.kinds - RESULTS}
        if self.saliency_heads is not None:
            outputs["cls_attention"] = self._cls_attention(normed, projected)
        if self.complete:
            x = x + a.apply(self.proj, self._attend(*(projected[kind] for kind in QKV))).float()
            hidden = a.activate(self.activation, a.apply(self.fc1, a(self.norm2(x))))
            x = x + a.apply(self.fc2, hidden).float()
        if FacetKind.TOKEN in self.kinds:
            outputs["token"] = x
        return x, outputs

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        a = self.attention_arithmetic
        query, key, value = a(query), a(key), a(value)
        if a.fused and not a.rounded:
            return self.arithmetic(attention(query, key, value, self.heads, self.scale))
        weights = a(self._attention(self._split(query), key, a))
        mixed = a.product(weights @ self._split(value))  # (B, heads, t, d)
        return self.arithmetic(mixed.transpose(1, 2).flatten(2))

    def _cls_attention(self, normed: Tensor, projected: dict[FacetKind, Tensor]) -> Tensor:
        """Mean attention of the chosen heads from [CLS] to the cells, ``(B, n)`` float32."""
        a = self.cls_arithmetic
        key = projected[FacetKind.KEY] if self.cls_key is None else a.apply(self.cls_key, a(normed))
        if self.cls_query is None:
            query = projected[FacetKind.QUERY][:, :1]
        else:
            query = a.apply(self.cls_query, a(normed)[:, :1])
        heads = query.reshape(query.shape[0], self.heads, 1, -1)  # of one token: a transposition is no more than that
        weights = self._attention(heads, key, a)[:, self.saliency_heads, 0, 1:]
        return weights.mean(dim=1)

    def _attention(self, query: Tensor, key: Tensor, a: Arithmetic) -> Tensor:
        """Weights of ``(B, heads, queries, d)`` queries over all keys, in fp32."""
        logits = a.product(a.product(query * self.scale) @ self._split(key).transpose(2, 3))
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


def _thirds(qkv: nn.Linear, kinds: Sequence[FacetKind], arithmetic: Arithmetic) -> nn.Linear:
    """The fused projection with only some of its thirds."""
    dim = qkv.in_features
    rows = torch.cat([torch.arange(dim) + QKV.index(kind) * dim for kind in kinds])
    return arithmetic.linear(qkv, rows)
