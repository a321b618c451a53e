"""Callables on batches of columns, which open their engine once in each process that calls them.

A batch is a mapping of columns, each an array with a row per item, as ``ray.data.Dataset.map_batches`` gives it. Images
are paths, the bytes of image files, or ``(H, W, 3)`` uint8 arrays. What comes back are the columns given, but no images
that are no paths, and those found; with ``arrow``, a table of plain lists, which Parquet holds for everybody. A row
whose image is broken has empty arrays, and says why in ``error``. The callables can be pickled, without their engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from facetrt.engine.engine import Engine
from facetrt.engine.features.features import Features
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSize
from facetrt.engine.serving.tasks import TASKS, Outcome, ServedTask, TaskName, TaskOptions, each_or_error
from facetrt.engine.serving.tensors import DTYPES
from facetrt.kernels.errors import FacetrtError, InputError, MissingDependencyError

Columns = Mapping[str, Any]
ERROR = "error"


class OnBatches(ABC):
    """What all of them do.

    Args:
        bundle: a folder that every process can read, or ``builtin``.
        engine: options of ``Engine.open``.
        columns: that hold the images.
        arrow: whether a ``pyarrow.Table`` comes back.
    """

    def __init__(self, bundle: str, columns: Sequence[str], engine: Mapping[str, Any] | None, *, arrow: bool) -> None:
        self.bundle, self.columns, self.engine_options = str(bundle), tuple(columns), dict(engine or {})
        self.arrow = arrow
        self._opened: Engine | None = None

    def __call__(self, batch: Columns) -> Any:
        """The batch with what was found: columns of arrays, or a table.

        Raises:
            InputError: a column is missing.
            MissingDependencyError: pyarrow is not installed, and a table was asked for.
        """
        for column in self.columns:
            if column not in batch:
                raise InputError(f"the batch has columns {', '.join(batch) or 'none'}: expected {column}")
        items = list(zip(*(list(batch[column]) for column in self.columns), strict=True))
        outcomes = self._run(items)
        kept = {name: values for name, values in batch.items() if name not in self.columns or _are_paths(values)}
        found = {**kept, **_columns(outcomes, self._nothing())}
        return arrow_table(found) if self.arrow else found

    @property
    def engine(self) -> Engine:
        """The one of this process; opened now if it was not."""
        if self._opened is None:
            self._opened = Engine.open(self.bundle, **self.engine_options)
        return self._opened

    @abstractmethod
    def _run(self, items: list[tuple[Any, ...]]) -> list[Outcome]:
        """What was found of each row, or why nothing was."""

    @abstractmethod
    def _nothing(self) -> dict[str, Any]:
        """What a row without results has, by column."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")} | {"_opened": None}


class Encode(OnBatches):
    """Descriptors of images: each facet ``(cells, C)`` float32, ``grid (2,)`` and ``saliency (cells,)``.

    Args:
        facets: all of the bundle's by default.
        column: that holds the images.
    """

    def __init__(
        self,
        bundle: str,
        *,
        facets: Iterable[str] | None = None,
        load_size: LoadSize = DEFAULT_SIZE,
        column: str = "image",
        engine: Mapping[str, Any] | None = None,
        arrow: bool = False,
    ) -> None:
        super().__init__(bundle, [column], engine, arrow=arrow)
        self.facets, self.load_size = None if facets is None else list(facets), load_size

    def _run(self, items: list[tuple[Any, ...]]) -> list[Outcome]:
        images = [_own(image) for (image,) in items]
        found = each_or_error(images, partial(self.engine.encode, images, load_size=self.load_size))
        return [each if isinstance(each, FacetrtError) else self._outputs(each) for each in found]

    def _nothing(self) -> dict[str, Any]:
        manifest = self.engine.manifest
        found: dict[str, Any] = {
            facet: np.empty((0, manifest.architecture.dim), np.float32) for facet in self.facets or manifest.facets
        }
        if manifest.saliency_heads is not None:
            found["saliency"] = np.empty(0, np.float32)
        return found | {"grid": np.zeros(2, np.int32)}

    def _outputs(self, features: Features) -> dict[str, NDArray[Any]]:
        facets = features.facets if self.facets is None else self.facets
        outputs: dict[str, NDArray[Any]] = {facet: features[facet] for facet in facets}
        if features.attention is not None:
            outputs["saliency"] = features.saliency.ravel()
        return outputs | {"grid": np.array(features.grid, np.int32)}


