"""The model as published, in plain torch: what an exported graph is compared with, in float64 for the truth.

Independent of the pruned encoder on purpose: the whole timm network, pixels normalised in front of it, its attention
watched at the function that computes it, the positional table from torch's own interpolation where cells are whole
patches, and from the formula of its kernel where they overlap.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from facetrt.engine.bundle.manifest import CLS_ATTENTION
from facetrt.engine.bundle.positional import TableRule
from facetrt.engine.images.geometry import grid_size
from facetrt.export.export_options import Facet, FacetKind
from facetrt.export.models import ModelSpec
from facetrt.kernels.errors import InputError

Attended = Callable[[int, Tensor, Tensor, Tensor], None]  # a layer's queries, keys, values, (1, heads, t, d)
Rotary = tuple[Tensor, bool]  # sines and cosines (cells, 2 d) as timm takes them, and whether halves turn

_WATCHING = threading.Lock()


class ReferenceModel:
    """Facets and [CLS] attention of one image by the unpruned network, in float32 or float64 throughout.

    With ``riders``, attention of the blocks from that one on sees only the tokens that there are at the patch's stride.
    """

    def __init__(
        self,
        vit: Any,
        spec: ModelSpec,
        *,
        stride: int,
        saliency_heads: Sequence[int] | None,
        dtype: torch.dtype = torch.float32,
        riders: int | None = None,
    ) -> None:
        self.vit = vit if dtype is torch.float32 else copy.deepcopy(vit).to(dtype)
        self.spec, self.stride, self.saliency_heads, self.dtype = spec, stride, saliency_heads, dtype
        self.riders = len(self.vit.blocks) if riders is None else riders

    @torch.no_grad()
    def run(
        self, pixels: NDArray[np.uint8], facets: Sequence[Facet], attended: Attended = lambda *attention: None
    ) -> dict[str, NDArray[Any]]:
        """``pixels (H, W, 3)`` uint8 → each facet ``(prefix + cells, C)``, and ``cls_attention (cells,)``.

        Args:
            attended: called with what each layer's attention takes.
        """
        captured: dict[str, Tensor] = {}
        size = (pixels.shape[0], pixels.shape[1])
        rotary = self._rotary(size)
        x = self._tokens(pixels)
        for layer, block in enumerate(self.vit.blocks):
            block.attn.fused_attn = True  # by torch's function, which is watched
            with _watched(None if layer < self.riders else self._own_tokens(size)) as calls:
                x = block(x) if rotary is None else block(x, rope=rotary[0])
            if len(calls) != 1:
                raise InputError(f"block {layer} of {self.spec.name} has {len(calls)} attentions: expected one")
            captured[f"token@{layer}"] = x
            captured |= {f"{name}@{layer}": value for name, value in zip("qkv", calls[0], strict=True)}
            attended(layer, *calls[0])
        outputs = {str(facet): self._facet(captured, facet, rotary).numpy() for facet in facets}
        if self.saliency_heads is not None:
            last = len(self.vit.blocks) - 1
            outputs[CLS_ATTENTION] = self._cls_attention(captured[f"q@{last}"], captured[f"k@{last}"]).numpy()
        return outputs

    def _tokens(self, pixels: NDArray[np.uint8]) -> Tensor:
        vit = self.vit
        mean, std = (torch.tensor(v, dtype=self.dtype).view(3, 1, 1) for v in self.spec.normalisation)
        image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(self.dtype) / 255 - mean) / std
        proj = vit.patch_embed.proj
        x = nn.functional.conv2d(image[None], proj.weight, proj.bias, stride=self.stride)
        x = x.flatten(2).transpose(1, 2)  # (1, n, C)
        before = [token for token in (vit.cls_token, getattr(vit, "reg_token", None)) if token is not None]
        if vit.pos_embed is None:
            x = torch.cat([*before, x], dim=1)
        else:
            cells = self._positional((pixels.shape[0], pixels.shape[1]))
            if vit.no_embed_class or not before:
                x = torch.cat([*before, x + cells], dim=1)
            else:
                count = sum(token.shape[1] for token in before)
                x = torch.cat([*before, x], dim=1) + torch.cat([vit.pos_embed[:, :count], cells], dim=1)
        tokens: Tensor = vit.norm_pre(x)
        return tokens

    def _own_tokens(self, size: tuple[int, int]) -> Tensor:
        """``(t,)`` bool: whether the network has a token at its own stride, too."""
        grid = grid_size(size, self.spec.patch, self.stride)
        down, across = (torch.arange(0, cells * self.stride, self.stride) % self.spec.patch == 0 for cells in grid)
        cells = torch.logical_and(down[:, None], across[None]).flatten()
        return torch.cat([torch.ones(self.spec.prefix, dtype=torch.bool), cells])

    def _positional(self, size: tuple[int, int]) -> Tensor:
        """``(1, cells, C)``, by the family's rule (see :class:`facetrt.engine.bundle.positional.TableRule`)."""
        spec, rule = self.spec, self.spec.table_rule
        side, table = spec.trained_grid, self.vit.pos_embed[:, -(spec.trained_grid**2) :]
        grid = grid_size(size, spec.patch, self.stride)
        overlapping = rule.true_centres and self.stride != spec.patch
        by_size = rule in (TableRule.SIZE, TableRule.SIZE_CENTRES)
        if grid[0] * grid[1] == side * side and (by_size or size[0] == size[1]) and not overlapping:
            return torch.as_tensor(table)
        square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if overlapping:
            rows, columns = (self._kernel(cells, rule) for cells in grid)
            return torch.einsum("yi,bcij,xj->byxc", rows, square, columns).flatten(1, 2)
        how: dict[str, Any] = {"size": grid, "antialias": rule is TableRule.ANTIALIAS}
        if rule in (TableRule.SCALE, TableRule.SCALE_CENTRES):
            scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
            how = {"scale_factor": scale, "recompute_scale_factor": False}
        resized = nn.functional.interpolate(square, mode="bicubic", **how)
        return resized.flatten(2).transpose(1, 2)

    def _kernel(self, cells: int, rule: TableRule) -> Tensor:
        """``(cells, side)``: the bicubic kernel of every entry of the table at every cell's true centre."""
        spec, side = self.spec, self.spec.trained_grid
        share = self.stride / spec.patch
        patches = (cells - 1) * share + 1
        centre = torch.arange(cells, dtype=torch.float64) * share + 0.5
        smooth = rule is TableRule.ANTIALIAS
        stretch = max(side / patches, 1.0) if smooth else 1.0
        source = centre * side / (patches + (0.1 if rule is TableRule.SCALE_CENTRES else 0.0))
        reach = 0 if smooth else 3  # entries beyond the border are those at the border
        entries = torch.arange(-reach, side + reach, dtype=torch.float64) + 0.5
        weights = _bicubic((entries - source[:, None]) / stretch, -0.5 if smooth else -0.75)
        if smooth:
            return (weights / weights.sum(dim=1, keepdim=True)).to(self.dtype)
        inside = weights[:, reach : reach + side].clone()
        inside[:, 0] += weights[:, :reach].sum(dim=1)
        inside[:, -1] += weights[:, reach + side :].sum(dim=1)
        return inside.to(self.dtype)

    def _rotary(self, size: tuple[int, int]) -> Rotary | None:
        """Sines and cosines as timm's blocks take them, in timm's own arrangement."""
        rope, spec = getattr(self.vit, "rope", None), self.spec
        if rope is None:
            return None
        grid = grid_size(size, spec.patch, self.stride)
        halves = bool(self.vit.blocks[0].attn.rotate_half)
        if self.stride == spec.patch:
            return rope.get_embed(grid).to(self.dtype), halves
        share = self.stride / spec.patch
        counts = [(cells - 1) * share + 1 for cells in grid]  # of patches side by side
        steps = [torch.arange(cells, dtype=torch.float64) * share for cells in grid]  # of patches, from the first one
        if hasattr(rope, "periods"):
            axes = [2 * (step + 0.5) / count - 1 for step, count in zip(steps, counts, strict=True)]
            speeds = 2 * np.pi / rope.periods.double()
        else:
            sides = zip(steps, counts, rope.ref_feat_shape, strict=True)
            axes = [(step + rope.grid_offset) / count * side for step, count, side in sides]
            speeds = rope.bands.double()
        y, x = torch.meshgrid(*axes, indexing="ij")
        places = [x, y] if rope.grid_indexing == "xy" else [y, x]
        angles = torch.cat([place.reshape(-1, 1) * speeds for place in places], dim=1)
        angles = torch.cat([angles, angles], dim=1) if halves else angles.repeat_interleave(2, dim=1)
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(self.dtype), halves

    def _facet(self, captured: dict[str, Tensor], facet: Facet, rotary: Rotary | None) -> Tensor:
        layer = facet.layer
        if facet.kind in (FacetKind.TOKEN, FacetKind.NORMED):
            token = captured[f"token@{layer}"][0]
            return token if facet.kind is FacetKind.TOKEN else torch.as_tensor(self.vit.norm(token))
        taken = captured[f"{facet.kind.removeprefix('rotated_')[0]}@{layer}"][0]  # (heads, t, d)
        if rotary is not None and facet.kind in (FacetKind.QUERY, FacetKind.KEY):
            taken = self._turned_back(taken, rotary)
        return taken.transpose(0, 1).flatten(1)

    def _turned_back(self, x: Tensor, rotary: Rotary) -> Tensor:
        """The projection's own queries or keys: cells turned by the negative angles."""
        (sine, cosine), halves = rotary[0].chunk(2, dim=-1), rotary[1]
        cells = x[:, self.spec.prefix :]
        if halves:
            first, second = cells.chunk(2, dim=-1)
            across = torch.cat([-second, first], dim=-1)
        else:
            across = torch.stack([-cells[..., 1::2], cells[..., ::2]], dim=-1).reshape(cells.shape)
        return torch.cat([x[:, : self.spec.prefix], cells * cosine - across * sine], dim=1)

    def _cls_attention(self, query: Tensor, key: Tensor) -> Tensor:
        attention = (query[:, :, :1] @ key.transpose(2, 3) * self.vit.blocks[-1].attn.scale).softmax(dim=-1)
        rows: Tensor = attention[0, list(self.saliency_heads or ()), 0, self.spec.prefix :]
        return rows.mean(dim=0)


@contextmanager
def _watched(seen: Tensor | None = None) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """What torch's attention is called with meanwhile; by one thread at a time.

    Args:
        seen: ``(t,)`` bool, the tokens whose keys and values it is left with; all if None.
    """
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    original = nn.functional.scaled_dot_product_attention

    def watching(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append((query, key, value))
        if seen is not None:
            key, value = key[:, :, seen], value[:, :, seen]
        return original(query, key, value, *rest, **options)

    with _WATCHING:
        nn.functional.scaled_dot_product_attention = watching
        try:
            yield calls
        finally:
            nn.functional.scaled_dot_product_attention = original


def _bicubic(distance: Tensor, a: float) -> Tensor:
    u = distance.abs()
    near = ((a + 2) * u - (a + 3)) * u * u + 1
    far = a * (((u - 5) * u + 8) * u - 4)
    return torch.where(u <= 1, near, torch.where(u < 2, far, torch.zeros_like(u)))
