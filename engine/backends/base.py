"""What every backend does: load the encoder once, run it many times."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import CLS_ATTENTION, Manifest
from facetrt.engine.images.geometry import grid_size
from facetrt.kernels.errors import BackendError, BundleError

CLOSED = "this engine is closed: open it again with Engine.open"

Tensors = Mapping[str, NDArray[Any]]

STATIC_INPUTS = ("images",)
DTYPES = {
    "images": np.uint8, "positional": np.float32, "rotation": np.float32, "rows": np.int64, "cols": np.int64,
    "carriers": np.int64,
}  # fmt: skip


class Backend(ABC):
    """Runs a bundle's encoder.

    Nothing is touched in ``__init__``: the device is opened by the first :meth:`run` (or :meth:`activate`) and given
    back by :meth:`close`. Methods may be called from several threads.

    Inputs: ``images (B, H, W, 3)`` uint8 RGB; for dynamic bundles also ``positional (1, grid_h, grid_w, C)`` float32
    and ``rows (grid_h,)``, ``cols (grid_w,)`` int64: which rows and columns of the strided patch convolution become
    cells (all of them, or every second one for twice the stride). Those of models that rotate queries and keys take
    ``rotation (2, grid_h, grid_w, d / 2)`` float32 as well, sines and cosines; those with riders take ``carriers (n,)``
    int64, the tokens whose keys and values attention takes.

    Attributes:
        options: what runs, without any ``auto``.
        streams: how many runs side by side use the machine best; known once active.
        max_batch: the most images in one run, or None for any number.
    """

    name: ClassVar[str]
    streams: int = 1
    max_batch: int | None = None

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        self.bundle = bundle
        self.options = options
        self._lock = threading.Lock()
        self._state = "new"

    def activate(self) -> None:
        """Load the encoder now; otherwise the first run does."""
        with self._lock:
            if self._state == "closed":
                raise BackendError(CLOSED)
            if self._state == "new":
                self._activate()
                self.bundle = replace(self.bundle, encoder=b"")  # the runtime has its own copy now
                self._state = "active"

    def run(self, inputs: Tensors) -> dict[str, NDArray[np.float32]]:
        """Encode one batch.

        Returns:
            Each facet as ``(B, prefix + cells, C)`` float32, [CLS] row first, then registers, and ``cls_attention
            (B, cells)`` if the bundle has saliency. The arrays belong to the caller.

        Raises:
            BackendError: inputs that do not fit the encoder, or a failure inside the runtime.
            BundleError: outputs of another shape or type than the manifest means.
        """
        self._check(inputs)
        self.activate()
        outputs = dict(zip(self.bundle.manifest.outputs, self._run(inputs), strict=True))
        self._check_outputs(inputs, outputs)
        return outputs

    def transfers(self) -> tuple[float, float]:
        """Seconds that callers spent until now on ways to a GPU, and on waiting for it and the ways back."""
        return 0.0, 0.0

    def close(self) -> None:
        """Give the device back; later runs are errors. Closing twice is allowed."""
        with self._lock:
            before, self._state = self._state, "closed"
            if before == "active":
                self._close()

    def _check(self, inputs: Tensors) -> None:
        """Shapes and types, and cells: a runtime may read outside its arrays where they do not fit the image."""
        check_inputs(self.bundle.manifest, inputs)
        if not self.bundle.manifest.dynamic:
            return
        patch, stride = self.bundle.manifest.architecture.patch, self.bundle.manifest.stride
        sides = zip(("rows", "cols"), inputs["images"].shape[1:3], strict=True)
        for name, pixels in sides:
            cells, count = inputs[name], 1 + (pixels - patch) // stride
            if not _index(cells, count):
                raise BackendError(f"{name} do not all lie in 0..{count - 1}, the cells of {pixels} pixels")
        if self.bundle.manifest.riders is not None:
            tokens = self.bundle.manifest.architecture.prefix + inputs["rows"].size * inputs["cols"].size
            if not _index(inputs["carriers"], tokens):
                raise BackendError(f"carriers do not all lie in 0..{tokens - 1}, the tokens of the given rows and cols")

    def _check_outputs(self, inputs: Tensors, outputs: Tensors) -> None:
        manifest, images = self.bundle.manifest, inputs["images"].shape
        if manifest.dynamic:
            cells = inputs["rows"].size * inputs["cols"].size
        else:
            cells = math.prod(grid_size((images[1], images[2]), manifest.architecture.patch, manifest.stride))
        tokens = (images[0], manifest.architecture.prefix + cells, manifest.architecture.dim)
        for name, value in outputs.items():
            wanted = (images[0], cells) if name == CLS_ATTENTION else tokens
            if value.shape != wanted or value.dtype != np.float32:
                raise BundleError(
                    f"{self.bundle.path}: the encoder gives {name} as {value.dtype} {value.shape}, the manifest means "
                    f"float32 {wanted}: export the bundle again"
                )

    def _check_graph(self, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Raise :class:`BundleError` unless the graph has the inputs and outputs that the manifest means."""
        given, expected = sorted(inputs), sorted(input_names(self.bundle.manifest))
        if given != expected:
            raise BundleError(f"{self.bundle.path}: the encoder has inputs {given}, the manifest means {expected}")
        made = set(outputs)
        missing = [name for name in self.bundle.manifest.outputs if name not in made]
        if missing:
            raise BundleError(f"{self.bundle.path}: the encoder has no output {missing}, but the manifest lists it")

    @classmethod
    @abstractmethod
    def check_installed(cls) -> None:
        """Raise :class:`MissingDependencyError` unless the backend's library can be imported."""

    @classmethod
    @abstractmethod
    def check_supported(cls, bundle: Bundle, options: RunOptions) -> None:
        """Raise :class:`InputError` unless this backend can run the bundle as ``options`` say, on this machine."""

    @abstractmethod
    def _activate(self) -> None: ...

    @abstractmethod
    def _run(self, inputs: Tensors) -> list[NDArray[np.float32]]:
        """Outputs in the manifest's order."""

    @abstractmethod
    def _close(self) -> None: ...


