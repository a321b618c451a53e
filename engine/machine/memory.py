"""How much time and memory encoding an image takes: too much is refused before it is begun."""

from __future__ import annotations

from facetrt.engine.settings import Setting
from facetrt.kernels.machine import usable_memory

SHARE = 0.7  # of the memory that this process may use, that encoding one image may take
ACTIVATIONS = 30  # float32 numbers per cell and channel; up to 28 were measured, on ViT-S/8 with 12,321 cells

MAX_CELLS = 32_768
"""Cells of one image that are encoded unless the caller raises the bound.

Attention costs cells²: ViT-S at 55 × 55 cells is 150 GMAC, 1.5 s on two cores; at this bound it is 10,600, so about 70
times as long. 480 × 854 pixels at stride 4 (25,228 cells) and 1080 × 1920 at stride 8 (32,026) stay below.
"""

ENLARGED = 16  # a picture loaded with more than so many times its own pixels has little to show for its cells
ENLARGED_SHARE = 4  # so it may have one cell for every four of the bound


def bound_on_cells(max_cells: int, original: tuple[int, int], loaded: tuple[int, int]) -> int:
    """How many cells an image may have that is loaded at another size than its own, both (height, width).

    A line of 1 × 8 pixels, loaded with a shorter side of 224, would take as long as a frame of 480 × 854.
    """
    enlarged = loaded[0] * loaded[1] > ENLARGED * original[0] * original[1]
    return max(1, max_cells // ENLARGED_SHARE) if enlarged else max_cells


MAX_CELLS_SETTING = Setting(
    "An image of more is refused: time grows with their square.",
    minimum=1,
    expected="a number of cells, at least 1, or None for no bound",
)


def too_many(cells: int, bound: int, remedy: str, max_cells: int | None = None) -> str:
    """The end of a message about an image with more cells than ``bound``; ``max_cells`` would do, or ``cells``."""
    needed = cells if max_cells is None else max_cells
    return (
        f"{cells:,} cells; time grows with their square, and at most {bound:,} are encoded: {remedy}raise the bound "
        f"with max_cells={needed} (--max-cells {needed})"
    )


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
