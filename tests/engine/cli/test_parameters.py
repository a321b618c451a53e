"""Signatures, dataclasses and the command line say the same of every option: names, defaults, bounds, explanations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from facetrt.engine import Engine, fit_pca, similarity_map
from facetrt.engine.backends.run_options import RunOptions
from facetrt.engine.cli.discovery import DiscoverOptions
from facetrt.engine.cli.inspection import Comparison
from facetrt.engine.cli.main import COMMANDS
from facetrt.engine.cli.parameters import Presets, expanded, given
from facetrt.engine.encoding.encoder import EncodeOptions
from facetrt.engine.evaluation.catalogue import EVALUATIONS
from facetrt.engine.images.loading import DEFAULT_SIZE, LoadSizeChoice
from facetrt.engine.settings import FacetChoice, Option, Setting, check, options_of
from facetrt.engine.tasks.cosegmentation import CosegmentOptions
from facetrt.engine.tasks.discovery.catalogue import METHODS as DISCOVERY
from facetrt.engine.tasks.discovery.found_head import TrainingOptions
from facetrt.engine.tasks.matching import MatchOptions
from facetrt.engine.tasks.parts import PartsOptions
from facetrt.engine.tasks.pca import PcaOptions
from facetrt.engine.tasks.similarity import SimilarityOptions
from facetrt.engine.video.propagation import PropagateOptions
from facetrt.engine.video.stream import StreamOptions
from facetrt.engine.video.tracking import TrackOptions
from facetrt.export.export_options import ExportOptions
from facetrt.export.plans import PlanOptions
from facetrt.kernels.errors import InputError

ALONE = {"load_size"}  # of fit_pca and similarity_map, which take features
METHODS: list[tuple[Callable[..., Any], list[type], set[str]]] = [
    (Engine.open, [RunOptions], set()),
    (Engine.encode, [EncodeOptions], set()),
    (Engine.encode_iter, [EncodeOptions], set()),
    (Engine.encode_on_device, [EncodeOptions], {"fit"}),  # images are fitted on the host
    (Engine.extract, [EncodeOptions], set()),
    (Engine.stream, [EncodeOptions, StreamOptions], set()),
    (Engine.match, [MatchOptions], set()),
    (Engine.cosegment, [CosegmentOptions], set()),
    (Engine.segment_parts, [PartsOptions], set()),
    (Engine.discover, [DiscoverOptions], set()),
    (Engine.tracker, [TrackOptions], set()),
    (Engine.propagator, [PropagateOptions], set()),
    (fit_pca, [PcaOptions], ALONE),
    (similarity_map, [SimilarityOptions], ALONE),
]
ENGINE_ONLY = {"progress", "on_broken", "facets", "force", "facet"}  # not options, or (facet) told apart below
COMMAND_OPTIONS = {
    "match": [MatchOptions, RunOptions],
    "cosegment": [CosegmentOptions, RunOptions],
    "parts": [PartsOptions, RunOptions],
    "discover": [DiscoverOptions, RunOptions],
    "found-head": [TrainingOptions, RunOptions],
    "pca": [PcaOptions, RunOptions],
    "similarity": [SimilarityOptions, RunOptions],
    "facets": [Comparison, RunOptions],
    "extract": [EncodeOptions, RunOptions],
    "info": [RunOptions],
    "demo": [RunOptions],
    "video": [RunOptions],
    "eval": [RunOptions],
    "export": [ExportOptions, PlanOptions],
}
OTHERS = {("similarity", "top_k"): 5}  # defaults that a command has of its own


@pytest.mark.parametrize(("method", "kinds", "left_out"), METHODS, ids=lambda value: getattr(value, "__name__", None))
def test_a_signature_has_the_options_of_its_dataclass(
    method: Callable[..., Any], kinds: list[type], left_out: set[str]
) -> None:
    parameters = inspect.signature(method).parameters
    options = {name: option for kind in kinds for name, option in options_of(kind).items() if name not in left_out}
    assert set(options) <= set(parameters)
    keywords = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords - ENGINE_ONLY <= set(options)
    for name, option in options.items():
        default = parameters[name].default
        if name == "facet":
            assert default in (None, inspect.Parameter.empty) and option.default == ""
        else:
            assert default == option.default, name


@pytest.mark.parametrize("method", [method for method, _, _ in METHODS], ids=lambda method: method.__name__)
def test_a_docstring_explains_every_option(method: Callable[..., Any]) -> None:
    kinds = next(kinds for each, kinds, _ in METHODS if each is method)
    text = inspect.getdoc(method) or ""
    if "Like :meth:`encode`" in text or ":meth:`cosegment` also has" in text:
        text += (inspect.getdoc(Engine.encode) or "") + (inspect.getdoc(Engine.cosegment) or "")
    text += inspect.getdoc(Engine) or ""
    names = [name for kind in kinds for name in options_of(kind) if name in inspect.signature(method).parameters]
    assert not [name for name in names if not re.search(rf"``{name}``|\b{name}: ", text)]


@pytest.mark.parametrize("command", COMMAND_OPTIONS)
def test_a_command_has_the_options_of_its_dataclasses(command: str) -> None:
    found = {parameter.name: parameter for parameter in loaded(command).params}
    for name, option in ((n, o) for kind in COMMAND_OPTIONS[command] for n, o in options_of(kind).items()):
        parameter = found[name]
        assert option.flag in parameter.opts and parameter.help == option.setting.help
        default = OTHERS.get((command, name), option.default)
        text = isinstance(parameter.default, str) and not isinstance(default, str)
        shown = option.read(parameter.default) if text and parameter.default else parameter.default
        nothing = default in (None, False, ()) and shown in (None, False, "")
        assert nothing or shown == default, (command, name, shown)


def test_every_option_is_explained_and_its_default_is_allowed() -> None:
    kinds = {kind for _, several, _ in METHODS for kind in several} | {entry.kind for entry in EVALUATIONS.values()}
    for kind in kinds | {ExportOptions, PlanOptions, TrainingOptions, *DISCOVERY.values()}:
        options = options_of(kind)
        unset = {field.name for field in fields(kind) if field.name not in options} - {"encoding", "plain"}
        assert not unset, (kind, unset)
        for option in options.values():
            assert option.setting.help.strip().endswith((".", ")"))
            assert option.default is not MISSING and option.checked(option.default) == option.default


def beyond(option: Option) -> list[float]:
    """Values just out of an option's bounds."""
    setting = option.setting
    low = [] if setting.minimum is None else [setting.minimum - 1]
    high = [] if setting.maximum is None or setting.maximum > 1e6 else [setting.maximum + 1]
    return [*low, *high, *([] if setting.above is None else [setting.above])]


