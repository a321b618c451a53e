"""What the README and the pages of docs/ say is there, is there: their Python runs, their commands can be typed."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import typer

from facetrt.engine import Engine, InputError
from facetrt.engine.backends.run_options import BackendName
from facetrt.engine.cli import main
from facetrt.engine.cli.main import COMMANDS as TABLE
from facetrt.engine.evaluation import EVALUATIONS
from facetrt.export.models import MODELS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = ROOT / "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [README, *sorted((ROOT / "docs").rglob("*.md"))]}
COMMANDS: dict[str, Any] = {command.name: command.load() for command in TABLE}
USAGE_ERROR = typer.BadParameter.__base__ or Exception  # the parser's, of which typer may have a copy of its own
OPTIONS = {name for command in COMMANDS.values() for p in command.params for name in (*p.opts, *p.secondary_opts)}
OPTIONS |= {"--help", "--version"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
FILE = re.compile(r"(?:benchmarks|docs|engine|export|kernels|tests)/[\w./-]*")
NOT_RUN = "# not run: "  # and why; such a block is only read


def blocks(page: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(PAGES[page].read_text()) if found == language]


def inline(page: str) -> list[str]:
    """What stands between backticks, outside of blocks; a line that was broken within is joined."""
    text = re.sub(r"\n(?!\n)", " ", FENCE.sub("\n\n", PAGES[page].read_text()))
    return INLINE.findall(text)


def command_lines(page: str) -> Iterator[list[str]]:
    """The words after ``facetrt`` of each command in the blocks for a shell."""
    for line in "\n".join(blocks(page, "sh")).splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and Path(words[0]).name == "facetrt":
                yield words[1:]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page, "python")])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        code = compile(block, page, "exec", dont_inherit=True)
        if not block.startswith(NOT_RUN):
            exec(code, names)


@pytest.mark.parametrize("page", [page for page in PAGES if list(command_lines(page))])
def test_the_command_lines_of_a_page_can_be_typed(page: str) -> None:
    for name, *arguments in command_lines(page):
        COMMANDS[name].make_context(name, list(arguments))  # reads every value by its type


def check_fragment(name: str, words: list[str]) -> None:
    """A command that is named in a sentence, perhaps with some of its options: what is missing is no error."""
    command = COMMANDS[name]
    options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    if words and words[-1].startswith("-"):
        assert words.pop() in options | {"--help"}
    alternatives = [word.split("|") for word in words]
    for each in zip_longest(*alternatives):
        arguments = [word or given[0] for word, given in zip(each, alternatives, strict=True)]
        try:
            command.make_context(name, arguments)
        except InputError as error:
            assert "no bundle was given" in str(error)
        except USAGE_ERROR as error:
            if type(error).__name__ != "MissingParameter":
                raise


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    for code in inline(page):
        words = code.replace("…", "").split()
        if words[:1] == ["facetrt"] and len(words) > 1 and words[1] != "COMMAND":
            check_fragment(words[1], words[2:])
        elif code.startswith("--"):
            assert words[0].partition("=")[0] in OPTIONS, code
        elif (method := re.match(r"engine\.(\w+)", code)) and method[1] != "py":
            assert hasattr(Engine, method[1]), code
        elif FILE.fullmatch(code):
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(PAGES[page].read_text()):
        assert (PAGES[page].parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_extras_that_a_page_installs_or_names_exist(page: str) -> None:
    text = PAGES[page].read_text()
    installed = re.findall(r"(?:\.|facetrt)\[([\w,]+)\]", text)
    named = re.findall(r"\bextras?\s+((?:`\w+`(?:, | and )?)+)", text)
    names = set(re.findall(r"\w+", ",".join(installed + named).replace(" and ", ",")))
    assert names <= set(PROJECT["project"]["optional-dependencies"])


NAMES: dict[str, Iterable[str]] = {  # page → what it must name, in code
    "README.md": COMMANDS,
    "docs/backends/index.md": [name for name in BackendName if name is not BackendName.AUTO],
    "docs/tasks/evaluate.md": EVALUATIONS,
    "docs/weights.md": tuple(MODELS),  # tests add to it
}


@pytest.mark.parametrize("page", NAMES)
def test_a_page_names_all_that_there_is(page: str) -> None:
    words = {word for code in inline(page) for word in re.split(r"[^\w-]+", code)}
    words |= {words[0] for words in command_lines(page)}
    assert not [name for name in NAMES[page] if name not in words]


TASKS = [command.name for command in TABLE if command.group in (main.TASKS, main.VIDEO, main.DATA)]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_page(name: str) -> None:
    assert any(name == words[0] for page in PAGES if page.startswith("docs/tasks/") for words in command_lines(page))


@pytest.mark.parametrize("name", NAMES["docs/backends/index.md"])
def test_every_backend_has_a_page(name: str) -> None:
    assert f"docs/backends/{name}.md" in PAGES


def test_the_readme_takes_ten_minutes() -> None:
    assert len(README.read_text().splitlines()) < 200


WRONG = (["A", "B", "--out", "O", "--no-such"], ["A", "B", "--out", "O", "--backend", "none"])


@pytest.mark.parametrize("arguments", WRONG)
def test_these_tests_see_what_is_wrong(arguments: list[str]) -> None:
    with pytest.raises(USAGE_ERROR):
        COMMANDS["match"].make_context("match", [*arguments, "--bundle", "B"])
    with pytest.raises((USAGE_ERROR, AssertionError)):
        check_fragment("match", list(arguments))
