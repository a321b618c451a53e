"""Which input a nearest-neighbour resize takes for each output, by the rules of two libraries.

Source: specification, common-evaluation §5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def corner_indices(n_in: int, n_out: int) -> NDArray[np.int32]:
    """Source of each of ``n_out`` cells by torch's rule: at their upper-left corners, with float32 products."""
    sources = np.floor(np.arange(n_out, dtype=np.float32) * (np.float32(n_in) / np.float32(n_out)))
    return np.asarray(np.minimum(sources, n_in - 1), np.int32)


def centre_indices(n_in: int, n_out: int) -> NDArray[np.int32]:
    """Source of each of ``n_out`` cells by Pillow's rule: at their centres, in float64 steps summed one by one.

    The sum's rounding decides ties; the closed form ``(i + 0.5)·n_in/n_out`` decides some of them otherwise.
    """
    step = n_in / n_out
    steps = np.full(n_out, step)
    steps[0] = step * 0.5
    return np.asarray(np.minimum(np.floor(np.cumsum(steps)), n_in - 1), np.int32)