@pytest.mark.parametrize("command", ["match", "cosegment", "parts", "pca", "similarity", "found-head"])
def test_bounds_hold_in_dataclasses_and_on_the_command_line(command: str) -> None:
    kind = COMMAND_OPTIONS[command][0]
    app = typer.Typer()
    app.command()(next(entry for entry in COMMANDS if entry.name == command).function())
    checked = [(option, value) for option in options_of(kind).values() for value in beyond(option)]
    assert len(checked) >= 3
    for option, value in checked:
        with pytest.raises(InputError, match=rf"^{option.name}={value}: expected "):
            kind(**{option.name: value})
        refused = CliRunner().invoke(app, ["a.png", "-b", "builtin", "-o", "out", option.flag, str(value)])
        said = refused.output + str(refused.exception)
        assert refused.exit_code != 0 and (f"'{option.flag}'" in said or f"{option.name}=" in said), said


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("match", {"num_pairs": 0}, "num_pairs=0: expected 1 to 10,000"),
        ("cosegment", {"elbow": 0}, "elbow=0: expected more than 0"),
        ("segment_parts", {"seed": -1}, "seed=-1: expected at least 0"),
        ("segment_parts", {"saliency": "high"}, "saliency 'high': expected full or low_resolution"),
        ("encode", {"saliency": "high"}, "saliency 'high': expected full or low_resolution"),
        ("stream", {"policy": "some"}, "policy 'some': expected one of auto, block, latest"),
        ("stream", {"latency_budget": 0}, "latency_budget=0: expected more than 0"),
        ("tracker", {"min_confidence": 2}, "min_confidence=2: expected 0 to 1"),
        ("propagator", {"topk": 0}, "topk=0: expected at least 1"),
    ],
)
def test_methods_refuse_in_the_same_words(
    tiny_engine: Engine, task: str, options: dict[str, Any], message: str
) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    given = {"match": [image, image], "tracker": ["key@1"], "propagator": [], "stream": []}.get(task, [[image] * 2])
    more = {"facet": "key@1"} if task == "propagator" else {}
    with pytest.raises(InputError, match=message):
        getattr(tiny_engine, task)(*given, **more, **options)


@dataclass(frozen=True)
class Chosen:
    """Options of a command that is made for these tests."""

    source: Annotated[str, typer.Argument(help="Where from.")]
    facet: FacetChoice = ""
    load_size: LoadSizeChoice = DEFAULT_SIZE
    weight: Annotated[float, Setting("How much.", above=0)] = 0.5
    count: Annotated[int, Setting("How many.", minimum=1)] = 3
    fast: Annotated[bool, Setting("Whether.")] = True
    folder: Annotated[Path | None, Setting("Where to.", flag="into")] = None

    def __post_init__(self) -> None:
        check(self)


def run(*arguments: str) -> tuple[Chosen, set[str]]:
    seen: list[tuple[Chosen, set[str]]] = []

    @expanded
    def command(context: typer.Context, chosen: Annotated[Chosen, Presets({"count": 7, "load_size": 320})]) -> None:
        """Keep what came."""
        seen.append((chosen, given(context)))

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_an_expanded_command_gets_its_dataclass() -> None:
    assert run("here") == (Chosen("here"), {"source"})
    arguments = ("here", "--load-size", "48x64", "--weight", "2", "--no-fast", "--into", "there", "--facet", "key@1")
    chosen, names = run(*arguments)
    assert chosen == Chosen("here", "key@1", (48, 64), 2.0, 3, fast=False, folder=Path("there"))
    assert names == {"source", "facet", "load_size", "weight", "fast", "folder"}
    for wrong, message in (
        (("--weight", "0"), "more than 0"),
        (("--load-size", "big"), "shorter side"),
        (("--facet", ""), "facet ''"),
    ):
        with pytest.raises(InputError, match=message):
            run("here", *wrong)


def test_a_preset_changes_defaults_and_never_what_was_given() -> None:
    assert run("here", "--preset", "paper")[0] == Chosen("here", load_size=320, count=7)
    chosen, _ = run("here", "--preset", "paper", "--load-size", "224", "--count", "3")
    assert chosen == Chosen("here", load_size=224, count=3) and chosen.load_size is not DEFAULT_SIZE


def test_two_dataclasses_with_one_option_are_refused() -> None:
    def command(one: EncodeOptions, other: CosegmentOptions) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name"):
        expanded(command)


def loaded(name: str) -> Any:
    return next(entry for entry in COMMANDS if entry.name == name).load()
