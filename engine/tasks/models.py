"""What a set of images taught, for images to come: centroids, what they stand for, and the encoder they belong to.

A model is learned from a few images or frames and applied to any number of others by ``Engine.apply``, one by one.
Applied to the images it was learned from, it gives them the labels that learning gave. Its file is an NPZ of plain
arrays, one of them JSON, without pickle; whatever else lies in it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.features.features import Features, Float
from facetrt.engine.images.loading import LoadSize, check_load_size
from facetrt.engine.tasks.cosegmentation import (
    CosegmentOptions,
    HostPicture,
    Mask,
    Masks,
    Picture,
    mask_of_labels,
    nearest_of_groups,
)
from facetrt.engine.tasks.descriptors import Rows, distances_to, unit_rows
from facetrt.engine.tasks.model_files import METADATA, Arrays, parse_array, parse_metadata, read_members, write_model
from facetrt.engine.tasks.parts import PartMap, Parts, PartsOptions, energy_of, map_of_energy, part_energy
from facetrt.engine.tasks.refinement import Refinement, Refiner, refine_labels
from facetrt.engine.tasks.smoothing import Smoother
from facetrt.kernels.errors import InputError, reading
from facetrt.kernels.kmeans import nearest
from facetrt.kernels.log_bin import check_hierarchy

Options = Mapping[str, float | int | bool]

SCHEMA = 1
MAX_CENTROIDS = 1024


@dataclass(frozen=True, eq=False)
class Model:
    """What both kinds of models have in common.

    Attributes:
        facet: that centroids and cells are compared in.
        encoder: name of the model that encoded the images; ``encoder_sha256`` tells exactly which.
        stride: between cells, and ``load_size``: how the images were loaded. Images to come are loaded alike.
        options: of the clustering and the vote.
        images: how many it was learned from.
    """

    kind: ClassVar[str]

    facet: str
    encoder: str
    encoder_sha256: str
    stride: int
    load_size: LoadSize
    options: Options = field(repr=False)
    images: int

    def __post_init__(self) -> None:
        for name in ("facet", "encoder", "encoder_sha256"):
            _check(isinstance(getattr(self, name), str) and getattr(self, name) != "", name, self, "a text")
        for name in ("stride", "images"):
            _check(type(getattr(self, name)) is int and getattr(self, name) > 0, name, self, "a positive number")
        check_load_size(self.load_size)
        plain = isinstance(self.options, Mapping) and all(
            isinstance(key, str) and (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)))
            for key, value in self.options.items()
        )
        _check(plain, "options", self, "finite numbers by name")
        check_hierarchy(self.hierarchy)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            MissingFileError: there is no such file.
            InputError: a damaged or foreign file, a model of the other kind or of another schema.
        """
        model = load_model(path)
        if not isinstance(model, cls):
            raise InputError(f"{path} holds a {model.kind} model: expected a {cls.kind} model")
        return model

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the model; the file is complete or not there.

        Raises:
            OutputError: the file exists and ``force`` is off, ``force`` would replace something else than a model, or
                it cannot be written.
        """
        metadata = {"schema": SCHEMA, "kind": self.kind, **self._metadata()}
        write_model(Path(path), metadata, self._arrays(), force=force)

    def apply(self, features: Features, refine: Refinement, smoother: Smoother | None = None) -> Mask | PartMap:
        """See ``Engine.apply``."""
        distances, squares = distances_to(self._rows(features), self.every_centroid)
        picture = HostPicture(features, self.facet, self.hierarchy)
        return self.decide(picture, distances, squares, refine, smoother)

    @property
    def every_centroid(self) -> Float:
        """What cells are compared with, ``(k, C)``."""
        raise NotImplementedError

    def decide(
        self,
        picture: Picture,
        distances: Float,
        squares: Float,
        refine: Refinement,
        smoother: Smoother | None,
        refiner: Refiner = refine_labels,
    ) -> Mask | PartMap:
        """What the model finds in an image, wherever its descriptors lie.

        Args:
            distances: ``(k, cells)`` squared, of unit descriptors to :attr:`every_centroid`; ``squares (cells,)``, the
                descriptors' squared lengths: 1 but for rounding, or 0.
            refiner: runs the CRF.
        """
        raise NotImplementedError

    def check_width(self, width: int) -> None:
        """Raise :class:`InputError` unless descriptors of ``width`` numbers can be compared with the centroids."""
        own = self.every_centroid.shape[1]
        if width != own:
            raise InputError(f"the model's centroids have {own} numbers and {self.facet} has {width}")

    def _metadata(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _metadata_names()} | {"options": dict(self.options)}

    def _arrays(self) -> Arrays:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _metadata_names()}

    @property
    def hierarchy(self) -> int:
        """Levels of log-binning of the descriptors; 0 for none."""
        return int(self.options.get("hierarchy", 0))

    def _rows(self, features: Features) -> Rows:
        """Unit descriptors of the cells, ``(cells, C)``, binned if those of the model are."""
        rows = unit_rows(features, self.facet, self.hierarchy)
        if not np.isfinite(features[self.facet]).all():
            raise InputError(nonfinite(features.name))
        self.check_width(rows.shape[1])
        return rows


@dataclass(frozen=True, eq=False)
class SegmentationModel(Model):
    """A co-segmentation to apply: ``centroids (k, C)`` float32 of unit descriptors, and which of them are foreground.

    ``salient_labels`` int64, ascending, at least one.
    """

    kind = "segmentation"

    centroids: Float = field(repr=False)
    salient_labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_centroids("centroids", self.centroids, least=1)
        labels = self.salient_labels
        if labels.dtype != np.int64 or labels.ndim != 1 or not _ascending_below(labels, len(self.centroids)):
            raise InputError(
                f"salient_labels are {labels!r:.200}: expected int64 numbers of some of the {len(self.centroids)} "
                "clusters, ascending, at least one"
            )

    @property
    def every_centroid(self) -> Float:
        return self.centroids

    def decide(
        self,
        picture: Picture,
        distances: Float,
        squares: Float,
        refine: Refinement,
        smoother: Smoother | None,
        refiner: Refiner = refine_labels,
    ) -> Mask:
        """See :meth:`Model.decide`."""
        image, salient = picture.record, self.salient_labels
        if image.why_empty is not None:
            return mask_of_labels(picture, None, salient, refine, None)
        if smoother is not None:
            distances = smoother.smooth(distances.reshape(-1, *image.grid)).reshape(distances.shape)
        labels = nearest(distances, self.centroids, squares)
        all_salient = len(salient) == len(self.centroids)
        of_groups = None if all_salient else lambda: nearest_of_groups(distances, salient)
        return mask_of_labels(picture, labels, salient, refine, of_groups, refiner)


@dataclass(frozen=True, eq=False)
class PartsModel(Model):
    """Parts to apply: ``centroids (num_parts, C)`` and ``background_centroids (b, C)``, float32; b may be 0.

    A cell belongs to the nearest of all of them.
    """

    kind = "parts"

    centroids: Float = field(repr=False)
    background_centroids: Float = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_centroids("centroids", self.centroids, least=1)
        _check_centroids("background_centroids", self.background_centroids, least=0)
        if self.centroids.shape[1] != self.background_centroids.shape[1]:
            raise InputError(
                f"centroids have shape {self.centroids.shape} and background_centroids "
                f"{self.background_centroids.shape}: expected rows of one length"
            )

    @property
    def num_parts(self) -> int:
        """Number of part labels."""
        return len(self.centroids)

    @property
    def every_centroid(self) -> Float:
        """Those of the parts, then those of the background."""
        return np.concatenate([self.centroids, self.background_centroids])

    def apply(self, features: Features, refine: Refinement, smoother: Smoother | None = None) -> PartMap:
        """See ``Engine.apply``."""
        energy = part_energy(features, self._rows(features), self.centroids, self.background_centroids)
        picture = HostPicture(features, self.facet, self.hierarchy)
        return self._decide(picture, energy, refine, smoother, refine_labels)

    def decide(
        self,
        picture: Picture,
        distances: Float,
        squares: Float,
        refine: Refinement,
        smoother: Smoother | None,
        refiner: Refiner = refine_labels,
    ) -> PartMap:
        """See :meth:`Model.decide`."""
        energy = energy_of(distances, self.num_parts, picture.record.grid)
        return self._decide(picture, energy, refine, smoother, refiner)

    def _decide(
        self, picture: Picture, energy: Float, refine: Refinement, smoother: Smoother | None, refiner: Refiner
    ) -> PartMap:
        if smoother is not None and picture.record.why_empty is None:
            energy = smoother.smooth(energy)
        return map_of_energy(picture, energy, self.num_parts, refine, refiner)


KINDS: dict[str, type[SegmentationModel] | type[PartsModel]] = {
    kind.kind: kind for kind in (SegmentationModel, PartsModel)
}


def segmentation_model(masks: Masks, features: Sequence[Features], options: CosegmentOptions) -> SegmentationModel:
    """The model of a co-segmentation of ``features`` with ``options``.

    Raises:
        InputError: no cluster was salient.
    """
    salient = masks.votes.salient_labels
    if not salient.size:
        raise InputError(
            "no cluster was salient in enough images, so a model would find nothing: try a lower saliency_threshold or "
            "votes_percentage, or other images"
        )
    return SegmentationModel(
        **_learned(features, options), centroids=masks.clustering.centroids, salient_labels=salient.astype(np.int64)
    )


def parts_model(parts: Parts, features: Sequence[Features], options: PartsOptions) -> PartsModel:
    """The model of a part co-segmentation of ``features`` with ``options``.

    Raises:
        InputError: everything was background.
    """
    if not parts.num_parts:
        raise InputError(
            "everything was background, so a model would find nothing: try a lower saliency_threshold or "
            "votes_percentage, or other images"
        )
    return PartsModel(
        **_learned(features, options), centroids=parts.centroids, background_centroids=parts.background_centroids
    )


def load_model(path: str | Path) -> SegmentationModel | PartsModel:
    """The model in a file, of either kind; errors as :meth:`Model.load`."""
    members = read_members(Path(path))
    try:
        with reading(path, "a model of facetrt"):
            return _parse(members)
    except InputError as error:
        raise InputError(f"{path} is not a model that can be used: {error}") from error


def _parse(members: Mapping[str, bytes]) -> SegmentationModel | PartsModel:
    metadata = parse_metadata(members)
    kind, schema = metadata.pop("kind", None), metadata.pop("schema", None)
    if schema != SCHEMA or kind not in list(KINDS):
        raise InputError(
            f"kind {kind!r:.50} of schema {schema!r:.50}: this version of facetrt reads "
            f"{' and '.join(KINDS)} of schema {SCHEMA}; learn it again"
        )
    return _build(KINDS[kind], metadata, members)


def _learned(features: Sequence[Features], options: CosegmentOptions | PartsOptions) -> dict[str, Any]:
    """The fields of :class:`Model`; images of a set are loaded alike, so the first tells how."""
    example = features[0]
    named = {
        name: value
        for name, value in asdict(options).items()
        if isinstance(value, (int, float)) and name != "load_size"
    }
    return {
        "facet": options.facet,
        "encoder": example.provenance.model,
        "encoder_sha256": example.provenance.encoder_sha256,
        "stride": example.stride,
        "load_size": check_load_size(example.load_size),
        "options": named,
        "images": len(features),
    }


def nonfinite(name: str) -> str:
    """The message for descriptors that no model can be applied to."""
    return f"{name} has NaN or infinite descriptors: expected finite ones"


def _metadata_names() -> list[str]:
    return [f.name for f in fields(Model)]


def _check(holds: bool, name: str, model: Model, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {getattr(model, name)!r:.200}: expected {expected}")


def _check_centroids(name: str, values: Float, *, least: int) -> None:
    fits = values.dtype == np.float32 and values.ndim == 2 and least <= len(values) <= MAX_CENTROIDS
    if not fits or not values.shape[1]:
        raise InputError(
            f"{name} are {values.dtype} of shape {values.shape}: expected float32 of shape (k, C) with k from {least} "
            f"to {MAX_CENTROIDS}"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{name} hold NaN or infinite values: expected finite ones")


def _ascending_below(labels: NDArray[np.int64], count: int) -> bool:
    return bool(labels.size and labels[0] >= 0 and labels[-1] < count and (np.diff(labels) > 0).all())


DTYPES = {"centroids": "<f4", "background_centroids": "<f4", "salient_labels": "<i8"}


def _build(
    kind: type[SegmentationModel] | type[PartsModel], metadata: dict[str, Any], members: Mapping[str, bytes]
) -> SegmentationModel | PartsModel:
    names = [f.name for f in fields(kind) if f.name not in _metadata_names()]
    expected = {f"{name}.npy" for name in (METADATA, *names)}
    if set(members) != expected:
        raise InputError(f"missing or unknown members: {', '.join(sorted(set(members) ^ expected)):.200}")
    if set(metadata) != set(_metadata_names()):
        raise InputError(f"missing or unknown fields: {', '.join(sorted(set(metadata) ^ set(_metadata_names()))):.200}")
    load_size = metadata["load_size"]
    metadata["load_size"] = tuple(load_size) if isinstance(load_size, list) else load_size
    arrays: dict[str, Any] = {name: parse_array(name, members, DTYPES[name]) for name in names}
    return kind(**metadata, **arrays)
