"""What an encoder is built from, read off a network that timm built: prefix, table, blocks, norms, rotation.

timm writes the same parts in several ways (``VisionTransformer`` and ``Eva``; projections together or apart; SwiGLU
packed or not). Here they become one. A network with a part that is not known is refused by that part's name: nothing is
left out silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from facetrt.engine.bundle.positional import Rotation
from facetrt.kernels.errors import InputError

Turning = tuple[Rotation, NDArray[np.float32]]  # how cells turn, and by which periods
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "tanh", "QuickGELU": "quick", "SiLU": "silu"}  # timm's and torch's classes


@dataclass(frozen=True)
class Mlp:
    """``second(norm(f(first x)))`` with an activation f; if ``gated``, f is activation(first half) · second half.

    ``activation`` is ``gelu``, ``tanh`` (GELU's approximation), ``quick`` (x · sigmoid 1.702 x) or ``silu``.
    """

    first: nn.Linear
    second: nn.Linear
    activation: str
    gated: bool
    norm: nn.Module | None


@dataclass(frozen=True)
class BlockParts:
    """One transformer block: ``x += scale1 · attention(norm1 x)``, ``x += scale2 · mlp(norm2 x)``.

    Attributes:
        qkv: queries, keys and values, head-major each.
        attention_norm: of what attention gives, before its projection.
        scale: of the logits.
        scale1, scale2: LayerScale ``(C,)``.
    """

    norm1: nn.Module
    qkv: nn.Linear
    attention_norm: nn.Module | None
    projection: nn.Linear
    scale1: Tensor | None
    norm2: nn.Module
    mlp: Mlp
    scale2: Tensor | None
    heads: int
    scale: float


@dataclass(frozen=True)
class NetworkParts:
    """A network that takes patches.

    Attributes:
        patches: the patch convolution.
        prefix: ``(1, prefix, C)``: [CLS] and registers, with their positions.
        norm_pre: of all tokens, before the first block.
        norm: the final one.
        rotation: how queries and keys turn, and the periods ``(d / 4,)``; None if they don't.
        interleaved: whether channel 2i turns with 2i + 1, else i with i + d/2.
    """

    patches: nn.Conv2d
    prefix: Tensor
    norm_pre: nn.Module | None
    blocks: list[BlockParts]
    norm: nn.Module | None
    rotation: Turning | None
    interleaved: bool


def read_network(vit: Any) -> NetworkParts:
    """The parts of a timm ``VisionTransformer`` or ``Eva``.

    Raises:
        InputError: a part that is not known here; names it.
    """
    prefix, own = _prefix(vit), _own_positions(vit)
    if own:
        prefix = prefix + vit.pos_embed[:, :own]
    if not isinstance(vit.patch_embed.proj, nn.Conv2d) or not _is_identity(vit.patch_embed.norm):
        raise InputError("its patches are not embedded by one convolution, which is not supported")
    return NetworkParts(
        patches=vit.patch_embed.proj,
        prefix=prefix.detach(),
        norm_pre=_norm(vit.norm_pre),
        blocks=[_block(block) for block in vit.blocks],
        norm=_norm(vit.norm),
        rotation=read_rotation(vit),
        interleaved=getattr(vit, "rope", None) is not None and not vit.blocks[0].attn.rotate_half,
    )


def read_table(vit: Any) -> Tensor | None:
    """The positional table of a network's patches, ``(G, G, C)``; None if it has none.

    Raises:
        InputError: a table of a grid that is no square.
    """
    if vit.pos_embed is None:
        return None
    cells: Tensor = vit.pos_embed[0, _own_positions(vit) :].detach()
    side = round(len(cells) ** 0.5)
    if side * side != len(cells):
        raise InputError(f"a positional table of {len(cells)} rows: expected a square number")
    return cells.reshape(side, side, -1)


def _prefix(vit: Any) -> Tensor:
    """[CLS] and registers without their positions, ``(1, prefix, C)``."""
    tokens = [token for token in (vit.cls_token, getattr(vit, "reg_token", None)) if token is not None]
    return torch.cat(tokens, dim=1) if tokens else torch.zeros(1, 0, vit.embed_dim)


def _own_positions(vit: Any) -> int:
    """How many rows of the positional table, if there is one, are those of [CLS] and registers."""
    return 0 if vit.pos_embed is None or vit.no_embed_class else _prefix(vit).shape[1]


def _block(block: Any) -> BlockParts:
    names = {name for name, _ in block.named_children()}
    unknown = sorted(names - {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"})
    if unknown or type(block).__name__ not in ("Block", "EvaBlock"):
        raise InputError(
            f"its blocks are {type(block).__name__} with {', '.join(unknown) or 'other orders'}: not supported"
        )
    attention = block.attn
    for name in ("q_norm", "k_norm", "gate"):
        if not _is_identity(getattr(attention, name, None)):
            raise InputError(f"its attention has {name}, which is not supported")
    if getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads:
        raise InputError("its attention shares keys between heads, which is not supported")
    return BlockParts(
        norm1=block.norm1,
        qkv=_projections(attention),
        attention_norm=_norm(attention.norm),
        projection=attention.proj,
        scale1=_layer_scale(block, "ls1", "gamma_1"),
        norm2=block.norm2,
        mlp=_mlp(block.mlp),
        scale2=_layer_scale(block, "ls2", "gamma_2"),
        heads=attention.num_heads,
        scale=float(attention.scale),
    )


def _projections(attention: Any) -> nn.Linear:
    """Queries, keys and values as one layer; a bias that one of them lacks is zero."""
    if attention.qkv is None:
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        weight, biases = torch.cat([layer.weight for layer in layers]), [layer.bias for layer in layers]
    else:
        weight, biases = attention.qkv.weight, [attention.qkv.bias]
        if getattr(attention, "q_bias", None) is not None:
            biases = [attention.q_bias, None, attention.v_bias]
    bias = None
    if any(each is not None for each in biases):
        share = len(weight) // len(biases)
        bias = torch.cat([weight.new_zeros(share) if each is None else each for each in biases])
    return _linear(weight, bias)


def _mlp(mlp: Any) -> Mlp:
    kind, first = type(mlp).__name__, getattr(mlp, "fc1", None)
    if kind == "SwiGLU":
        gate, up = mlp.fc1_g, mlp.fc1_x
        bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
        first = _linear(torch.cat([gate.weight, up.weight]), bias)
    elif kind not in ("Mlp", "GluMlp") or (kind == "GluMlp" and mlp.gate_last) or not isinstance(first, nn.Linear):
        raise InputError(f"its MLP is {kind}, which is not supported")
    activation = ACTIVATIONS.get(type(mlp.act).__name__)
    if activation is None:
        raise InputError(f"its activation is {type(mlp.act).__name__}, which is not supported")
    if getattr(mlp.act, "approximate", "none") == "tanh":
        activation = "tanh"
    return Mlp(first, mlp.fc2, activation, kind != "Mlp", _norm(mlp.norm))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _layer_scale(block: Any, module: str, parameter: str) -> Tensor | None:
    scale = getattr(block, parameter, None)
    if scale is None:
        scale = getattr(getattr(block, module, None), "gamma", None)
    return None if scale is None else scale.detach()


def _norm(module: Any) -> nn.Module | None:
    if _is_identity(module):
        return None
    if not isinstance(module, nn.LayerNorm):
        raise InputError(f"it normalises by {type(module).__name__}, which is not supported")
    return module


def _is_identity(module: Any) -> bool:
    return module is None or isinstance(module, nn.Identity)


def read_rotation(vit: Any) -> Turning | None:
    """How a network's queries and keys turn, and the periods ``(d / 4,)``; None if they don't.

    Raises:
        InputError: a rotation that is not known here.
    """
    rope = getattr(vit, "rope", None)
    if rope is None:
        return None
    kind = type(rope).__name__
    x_first = rope.grid_indexing == "xy"
    if kind == "RotaryEmbeddingDinoV3" and rope.normalize_coords == "separate" and not rope.grid_offset:
        found, periods = Rotation(2.0, 0.0, -1.0, x_first), rope.periods
    elif kind == "RotaryEmbeddingCat" and rope.grid_type == "index" and rope.ref_feat_shape is not None:
        side, other = rope.ref_feat_shape
        if side != other:
            raise InputError(f"its rotation refers to {side} × {other} patches: expected a square")
        found = Rotation(float(side), side * (rope.grid_offset - 0.5), 0.0, x_first)
        periods = 2 * torch.pi / rope.bands
    else:
        raise InputError(f"its queries and keys turn by {kind}, which is not supported")
    return found, np.ascontiguousarray(periods.detach().float().numpy())
