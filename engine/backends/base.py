"""What every backend does: load the encoder once, run it many times."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.bundle import Bundle
from facetrt.kernels.errors import BackendError

Tensors = Mapping[str, NDArray[Any]]

STATIC_INPUTS = ("images",)
DYNAMIC_INPUTS = ("images", "positional", "rows", "cols")
DTYPES = {"images": np.uint8, "positional": np.float32, "rows": np.int64, "cols": np.int64}


class Backend(ABC):
    """Runs a bundle's encoder.

    Nothing is touched in ``__init__``: the device is opened by the first :meth:`run` (or :meth:`activate`) and given
    back by :meth:`close`. Methods may be called from several threads.

    Inputs: ``images (B, H, W, 3)`` uint8 RGB; for dynamic bundles also ``positional (1, grid_h, grid_w, C)`` float32
    and ``rows (grid_h,)``, ``cols (grid_w,)`` int64: which rows and columns of the strided patch convolution become
    cells (all of them, or every second one for twice the stride).
    """

    name: ClassVar[str]

    def __init__(self, bundle: Bundle, *, device: str, threads: int | None) -> None:
        self.bundle = bundle
        self.device = device
        self.threads = threads
        self._lock = threading.Lock()
        self._state = "new"

    def activate(self) -> None:
        """Load the encoder now; otherwise the first run does."""
        with self._lock:
            if self._state == "closed":
                raise BackendError("this engine is closed: open it again with Engine.open")
            if self._state == "new":
                self._activate()
                self.bundle = replace(self.bundle, encoder=b"")  # the runtime has its own copy now
                self._state = "active"

    def run(self, inputs: Tensors) -> dict[str, NDArray[np.float32]]:
        """Encode one batch.

        Returns:
            Each facet as ``(B, 1 + cells, C)`` float32, [CLS] row first, and ``cls_attention (B, cells)`` if the bundle
            has saliency. The arrays belong to the caller.

        Raises:
            BackendError: inputs that do not fit the encoder, or a failure inside the runtime.
        """
        self._check(inputs)
        self.activate()
        outputs = self._run(inputs)
        return dict(zip(self.bundle.manifest.outputs, outputs, strict=True))

    def close(self) -> None:
        """Give the device back; later runs are errors. Closing twice is allowed."""
        with self._lock:
            if self._state == "active":
                self._close()
            self._state = "closed"

    def _check(self, inputs: Tensors) -> None:
        expected = DYNAMIC_INPUTS if self.bundle.manifest.dynamic else STATIC_INPUTS
        if set(inputs) != set(expected):
            raise BackendError(f"inputs {sorted(inputs)} were given: expected {sorted(expected)}")
        for name, value in inputs.items():
            if value.dtype != DTYPES[name]:
                raise BackendError(f"input {name} has type {value.dtype}: expected {np.dtype(DTYPES[name])}")
        images = inputs["images"]
        if images.ndim != 4 or images.shape[3] != 3:
            raise BackendError(f"images have shape {images.shape}: expected (B, H, W, 3)")
        size = self.bundle.manifest.size
        if size is not None and list(images.shape[1:3]) != size:
            raise BackendError(f"images of {images.shape[1]}×{images.shape[2]}: expected {size[0]}×{size[1]}")

    @abstractmethod
    def _activate(self) -> None: ...

    @abstractmethod
    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        """Outputs in the manifest's order."""

    @abstractmethod
    def _close(self) -> None: ...
