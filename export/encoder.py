"""The network that is exported: a ViT cut down to what the outputs need, one for all families.

* No block after the last one that an output depends on; of that block only the projections asked for.
* Saliency takes one row of the last attention: the [CLS] query against all keys, never the t × t matrix.
* With riders, an approximation that must be asked for, attention from a block on takes keys and values of *carriers*
  alone, the tokens that the network has at the stride of its patch; queries come from all tokens. Carriers are gathered
  before they are projected. Facets are of all tokens all the same, and so are the keys of [CLS] attention, which is
  about each cell.
* Scaling to [0, 1] and mean/std normalisation are folded into the patch convolution, so that bytes go in.
* Models that rotate turn queries and keys together, apart from values, in fp32 between two casts: halves of each head's
  channels change places in one gather, and the rest is one expression. In TensorRT that is inside the kernel that moves
  heads anyway; on processors splitting and joining halves takes longer. Where neighbouring channels turn together, the
  weights are put in the order of halves, which changes no product, and facets are put back.
* In fp16 and bf16, weights and matrix products are half; residual stream, LayerNorm and softmax stay in fp32, because
  ViTs do not survive naive fp16. So do whole blocks, and [CLS] attention, where the contract needs it
  (:class:`facetrt.engine.bundle.manifest.Fp32Parts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from facetrt.engine.bundle.manifest import Fp32Parts
from facetrt.export.attention import attention
from facetrt.export.backbones.parts import BlockParts, Mlp, NetworkParts, read_network
from facetrt.export.export_options import Facet, FacetKind

RESULTS = {FacetKind.TOKEN, FacetKind.NORMED}  # facets that need the whole block
CARRIED = (FacetKind.KEY, FacetKind.VALUE)
QKV = (FacetKind.QUERY, FacetKind.KEY, FacetKind.VALUE)  # order of the thirds of the fused projection
ROTATED = {FacetKind.ROTATED_QUERY: FacetKind.QUERY, FacetKind.ROTATED_KEY: FacetKind.KEY}
QUICK = 1.702  # of QuickGELU
TANH = (0.7978845608028654, 0.044715)  # of GELU's approximation: the square root of 2 / pi, and the cube's share


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
        product = self(nn.functional.linear(x, linear.weight))
        return product if linear.bias is None else self(product + linear.bias)

    def activate(self, kind: str, x: Tensor) -> Tensor:
        """An activation (see :class:`facetrt.export.backbones.parts.Mlp`), in the operations of the graph."""
        a = self.product
        if kind == "silu":
            return a(x * a(torch.sigmoid(x)))
        if kind == "quick":
            return a(x * a(torch.sigmoid(a(QUICK * x))))
        if kind == "tanh":
            scale, share = TANH
            inner = a(scale * a(x + a(share * a(a(x * x) * x))))
            return a(a(0.5 * x) * a(1 + a(torch.tanh(inner))))
        if self.rounded:  # GELU is five operations
            return self(x * self(0.5 * self(self(torch.erf(self(x / 2**0.5))) + 1)))
        return nn.functional.gelu(x)

    def linear(self, linear: nn.Linear, rows: Tensor | None = None) -> nn.Linear:
        """A copy of a layer in this arithmetic, or of some of its rows; in fp32 the numbers stay bit for bit."""
        weight, bias = (v if rows is None or v is None else v[rows] for v in (linear.weight, linear.bias))
        weight = self(weight)
        copy = nn.Linear(linear.in_features, len(weight), bias=bias is not None, device="meta")
        copy.weight = nn.Parameter(weight)
        if bias is not None:
            copy.bias = nn.Parameter(self(bias))
        return copy


FP32 = Arithmetic()
HALF_LOGITS = 64.0  # attention logits up to here lose less than 2 % of a weight in fp16


class FacetEncoder(nn.Module):
    """``forward(images, positional, rows, cols, rotation)`` → one tensor per facet, then [CLS] attention if asked.

    Shapes as in :class:`facetrt.engine.backends.base.Backend`. A static encoder has its tables baked in and takes
    ``images`` alone; only models that rotate take ``rotation``, only encoders with riders ``carriers``.

    Args:
        vit: a timm network with its weights, see :func:`facetrt.export.backbones.parts.read_network`.
        mean, std: per-channel normalisation of RGB in [0, 1].
        saliency_heads: heads whose [CLS] attention is averaged, or None for no saliency output.
        arithmetic: of the blocks; in fp32 stays what ``fp32`` names.
        logits: the largest attention logit of each block, where it was measured. A block that stays in fp32 beside
            others in fp16 computes its attention in fp16 if these are small: fp32 attention is fused by no builder.
        tables: ``positional``, ``rotation`` and ``carriers`` of a static encoder.
        riders: the first block whose attention takes keys and values of carriers alone; None for no such block.
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
        tables: Mapping[str, Tensor] | None = None,
        riders: int | None = None,
    ) -> None:
        super().__init__()
        fp32, parts, tables = fp32 or Fp32Parts(), read_network(vit), tables or {}
        small = {i for i, logit in enumerate(logits) if logit <= HALF_LOGITS and arithmetic.dtype is torch.float16}
        exact = replace(FP32, fused=arithmetic.dtype is torch.float32)
        self.facets = tuple(facets)
        self.patches = _bytes_convolution(parts.patches, stride, mean, std)
        self.prefix = nn.Parameter(parts.prefix)
        self.norm_pre = parts.norm_pre
        self.still = None  # sines and cosines of what does not turn, (2, prefix, d / 2)
        if parts.rotation is not None and parts.prefix.shape[1]:
            angles = torch.zeros(parts.prefix.shape[1], 2 * len(parts.rotation[1]))
            self.still = nn.Parameter(torch.stack([angles.sin(), angles.cos()]))
        self.baked = nn.ParameterList(self._turn(tables["rotation"])) if "rotation" in tables else None
        self.table = nn.Parameter(tables["positional"]) if "positional" in tables else None
        self.baked_carriers = self.baked_carried = None
        if "carriers" in tables:
            self.baked_carriers = nn.Parameter(tables["carriers"], requires_grad=False)
            if self.baked is not None:
                self.baked_carried = nn.ParameterList(each.index_select(1, tables["carriers"]) for each in self.baked)
        last = len(parts.blocks) - 1
        wanted: dict[int, set[FacetKind]] = {}
        for facet in self.facets:
            wanted.setdefault(facet.layer, set()).add(facet.kind)
        if saliency_heads is not None:
            wanted.setdefault(last, set())
        depth = 1 + max(wanted)
        self.norm = parts.norm if any(facet.kind is FacetKind.NORMED for facet in self.facets) else None
        self.blocks = nn.ModuleList(
            Block(
                parts,
                layer,
                kinds=wanted.get(layer, set()),
                complete=layer + 1 < depth or bool(wanted[layer] & RESULTS),
                saliency_heads=saliency_heads if layer == last else None,
                riding=riders is not None and layer >= riders,
                arithmetic=exact if layer in fp32.blocks else arithmetic,
                cls_arithmetic=exact if fp32.cls_attention else arithmetic,
                attention_arithmetic=exact if layer in set(fp32.blocks) - small else arithmetic,
            )
            for layer in range(depth)
        )

    def forward(
        self,
        images: Tensor,
        positional: Tensor | None = None,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
        rotation: Tensor | None = None,
        carriers: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        pixels = images.float()  # first of all: TensorRT knows bytes at its edge only
        x = self.patches(pixels.permute(0, 3, 1, 2))  # (B, C, conv_h, conv_w)
        if rows is not None and cols is not None:
            x = x.index_select(2, rows).index_select(3, cols)
        table = positional if self.table is None else self.table
        x = (x.permute(0, 2, 3, 1) + table).flatten(1, 2)  # (B, n, C)
        if self.prefix.shape[1]:
            x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        turn = None if rotation is None else self._turn(rotation)
        if self.baked is not None:
            turn = (self.baked[0], self.baked[1])
        carried = self._carriers(carriers, turn)
        outputs: dict[str, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            x, named = block(x, turn, carried)
            outputs |= {f"{name}@{layer}": value for name, value in named.items()}
            if Facet(FacetKind.NORMED, layer) in self.facets and self.norm is not None:
                outputs[f"normed@{layer}"] = self.norm(x)
        saliency = [value for name, value in outputs.items() if name.startswith("cls_attention")]
        return (*(outputs[str(facet)] for facet in self.facets), *saliency)

    def _turn(self, rotation: Tensor) -> Turn:
        """What turns all tokens, from ``(2, grid_h, grid_w, d / 2)`` sines and cosines: [CLS] and registers stay."""
        tokens = rotation.flatten(1, 2)  # (2, n, d / 2)
        if self.still is not None:
            tokens = torch.cat([self.still, tokens], dim=1)
        sine, cosine = tokens.chunk(2)
        sine = sine[:, :, None, None]
        return torch.cat([sine, -sine], dim=3), cosine[:, :, None, None]

    def _carriers(self, carriers: Tensor | None, turn: Turn | None) -> Carriers | None:
        """The input, or what is baked in; what turns carriers is gathered once for all blocks."""
        if self.baked_carriers is not None:
            baked = self.baked_carried
            return Carriers(self.baked_carriers, None if baked is None else (baked[0], baked[1]))
        if carriers is None:
            return None
        carried = None if turn is None else (turn[0].index_select(1, carriers), turn[1].index_select(1, carriers))
        return Carriers(carriers, carried)


Turn = tuple[Tensor, Tensor]  # each token's sines and negative sines (1, t, 1, 2, d / 2), cosines (1, t, 1, 1, d / 2)


class Carriers(NamedTuple):
    """Which tokens riders attend to: ``tokens (n,)`` int64, and what turns them."""

    tokens: Tensor
    turn: Turn | None


class Block(nn.Module):
    """One transformer block that also hands out its facets.

    ``complete`` says whether anything needs the block's own result; without it, attention and MLP are left out.
    ``riding`` says whether attention takes keys and values of carriers alone, which then have projections of their own.
    """

    def __init__(
        self,
        network: NetworkParts,
        layer: int,
        *,
        kinds: set[FacetKind],
        complete: bool,
        saliency_heads: Sequence[int] | None,
        riding: bool,
        arithmetic: Arithmetic,
        cls_arithmetic: Arithmetic,
        attention_arithmetic: Arithmetic,
    ) -> None:
        super().__init__()
        parts = network.blocks[layer]
        self.kinds, self.complete, self.arithmetic, self.cls_arithmetic = kinds, complete, arithmetic, cls_arithmetic
        self.attention_arithmetic = attention_arithmetic
        self.heads, self.scale, self.prefix = parts.heads, parts.scale, network.prefix.shape[1]
        self.saliency_heads = None if saliency_heads is None else list(saliency_heads)
        self.norm1 = parts.norm1
        self.back = _order_of_halves(parts).argsort() if network.interleaved else None
        qkv = _by_halves(parts) if network.interleaved else parts.qkv
        apart = (
            saliency_heads is not None and cls_arithmetic != arithmetic
        )  # [CLS] attention has projections of its own
        shared = saliency_heads is not None and not apart
        projected = {ROTATED.get(kind, kind) for kind in kinds}
        if complete:
            projected |= {FacetKind.QUERY} if riding else set(QKV)
        needed = [k for k in QKV if k in projected or (k is FacetKind.KEY and shared)]
        turning = [k for k in needed if k is not FacetKind.VALUE] if network.rotation is not None else []
        self.needed, self.turning = [k for k in needed if k not in turning], turning
        self.qkv = _thirds(qkv, self.needed, arithmetic) if self.needed else None
        self.qk = _thirds(qkv, turning, arithmetic) if turning else None
        self.carried = _thirds(qkv, CARRIED, arithmetic) if complete and riding else None
        self.cls_key = _thirds(qkv, [FacetKind.KEY], cls_arithmetic) if apart else None
        self.cls_query = None
        if apart or (shared and FacetKind.QUERY not in needed):
            self.cls_query = _thirds(qkv, [FacetKind.QUERY], cls_arithmetic)
        if complete:
            self.attention_norm, self.norm2 = parts.attention_norm, parts.norm2
            self.proj = arithmetic.linear(parts.projection)
            self.mlp = FeedForward(parts.mlp, arithmetic)
            self.scale1, self.scale2 = (
                None if scale is None else nn.Parameter(scale) for scale in (parts.scale1, parts.scale2)
            )

    def forward(
        self, x: Tensor, turn: Turn | None = None, carriers: Carriers | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.arithmetic
        normed = self.norm1(x)  # (B, t, C)
        projected = self._projected(a(normed), turn)
        outputs = {str(kind): self._facet(kind, projected) for kind in self.kinds - RESULTS}
        if self.saliency_heads is not None:
            outputs["cls_attention"] = self._cls_attention(normed, projected, turn)
        if self.complete:
            attended = self._attend(projected[FacetKind.ROTATED_QUERY], *self._taken(normed, projected, carriers))
            if self.attention_norm is not None:
                attended = a(self.attention_norm(attended.float()))
            x = _plus(x, a.apply(self.proj, attended).float(), self.scale1)
            x = _plus(x, self.mlp(a(self.norm2(x))).float(), self.scale2)
        if FacetKind.TOKEN in self.kinds:
            outputs["token"] = x
        return x, outputs

    def _projected(self, normed: Tensor, turn: Turn | None) -> dict[FacetKind, Tensor]:
        """The thirds that are needed, and queries and keys as attention takes them."""
        found: dict[FacetKind, Tensor] = {}
        if self.qkv is not None:
            found |= _apart(self.arithmetic.apply(self.qkv, normed), self.needed)
        if self.qk is None or turn is None:
            return found | {turned: found[plain] for turned, plain in ROTATED.items() if plain in found}
        together = self.arithmetic.apply(self.qk, normed)
        turned = self._rotate(together, turn, self.arithmetic)
        kinds = [kind for kind, plain in ROTATED.items() if plain in self.turning]
        return found | _apart(together, self.turning) | _apart(turned, kinds)

    def _taken(
        self, normed: Tensor, projected: dict[FacetKind, Tensor], carriers: Carriers | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as attention takes them."""
        if self.carried is None or carriers is None:
            return projected[FacetKind.ROTATED_KEY], projected[FacetKind.VALUE]
        found = self.arithmetic.apply(self.carried, self.arithmetic(normed).index_select(1, carriers.tokens))
        key, value = found.chunk(2, dim=-1)
        return (key if carriers.turn is None else self._rotate(key, carriers.turn, self.arithmetic)), value

    def _rotate(self, x: Tensor, turn: Turn, a: Arithmetic) -> Tensor:
        """``(B, t, heads · d)``, or several of them side by side, turned; in fp32.

        The first halves become a · cos - b · sin, the second ones b · cos - a · (-sin): a difference, because a sum of
        two tensors is a residual addition to the readers of graphs.
        """
        sine, cosine = turn
        halves = x.float().reshape(*x.shape[:2], -1, 2, cosine.shape[-1])  # (B, t, heads, 2, d / 2)
        other = halves.index_select(3, torch.tensor([1, 0]))
        return a((halves * cosine - other * sine).flatten(2))

    def _facet(self, kind: FacetKind, projected: dict[FacetKind, Tensor]) -> Tensor:
        value = projected[kind].float()
        return value if self.back is None or kind is FacetKind.VALUE else value.index_select(2, self.back)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        a = self.attention_arithmetic
        query, key, value = a(query), a(key), a(value)
        if a.fused and not a.rounded:
            return self.arithmetic(attention(query, key, value, self.heads, self.scale))
        weights = a(self._attention(self._split(query), key, a))
        mixed = a.product(weights @ self._split(value))  # (B, heads, t, d)
        return self.arithmetic(mixed.transpose(1, 2).flatten(2))

    def _cls_attention(self, normed: Tensor, projected: dict[FacetKind, Tensor], turn: Turn | None) -> Tensor:
        """Mean attention of the chosen heads from [CLS] to the cells, ``(B, n)`` float32. Its query does not turn."""
        a = self.cls_arithmetic
        if self.cls_key is None:
            key = projected[FacetKind.ROTATED_KEY]
        else:
            key = a.apply(self.cls_key, a(normed))
            key = key if turn is None else self._rotate(key, turn, a)
        if self.cls_query is None:
            query = projected[FacetKind.QUERY][:, :1]
        else:
            query = a.apply(self.cls_query, a(normed)[:, :1])
        heads = query.reshape(query.shape[0], self.heads, 1, -1)  # of one token: a transposition is no more than that
        weights = self._attention(heads, key, a)[:, self.saliency_heads, 0, self.prefix :]
        return weights.mean(dim=1)

    def _attention(self, query: Tensor, key: Tensor, a: Arithmetic) -> Tensor:
        """Weights of ``(B, heads, queries, d)`` queries over all keys, in fp32."""
        logits = a.product(a.product(query * self.scale) @ self._split(key).transpose(2, 3))
        return torch.softmax(logits.float(), dim=-1)

    def _split(self, x: Tensor) -> Tensor:
        """``(B, t, C)`` → ``(B, heads, t, d)``."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """A block's MLP."""

    def __init__(self, parts: Mlp, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.arithmetic, self.activation, self.gated, self.norm = arithmetic, parts.activation, parts.gated, parts.norm
        self.fc1, self.fc2 = arithmetic.linear(parts.first), arithmetic.linear(parts.second)

    def forward(self, x: Tensor) -> Tensor:
        a = self.arithmetic
        hidden = a.apply(self.fc1, x)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = a.product(a.activate(self.activation, gate) * up)
        else:
            hidden = a.activate(self.activation, hidden)
        if self.norm is not None:
            hidden = a(self.norm(hidden.float()))
        return a.apply(self.fc2, hidden)


def _apart(side_by_side: Tensor, kinds: Sequence[FacetKind]) -> dict[FacetKind, Tensor]:
    return dict(zip(kinds, side_by_side.chunk(len(kinds), dim=-1), strict=True))


def _plus(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """A branch added to the residual stream; LayerScale is not folded into weights, where fp16 would lose it."""
    return x + (branch if scale is None else branch * scale)


def _order_of_halves(parts: BlockParts) -> Tensor:
    """Which channel of queries and keys goes to each place, so that those that turn together are d / 2 apart."""
    d = parts.qkv.out_features // 3 // parts.heads
    within = torch.cat([torch.arange(0, d, 2), torch.arange(1, d, 2)])
    return (torch.arange(parts.heads)[:, None] * d + within).flatten()


def _by_halves(parts: BlockParts) -> nn.Linear:
    order, dim = _order_of_halves(parts), parts.qkv.out_features // 3
    return FP32.linear(parts.qkv, torch.cat([order, order + dim, torch.arange(dim) + 2 * dim]))


def _bytes_convolution(proj: nn.Conv2d, stride: int, mean: Sequence[float], std: Sequence[float]) -> nn.Conv2d:
    """The patch convolution for 0..255 input: ``w·(x/255 − mean)/std + b`` with the constants folded, in float64."""
    scale = 1 / torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
    offset = torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1) * scale
    weight = proj.weight.double()
    bias = 0 if proj.bias is None else proj.bias.double()
    height, width = proj.weight.shape[2:]
    convolution = nn.Conv2d(3, proj.out_channels, (height, width), stride=stride)
    convolution.weight = nn.Parameter((weight * scale / 255).float())
    convolution.bias = nn.Parameter((bias - (weight * offset).sum(dim=(1, 2, 3))).float())
    return convolution


def _thirds(qkv: nn.Linear, kinds: Sequence[FacetKind], arithmetic: Arithmetic) -> nn.Linear:
    """The fused projection with only some of its thirds."""
    dim = qkv.out_features // 3
    rows = torch.cat([torch.arange(dim) + QKV.index(kind) * dim for kind in kinds])
    return arithmetic.linear(qkv, rows)
