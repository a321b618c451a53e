"""From images to features: load, batch by shape, run the encoder, cut its outputs into one result per image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import Backend
from facetrt.engine.bundle import CLS_ATTENTION, ENCODER, Bundle
from facetrt.engine.features import Features, Float, Provenance, SaliencyMode
from facetrt.engine.geometry import Geometry, grid_size
from facetrt.engine.images import ImageLike, LoadedImage, LoadSize, load_image
from facetrt.engine.positional import positional_table
from facetrt.engine.resampling import pillow_nearest
from facetrt.kernels.errors import InputError

Progress = Callable[[int, int | None], None]  # (images done, images in all if known)

LOW_RESOLUTION_STRIDE = 8  # of the second pass, as in the reference
BATCH_CELLS = 4096  # cells encoded at once: beyond that a batch only takes memory on a CPU
WINDOW = 32  # images held at a time while looking for equal shapes, unless their features exceed
WINDOW_BYTES = 256 << 20  # so many bytes
MEMORY_SHARE = 0.7  # of the machine's memory that one image's attention may take


@dataclass(frozen=True)
class EncodeOptions:
    """How images are loaded and encoded; ``Engine.encode`` documents the fields."""

    load_size: LoadSize = None
    saliency: SaliencyMode = SaliencyMode.FULL
    stride: int | None = None


class Encoder:
    """Runs a bundle through a backend, in batches; keeps nothing between calls but the last few positional tables."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        manifest = bundle.manifest
        self.manifest = manifest
        self.backend = backend
        self.provenance = Provenance(
            model=manifest.model,
            encoder_sha256=manifest.files[ENCODER].sha256,
            backend=backend.name,
            device=backend.device,
            precision=manifest.precision,
        )
        if bundle.positional is not None:
            self._table = lru_cache(maxsize=8)(partial(positional_table, bundle.positional))

    def encode(
        self, images: Iterable[ImageLike], options: EncodeOptions, progress: Progress | None = None
    ) -> Iterator[Features]:
        """Features of each image, in order. At most ``WINDOW`` images are held at a time."""
        self._check_stride(options.stride)
        total = len(images) if isinstance(images, Sized) else None
        done = 0
        for loaded in self._windows(iter(images), options):
            results: dict[int, Features] = {}
            for batch in self._batches(loaded, options):
                encoded = self._encode_batch([loaded[i] for i in batch], options)
                results |= dict(zip(batch, encoded, strict=True))
                done += len(batch)
                if progress is not None:
                    progress(done, total)
            for i in range(len(loaded)):
                yield results.pop(i)

    def _windows(self, images: Iterator[ImageLike], options: EncodeOptions) -> Iterator[list[LoadedImage]]:
        """Runs of consecutive images, as many as ``WINDOW`` and ``WINDOW_BYTES`` allow; at least one."""
        halve = options.saliency is SaliencyMode.LOW_RESOLUTION and options.load_size is not None
        window: list[LoadedImage] = []
        size = 0
        for number, image in enumerate(images):
            window.append(load_image(image, options.load_size, name=f"image {number}", half=halve))
            cells = self._check_size(window[-1], options.stride or self.manifest.stride)
            size += cells * self.manifest.architecture.dim * 4 * len(self.manifest.facets)
            if len(window) == WINDOW or size > WINDOW_BYTES:
                yield window
                window, size = [], 0
        if window:
            yield window

    def _check_stride(self, stride: int | None) -> None:
        own, patch = self.manifest.stride, self.manifest.architecture.patch
        if stride not in (None, own) and (not self.manifest.dynamic or stride % own or patch % stride):
            allowed = [s for s in range(own, patch + 1, own) if patch % s == 0] if self.manifest.dynamic else [own]
            raise InputError(f"stride {stride}: this bundle can run at stride {' or '.join(map(str, allowed))}")

    def _batches(self, loaded: list[LoadedImage], options: EncodeOptions) -> Iterator[list[int]]:
        """Indices of images of one shape, as many as ``BATCH_CELLS`` allows."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(loaded):
            shapes.setdefault(image.image_size, []).append(i)
        for shape, indices in shapes.items():
            grid_h, grid_w = grid_size(shape, self.manifest.architecture.patch, options.stride or self.manifest.stride)
            size = max(1, BATCH_CELLS // (grid_h * grid_w))
            yield from (indices[start : start + size] for start in range(0, len(indices), size))

    def _check_size(self, image: LoadedImage, stride: int) -> int:
        """Number of cells of an image, or :class:`InputError` if it cannot be encoded."""
        expected, shape, name = self.manifest.size, image.image_size, image.name
        if expected is not None and list(shape) != expected:
            raise InputError(
                f"{name} loads as {shape[0]}×{shape[1]} (height × width), but this bundle is built for "
                f"{expected[0]}×{expected[1]}: use load size {expected[0]}x{expected[1]}, or export with --dynamic"
            )
        try:
            grid_h, grid_w = grid_size(shape, self.manifest.architecture.patch, stride)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        cells = grid_h * grid_w
        if not attention_fits(self.manifest.architecture.heads, cells):
            raise InputError(
                f"{name} loads as {shape[1]}×{shape[0]} pixels, which makes "
                f"{too_many(self.manifest.architecture.heads, cells, stride)}: use a smaller size or a larger stride"
            )
        return cells

    def _encode_batch(self, batch: list[LoadedImage], options: EncodeOptions) -> list[Features]:
        stride, patch = options.stride or self.manifest.stride, self.manifest.architecture.patch
        geometries = [Geometry(image.original_size, image.image_size, patch, stride) for image in batch]
        outputs = self._run(np.stack([image.pixels for image in batch]), step=stride // self.manifest.stride)
        attention = outputs.pop(CLS_ATTENTION, None)
        if attention is not None and options.saliency is SaliencyMode.LOW_RESOLUTION:
            attention = self._low_resolution_attention(batch, geometries[0].grid)
        return [
            Features(
                tokens={facet: rows[i] for facet, rows in outputs.items()},
                attention=None if attention is None else attention[i].reshape(geometry.grid),
                saliency_mode=options.saliency,
                geometry=geometry,
                pixels=image.pixels,
                name=image.name,
                provenance=self.provenance,
                load_size=options.load_size,
            )
            for i, (image, geometry) in enumerate(zip(batch, geometries, strict=True))
        ]

    def _low_resolution_attention(self, batch: list[LoadedImage], grid: tuple[int, int]) -> Float:
        """[CLS] attention at half the image size and stride 8, enlarged to ``grid``, ``(B, cells)``.

        Without a load size the reference does not halve the image, only the resolution of the grid.
        The weights are the same: every second cell of the stride-4 patch convolution is a cell at stride 8.
        """
        stride, patch = self.manifest.stride, self.manifest.architecture.patch
        if not self.manifest.dynamic or LOW_RESOLUTION_STRIDE % stride:
            kind = f"stride {stride}" if self.manifest.dynamic else "one fixed size"
            raise InputError(
                f"low-resolution saliency runs the encoder at half the image size and stride {LOW_RESOLUTION_STRIDE}, "
                f"but this bundle has {kind}: use low_resolution_saliency=False (--saliency full), or export with "
                "--dynamic and a stride that divides 8"
            )
        images = np.stack([image.pixels if image.half is None else image.half for image in batch])
        try:
            small_grid = grid_size((images.shape[1], images.shape[2]), patch, LOW_RESOLUTION_STRIDE)
        except InputError as error:
            raise InputError(
                f"{batch[0].name}: low-resolution saliency halves the image: {error}, or full saliency"
            ) from error
        attention = self._run(images, step=LOW_RESOLUTION_STRIDE // stride)[CLS_ATTENTION]
        return np.stack([pillow_nearest(values.reshape(small_grid), grid).ravel() for values in attention])

    def _run(self, images: NDArray[np.uint8], *, step: int) -> dict[str, Float]:
        """One pass over ``images (B, H, W, 3)``; ``step`` keeps every step-th cell of the patch convolution."""
        if not self.manifest.dynamic:
            return self.backend.run({"images": images})
        patch, stride = self.manifest.architecture.patch, self.manifest.stride
        size = (images.shape[1], images.shape[2])
        conv_h, conv_w = grid_size(size, patch, stride)
        grid = grid_size(size, patch, stride * step)
        used_h, used_w = (stride * (cells - 1) + patch for cells in (conv_h, conv_w))
        inputs: dict[str, NDArray[Any]] = {
            "images": np.ascontiguousarray(images[:, :used_h, :used_w]),
            "positional": self._table(grid, size)[None],
            "rows": np.arange(grid[0], dtype=np.int64) * step,
            "cols": np.arange(grid[1], dtype=np.int64) * step,
        }
        return self.backend.run(inputs)


def attention_bytes(heads: int, cells: int) -> int:
    """What one image's attention takes: logits and probabilities of one layer in float32."""
    return 2 * heads * (1 + cells) ** 2 * 4


def attention_fits(heads: int, cells: int) -> bool:
    """Whether this machine can hold one image's attention."""
    return attention_bytes(heads, cells) <= MEMORY_SHARE * physical_memory()


def too_many(heads: int, cells: int, stride: int) -> str:
    """The middle of a message about an image whose attention does not fit."""
    needed, present = attention_bytes(heads, cells) / 1e9, physical_memory() / 1e9
    return (
        f"{cells:,} cells at stride {stride}; their attention needs about {needed:.0f} GB and this machine has "
        f"{present:.0f} GB"
    )


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
