"""Reader of co-segmentation data sets: sets of images with one binary mask each.

Two layouts are accepted, wherever the data set comes from:

* ``images/SET/NAME.jpg`` with ``masks/SET/NAME.png``; the folders may also be called as in :data:`IMAGE_FOLDERS` and
  :data:`MASK_FOLDERS`.
* ``SET/NAME.jpg`` with ``SET/GroundTruth/NAME.png`` (as MSRC and Internet300 are distributed with Rubinstein et al.'s
  code), where ``GroundTruth`` may be any of :data:`MASK_FOLDERS`.

Image and mask have one stem, or the mask's ends in ``_GT``. Masks are read by :func:`reading.read_mask`; an all-black
one says that the image does not show the object.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from facetrt.engine.evaluation.datasets.reading import image_size, list_folders, list_images, require
from facetrt.kernels.errors import InputError, MissingFileError

IMAGE_FOLDERS = ("images", "Images", "JPEGImages", "img")
MASK_FOLDERS = ("masks", "GroundTruth", "Groundtruth", "ground_truth", "ground-truth", "GT", "gt")
MASK_SUFFIX = "_GT"


@dataclass(frozen=True)
class ImageSet:
    """Images that share an object; ``masks[i]`` belongs to ``images[i]``."""

    name: str
    images: list[Path]
    masks: list[Path]


def read_image_sets(root: Path, data_set: str, limit: int | None = None) -> list[ImageSet]:
    """The sets of a co-segmentation data set, sorted by name; the first ``limit`` images of each.

    Raises:
        MissingFileError: not such a folder; an image without a mask or a mask without an image.
        InputError: image and mask of different size.
    """
    require(root, data_set, "images and masks")
    found = [
        _read_set(images, masks, limit, data_set)
        for images, masks in _set_folders(root)
        if images.is_dir() and list_images(images)
    ]
    if not found:
        raise MissingFileError(
            f"{root} is not {data_set}: expected images/SET/NAME.jpg with masks/SET/NAME.png, or SET/NAME.jpg with "
            "SET/GroundTruth/NAME.png"
        )
    return found


def _set_folders(root: Path) -> list[tuple[Path, Path]]:
    """``(images, masks)`` folder of each set."""
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    masks = next((root / name for name in MASK_FOLDERS if (root / name).is_dir()), None)
    if images is not None and masks is not None:
        return [(folder, masks / folder.name) for folder in list_folders(images)]
    inside = [(folder, name) for folder in list_folders(root) for name in MASK_FOLDERS if (folder / name).is_dir()]
    return [(folder, folder / name) for folder, name in inside]


def _read_set(images: Path, masks: Path, limit: int | None, data_set: str) -> ImageSet:
    require(masks, data_set, f"the masks of {images}")
    by_stem = {path.stem.removesuffix(MASK_SUFFIX): path for path in list_images(masks)}
    found = list_images(images)
    lonely = sorted(set(by_stem) - {path.stem for path in found})
    if lonely:
        raise MissingFileError(f"{by_stem[lonely[0]]} has no image: {data_set} has {images / lonely[0]}.* with it")
    chosen = found[:limit]
    return ImageSet(images.name, chosen, [_mask_of(path, by_stem, masks, data_set) for path in chosen])


def _mask_of(image: Path, by_stem: dict[str, Path], masks: Path, data_set: str) -> Path:
    mask = by_stem.get(image.stem)
    if mask is None:
        raise MissingFileError(f"{masks / image.stem}.png is missing: {data_set} has the mask of {image} there")
    size, expected = image_size(mask), image_size(image)
    if size != expected:
        raise InputError(
            f"{mask} has {size[1]}×{size[0]} pixels and {image} {expected[1]}×{expected[0]} (width × height): image "
            "and annotation must have one size"
        )
    return mask
