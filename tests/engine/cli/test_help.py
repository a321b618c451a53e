"""What the command line says about itself: every option explained, the version, and where the bundle comes from."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from typer.testing import CliRunner

import facetrt.engine
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.cli.app import BUNDLE_VARIABLE
from facetrt.engine.cli.main import COMMANDS as TABLE
from facetrt.engine.cli.main import program
from facetrt.engine.samples import sample_paths
from facetrt.kernels.errors import InputError

COMMANDS: dict[str, click.Command] = {command.name: command.load() for command in TABLE}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_is_explained(name: str) -> None:
    command: click.Command = COMMANDS[name]
    assert command.help
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    assert not [p.name for p in shown if not (getattr(p, "help", None) or "").strip()]


def test_the_version_is_the_distributions() -> None:
    result = CliRunner().invoke(program(), ["--version"])
    assert result.exit_code == 0 and result.stdout.strip() == f"facetrt {facetrt.engine.__version__}"
    assert facetrt.engine.__version__[0].isdigit()


def test_the_bundle_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["similarity", str(facetrt.engine.__file__), "--cls", "--out", f"{tmp_path}/out"]
    monkeypatch.delenv(BUNDLE_VARIABLE, raising=False)
    missing = CliRunner().invoke(program(), arguments)
    assert isinstance(missing.exception, InputError)
    assert "builtin" in str(missing.exception) and BUNDLE_VARIABLE in str(missing.exception)
    monkeypatch.setenv(BUNDLE_VARIABLE, "builtin")
    found = CliRunner().invoke(program(), arguments)
    assert "no bundle" not in str(found.exception)  # it goes on to the images, and stops there
    assert BUNDLE_VARIABLE in CliRunner().invoke(program(), ["similarity", "--help"], env={"COLUMNS": "160"}).stdout


def test_the_environment_names_the_bundle_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BUNDLE_VARIABLE, raising=False)
    missing = CliRunner().invoke(program(), ["info"])
    assert isinstance(missing.exception, InputError)
    assert BUNDLE_VARIABLE in str(missing.exception) and "--bundle" not in str(missing.exception)
    monkeypatch.setenv(BUNDLE_VARIABLE, "builtin")
    assert "builtin" in CliRunner().invoke(program(), ["info"], catch_exceptions=False).stdout


def test_advice_names_what_the_model_can_have() -> None:
    manifest = Bundle.open("builtin").manifest  # four blocks
    assert f"--facets {','.join([*manifest.facets, 'query@0'])}" in manifest.missing_facet("query@0")
    for impossible in ("token@11", "key@4", "kye@1", "key", ""):
        message = manifest.missing_facet(impossible)
        assert "layers 0 to 3" in message and "--facets" not in message


@pytest.mark.parametrize("name", COMMANDS)
def test_no_help_names_a_facet_that_a_bundle_may_lack(name: str) -> None:
    texts = [COMMANDS[name].help or "", *(getattr(p, "help", None) or "" for p in COMMANDS[name].params)]
    assert not [text for text in texts if "key@" in text or "token@" in text]


def test_what_runs_is_said_where_something_was_asked(tmp_path: Path) -> None:
    photo = next(iter(sample_paths().values()))
    common = ["similarity", str(photo), str(photo), "--cls", "--load-size", "48", "-b", "builtin", "--force", "-o"]
    asked = CliRunner().invoke(program(), [*common, str(tmp_path / "out"), "--precision", "fastest"])
    assert asked.exit_code == 0 and "running " in asked.output and " on cpu" in asked.output
    record = json.loads((tmp_path / "out" / "results.json").read_text())["images"][0]
    assert f"running {record['backend']} in {record['precision']} on {record['device']}" in asked.output
