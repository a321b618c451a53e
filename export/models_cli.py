"""``facetrt models``: the table of all models that can be exported. Parse, choose, print."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from facetrt.engine.cli.app import console
from facetrt.export.backbones.model_spec import ModelSpec
from facetrt.export.models import MODELS, find_model


def models(
    wanted: Annotated[
        str,
        typer.Argument(metavar="[FILTER]", help="Part of a name (ours, timm's or the hub's) or of a family's title."),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="All that is known of each, as JSON.")] = False,
) -> None:
    """List the models that can be exported: patch, size, registers, strides, licence, where weights come from."""
    found = matching(wanted)
    if as_json:
        console.print_json(json.dumps([described(spec) for spec in found]))
        return
    for family in dict.fromkeys(spec.family.name for spec in found):
        console.print(_table([spec for spec in found if spec.family.name == family]))


def _table(specs: list[ModelSpec]) -> Table:
    """Models of one family."""
    family = specs[0].family
    sources = " or ".join(dict.fromkeys(weights_from(spec) for spec in specs))
    title = f"{family.title}: {family.licence}; weights: {sources}; compared with {family.compared}"
    table = Table(title=title, title_justify="left", min_width=72)
    table.add_column("model", no_wrap=True)
    for name in ("patch", "channels", "blocks", "registers", "strides"):
        table.add_column(name)
    for spec in specs:
        registers = str(spec.prefix - 1) if spec.prefix else escape("no [CLS]")
        numbers = (spec.patch, spec.dim, spec.depth)
        strides = " ".join(map(str, spec.strides))
        table.add_row(spec.name, *map(str, numbers), registers, strides)
    return table


def matching(wanted: str) -> list[ModelSpec]:
    """The models whose names or family match, in order.

    Raises:
        InputError: none does; with the closest names, or the reason for one that is refused.
    """
    folded = wanted.lower()
    found = [spec for spec in MODELS.values() if folded in _searched(spec)]
    return found or [find_model(wanted)]


def _searched(spec: ModelSpec) -> str:
    return " ".join((spec.name, spec.description, spec.family.title, *spec.aliases)).lower()


def weights_from(spec: ModelSpec) -> str:
    """Where a model's weights come from, in a few words."""
    if spec.name == "builtin":
        return "part of facetrt"
    if spec.url is not None:
        return "publisher"
    if spec.timm_name is not None:
        return "timm" if spec.file is None else "publisher (account needed) or timm"
    return "your own"


def described(spec: ModelSpec) -> dict[str, Any]:
    """A model as data."""
    return {
        "name": spec.name,
        "family": spec.family.name,
        "description": spec.description,
        "aliases": list(spec.aliases),
        "patch": spec.patch,
        "channels": spec.dim,
        "blocks": spec.depth,
        "heads": spec.heads,
        "registers": max(0, spec.prefix - 1),
        "cls": spec.prefix > 0,
        "strides": list(spec.strides),
        "normalisation": {"mean": list(spec.normalisation[0]), "std": list(spec.normalisation[1])},
        "defaults": spec.defaults,
        "published_defaults": list(spec.published_defaults),
        "licence": spec.family.licence,
        "url": spec.url,
        "file": spec.file_name,
        "timm": spec.timm_name,
        "hub": list(spec.hub),
        "compared_with": spec.family.compared,
    }
