"""What the command line says about itself: every option explained, the version, and where the bundle comes from."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

import facetrt.engine
from facetrt.engine.cli.app import BUNDLE_VARIABLE
from facetrt.export.cli import app
from facetrt.kernels.errors import InputError

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_is_explained(name: str) -> None:
    command: click.Command = COMMANDS[name]
    assert command.help
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    assert not [p.name for p in shown if not (getattr(p, "help", None) or "").strip()]


def test_the_version_is_the_distributions() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout.strip() == f"facetrt {facetrt.engine.__version__}"
    assert facetrt.engine.__version__[0].isdigit()


def test_the_bundle_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["similarity", str(facetrt.engine.__file__), "--cls", "--out", f"{tmp_path}/out"]
    monkeypatch.delenv(BUNDLE_VARIABLE, raising=False)
    missing = CliRunner().invoke(app, arguments)
    assert isinstance(missing.exception, InputError)
    assert "builtin" in str(missing.exception) and BUNDLE_VARIABLE in str(missing.exception)
    monkeypatch.setenv(BUNDLE_VARIABLE, "builtin")
    found = CliRunner().invoke(app, arguments)
    assert "no bundle" not in str(found.exception)  # it goes on to the images, and stops there
    assert BUNDLE_VARIABLE in CliRunner().invoke(app, ["similarity", "--help"], env={"COLUMNS": "160"}).stdout