class _Task(OnBatches):
    """A task as it is served, without a server."""

    def __init__(
        self,
        bundle: str,
        task: TaskName,
        columns: Sequence[str],
        engine: Mapping[str, Any] | None,
        *,
        arrow: bool,
        **options: Any,
    ) -> None:
        super().__init__(bundle, columns, engine, arrow=arrow)
        self.options = TaskOptions((task,), **options)
        self._task: ServedTask[Any] | None = None

    def _run(self, items: list[tuple[Any, ...]]) -> list[Outcome]:
        if getattr(self, "_task", None) is None:
            self._task = TASKS[self.options.tasks[0]](self.engine, self.options)
        own = [tuple(map(_own, item)) for item in items]
        task: Any = self._task
        return list(task.run(own if len(self.columns) > 1 else [item for (item,) in own]))

    def _nothing(self) -> dict[str, Any]:
        outputs = TASKS[self.options.tasks[0]].outputs
        return {
            tensor.name: np.empty((0, *(max(side, 0) for side in tensor.shape[1:])), DTYPES[tensor.datatype])
            for tensor in outputs
        }


class Match(_Task):
    """Point pairs of two columns of images: the outputs of ``match`` in :mod:`facetrt.engine.serving.tasks`."""

    def __init__(
        self,
        bundle: str,
        *,
        columns: tuple[str, str] = ("image_a", "image_b"),
        engine: Mapping[str, Any] | None = None,
        arrow: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(bundle, TaskName.MATCH, columns, engine, arrow=arrow, **options)


class _OneColumn(_Task):
    """A task on one column of images."""

    task: ClassVar[TaskName]

    def __init__(
        self,
        bundle: str,
        *,
        column: str = "image",
        engine: Mapping[str, Any] | None = None,
        arrow: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(bundle, self.task, [column], engine, arrow=arrow, **options)


class Apply(_OneColumn):
    """What a learned model (``learned``, a file) finds in images: the outputs of ``apply``."""

    task = TaskName.APPLY


class Discover(_OneColumn):
    """The objects of images: the outputs of ``discover``."""

    task = TaskName.DISCOVER


def arrow_table(columns: Columns) -> Any:
    """Columns as a ``pyarrow.Table``: arrays are lists, of lists of fixed size if they have two axes.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        pa = import_module("pyarrow")
    except ImportError as error:
        raise MissingDependencyError("tables need pyarrow, which is not installed: pip install pyarrow") from error
    return pa.table({name: _arrow(pa, values) for name, values in columns.items()})


def _arrow(pa: Any, values: Sequence[Any]) -> Any:
    first = next(iter(values), None)
    if isinstance(first, list):
        return pa.array(list(values), pa.list_(pa.binary()))
    if not isinstance(first, np.ndarray):
        return pa.array(list(values), pa.string() if first is None else None)
    offsets = np.cumsum([0, *(len(value) for value in values)]).astype(np.int32)
    flat = pa.array(np.concatenate([value.reshape(-1) for value in values]))
    if first.ndim > 1:
        flat = pa.FixedSizeListArray.from_arrays(flat, first.shape[1])
    return pa.ListArray.from_arrays(offsets, flat)


def _own(image: Any) -> Any:
    """An object of its own, by which errors are told apart; NumPy's texts and bytes become Python's."""
    if isinstance(image, str):
        return _Path(image)
    return bytes(bytearray(image)) if isinstance(image, bytes) else np.asarray(image)


class _Path(str):
    """Equal texts may be one object; these are not."""

    __slots__ = ()


def _are_paths(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _columns(outcomes: Sequence[Outcome], nothing: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    columns = {
        name: _column([_row(empty if isinstance(found, FacetrtError) else found[name]) for found in outcomes])
        for name, empty in nothing.items()
    }
    return columns | {ERROR: _column([str(found) if isinstance(found, FacetrtError) else None for found in outcomes])}


def _row(value: NDArray[Any]) -> Any:
    """Files are a list of bytes, which Arrow knows, and an array of them is not."""
    return value.tolist() if value.dtype == np.object_ else value


def _column(values: Sequence[Any]) -> NDArray[Any]:
    """One object for each row, as sizes differ."""
    column = np.empty(len(values), np.object_)
    for row, value in enumerate(values):
        column[row] = value
    return column