class Shaped(Protocol):
    """An array, wherever it lies."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def size(self) -> int: ...


def check_inputs(manifest: Manifest, inputs: Mapping[str, Shaped]) -> None:
    """Raise :class:`BackendError` unless names, types and shapes are those of the encoder's inputs."""
    expected = input_names(manifest)
    if set(inputs) != set(expected):
        raise BackendError(f"inputs {sorted(inputs)} were given: expected {sorted(expected)}")
    for name, value in inputs.items():
        if value.dtype != DTYPES[name]:
            raise BackendError(f"input {name} has type {value.dtype}: expected {np.dtype(DTYPES[name])}")
    shape = inputs["images"].shape
    if len(shape) != 4 or shape[3] != 3:
        raise BackendError(f"images have shape {shape}: expected (B, H, W, 3)")
    if manifest.size is not None and list(shape[1:3]) != manifest.size:
        raise BackendError(f"images of {shape[1]}×{shape[2]}: expected {manifest.size[0]}×{manifest.size[1]}")
    if manifest.dynamic:
        grid, model = (inputs["rows"].size, inputs["cols"].size), manifest.architecture
        tables = {"positional": (1, *grid, model.dim), "rotation": (2, *grid, model.head_dim // 2)}
        for name in tables.keys() & set(expected):
            if inputs[name].shape != tables[name]:
                raise BackendError(
                    f"{name} has shape {inputs[name].shape}: expected {tables[name]} for the given rows and cols"
                )


def input_names(manifest: Manifest) -> tuple[str, ...]:
    """What a bundle's encoder takes, in order."""
    if not manifest.dynamic:
        return STATIC_INPUTS
    some = {"rotation": manifest.rotation, "carriers": manifest.riders}
    return tuple(name for name in DTYPES if name not in some or some[name] is not None)


def _index(values: NDArray[Any], count: int) -> bool:
    """Whether these are places of some of ``count`` things."""
    return values.ndim == 1 and values.size > 0 and bool(values.min() >= 0 and values.max() < count)


def first_line(error: Exception) -> str:
    """What a library's error says, without the stack that follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
