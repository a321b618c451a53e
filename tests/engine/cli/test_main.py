"""The table of commands: complete, true to the commands' own words, and all that ``--help`` needs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from facetrt.engine.cli import main as entry
from facetrt.engine.cli.main import COMMANDS, Command, program
from facetrt.kernels.errors import MissingDependencyError

HEAVY = ("numpy", "PIL", "cv2", "torch", "onnx", "onnxruntime", "openvino", "faiss", "zarr", "av", "importlib.metadata")
IDS = [command.name for command in COMMANDS]


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_the_tables_help_is_the_commands_docstring(command: Command) -> None:
    documentation = inspect.getdoc(command.function())
    assert documentation is not None and documentation.splitlines()[0] == command.help


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_a_command_has_the_name_of_the_table_and_explains_its_options(command: Command) -> None:
    result = CliRunner().invoke(program(), [command.name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and f" {command.name} [OPTIONS]" in result.stdout
    assert command.help in result.stdout and "--help" in result.stdout


def test_help_shows_every_command_in_the_panel_and_place_of_the_table() -> None:
    lines = CliRunner().invoke(program(), ["--help"], env={"COLUMNS": "200"}).stdout.splitlines()
    shown, panel = [], ""
    for line in lines:
        if line.startswith("╭─ "):
            panel = line.removeprefix("╭─ ").rstrip("─╮ ")
        elif line.startswith("│ ") and panel != "Options":
            name, _, text = line.strip("│ ").partition(" ")
            shown.append((panel, name, text.strip()))
    assert shown == [(command.group, command.name, command.help) for command in COMMANDS]


def test_help_imports_no_library_that_takes_time() -> None:
    code = (
        "import sys\nfrom facetrt.engine.cli.main import main\nsys.argv = ['facetrt', '--help']\n"
        f"try:\n    main()\nexcept SystemExit:\n    print('imported:', [n for n in {HEAVY} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_a_command_imports_no_other_commands_libraries() -> None:
    code = (
        "import sys\nfrom facetrt.engine.cli.main import main\nsys.argv = ['facetrt', 'info', 'builtin']\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print(sorted({n.split('.')[1] for n in sys.modules if n.startswith('facetrt.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['engine', 'kernels']"


def test_an_unknown_command_is_met_with_the_nearest() -> None:
    result = CliRunner().invoke(program(), ["mach", "a.png"])
    assert result.exit_code == 2 and "No such command 'mach'" in result.output and "match" in result.output


def test_a_missing_module_names_the_commands_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    command = next(command for command in COMMANDS if command.name == "bench")
    monkeypatch.setitem(sys.modules, "facetrt.benchmarks.command", None)
    with pytest.raises(MissingDependencyError, match=r"facetrt bench needs .*pip install 'facetrt\[bench\]'"):
        command.load()


def test_a_fault_of_our_own_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "half_written.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError):
        Command("half", "half_written:half", entry.START, "Half.").load()
