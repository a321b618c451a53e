"""Turning images into features: load, batch by shape, run the encoder, cut its outputs into one result per image."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.backends.base import Backend
from facetrt.engine.backends.run_options import DeviceName, Hint
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import ENCODER, PADDING
from facetrt.engine.bundle.positional import Cells, padding_correction
from facetrt.engine.encoding.passes import Passes, low_resolution_stride
from facetrt.engine.features.features import Features, Float, ImageRecord, Provenance, SaliencyMode
from facetrt.engine.images.fitting import Fit, FitChoice, rounded_colour
from facetrt.engine.images.geometry import Geometry, grid_size
from facetrt.engine.images.loading import (
    DEFAULT_SIZE,
    ImageLike,
    LoadedImage,
    LoadSizeChoice,
    Pixels,
    check_load_size,
    half_size,
    load_image,
    loaded_size,
)
from facetrt.engine.images.reading_ahead import read_ahead
from facetrt.engine.images.resampling import pillow_nearest
from facetrt.engine.machine.memory import (
    ENLARGED_SHARE,
    MAX_CELLS,
    bound_on_cells,
    encoding_bytes,
    fits,
    too_many,
    too_much,
)
from facetrt.engine.settings import Setting, check
from facetrt.kernels.errors import FacetrtError, InputError

Progress = Callable[[int, int | None], None]  # (images done, images in all if known)
OnBroken = Callable[[ImageLike, FacetrtError], None]  # (image that cannot be encoded, why)

BATCH_CELLS = 4096  # cells encoded at once: beyond that a batch only takes memory on a CPU
GPU_BATCH_CELLS = 48_400  # on a GPU: sixteen images of 55 × 55
WINDOW = 32  # images held at a time while looking for equal shapes, unless their features exceed
WINDOW_BYTES = 256 << 20  # so many bytes


@dataclass(frozen=True)
class EncodeOptions:
    """How images are loaded and encoded; ``Engine.encode`` documents the fields."""

    load_size: LoadSizeChoice = DEFAULT_SIZE
    saliency: Annotated[SaliencyMode, Setting("Which pass it comes from.")] = SaliencyMode.FULL
    stride: Annotated[
        int | None, Setting("Pixels between cells; the bundle's own by default, or a multiple that divides the patch.")
    ] = None
    fit: FitChoice = Fit.NONE

    def __post_init__(self) -> None:
        check(self)
        if self.fit is not Fit.NONE and self.saliency is SaliencyMode.LOW_RESOLUTION:
            raise InputError(f"fit={self.fit} and low-resolution saliency exclude each other: use saliency='full'")
        object.__setattr__(self, "load_size", check_load_size(self.load_size))

    @property
    def halve(self) -> bool:
        """Whether images are needed at half their size as well. Without a load size the reference does not halve."""
        return self.saliency is SaliencyMode.LOW_RESOLUTION and self.load_size is not None


class Tally:
    """Counts images and reports them."""

    def __init__(self, images: object, progress: Progress | None) -> None:
        self.done, self.total = 0, len(images) if isinstance(images, Sized) else None
        self._progress = progress

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._progress is not None:
            self._progress(self.done, self.total)


Alike = tuple[tuple[int, int], tuple[int, int] | None]


def alike_of(image: LoadedImage) -> Alike:
    """What images share that can be encoded together: their size, and where a border of theirs begins."""
    return image.image_size, image.resized


class _Window:
    """Images in order that wait for others of their shape, and the features of those that come after them.

    ``waiting`` has (number, image) by what makes images alike, ``done`` features by number.
    """

    def __init__(self) -> None:
        self.waiting: dict[Alike, list[tuple[int, LoadedImage]]] = {}
        self.done: dict[int, Features] = {}
        self._bytes: dict[int, int] = {}  # of the features, by number, in order

    def add(self, number: int, image: LoadedImage, nbytes: int) -> int:
        """Let an image wait; returns how many of its shape do now."""
        self._bytes[number] = nbytes
        alike = self.waiting.setdefault(alike_of(image), [])
        alike.append((number, image))
        return len(alike)

    def ready(self) -> Iterator[tuple[int, Features]]:
        """Numbers and features of the first images, up to one that waits."""
        while self._bytes and (number := next(iter(self._bytes))) in self.done:
            del self._bytes[number]
            yield number, self.done.pop(number)

    @property
    def nbytes(self) -> int:
        """What the features of all images take that were not handed out."""
        return sum(self._bytes.values())

    def __len__(self) -> int:
        return len(self._bytes)


class Encoder(Passes[NDArray[Any]]):
    """Runs a bundle through a backend, in batches; keeps nothing between calls but the last few positional tables."""

    def __init__(self, bundle: Bundle, backend: Backend, *, max_cells: int | None = MAX_CELLS) -> None:
        manifest = bundle.manifest
        self.max_cells = max_cells
        self.manifest = manifest
        self.backend = backend
        self.provenance = Provenance(
            model=manifest.title,
            encoder_sha256=manifest.files[ENCODER].sha256,
            backend=backend.name,
            device=backend.options.device,
            precision=backend.options.precision,
        )
        self._padding = bundle.padding
        self._bundle = replace(bundle, encoder=b"")  # the backend has it
        if manifest.dynamic:
            self._positions = lru_cache(maxsize=8)(bundle.positions)
            self._padded_table = lru_cache(maxsize=8)(self._make_padded_table)

    def read_file(self, name: str) -> bytes | None:
        """A file of the bundle, checked; None if it has none of that name."""
        return self._bundle.read(name) if name in self.manifest.files else None

    def encode(
        self,
        images: Iterable[ImageLike],
        options: EncodeOptions,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
    ) -> Generator[Features]:
        """Features of each image, in order. At most ``WINDOW`` images are held at a time."""
        tally = Tally(images, progress)
        with closing(self.encode_numbered(enumerate(images), options, tally.add, on_broken)) as numbered:
            for _, features in numbered:
                yield features

    def encode_numbered(
        self,
        images: Iterable[tuple[int, ImageLike]],
        options: EncodeOptions,
        advance: Callable[[int], None] = lambda count: None,
        on_broken: OnBroken | None = None,
    ) -> Generator[tuple[int, Features]]:
        """Number and features of each image, in order; ``advance`` is told how many more are done.

        An image that cannot be encoded raises after everything before it, or goes to ``on_broken``. What ``images``
        raises comes after everything before it as well.
        """
        self.check_options(options)
        window = _Window()
        with closing(read_ahead(images, partial(self._load, options=options))) as items:
            while True:
                try:
                    item = next(items, None)
                except Exception:
                    yield from self._flush(window, options, advance)
                    raise
                if item is None:
                    break
                if isinstance(item.loaded, FacetrtError):
                    yield from self._flush(window, options, advance)
                    if on_broken is None:
                        raise item.loaded
                    on_broken(item.image, item.loaded)
                    advance(1)
                    continue
                cells = self._cells(item.loaded.image_size, options)
                alike = window.add(item.number, item.loaded, cells * self._cell_bytes)
                if alike == self._batch_size(cells):
                    self._encode_alike(window, alike_of(item.loaded), options, advance)
                if len(window) == WINDOW or window.nbytes > WINDOW_BYTES:
                    yield from self._flush(window, options, advance)
                yield from window.ready()
        yield from self._flush(window, options, advance)

    def _flush(
        self, window: _Window, options: EncodeOptions, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, Features]]:
        for alike in list(window.waiting):
            self._encode_alike(window, alike, options, advance)
        return window.ready()

    def _encode_alike(
        self, window: _Window, alike: Alike, options: EncodeOptions, advance: Callable[[int], None]
    ) -> None:
        """Encode the images of one shape that wait."""
        numbers, images = zip(*window.waiting.pop(alike), strict=True)
        window.done |= dict(zip(numbers, self._encode_in_streams(images, options), strict=True))
        advance(len(numbers))

    def _batch_size(self, cells: int) -> int:
        """How many images of one shape are encoded at once."""
        if self.backend.options.device is not DeviceName.CPU or self.backend.options.hint is Hint.THROUGHPUT:
            self.backend.activate()  # only then is the number of streams known, and the largest batch
        return self.backend.streams * self._stream_batch(cells)

    def _stream_batch(self, cells: int) -> int:
        on_cpu = self.backend.options.device is DeviceName.CPU
        count = max(1, (BATCH_CELLS if on_cpu else GPU_BATCH_CELLS) // cells)
        return min(count, self.backend.max_batch or count)

    def lane_batch(self, size: tuple[int, int], options: EncodeOptions) -> int:
        """How many images of a loaded ``size`` one stream of the active backend encodes at once."""
        return self._stream_batch(self._cells(size, options))

    @property
    def _low_stride(self) -> int:
        return low_resolution_stride(self.manifest.architecture.patch)

    @property
    def _cell_bytes(self) -> int:
        return self.manifest.architecture.dim * 4 * len(self.manifest.facets)

    def _load(self, number: int, image: ImageLike, options: EncodeOptions) -> LoadedImage:
        return self.load(image, options, name=f"image {number}")

    def load(self, image: ImageLike, options: EncodeOptions, *, name: str) -> LoadedImage:
        """Read and resize one image, and check that it can be encoded; ``name`` is how messages call an array."""
        patch, fit = self.manifest.architecture.patch, options.fit
        adapt = partial(fit.resized, patch=patch)
        loaded = load_image(image, options.load_size, name=name, half=options.halve, adapt=adapt)
        pixels = fit.apply(loaded.pixels, patch, rounded_colour(self.manifest.normalisation.mean))
        if pixels.shape != loaded.pixels.shape:
            loaded = replace(loaded, pixels=pixels, resized=loaded.image_size)
            self._check_padding(loaded, options)
        half = None if loaded.half is None else (loaded.half.shape[0], loaded.half.shape[1])
        self.check_size(loaded.name, loaded.original_size, loaded.image_size, half, options)
        return loaded

    def _check_padding(self, image: LoadedImage, options: EncodeOptions) -> None:
        """Raise :class:`InputError` where this bundle cannot pad exactly."""
        if options.fit is Fit.PAD and self._padding is None:
            why = "has one fixed size" if not self.manifest.dynamic else f"has no {PADDING}"
            raise InputError(
                f"{image.name} would be padded to {image.image_size[0]}×{image.image_size[1]} (height × width), but "
                f"this bundle {why}: export it again, with --dynamic, or use fit 'pad_black', 'crop' or 'resize'"
            )

    def _cells(self, image_size: tuple[int, int], options: EncodeOptions) -> int:
        grid_h, grid_w = grid_size(image_size, self.manifest.architecture.patch, self.stride(options))
        return grid_h * grid_w

    def check_options(self, options: EncodeOptions) -> None:
        """What is wrong with the options is said once, not of every image."""
        self._check_stride(options.stride)
        if options.saliency is SaliencyMode.LOW_RESOLUTION and self.manifest.saliency_heads is not None:
            self._check_low_resolution()

    def _check_stride(self, stride: int | None) -> None:
        own, patch = self.manifest.stride, self.manifest.architecture.patch
        if stride is None or stride == own:
            return
        if stride < 1 or not self.manifest.dynamic or stride % own or patch % stride:
            allowed = [s for s in range(own, patch + 1, own) if patch % s == 0] if self.manifest.dynamic else [own]
            raise InputError(f"stride {stride}: this bundle can run at stride {' or '.join(map(str, allowed))}")

    def _check_low_resolution(self) -> None:
        """The weights are the same: every second cell of the stride-4 patch convolution is a cell at stride 8."""
        stride, low = self.manifest.stride, self._low_stride
        if not self.manifest.dynamic or low % stride:
            kind = f"stride {stride}" if self.manifest.dynamic else "one fixed size"
            fitting = [s for s in range(low, 0, -1) if low % s == 0]
            raise InputError(
                f"low-resolution saliency runs the encoder at half the image size and stride {low}, "
                f"but this bundle has {kind}: use saliency='full' (--saliency full), or export with "
                f"--dynamic and stride {' or '.join(map(str, fitting))}"
            )

    def check_size(
        self,
        name: str,
        original: tuple[int, int],
        shape: tuple[int, int],
        half: tuple[int, int] | None,
        options: EncodeOptions,
    ) -> None:
        """Raise :class:`InputError` if an image cannot be encoded: ``shape``, and ``half`` its size if that is given.

        ``original`` is its size before it was resized.
        """
        expected, stride = self.manifest.size, self.stride(options)
        if expected is not None and list(shape) != expected:
            raise InputError(
                f"{name} loads as {shape[0]}×{shape[1]} (height × width), but this bundle is built for "
                f"{expected[0]}×{expected[1]}: use load size {expected[0]}x{expected[1]}, or export with --dynamic"
            )
        self._check_patch(name, shape, half, stride)
        cells = self._most_cells(shape, half, options)
        self._check_bound(name, cells, original, shape, options)
        model = self.manifest.architecture
        unfused = self.manifest.fp32_parts(self.backend.options.precision).blocks  # attention there is written out
        fused = self.manifest.precision == "fp32" and not unfused
        needed = encoding_bytes(dim=model.dim, heads=model.heads, cells=cells, fused=fused)
        if self.backend.options.device is DeviceName.CPU and not fits(needed):  # a GPU's allocator says it by itself
            raise InputError(
                f"{name} loads as {shape[1]}×{shape[0]} pixels, which makes {too_much(needed, cells, stride)}: use a "
                "smaller size or a larger stride"
            )

    def _check_bound(
        self, name: str, cells: int, original: tuple[int, int], shape: tuple[int, int], options: EncodeOptions
    ) -> None:
        if self.max_cells is None or cells <= (bound := bound_on_cells(self.max_cells, original, shape)):
            return
        enlarged = bound < self.max_cells
        loads = f"is enlarged from {original[1]}×{original[0]} to" if enlarged else "loads as"
        needed = ENLARGED_SHARE * cells if enlarged else cells
        raise InputError(
            f"{name} {loads} {shape[1]}×{shape[0]} pixels, which makes "
            + too_many(cells, bound, self._smaller(original, options), needed)
        )

    def _most_cells(self, shape: tuple[int, int], half: tuple[int, int] | None, options: EncodeOptions) -> int:
        """The most cells of a pass over one image; without a load size low-resolution saliency halves nothing."""
        patch, stride = self.manifest.architecture.patch, self.stride(options)
        cells = math.prod(grid_size(shape, patch, stride))
        if options.saliency is SaliencyMode.LOW_RESOLUTION and self.manifest.saliency_heads is not None:
            cells = max(cells, math.prod(grid_size(half or shape, patch, self._low_stride)))
        return cells

    def _smaller(self, original: tuple[int, int], options: EncodeOptions) -> str:
        """What to do about an image of too many cells: the largest load size that would pass, if one would."""
        if not self.manifest.dynamic:
            return "export a smaller --size, or "
        size = self._largest_load_size(original, options)
        if size is None:
            return "no load size of so long an image passes, so crop it, or "
        return f"use load size {size} (--load-size {size}), or "

    def _largest_load_size(self, original: tuple[int, int], options: EncodeOptions) -> int | None:
        """The longest shorter side that is within the bound, or None."""

        def passes(side: int) -> bool:
            try:
                size = options.fit.fitted(options.fit.resized(loaded_size(original, side), patch), patch)
                half = half_size(size) if options.saliency is SaliencyMode.LOW_RESOLUTION else None
                self._check_patch("", size, half, self.stride(options))
            except InputError:
                return False
            bound = None if self.max_cells is None else bound_on_cells(self.max_cells, original, size)
            return bound is None or self._most_cells(size, half, options) <= bound

        patch = self.manifest.architecture.patch
        sides = [*range(patch, 4 * patch), *(4 * patch * 2**n for n in range(12))]
        low: int | None = max(filter(passes, sides), default=None)
        if low is None:
            return None
        too_large: int = bisect_left(range(low, 2 * low + 1), True, key=lambda side: not passes(side))
        return low + too_large - 1

    def check_cells(self, features: ImageRecord) -> None:
        """Raise :class:`InputError` for features of another run with more cells than this one would encode."""
        cells = math.prod(features.grid)
        if self.max_cells is not None and cells > self.max_cells:
            raise InputError(f"the features of {features.name} have " + too_many(cells, self.max_cells, ""))

    def _check_patch(self, name: str, shape: tuple[int, int], half: tuple[int, int] | None, stride: int) -> None:
        patch, context = self.manifest.architecture.patch, ""
        try:
            grid_size(shape, patch, stride)
            if half is not None:
                context = "low-resolution saliency halves the image: "
                grid_size(half, patch, self._low_stride)
        except InputError as error:
            raise InputError(f"{name}: {context}{error}{', or full saliency' if context else ''}") from error

    def encode_loaded(self, image: LoadedImage, options: EncodeOptions) -> Features:
        """Features of one image from :meth:`load`."""
        return self._encode_batch([image], options)[0]

    def _encode_in_streams(self, images: Sequence[LoadedImage], options: EncodeOptions) -> list[Features]:
        """Encode images of one shape, an equal part of them in each of the backend's streams."""
        streams = min(self.backend.streams, len(images))
        if streams == 1:
            return self._encode_batch(images, options)
        bounds = [len(images) * i // streams for i in range(streams + 1)]
        with ThreadPoolExecutor(streams) as pool:
            parts = pool.map(lambda low, high: self._encode_batch(images[low:high], options), bounds, bounds[1:])
            return [features for part in parts for features in part]

    def _encode_batch(self, batch: Sequence[LoadedImage], options: EncodeOptions) -> list[Features]:
        low = options.saliency is SaliencyMode.LOW_RESOLUTION
        halves = [image.pixels if image.half is None else image.half for image in batch] if low else []
        padded = batch[0].resized if options.fit is Fit.PAD else None
        seen = [image.pixels for image in batch]
        if self.manifest.dynamic:  # the table of one fixed size is that of the whole image
            seen = [options.fit.seen(pixels, self.manifest.architecture.patch) for pixels in seen]
        outputs, attention = self.outputs(seen, halves, self.stride(options), padded)
        features = []
        for i, image in enumerate(batch):
            record = self.record(image.name, image.original_size, image.image_size, options, resized=image.resized)
            tokens = {facet: rows[i] for facet, rows in outputs.items()}
            own = None if attention is None else attention[i].reshape(record.grid)
            features.append(Features.of(record, tokens, own, image.pixels))
        return features

    def stride(self, options: EncodeOptions) -> int:
        """Pixels between cells."""
        return options.stride or self.manifest.stride

    def record(
        self,
        name: str,
        original: tuple[int, int],
        size: tuple[int, int],
        options: EncodeOptions,
        detail: float | None = None,
        resized: tuple[int, int] | None = None,
    ) -> ImageRecord:
        """What an image of an ``original`` and a loaded ``size`` is, encoded."""
        return ImageRecord(
            saliency_mode=options.saliency,
            geometry=Geometry(original, size, self.manifest.architecture.patch, self.stride(options), resized),
            name=name,
            provenance=self.provenance,
            load_size=options.load_size,
            detail=detail,
        )

    def enlarge(self, attention: Float, small: tuple[int, int], grid: tuple[int, int]) -> Float:
        """See :class:`Passes`."""
        return np.stack([pillow_nearest(values.reshape(small), grid).ravel() for values in attention])

    def run(self, images: Sequence[Pixels], step: int, picture: tuple[int, int] | None = None) -> dict[str, Float]:
        """See :class:`Passes`."""
        size = images[0].shape[:2]
        used_h, used_w = self.used_size(size)
        pixels = _stack([image[:used_h, :used_w] for image in images])
        return self.backend.run({"images": pixels, **self.grid_inputs(size, step=step, picture=picture)})

    def used_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The upper-left part of an image that the encoder takes: all of it, or what whole patches cover."""
        if not self.manifest.dynamic:
            return size
        patch, stride = self.manifest.architecture.patch, self.manifest.stride
        used_h, used_w = (stride * (cells - 1) + patch for cells in grid_size(size, patch, stride))
        return used_h, used_w

    def grid_inputs(
        self, size: tuple[int, int], *, step: int, picture: tuple[int, int] | None = None
    ) -> dict[str, NDArray[Any]]:
        """What the encoder takes beside images of ``size``: nothing if static, else tables, rows, columns and carriers.

        Args:
            picture: ``(height, width)`` of the part that is not padding, where some is.
        """
        if not self.manifest.dynamic:
            return {}
        cells = Cells(size, self.manifest.architecture.patch, self.manifest.stride * step)
        grid, positions = cells.grid, self._positions(cells)
        if picture is not None:
            positions = {**positions, "positional": self._padded_table(cells, picture)}
        return {
            **positions,
            "rows": np.arange(grid[0], dtype=np.int64) * step,
            "cols": np.arange(grid[1], dtype=np.int64) * step,
        }

    def _make_padded_table(self, cells: Cells, picture: tuple[int, int]) -> Float:
        """The positional table with what makes padding exact: the graph adds it to the patches' embeddings."""
        if self._padding is None:
            raise InputError(f"this bundle has no {PADDING}, which padding needs: export it again")
        return self._positions(cells)["positional"] + padding_correction(
            self._padding, cells.grid, picture, cells.stride
        )


def _stack(images: Sequence[Pixels]) -> NDArray[np.uint8]:
    """``(B, H, W, 3)``; one whole image is not copied."""
    return np.ascontiguousarray(images[0])[None] if len(images) == 1 else np.stack(images)
