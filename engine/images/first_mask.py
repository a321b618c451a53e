"""The mask that a video begins with, as annotation tools, paint programs and cut-out services write it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facetrt.engine.images.label_images import (
    GREY_MODES,
    VOID,
    Labels,
    colour_codes,
    labels_of,
    open_label_image,
    palette_indices,
)
from facetrt.kernels.errors import InputError

LOSSY = ("JPEG", "MPO", "AVIF", "JPEG2000")
MOST_COLOURS = 64  # of objects; a picture with more is a photo
FEW = 4  # colours that are all objects, however small
MOST_SHADES = 16  # of a grey mask without areas of one value
NEARLY = 24  # a lossy format's grey may be as far from grey, and its black from black
MOST_BETWEEN = 0.1  # of the pixels may be neither dark nor bright in a lossy mask
MOST_MIXED = 0.5  # of the pixels may have a colour that fills no area; of photos nearly all have
ADVICE = "save it as PNG without smoothing, 0 (black) for the background and one value or colour for each object"


def read_first_mask(path: Path) -> Labels:
    """Labels of the first frame, ``(H, W)``: 0 background.

    - Palette images (DAVIS): the indices. 255 is void, which becomes background, unless it is the only label.
    - Grey images, also of 16 bits: the values; white alone is object 1. Beside the labels 1, 2, … alone 255 is void.
    - Colours: black is the background, every other colour an object, numbered by 0xRRGGBB; those of the palette of VOC
      and DAVIS keep its indices.
    - Alpha that varies: what is opaque is the object, or the objects if it has a few colours.
    - Lossy or smoothed grey masks are cut at half of their largest value. Warnings say what was taken for what.

    Raises:
        MissingFileError, InputError: no such file, no image, no object in it, or a picture that is no mask.
    """
    image = open_label_image(path)
    labels = _labels(image, path, lossy=image.format in LOSSY or _is_lossy_webp(image, path))
    if not labels.any():
        raise InputError(f"{path} shows no object: expected 0 for background and 1, 2, … (or 255 alone) for objects")
    return labels


def _is_lossy_webp(image: Image.Image, path: Path) -> bool:
    if image.format != "WEBP":
        return False
    with path.open("rb") as file:
        return b"VP8 " in file.read(1 << 16)


def _labels(image: Image.Image, path: Path, *, lossy: bool) -> Labels:
    if image.mode == "F":
        raise InputError(f"{path} holds floats: {ADVICE}")
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() != alpha.max():
            return _opaque(np.asarray(image.convert("RGBA")), path)
        image = image if image.mode == "P" else image.convert("L" if image.mode in ("LA", "La") else "RGB")
    if image.mode == "P" and _is_label_palette(image):
        return _without_void(labels_of(image))
    if image.mode in GREY_MODES:
        return _grey(labels_of(image), path, lossy=lossy)
    colours = np.asarray(image.convert("RGB"))
    spread = int((colours.max(axis=2).astype(int) - colours.min(axis=2)).max())
    if spread <= (NEARLY if lossy else 0):
        return _grey(np.asarray(image.convert("L")).astype(np.int64), path, lossy=lossy)
    if lossy:
        raise InputError(f"{path} shows colours in a format that blurs them ({image.format}): {ADVICE}")
    return _colours(colours, path)


def _is_label_palette(image: Image.Image) -> bool:
    """Whether indices are labels: 0 is black, and it is no photo or smoothed mask that a program gave a palette."""
    used = np.unique(np.asarray(image))
    shown = np.array(image.getpalette("RGB") or [], np.int64).reshape(-1, 3)
    if len(shown) <= used.max(initial=0) or shown[0].any():
        return not len(shown)
    grey = (shown[used] == shown[used][:, :1]).all()
    return len(used) <= (MOST_SHADES if grey else MOST_COLOURS) or not grey


def _without_void(labels: Labels) -> Labels:
    """255 is void, unless it is the only label: then it is object 1, as in binary masks."""
    binary = bool(np.isin(labels, (0, VOID)).all())
    return np.where(labels == VOID, int(binary), labels)


def _grey(values: Labels, path: Path, *, lossy: bool) -> Labels:
    used = np.unique(values)
    objects = used[used > 0]
    numbered = objects[objects != VOID]
    if not lossy and (numbered == np.arange(1, len(numbered) + 1)).all():  # 0, 1, 2, …
        if len(numbered) < len(objects) and len(numbered):
            warnings.warn(f"{path}: 255 is taken for void, as the other labels are 1 to {len(numbered)}", stacklevel=2)
        return _without_void(values)
    if not lossy and len(objects) == 1:
        return np.where(values == used.max(), 1, 0) if used.max() in (VOID, 65535) else values
    if not lossy and not _is_smoothed(values, used):
        return values
    return _at_half(values, path, lossy=lossy)


def _is_smoothed(values: Labels, used: NDArray[np.int64]) -> bool:
    """Whether some values are mixtures: they lie between others and fill no area of their own."""
    solid = np.unique(values[_interior(values)])
    rest = used[~np.isin(used, solid)]
    mixed = rest[(rest > solid.min(initial=0)) & (rest < solid.max(initial=0))]
    return len(mixed) > 0 or (len(rest) > 0 and len(used) > MOST_SHADES)


def _interior(values: Labels) -> NDArray[np.bool_]:
    """Pixels whose eight neighbours have their value."""
    height, width = values.shape
    padded = np.pad(values, 1, mode="edge")
    inside = np.ones(values.shape, np.bool_)
    for y in range(3):
        for x in range(3):
            inside &= padded[y : y + height, x : x + width] == values
    return inside


def _at_half(values: Labels, path: Path, *, lossy: bool) -> Labels:
    largest = int(values.max())
    if lossy:
        if largest <= NEARLY:
            return np.zeros_like(values)
        between = ((values > largest / 4) & (values < 3 * largest / 4)).mean()
        if between > MOST_BETWEEN:
            raise InputError(f"{path} is no mask: {between:.0%} of it is neither dark nor bright: {ADVICE}")
    else:
        solid, counts = np.unique(values[_interior(values)], return_counts=True)
        areas = solid[(solid > 0) & (counts > values.size / 500)]
        if 1 < len(areas) <= MOST_SHADES:
            raise InputError(
                f"{path} has {len(areas)} grey areas with smooth edges, which hide where they end: {ADVICE}"
            )
    shades = len(np.unique(values))
    warnings.warn(f"{path} has {shades} shades of grey: above half of the brightest is the object", stacklevel=2)
    return (values > largest / 2).astype(np.int64)


def _opaque(pixels: NDArray[np.uint8], path: Path) -> Labels:
    """Objects of ``(H, W, 4)`` RGBA: by colour where a few were painted, else one, cut out of a photo."""
    opaque = pixels[..., 3] > 127
    colours = pixels[..., :3] * opaque[..., None].astype(np.uint8)
    codes = colour_codes(colours)
    painted = np.unique(codes[opaque])
    if len(painted) == 1:
        return opaque.astype(np.int64)
    if len(painted) > MOST_COLOURS or _mixed_share(codes) > MOST_MIXED:
        warnings.warn(f"{path}: what is opaque is taken for one object", stacklevel=2)
        return opaque.astype(np.int64)
    return _colours(colours, path)


def _mixed_share(codes: Labels) -> float:
    """The share of the pixels whose colour fills no area."""
    solid = np.unique(codes[_interior(codes)])
    return float((~np.isin(codes, solid)).mean())


def _colours(colours: NDArray[np.uint8], path: Path) -> Labels:
    indices = palette_indices(colours)
    if indices is not None:
        return _without_void(indices)
    codes = _without_mixtures(colour_codes(colours), path)
    background = _background(codes, path)
    objects = np.array([code for code in np.unique(codes) if code != background])
    said = ", ".join(f"{number} is #{code:06x}" for number, code in enumerate(objects[:9].tolist(), 1))
    warnings.warn(f"{path}: each colour is an object: {said}{', …' if len(objects) > 9 else ''}", stacklevel=2)
    return np.where(codes == background, 0, np.searchsorted(objects, codes) + 1)


def _without_mixtures(codes: Labels, path: Path) -> Labels:
    """The colours of smoothed edges become the nearest one that fills an area."""
    if len(np.unique(codes)) <= FEW:
        return codes
    solid = np.unique(codes[_interior(codes)])
    mixed = ~np.isin(codes, solid)
    if len(solid) > MOST_COLOURS or mixed.mean() > MOST_MIXED or not len(solid):
        raise InputError(f"{path} is no mask: it has {len(np.unique(codes)):,} colours: {ADVICE}")
    if mixed.any():
        warnings.warn(f"{path} has smoothed edges: their colours become the nearest that fills an area", stacklevel=2)
    distance = np.square(_rgb(codes[mixed])[:, None] - _rgb(solid)).sum(axis=2)
    cleared = codes.copy()
    cleared[mixed] = solid[distance.argmin(axis=1)]
    return cleared


def _rgb(codes: Labels) -> NDArray[np.int64]:
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)


def _background(codes: Labels, path: Path) -> int:
    """Black; without it the colour that most of the edge has."""
    if not codes.all():
        return 0
    edge = np.concatenate([codes[0], codes[-1], codes[:, 0], codes[:, -1]])
    colours, counts = np.unique(edge, return_counts=True)
    background = int(colours[counts.argmax()])
    warnings.warn(f"{path} has no black: #{background:06x}, around the edge, is the background", stacklevel=2)
    return background
