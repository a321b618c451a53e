"""Options written once: their checks, what texts mean, and that nothing else passes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

from facetrt.engine.settings import Setting, check, options_of, parse, read_options, split_settings, values_of
from facetrt.kernels.errors import InputError


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


@dataclass(frozen=True)
class Base:
    count: Annotated[int, Setting("How many.", minimum=1, maximum=10_000)] = 3
    share: Annotated[float, Setting("How much.", above=0)] = 0.5
    level: Annotated[float, Setting("Any.")] = 0.0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Full(Base):
    count: int = 4  # another default, the same setting
    most: Annotated[int | None, Setting("At most.", minimum=2)] = None
    colour: Annotated[Colour, Setting("Which.")] = Colour.RED
    loud: Annotated[bool, Setting("Whether.")] = False
    size: Annotated[int | tuple[int, int] | None, Setting("Size.", minimum=1, expected="a size")] = None
    heads: Annotated[tuple[int, ...], Setting("Several.")] = ()
    folder: Annotated[Path | None, Setting("Where.")] = None
    plain: int = -1  # no option


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "count=0: expected 1 to 10,000"),
        ({"count": 10_001}, "count=10001: expected 1 to 10,000"),
        ({"count": 2.5}, "count=2.5: expected a whole number, 1 to 10,000"),
        ({"count": True}, "count=True: expected"),
        ({"count": None}, "count=None: expected"),
        ({"count": "3"}, "count='3': expected"),
        ({"share": 0}, "share=0: expected more than 0"),
        ({"share": float("nan")}, "share=nan: expected a finite number, more than 0"),
        ({"level": float("inf")}, "level=inf: expected a finite number"),
        ({"most": 1}, "most=1: expected at least 2 or none"),
        ({"colour": "pink"}, "colour 'pink': expected one of red, green, blue"),
        ({"loud": 2}, "loud=2: expected yes or no"),
        ({"size": (1, 2, 3)}, r"size=\(1, 2, 3\): expected a size"),
        ({"size": [1, 2]}, "expected a size"),
        ({"heads": (1, "2")}, "expected a whole number, or several, comma-separated"),
        ({"folder": 3}, "folder=3: expected a path or none"),
    ],
)
def test_values_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Full(**given)
    with pytest.raises(InputError, match=message):
        replace(Full(), **given)


def test_values_are_held_as_their_types_say() -> None:
    made = Full(count=np.int64(7), share=np.float32(0.5), colour="blue", loud=1, folder="here", heads=(1, 2))  # type: ignore[arg-type]
    assert made == Full(7, 0.5, colour=Colour.BLUE, loud=True, folder=Path("here"), heads=(1, 2))
    assert type(made.count) is int and type(made.share) is float and made.colour is Colour.BLUE and made.loud is True
    assert Full(level=2).level == 2
    with pytest.raises(FrozenInstanceError):
        made.count = 1  # type: ignore[misc]


def test_a_subclass_that_changes_a_default_keeps_the_setting() -> None:
    option = options_of(Full)["count"]
    assert option.default == 4 and option.setting is options_of(Base)["count"].setting
    assert "plain" not in options_of(Full)


def test_texts() -> None:
    texts = {"count": "12", "share": " 1e-3", "most": "none", "colour": "green", "loud": "Yes", "size": "224X336"}
    found = read_options(Full, texts | {"heads": "0, 2", "folder": "a/b"})
    assert found == Full(12, 1e-3, colour=Colour.GREEN, loud=True, size=(224, 336), heads=(0, 2), folder=Path("a/b"))
    assert read_options(Full, {"size": "48"}).size == 48 and read_options(Full, {"size": "all"}).size is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count=many", "count='many': expected a whole number, 1 to 10,000"),
        ("count=0", "count=0: expected 1 to 10,000"),
        ("share=inf", "share=inf: expected a finite number, more than 0"),
        ("size=1x2x3", "size='1x2x3': expected a size"),
        ("loud=maybe", "loud='maybe': expected yes or no"),
        ("colour=pink", "colour 'pink': expected one of"),
        ("plain=1", "no option 'plain' here: expected one of count=4, share=0.5"),
        ("count", "'count': expected NAME=VALUE"),
        ("=3", "'=3': expected NAME=VALUE"),
    ],
)
def test_texts_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_options(Full, split_settings([text]))


def test_names_on_the_command_line_may_have_hyphens() -> None:
    assert split_settings(["sample-interval = 3", "a=b=c"]) == {"sample_interval": "3", "a": "b=c"}


def test_values_by_name() -> None:
    assert values_of(Full(count=2), Base, without=["level"]) == {"count": 2, "share": 0.5}
    assert list(values_of(Base())) == ["count", "share", "level"]


def test_choices() -> None:
    assert parse(Colour, "red", "colour") is Colour.RED
    with pytest.raises(InputError, match="wall 'pink': expected one of red, green, blue"):
        parse(Colour, "pink", "wall")
