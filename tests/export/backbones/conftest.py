from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import registered
from helpers_backbones import all_facets, tiny, weights

from facetrt.export.backbones.model_spec import ModelSpec
from facetrt.export.export_options import ExportOptions
from facetrt.export.exporting import export_bundle, load_model

Made = tuple[ModelSpec, Path, Any]  # a model, its bundle of any size, and timm's network with its weights


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    """Tiny models of all families; each is exported once, which compares it with torch in float64."""
    folder = tmp_path_factory.mktemp("families")
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            spec = known.enter_context(registered(tiny(name)))
            path = weights(spec, folder)
            options = ExportOptions(facets=all_facets(spec), measure=False)
            export_bundle(spec.name, folder / name, options, weights=path)
            made[name] = spec, folder / name, load_model(spec, path)[0]
        return made[name]

    with ExitStack() as known:
        yield get
