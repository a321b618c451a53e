"""How much memory encoding an image takes, and whether this process may have it: refused before it is allocated."""

from __future__ import annotations

from facetrt.kernels.machine import usable_memory

SHARE = 0.7  # of the memory that this process may use, that encoding one image may take
ACTIVATIONS = 30  # float32 numbers per cell and channel; up to 28 were measured, on ViT-S/8 with 12,321 cells


def encoding_bytes(*, dim: int, heads: int, cells: int, fused: bool) -> int:
    """About what encoding one image takes.

    ``fused`` attention works through blocks; otherwise logits and probabilities of one layer are held in full.
    """
    whole = 0 if fused else 2 * heads * (1 + cells) ** 2 * 4
    return whole + ACTIVATIONS * dim * cells * 4


def fits(needed: int) -> bool:
    """Whether this process can hold so many bytes beside everything else."""
    return needed <= SHARE * usable_memory().nbytes


def too_much(needed: int, cells: int, stride: int) -> str:
    """The middle of a message about an image that does not fit."""
    return f"{cells:,} cells at stride {stride}; encoding them needs about {needed / 1e9:.1f} GB and {usable_memory()}"
