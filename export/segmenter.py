"""SelfMask's decoder in a checkpoint, which lies beside the backbone that was trained with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from facetrt.engine.tasks.discovery.segmenter import Segmenter
from facetrt.export.backbone import tensors_of
from facetrt.export.checkpoints import read_checkpoint
from facetrt.kernels.errors import BundleError, InputError

PARTS = ("query_embed", "decoder.layers.", "decoder.norm.", "ffn.layers.")


def read_segmenter(path: Path) -> Segmenter:
    """The segmenter of a checkpoint file of any layout.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    found = {name: tensor for name, tensor in tensors_of(read_checkpoint(path)) if name.startswith(PARTS)}
    weights = {name: np.asarray(tensor.detach().float().numpy(), np.float32) for name, tensor in found.items()}
    try:
        return Segmenter.of(weights, str(path))
    except BundleError as error:
        raise InputError(
            f"{error}: is it one of SelfMask's checkpoints, selfmask_nq10.pt or selfmask_nq20.pt?"
        ) from None
