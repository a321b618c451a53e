"""An eager ViT with DINO's module names, the kind of model that research code hooks into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from facetrt.export.models import ModelSpec


class PlainViT(nn.Module):
    """``forward(images (B, 3, H, W) float32)`` → the [CLS] token; everything else is read by hooks.

    Attention is materialised as ``(B, heads, t, t)`` and passes through ``attn_drop``, where a hook can read it. The
    positional table is interpolated by DINO's rule in every call.
    """

    def __init__(self, spec: ModelSpec, stride: int) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(spec, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + spec.trained_grid**2, spec.dim))
        self.blocks = nn.ModuleList(_Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.interpolate_pos_encoding(x, images.shape[2], images.shape[3])
        for block in self.blocks:
            x = block(x)
        cls: Tensor = self.norm(x)[:, 0]
        return cls

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        """``(1, t, C)`` for an input of that size."""
        table = self.pos_embed[:, 1:]
        side, dim = round(table.shape[1] ** 0.5), table.shape[2]
        if x.shape[1] - 1 == side * side and height == width:
            return self.pos_embed
        patch, (stride, _) = self.patch_embed.patch_size, self.patch_embed.proj.stride
        scale = tuple((1 + (size - patch) // stride + 0.1) / side for size in (height, width))
        square = table.reshape(1, side, side, dim).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(square, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


class _PatchEmbed(nn.Module):
    def __init__(self, spec: ModelSpec, stride: int) -> None:
        super().__init__()
        self.patch_size = spec.patch
        self.proj = nn.Conv2d(3, spec.dim, spec.patch, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class _Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(spec.dim, eps=1e-6), nn.LayerNorm(spec.dim, eps=1e-6)
        self.attn = _Attention(spec)
        self.mlp = _Mlp(spec)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class _Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.num_heads, self.scale = spec.heads, (spec.dim // spec.heads) ** -0.5
        self.qkv, self.proj = nn.Linear(spec.dim, 3 * spec.dim), nn.Linear(spec.dim, spec.dim)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (qkv[0] @ qkv[1].transpose(-2, -1)) * self.scale  # (B, heads, t, t)
        attention = self.attn_drop(attention.softmax(dim=-1))
        mixed = (attention @ qkv[2]).transpose(1, 2).reshape(batch, tokens, dim)
        result: Tensor = self.proj(mixed)
        return result


class _Mlp(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        hidden = int(spec.dim * spec.mlp_ratio)
        self.fc1, self.fc2, self.act = nn.Linear(spec.dim, hidden), nn.Linear(hidden, spec.dim), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result
